"""SFormers as folders: safetensors weights and a timm config that records the conversion."""
import dataclasses
import json
import os
from pathlib import Path
from typing import Dict, Union

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from .conversion import _first_line, create_source, read_safetensors
from .errors import SFormerError, UncalibratedError
from .layers import named_neurons
from .models import SFormerMixin, is_calibrated
from .utils import file_hash, write_aside

__all__ = ['save_model', 'load_model', 'open_model', 'WEIGHTS_NAME', 'CONFIG_NAME']

WEIGHTS_NAME = 'model.safetensors'
CONFIG_NAME = 'config.json'


def save_model(model: nn.Module, directory: Union[str, Path], overwrite: bool = False) -> Path:
    """Save an SFormer as `model.safetensors` and a timm `config.json` with one more root key, `sformer`.

    Both files are written aside and renamed: until they are complete the old model is the one that is there.

    Args:
        model: Calibrated SFormer.
        directory: Folder to write to.
        overwrite: Replace a model that is there already.

    Returns:
        The folder.

    Raises:
        UncalibratedError: If the thresholds were never fitted.
        SFormerError: If the folder holds a model, can't be written to, or the model can't be rebuilt from a config.
    """
    directory = Path(directory)
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; convert it with sformer.convert() before saving.')
    if not isinstance(model, SFormerMixin):
        raise SFormerError(f'no config can rebuild a {type(model).__name__}; save the whole SFormer.')
    if not (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'):
        raise SFormerError('the source was not built by timm.create_model(), so no config can rebuild it.')
    check_output(directory, overwrite)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    try:
        with write_aside(directory) as aside:
            save_file(state, aside / WEIGHTS_NAME, metadata={'format': 'pt'})
            record = dict(getattr(model, 'conversion', {}), weights_sha256=file_hash(aside / WEIGHTS_NAME))
            save_config_for_hf(
                model, str(aside / CONFIG_NAME),
                model_config=dict(sformer=record),
                model_args=dict(sfn=dataclasses.asdict(model.sfn_config)),
            )
            _check_rebuild(aside, state)
    except (OSError, SafetensorError, ValueError) as e:
        raise SFormerError(f'{directory} can not be written: {_first_line(e)}. What was there is unchanged.') from e
    return directory


def _check_rebuild(directory: Path, state: Dict[str, torch.Tensor]) -> None:
    """Raise SFormerError if the config does not build a model that these weights fit."""
    try:
        rebuilt = timm.create_model(f'local-dir:{directory}', device='meta').state_dict()
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise SFormerError(f'no config can rebuild this model: {_first_line(e)}.') from e
    for key in [*state, *rebuilt]:
        if key not in rebuilt or key not in state or rebuilt[key].shape != state[key].shape:
            raise SFormerError(f'no config can rebuild this model: it was changed after it was built ({key} differs).')


def check_output(directory: Path, overwrite: bool = False) -> None:
    """Raise SFormerError if a model can't be saved to `directory` because of what is there."""
    if directory.exists() and not directory.is_dir():
        raise SFormerError(f'{directory} is a file, not a folder.')
    existing = next(d for d in (directory, *directory.absolute().parents) if d.exists())
    if not os.access(existing, os.W_OK):
        raise SFormerError(f'{directory} can not be written: {existing} is read-only for you.')
    if not overwrite and any((directory / name).exists() for name in (WEIGHTS_NAME, CONFIG_NAME)):
        raise SFormerError(f'{directory} holds a model already; --overwrite (overwrite=True) replaces it.')


def open_model(name: str) -> nn.Module:
    """Model by the folder of an SFormer, `local-dir:` or `hf-hub:` name, or name of a timm model with weights.

    Raises:
        SFormerError: If there is no such model or its weights can't be loaded.
    """
    if name.startswith('local-dir:'):
        return load_model(name.partition(':')[2])
    if Path(name).is_dir():
        return load_model(name)
    if not name.startswith('hf-hub:') and ('/' in name or '\\' in name):
        raise SFormerError(f'{name} is no folder. A model on the Hub is hf-hub:{name}.')
    return create_source(name)


def load_model(path: Union[str, Path], **kwargs) -> nn.Module:
    """Load a saved SFormer; the same as `timm.create_model('local-dir:PATH', pretrained=True)`, with its record.

    Args:
        path: Folder written by `save_model`.
        **kwargs: Passed to `timm.create_model`.

    Raises:
        SFormerError: If the folder is incomplete, its weights are damaged or not those that the config names.
    """
    path = Path(path)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise SFormerError(f'{path} holds no SFormer: there is no {name}.')
    try:
        config = json.loads((path / CONFIG_NAME).read_text(encoding='utf-8'))
        architecture = config['architecture']
        for key in ('model_args', 'pretrained_cfg', 'sformer'):
            if not isinstance(config.get(key, {}), dict):
                raise TypeError(f'{key} is {config[key]!r}')
    except (ValueError, KeyError, TypeError) as e:
        raise SFormerError(f'{path / CONFIG_NAME} is not a timm config: {_first_line(e)}.') from e
    record = config.get('sformer', {})
    expected = record.get('weights_sha256')
    if expected and file_hash(path / WEIGHTS_NAME) != expected:
        read_safetensors(path / WEIGHTS_NAME)  # a damaged file says so itself
        raise SFormerError(f'{path / WEIGHTS_NAME} is not the file that {CONFIG_NAME} belongs to (SHA-256 differs).')
    read_safetensors(path / WEIGHTS_NAME)
    if not str(architecture).startswith('sformer') or not timm.is_model(architecture):
        raise SFormerError(f'{path / CONFIG_NAME}: architecture {architecture!r} is not an SFormer of this version.')
    try:
        model = timm.create_model(f'local-dir:{path}', pretrained=True, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        raise SFormerError(f'{path} can not be loaded: {" ".join(lines[:4])}') from e
    model.conversion = record
    return model.eval()


def uncalibrated(model: nn.Module) -> str:
    """Sentence that says which neurons of a model are uncalibrated."""
    names = [name for name, neuron in named_neurons(model) if not neuron.calibrated]
    if not names:
        return 'the model has no spiking neurons'
    return f'the model is uncalibrated ({len(names)} neurons have default thresholds, the first is {names[0]})'
