"""Source networks: timm models with trained weights, and the preprocessing that they were trained with."""
import dataclasses
import difflib
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.models import clean_state_dict

from ..data.preprocessing import check_preprocessing
from ..errors import SFormerError, first_line
from ..files import check_content, is_safetensors, read_safetensors
from ..layers import named_neurons
from ..models import set_pixel_range_

__all__ = ['Source', 'check_weights', 'create_source', 'load_source_weights_', 'set_data_config_']

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


def load_source_weights_(
        model: nn.Module,
        path: Union[str, Path],
        allow_pickle: bool = False,
        filter_fn: Optional[Callable[[Dict[str, Any], nn.Module], Dict[str, Any]]] = None,
) -> None:
    """Load a checkpoint of exactly this architecture, in place.

    Args:
        model: Model to load it into.
        path: Checkpoint.
        allow_pickle: Load a pickled one, with torch's `weights_only` unpickler.
        filter_fn: Adapts the state dict to the model, as timm's filters resize embeddings.

    Raises:
        SFormerError: If the file is missing, damaged, pickled, of another architecture, or has NaN or infinity in it.
    """
    path = Path(path)
    if not path.is_file():
        raise SFormerError(f'no checkpoint at {path}.')
    check_content(path)
    if path.suffix == '.safetensors' or is_safetensors(path):
        state = read_safetensors(path)
    elif not allow_pickle:
        raise SFormerError(
            f'{path} is not a safetensors file. A pickled checkpoint can run code when it is opened, so it is refused; '
            f'--allow-pickle (allow_pickle=True) loads it with torch\'s weights_only unpickler.')
    else:
        try:
            with warnings.catch_warnings(action='ignore'):
                state = timm.models.load_state_dict(str(path), weights_only=True)
        except Exception as e:  # torch's own message ends in advice to unpickle without protection
            raise SFormerError(
                f'{path} cannot be unpickled safely: it is damaged, or holds more than tensors. Save the state dict '
                f'as safetensors.') from e
    state = clean_state_dict(state)  # DataParallel and torch.compile put prefixes before names
    if filter_fn is not None:
        state = filter_fn(state, model)
    expected = model.state_dict()
    wrong = [f'{k} is missing' for k in expected if k not in state]
    wrong += [f'{k} is not part of the model' for k in state if k not in expected]
    for k, v in expected.items():
        if k in state and not isinstance(state[k], torch.Tensor):
            wrong.append(f'{k} is no tensor')
        elif k in state and state[k].is_floating_point() != v.is_floating_point():
            wrong.append(f'{k} holds {str(state[k].dtype).removeprefix("torch.")} values')
        elif k in state and state[k].shape != v.shape:
            wrong.append(f'{k} is {tuple(state[k].shape)} instead of {tuple(v.shape)}')
    if wrong:
        name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', 'the model')
        raise SFormerError(
            f'{path} is not a checkpoint of {name} with these arguments: {"; ".join(wrong[:3])}'
            f'{f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""}.')
    model.load_state_dict(state)
    check_weights(model, str(path))


def check_weights(model: nn.Module, where: str = 'the source network') -> None:
    """Raise SFormerError if a parameter holds NaN or infinity; names it."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SFormerError(f'{name} of {where} has no values: it is on the meta device, or offloaded.')
        if not torch.isfinite(parameter).all():
            raise SFormerError(f'{name} of {where} has NaN or infinite values.')
