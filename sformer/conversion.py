"""Conversion: source network -> calibrated SFormer."""
import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from .calibration import fit_thresholds_, observe
from .errors import SFormerError
from .layers import named_neurons
from .models import CUSTOM, ENTRYPOINTS, architecture_of, revert_, set_pixel_range_, spiking_model_
from .neurons import SFNConfig
from .utils import check_preprocessing, library_versions, progress, state_hash

__all__ = ['convert', 'create_source', 'load_source_weights_', 'set_data_config_']

PREPROCESSING = ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')


def convert(
        source: Union[str, nn.Module],
        calibration: Union[str, Iterable[torch.Tensor]] = 'dead-leaves',
        config: SFNConfig = SFNConfig(),
        *,
        split: Optional[str] = None,
        num_images: int = 256,
        batch_size: int = 32,
        seed: int = 0,
        inplace: bool = False,
        **source_kwargs: Any,
) -> nn.Module:
    """Convert a trained timm model into a calibrated single-timestep SFormer, without training.

    Thresholds are fitted to the currents of the source network (arXiv 2510.23383, post-training); no labels are read.

    Args:
        source: timm model, or the name of one, which is created with its pretrained weights. An SFormer stands for
            its own source.
        calibration: `dead-leaves` (generated images), `digits`, a folder of parquet files, an image folder, a Hugging
            Face dataset id, or an iterable of normalised image batches (B, C, H, W), all of which are used.
        config: Neurons and threshold estimator.
        split: Split of the calibration dataset.
        num_images: Number of calibration images drawn from a named source of images.
        batch_size: Images per batch, for named sources of images.
        seed: Seed of the choice or the generation of calibration images.
        inplace: Convert the given model itself instead of a copy; where that fails it is the source network.
        **source_kwargs: Passed to `timm.create_model` where `source` is a name.

    Returns:
        A timm model in eval mode; `model.conversion` records how it came about.

    Raises:
        SFormerError: If the source, the dataset or a value is not usable.
        UnsupportedLayerError: If a layer of the source has no spiking counterpart.
    """
    if isinstance(source, str):
        model = create_source(source, **source_kwargs)
    else:
        if source_kwargs:
            raise TypeError(f'{", ".join(source_kwargs)}: only for a source that is given by name.')
        model = source if inplace else copy.deepcopy(source)
    if any(True for _ in named_neurons(model)):
        model = revert_(model)  # converting again starts from the source that is inside
    check_weights(model)
    training = model.training
    before = {k: model.__dict__.get(k) for k in ('pretrained_cfg', 'default_cfg', '_model_args')}
    try:
        return _convert_(model, calibration, config, split, num_images, batch_size, seed)
    except BaseException:
        revert_(model).train(training).__dict__.update({k: v for k, v in before.items() if v is not None})
        raise


