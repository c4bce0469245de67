"""Source networks: timm models with trained weights, and the preprocessing that they were trained with."""
import dataclasses
import difflib
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Union

import timm
import torch.nn as nn

from .checkpoints import first_line, load_source_weights_
from .errors import SFormerError
from .layers import named_neurons
from .models import set_pixel_range_
from .utils import check_preprocessing

__all__ = ['Source', 'create_source', 'set_data_config_']

PREPROCESSING = ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')


@dataclasses.dataclass(frozen=True)
class Source:
    """A network to convert.

    Args:
        network: timm model in eval mode.
        weights: Where its published weights are from, a Hub id or a URL; None for weights of the user's own.
    """
    network: nn.Module
    weights: Optional[str] = None


def create_source(
        name: str,
        checkpoint: Union[str, Path, None] = None,
        allow_pickle: bool = False,
        filter_fn: Optional[Callable[[Dict[str, Any], nn.Module], Dict[str, Any]]] = None,
        **kwargs: Any,
) -> Source:
    """Create a timm model with trained weights.

    Args:
        name: Model name, as for `timm.create_model`.
        checkpoint: Weights to load; the published pretrained ones if None.
        allow_pickle: Load a pickled checkpoint, with torch's `weights_only` unpickler.
        filter_fn: Adapts the state dict of a checkpoint to the model.
        **kwargs: Passed to `timm.create_model`.

    Raises:
        SFormerError: If there is no such model, its arguments are wrong or the weights cannot be had.
    """
    if not name.startswith(('hf-hub:', 'local-dir:')) and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f' Did you mean {", ".join(close)}?' if close else " timm.list_models('vit*') lists names."
        if Path(name).is_dir():
            hint = f' A model in a folder is local-dir:{name}.'
        raise SFormerError(f'timm has no model {name!r}.{hint}')
    try:
        model = timm.create_model(name, pretrained=checkpoint is None, **kwargs)
    except SFormerError:
        raise
    except (OSError, RuntimeError) as e:
        if checkpoint is not None:
            raise SFormerError(f'{name} cannot be built with {kwargs}: {first_line(e)}') from e
        raise SFormerError(
            f'the pretrained weights of {name} cannot be loaded ({first_line(e)}). '
            f'Give a checkpoint, or make the Hub reachable.') from e
    except Exception as e:  # timm leaves it to whatever a wrong value breaks first
        raise SFormerError(f'{name} cannot be built with {kwargs}: {type(e).__name__}: {first_line(e)}') from e
    if checkpoint is not None:
        load_source_weights_(model, checkpoint, allow_pickle, filter_fn)
        return Source(model.eval())
    cfg: Any = model.pretrained_cfg
    own = kwargs.get('checkpoint_path') or cfg.get('file') or cfg.get('state_dict')
    described = not own and model.num_classes == cfg.get('num_classes')  # else not those that the config describes
    return Source(model.eval(), (cfg.get('hf_hub_id') or cfg.get('url') or None) if described else None)


def set_data_config_(model: nn.Module, **values: Any) -> None:
    """Override the preprocessing that a model was trained with: mean, std, crop_pct, crop_mode, interpolation."""
    unknown = set(values) - set(PREPROCESSING)
    if unknown:
        raise TypeError(f'unknown preprocessing: {", ".join(sorted(unknown))}')
    values = {k: v for k, v in values.items() if v is not None}
    in_chans = getattr(model, 'in_chans', 3)
    for key in ('mean', 'std'):
        value = values.get(key)
        if value is not None and len(value) != in_chans:
            raise SFormerError(f'{key} needs {in_chans} values for {in_chans} channels, got {len(value)}.')
    check_preprocessing(values)
    cfg: Any = model.pretrained_cfg
    cfg.update(values)
    if any(True for _ in named_neurons(model)):
        set_pixel_range_(model, cfg['mean'], cfg['std'])
