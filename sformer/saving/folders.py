"""SFormers as folders: safetensors weights and a timm config that records the conversion."""
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from ..conversion import record_of
from ..conversion.places import named_place
from ..conversion.record import Conversion
from ..conversion.repositories import redact
from ..conversion.sources import create_source, label_names_of
from ..errors import SFormerError, UncalibratedError, first_line
from ..files import Json, file_hash, may_write, write_aside
from ..layers import SPIKING_LAYERS, SpikingLayer, is_calibrated, named_neurons, ordinary_tensors, uncalibrated
from ..models import SFormerMixin
from ..neurons import NEURON_TYPES, GradedCoding, LateralScaleAndFire, ScaleAndFire, SharedScaleAndFire
from .hub import locate
from .model_config import CONFIG_NAME, WEIGHTS_NAME, conversion_of, read_config

__all__ = ['save_classifier', 'load_classifier', 'open_classifier', 'check_vacant', 'weights_of', 'write_model']


def save_classifier(model: nn.Module, directory: str | Path, overwrite: bool = False) -> Path:
    """What `sformer.save_model` does with an SFormer of timm, whose `config.json` has one more root key, `sformer`."""
    state = weights_of(model)
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; convert it with sformer.convert() before saving.')
    if not isinstance(model, SFormerMixin):
        raise SFormerError(f'no config can rebuild a {type(model).__name__}; save the whole SFormer.')
    if not (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'):
        raise SFormerError('the source was not built by timm.create_model(), so no config can rebuild it.')
    for name, layer in model.named_modules():
        if isinstance(layer, SpikingLayer) and type(layer) not in SPIKING_LAYERS.values():
            raise SFormerError(f'{name} is an {type(layer).__name__}, which no config can rebuild: save the model that '
                               f'it was made of.')
    _check_neurons(model)

    def write_config(aside: Path, weights_sha256: str) -> None:
        _save_config(model, aside / CONFIG_NAME, dataclasses.replace(record_of(model), weights_sha256=weights_sha256))
        _check_rebuild(aside, state)
    return write_model(state, Path(directory), write_config, overwrite)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """State of a model that can be saved.

    Raises:
        SFormerError: If it has no values, or NaN or infinite ones.
    """
    state = {k: v.detach() for k, v in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise SFormerError(f'{name} has no values: it is on the meta device, or offloaded.')
        bound = tensor.ndim == 0 and not tensor.isnan()  # such as a limit of a clamp, which may be none
        if tensor.is_floating_point() and not bound and not torch.isfinite(tensor).all():
            raise SFormerError(f'{name} has NaN or infinite values, so it is not saved.')
    return state


def write_model(
        state: dict[str, torch.Tensor],
        directory: Path,
        write_config: Callable[[Path, str], None],
        overwrite: bool = False,
) -> Path:
    """Write the folder of a model of whatever task, aside and renamed: until it is complete the old one is there.

    Args:
        state: Its weights, as of `weights_of`.
        directory: Folder to write to.
        write_config: Writes its config to a folder; it is told the SHA-256 of the weights' file.
        overwrite: Replace a model that is there already.

    Raises:
        SFormerError: If the folder holds a model or can't be written to, or two names share a tensor.
    """
    _check_untied(state)
    check_vacant(directory, overwrite)
    try:
        with write_aside(directory) as aside:
            save_file({k: v.cpu().contiguous() for k, v in state.items()}, aside / WEIGHTS_NAME,
                      metadata={'format': 'pt'})
            write_config(aside, file_hash(aside / WEIGHTS_NAME))
    except (OSError, SafetensorError) as e:
        raise SFormerError(f'{directory} cannot be written: {first_line(e)}. What was there is unchanged.') from e
    return directory


def _check_neurons(model: SFormerMixin) -> None:
    """Raise SFormerError if neurons are not those that the config of the model builds; names the first."""
    expected = NEURON_TYPES[model.sfn_config.neuron]
    kinds = (ScaleAndFire, SharedScaleAndFire, LateralScaleAndFire) if expected is ScaleAndFire else (expected,)
    for name, neuron in named_neurons(model):
        if isinstance(neuron, GradedCoding):
            continue
        if type(neuron) not in kinds:
            raise SFormerError(f'{name} is a {type(neuron).__name__}, which no config can rebuild: register its type '
                               f'(sformer.neurons.register_neuron) and convert with SFNConfig(neuron=...).')
        if neuron.config != model.sfn_config:
            raise SFormerError(f'{name} fires by another config than the first neuron of the model, so no config can '
                               f'rebuild it.')


def _check_untied(state: dict[str, torch.Tensor]) -> None:
    """Raise SFormerError if two names share a tensor, which they would not do any more in what is loaded."""
    names: dict[tuple[torch.device, int], str] = {}
    for name, tensor in state.items():
        first = names.setdefault((tensor.device, tensor.data_ptr()), name) if tensor.numel() else name
        if first != name:
            raise SFormerError(f'{name} and {first} share their values, so no config can rebuild this model: give each '
                               f'a copy of its own.')


def _save_config(model: SFormerMixin, path: Path, record: Conversion) -> None:
    names = label_names_of(model)
    root: Json = dict(sformer=record.to_dict())
    if names:  # where timm, transformers' pipelines and the Hub's widgets look for them
        root.update(label_names=names, id2label={str(i): name for i, name in enumerate(names)})
        if len({*names}) == len(names):
            root.update(label2id={name: i for i, name in enumerate(names)})
    try:
        save_config_for_hf(model, str(path), model_config=root)
    except ValueError as e:  # an argument that JSON does not know
        raise SFormerError(f'no config can rebuild this model: {first_line(e)}.') from e
    config = json.loads(path.read_text(encoding='utf-8'))
    config['model_args'].pop('num_classes', None)  # stands at the root; transformers refuses a second one
    config['pretrained_cfg'].pop('label_names', None)  # likewise
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _check_rebuild(directory: Path, state: dict[str, torch.Tensor]) -> None:
    """Raise SFormerError if the config does not build a model that these weights fit."""
    try:
        rebuilt = timm.create_model(f'local-dir:{directory}', device='meta').state_dict()
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise SFormerError(f'no config can rebuild this model: {first_line(e)}.') from e
    for key in [*state, *rebuilt]:
        if key not in rebuilt or key not in state or rebuilt[key].shape != state[key].shape:
            raise SFormerError(f'no config can rebuild this model: it was changed after it was built ({key} differs).')


def check_vacant(directory: Path, overwrite: bool = False) -> None:
    """Raise SFormerError if a model can't be saved to `directory` because of what is there."""
    may_write(directory, 'model', files=(WEIGHTS_NAME, CONFIG_NAME), overwrite=overwrite)


def open_classifier(name: str) -> nn.Module:
    """An SFormer by its folder, `local-dir:` or `hf-hub:` name; or whatever `create_source` takes for a source.

    Raises:
        SFormerError: If there is no such model or its weights can't be loaded.
    """
    place = named_place(name)
    config = place.read(CONFIG_NAME, optional=False) if place else None
    if str((config or {}).get('architecture')).startswith('sformer'):
        return load_classifier(name)
    return create_source(name).network


@ordinary_tensors()
def load_classifier(path: str | Path, revision: str | None = None, **kwargs) -> nn.Module:
    """What `sformer.load_model` does with an SFormer of timm: `timm.create_model`, and the record of its conversion."""
    name = str(path)
    folder = locate(name, revision, kwargs.get('cache_dir'), weights=False)
    if name.startswith('hf-hub:'):
        where, name = name, f'{name.partition("@")[0]}@{folder.name}'
    else:
        where, name = str(folder), f'local-dir:{folder}'
    config = read_config(folder)
    try:
        model = cast(SFormerMixin, timm.create_model(name, pretrained=True, **kwargs))
    except SFormerError:
        raise
    except Exception as e:  # whatever a wrong value in a config makes timm and torch raise
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        what = ' '.join(lines[:4]) if lines and not isinstance(e, KeyError) else repr(e)
        raise SFormerError(f'{where} cannot be loaded: {redact(what)}') from e
    model.conversion = conversion_of(config)
    return model.eval()