def _convert_(
        model: nn.Module,
        calibration: Union[str, Iterable[torch.Tensor]],
        config: SFNConfig,
        split: Optional[str],
        num_images: int,
        batch_size: int,
        seed: int,
) -> nn.Module:
    record: Dict[str, Any] = dict(
        source=(getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        source_tag=(getattr(model, 'pretrained_cfg', None) or {}).get('tag') or None,
        source_sha256=state_hash(model.state_dict()),
        source_weights=getattr(model, 'published_weights', None),
        global_pool=getattr(model, 'global_pool', None),
        recipe=dataclasses.asdict(config),
    )
    _name_architecture(model)
    model = spiking_model_(model, config).eval()

    if isinstance(calibration, str):
        from .data import open_images
        data_config = resolve_input_data_config(model)
        images = open_images(calibration, split, data_config=data_config, num_images=num_images, seed=seed)
        record['calibration'] = dict(
            name=images.name, split=images.split, seed=seed, fingerprint=images.fingerprint)
        batches = (batch for batch, _ in progress(images.batches(batch_size), 'Calibrating', images.num_images))
    else:
        record['calibration'] = dict(name=None, split=None, seed=None, fingerprint=None)
        batches = _checked(calibration, resolve_input_data_config(model)['input_size'])
    statistics, count = observe(model, batches)
    fit_thresholds_(model, statistics, config)
    record['calibration']['num_images'] = count
    record['versions'] = library_versions()
    model.conversion = record
    return model


def create_source(
        name: str,
        checkpoint: Union[str, Path, None] = None,
        allow_pickle: bool = False,
        **kwargs: Any,
) -> nn.Module:
    """Create a timm model with trained weights.

    Args:
        name: Model name, as for `timm.create_model`.
        checkpoint: Weights to load; the published pretrained ones if None.
        allow_pickle: Load a pickled checkpoint, with torch's `weights_only` unpickler.
        **kwargs: Passed to `timm.create_model`.

    Raises:
        SFormerError: If there is no such model, its arguments are wrong or the weights can't be had.
    """
    if not name.startswith(('hf-hub:', 'local-dir:')) and not timm.is_model(name):
        import difflib
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
            raise SFormerError(f'{name} can not be built with {kwargs}: {_first_line(e)}') from e
        raise SFormerError(
            f'the pretrained weights of {name} can not be loaded ({_first_line(e)}). '
            f'Give a checkpoint, or make the Hub reachable.') from e
    except Exception as e:  # timm leaves it to whatever a wrong value breaks first
        raise SFormerError(f'{name} can not be built with {kwargs}: {type(e).__name__}: {_first_line(e)}') from e
    if checkpoint is not None:
        load_source_weights_(model, checkpoint, allow_pickle)
    else:
        cfg = model.pretrained_cfg
        own = kwargs.get('checkpoint_path') or cfg.get('file') or cfg.get('state_dict')
        if not own and model.num_classes == cfg.get('num_classes'):  # else not those that the config describes
            model.published_weights = cfg.get('hf_hub_id') or cfg.get('url') or None
    return model.eval()


def load_source_weights_(model: nn.Module, path: Union[str, Path], allow_pickle: bool = False) -> None:
    """Load a checkpoint of exactly this architecture, in place.

    Raises:
        SFormerError: If the file is missing, damaged, pickled, of another architecture, or has NaN or infinity in it.
    """
    path = Path(path)
    if not path.is_file():
        raise SFormerError(f'no checkpoint at {path}.')
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
                f'{path} can not be unpickled safely: it is damaged, or holds more than tensors. Save the state dict '
                f'as safetensors.') from e
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


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: the length of a JSON header, then the header."""
    with open(path, 'rb') as f:
        start = f.read(9)
    return len(start) == 9 and int.from_bytes(start[:8], 'little') < path.stat().st_size and start[8:] == b'{'


def read_safetensors(path: Path) -> Dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        SFormerError: If it is truncated or corrupted.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as e:
        raise SFormerError(f'{path} is truncated or corrupted: {_first_line(e)}.') from e


def check_weights(model: nn.Module, where: str = 'the source network') -> None:
    """Raise SFormerError if a parameter holds NaN or infinity; names it."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SFormerError(f'{name} of {where} has no values: it is on the meta device, or offloaded.')
        if not torch.isfinite(parameter).all():
            raise SFormerError(f'{name} of {where} has NaN or infinite values.')


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
    model.pretrained_cfg.update(values)
    if any(True for _ in named_neurons(model)):
        set_pixel_range_(model, model.pretrained_cfg['mean'], model.pretrained_cfg['std'])


def _name_architecture(model: nn.Module) -> None:
    """Point a model's config at the `sformer_*` entrypoint that rebuilds it; away from the source's weights."""
    cfg = dict(getattr(model, 'pretrained_cfg', None) or {})
    if not cfg:
        return
    source = cfg['architecture']
    if source not in ENTRYPOINTS:
        cfg['architecture'] = architecture_of(source)
    if cfg['architecture'] == CUSTOM and source != CUSTOM:
        model._model_args = dict(getattr(model, '_model_args', {}), source=source)
    for key in ('hf_hub_id', 'url', 'file', 'state_dict', 'source', 'custom_load'):
        cfg.pop(key, None)
    in_chans = getattr(model, 'in_chans', 3)
    for key in ('mean', 'std'):  # a network built for other channels than the cfg's has no statistics of its own
        if key in cfg and len(cfg[key]) != in_chans:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * in_chans
    model.pretrained_cfg = model.default_cfg = cfg


def _checked(batches: Iterable[Any], input_size: Tuple[int, int, int]) -> Iterable[torch.Tensor]:
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != input_size[0]:
            shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            expected = ', '.join(map(str, input_size))
            raise SFormerError(f'calibration batches must be tensors (B, {expected}), got {shape}.')
        if len(images):
            yield images


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
