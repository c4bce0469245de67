"""Detectors as folders: safetensors weights, and a config that says what they are of."""
import dataclasses
import json
from pathlib import Path

import timm
import torch.nn as nn
from torchvision.models.detection import FasterRCNN

from ..conversion import record_of
from ..conversion.record import Conversion
from ..errors import SFormerError, UncalibratedError, first_line
from ..files import Json, read_safetensors
from ..layers import is_calibrated, named_neurons, ordinary_tensors, uncalibrated
from ..neurons import SFNConfig
from ..saving import weights_of, write_model
from ..saving.hub import locate
from ..saving.model_config import CONFIG_NAME, WEIGHTS_NAME, check_firing_config, check_weights_file
from .detector_conversion import spiking_detector_
from .detector_entrypoints import create_named, detector_name, is_detector_name
from .detectors import DetectorConfig, build_detector

__all__ = ['DETECTOR_KEY', 'load_detector', 'read_detector_config', 'save_detector']

DETECTOR_KEY = 'detector'  # what a config of a detector has, and no other


def save_detector(detector: nn.Module, directory: str | Path, overwrite: bool = False) -> Path:
    """Save a detector as `model.safetensors` and `config.json`: what it is built of, how its neurons fire if it has
    any, and the record of its conversion. Both files are written aside and renamed.

    Raises:
        UncalibratedError: If it has neurons whose thresholds were never fitted.
        SFormerError: If the folder holds a model, cannot be written, or weights are NaN or infinite.
    """
    model: FasterRCNN = detector
    spiking = any(True for _ in named_neurons(detector))
    if spiking and not is_calibrated(detector):
        raise UncalibratedError(f'{uncalibrated(detector)}; convert it with convert_detector() before saving.')

    def write_config(aside: Path, weights_sha256: str) -> None:
        config: Json = {
            'architecture': detector_name(model.config, spiking), DETECTOR_KEY: dataclasses.asdict(model.config),
            'weights_sha256': weights_sha256}
        if spiking:
            record = dataclasses.replace(record_of(detector), weights_sha256=weights_sha256)
            config.update(sfn=dataclasses.asdict(model.sfn), sformer=record.to_dict())
        (aside / CONFIG_NAME).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    return write_model(weights_of(detector), Path(directory), write_config, overwrite)


def read_detector_config(folder: Path) -> Json:
    """Read and check the `config.json` of a detector.

    Raises:
        SFormerError: If there is none of a detector, or it is not as `save_detector` wrote it.
    """
    file = folder / CONFIG_NAME
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or DETECTOR_KEY not in data:
        raise SFormerError(f'{folder} holds no detector: there is no {CONFIG_NAME} of one.')
    config, sfn, _ = _parsed(data, file)
    if sfn:
        check_firing_config(data['sfn'], file)
    if not (config.backbone.isidentifier() and timm.is_model(config.backbone)):
        raise SFormerError(f'{file}: the backbone {config.backbone!r} is not the name of a timm architecture.')
    return data


def _parsed(data: Json, file: Path) -> tuple[DetectorConfig, SFNConfig | None, Conversion | None]:
    """What a detector is built of, how its neurons fire, and the record of its conversion."""
    try:
        config = DetectorConfig(**data[DETECTOR_KEY])
        if not isinstance(data['weights_sha256'], str):
            raise TypeError('weights_sha256 is no text')
        if 'sfn' not in data:
            return config, None, None
        return config, SFNConfig(**data['sfn']), Conversion.from_dict(data['sformer'])
    except (SFormerError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise SFormerError(f'{file} is not as sformer wrote it: {first_line(e)}.') from e


@ordinary_tensors()
def load_detector(
        path: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
) -> nn.Module:
    """Load a detector that `save_detector` wrote, in eval mode.

    Args:
        path: Folder, `local-dir:FOLDER`, `hf-hub:org/name` or `hf-hub:org/name@revision`, whose files are of one
            commit; or the name of a detector without weights, `sformer_maskrcnn_vit_small_patch16_224`.
        revision: Branch, tag or commit of a detector on the Hub.
        cache_dir: Cache to use; the Hub client's own if None.

    Returns:
        The detector; of an SFormer, `conversion` is the record of its conversion and `sfn` says how its neurons fire.

    Raises:
        SFormerError: If there is none, its config is not as sformer wrote it, or its weights are damaged or not those
            that the config records.
    """
    if is_detector_name(str(path)):
        return create_named(str(path))
    folder = locate(str(path), revision, cache_dir, read=read_detector_config)
    data = read_detector_config(folder)
    config, sfn, record = _parsed(data, folder / CONFIG_NAME)
    check_weights_file(folder, data)
    detector: FasterRCNN = build_detector(config)
    if sfn:
        spiking_detector_(detector, sfn)
        detector.conversion = record
    try:
        detector.load_state_dict(read_safetensors(folder / WEIGHTS_NAME))
    except RuntimeError as e:
        raise SFormerError(f'{folder / WEIGHTS_NAME} is not of the detector that {CONFIG_NAME} describes: '
                           f'{" ".join(str(e).split())}') from e
    return detector.eval()
