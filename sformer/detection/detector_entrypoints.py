"""Detectors by name, registered with torchvision as its own are: `torchvision.models.get_model(name)`.

timm's registry is not theirs: its models take a tensor and classify, and its tools count on it.
"""
from pathlib import Path
from typing import Any

import torch.nn as nn
import torchvision
from torchvision.models._api import register_model
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from ..errors import SFormerError
from ..files import Json
from ..neurons import SFNConfig
from .detector_conversion import spiking_detector_
from .detectors import DetectorConfig, build_detector

__all__ = ['BACKBONES', 'COCO_CATEGORIES', 'create_named', 'detector_name', 'detector_names', 'is_detector_name']

BACKBONES = (
    'vit_tiny_patch16_224', 'vit_small_patch16_224', 'vit_base_patch16_224', 'vit_large_patch16_224',
    'vit_small_patch14_dinov2', 'vit_base_patch14_dinov2', 'vit_large_patch14_dinov2', 'deit3_small_patch16_224',
    'deit3_base_patch16_224', 'deit3_large_patch16_224',
    'eva02_tiny_patch14_224', 'eva02_small_patch14_224', 'eva02_base_patch14_224', 'eva02_large_patch14_224')

# 80 names by their ids in the annotations of COCO; torchvision fills the gaps between ids
COCO_CATEGORIES: dict[int, str] = {
    id: name for id, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta['categories'])
    if id and name != 'N/A'}


def detector_name(config: DetectorConfig, spiking: bool = True) -> str:
    """Name of a detector: `sformer_maskrcnn_BACKBONE`, `sformer_fasterrcnn_BACKBONE`; without `sformer_` if it has no
    neurons."""
    return f'{"sformer_" * spiking}{"maskrcnn" if config.masks else "fasterrcnn"}_{config.backbone}'


def is_detector_name(name: str) -> bool:
    """Whether torchvision's registry has a detector of this package by this name, and no folder is called so."""
    return name in _NAMES and not Path(name).is_dir()


def detector_names() -> list[str]:
    """Names of the detectors that torchvision's registry has of this package."""
    return sorted(_NAMES)


def create_named(name: str) -> nn.Module:
    """The detector of a name, uncalibrated, in eval mode."""
    return torchvision.models.get_model(name).eval()


def _register(backbone: str, masks: bool) -> str:
    def builder(
            *,
            weights: None = None,
            categories: dict[int, str] | None = None,
            sfn: SFNConfig | Json | None = None,
            **config: Any,
    ) -> nn.Module:
        if weights is not None:
            raise SFormerError(f'no weights are published as those of {builder.__name__}: '
                               f'sformer.load_model(\'hf-hub:org/name\') loads a detector with its own.')
        built = build_detector(DetectorConfig(backbone, categories or COCO_CATEGORIES, masks, **config))
        return spiking_detector_(built, sfn if isinstance(sfn, SFNConfig) else SFNConfig(**(sfn or {})))

    name = builder.__name__ = builder.__qualname__ = detector_name(
        DetectorConfig(backbone, COCO_CATEGORIES, masks))
    builder.__doc__ = f"""{"Mask" if masks else "Faster"} R-CNN on a spiking `{backbone}`: random weights, uncalibrated.

    Args:
        weights: None: there are none by this name.
        categories: Names of what is detected by their ids in the annotations; COCO's 80 if None.
        sfn: How neurons fire.
        **config: Other fields of `sformer.detection.DetectorConfig`.
    """
    register_model()(builder)
    return name


_NAMES = {_register(backbone, masks) for backbone in BACKBONES for masks in (False, True)}
