"""Detectors as folders: safetensors weights, and a config that says what they are of."""
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, Union

import timm
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..checkpoints import file_hash, first_line, read_safetensors, restore, state_hash, write_aside
from ..errors import SFormerError, UncalibratedError
from ..layers import is_calibrated, named_neurons, uncalibrated
from ..model_config import CONFIG_NAME, DETECTOR_KEY, WEIGHTS_NAME
from ..neurons import SFNConfig
from ..record import Conversion
from ..saving import check_output
from .conversion import spiking_detector_
from .detectors import DetectorConfig, build_detector

__all__ = ['is_detector', 'load_detector', 'save_detector']


def save_detector(detector: nn.Module, directory: Union[str, Path], overwrite: bool = False) -> Path:
    """Save a detector as `model.safetensors` and `config.json`: what it is built of, how its neurons fire if it has
    any, and the record of its conversion. Both files are written aside and renamed.

    Raises:
        UncalibratedError: If it has neurons whose thresholds were never fitted.
        SFormerError: If the folder holds a model, or cannot be written.
    """
    model: Any = detector
    directory = Path(directory)
    spiking = any(True for _ in named_neurons(detector))
    if spiking and not is_calibrated(detector):
        raise UncalibratedError(f'{uncalibrated(detector)}; convert it with convert_detector() before saving.')
    check_output(directory, overwrite)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
    config: Dict[str, Any] = {DETECTOR_KEY: dataclasses.asdict(model.config)}
    try:
        with write_aside(directory) as aside:
            save_file(state, aside / WEIGHTS_NAME, metadata={'format': 'pt'})
            config['weights_sha256'] = file_hash(aside / WEIGHTS_NAME)
            if spiking:
                neurons = tuple(f'{name}.' for name, _ in named_neurons(detector))
                weights = {name: tensor for name, tensor in state.items() if not name.startswith(neurons)}
                record = dataclasses.replace(
                    model.conversion, weights_sha256=config['weights_sha256'],
                    changed=model.conversion.changed or model.conversion.source_sha256 != state_hash(weights))
                config.update(sfn=dataclasses.asdict(model.sfn), sformer=record.to_dict())
            (aside / CONFIG_NAME).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    except (OSError, SafetensorError) as e:
        raise SFormerError(f'{directory} cannot be written: {first_line(e)}. What was there is unchanged.') from e
    return directory


def is_detector(path: Union[str, Path]) -> bool:
    """Whether a folder holds a detector rather than a classifier."""
    try:
        return DETECTOR_KEY in json.loads((Path(path) / CONFIG_NAME).read_text(encoding='utf-8'))
    except (OSError, ValueError, TypeError):
        return False


def load_detector(path: Union[str, Path]) -> nn.Module:
    """Load a detector that `save_detector` wrote, in eval mode.

    Returns:
        The detector; of an SFormer, `conversion` is the record of its conversion and `sfn` says how its neurons fire.

    Raises:
        SFormerError: If there is none, its config is not as sformer wrote it, or its weights are damaged or not those
            that the config records.
    """
    folder = Path(path)
    file, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not is_detector(folder):
        raise SFormerError(f'{folder} holds no detector: there is no {CONFIG_NAME} of one.')
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
        config = DetectorConfig(**data[DETECTOR_KEY])
        sfn = SFNConfig(**data['sfn']) if 'sfn' in data else None
        record = Conversion.from_dict(data['sformer']) if sfn else None
        expected = str(data['weights_sha256'])
    except (SFormerError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise SFormerError(f'{file} is not as sformer wrote it: {first_line(e)}.') from e
    if not (config.backbone.isidentifier() and timm.is_model(config.backbone)):
        raise SFormerError(f'{file}: the backbone {config.backbone!r} is not the name of a timm architecture.')
    if not ((weights.is_file() and file_hash(weights) == expected) or restore(weights, expected)):
        if not weights.is_file():
            raise SFormerError(f'{folder} holds no detector: there is no {WEIGHTS_NAME}.')
        read_safetensors(weights)  # a damaged file says so itself
        raise SFormerError(f'{weights} is not the file that {CONFIG_NAME} belongs to (SHA-256 differs).')
    detector: Any = build_detector(config)
    if sfn:
        spiking_detector_(detector, sfn)
        detector.conversion = record
    try:
        detector.load_state_dict(read_safetensors(weights))
    except RuntimeError as e:
        raise SFormerError(f'{weights} is not of the detector that {CONFIG_NAME} describes: {" ".join(str(e).split())}'
                           ) from e
    return detector.eval()
