"""torchvision's Faster and Mask R-CNN on a plain vision transformer of timm."""
import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from ..conversion.sources import create_source
from ..data.preprocessing import check_preprocessing
from ..errors import SFormerError, alone, check, check_flag, check_integer, check_text
from ..layers import register_floating
from ..models import PLAIN_MODELS
from .pyramid import SCALES, SimpleFeaturePyramid, ViTDetBackbone, window_

__all__ = ['DetectorConfig', 'build_detector', 'create_detector']

PATCH_SIZE = 16  # torchvision takes strides for powers of two; timm resamples patch embeddings of other sizes to it
ANCHORS_PER_OCTAVE = (4, 4 * 2 ** 0.5)  # sides of anchors in strides of their level
ASPECT_RATIOS = (0.5, 1., 2.)
MAX_SIZE = 2 ** 14  # of an image in pixels, of layers in channels: what is beyond fills the memory first
TRAINED_PROPOSALS = 128  # that the box head learns from, per image


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """What a detector is built of.

    Args:
        backbone: timm model: a plain ViT or EVA.
        categories: Names of what is detected by their ids in the annotations.
        masks: Whether it segments what it detects (Mask R-CNN), or only boxes it (Faster R-CNN).
        image_size: Height and width of its input in pixels. Images are resized until they fit into this or this lying
            on its side: the short side becomes the shorter of the two, the long one at most the longer.
        channels: Channels of every level of the pyramid.
        scales: Sizes of the levels relative to the map of the backbone, of 4, 2, 1, 0.5 (strides of 4 to 32 pixels).
        hidden: Width of the box head.
        max_detections: Detections per image, the best by score.
        mean: Mean of the normalisation, of pixels in [0, 1].
        std: Standard deviation of the normalisation.
        window_size: Tokens a side of the windows that most blocks of the backbone attend within; None: all attend
            globally.

    Raises:
        ConfigError: If a value is not what it has to be; names it.
    """
    backbone: str
    categories: dict[int, str]
    masks: bool = False
    image_size: tuple[int, int] = (512, 512)
    channels: int = 128
    scales: tuple[float, ...] = (4, 2, 1, 0.5)
    hidden: int = 512
    max_detections: int = 100
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    window_size: int | None = None

    def __post_init__(self) -> None:
        # as JSON has them: keys are strings, tuples are lists
        check(isinstance(self.categories, Mapping) and len(self.categories) > 0
              and all(str(id).removeprefix('-').isdecimal() for id in self.categories),
              f'categories are names by whole numbers, at least one, not {self.categories!r}.')
        object.__setattr__(self, 'categories', {int(id): name for id, name in self.categories.items()})
        check(all(isinstance(name, str) for name in self.categories.values()),
              f'categories have names, not {[*self.categories.values()]}.')
        for name in ('image_size', 'scales', 'mean', 'std'):
            value = getattr(self, name)
            check(isinstance(value, (list, tuple)), f'{name} has several values, not {value!r}.')
            object.__setattr__(self, name, tuple(value))
        check_text(self, 'backbone')
        check_flag(self, 'masks')
        for name in ('channels', 'hidden', 'max_detections'):
            check_integer(self, name, 1, MAX_SIZE)
        check(0 < len(self.scales) and all(scale in tuple(SCALES) for scale in self.scales)
              and [*self.scales] == sorted(self.scales, reverse=True),
              f'scales are of {", ".join(map(str, SCALES))}, largest first, not {self.scales}.')
        check(len(self.image_size) == 2 and all(_is_side(side) for side in self.image_size),
              f'image_size is a height and a width, multiples of 32 up to {MAX_SIZE}, not {self.image_size}.')
        check_preprocessing(dict(mean=self.mean, std=self.std))
        if self.window_size is not None:
            check_integer(self, 'window_size', 1)


def _is_side(value: object) -> bool:
    return type(value) is int and 32 <= value <= MAX_SIZE and not value % 32


class ResizedToFit(GeneralizedRCNNTransform):
    """torchvision's preprocessing, but of an image of 3000 x 4 pixels it leaves one of the short side, not none."""

    def resize(
            self,
            image: torch.Tensor,
            target: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        height, width = image.shape[-2:]
        scale = self.max_size / max(height, width)
        if min(height, width) * scale >= 1:
            return super().resize(image, target)
        fixed = copy.copy(self)
        fixed.fixed_size = max(1, int(width * scale)), max(1, int(height * scale))
        return GeneralizedRCNNTransform.resize(fixed, image, target)


register_floating(ResizedToFit)


def build_detector(config: DetectorConfig, vit: nn.Module | None = None) -> nn.Module:
    """A detector with a new pyramid and new heads.

    Args:
        config: What it is built of.
        vit: The backbone; without weights if None.

    Returns:
        torchvision's `FasterRCNN` or `MaskRCNN`, in training mode; `detector.config` is the config.

    Raises:
        SFormerError: If timm has no such backbone, or it is no plain vision transformer, or has no windows.
    """
    vit = vit or create_backbone(config, pretrained=False)
    if config.window_size is not None:
        window_(vit, config.window_size)
    channels, names = config.channels, [str(i) for i in range(len(config.scales))]
    pyramid = SimpleFeaturePyramid(int(vit.num_features), channels, config.scales)  # type: ignore[arg-type]
    strides = [PATCH_SIZE / scale for scale in config.scales]
    num_classes = len(config.categories) + 1  # 0 is the background
    parts: dict[str, Any] = dict(
        rpn_anchor_generator=AnchorGenerator(
            tuple(tuple(stride * side for side in ANCHORS_PER_OCTAVE) for stride in strides),
            (ASPECT_RATIOS,) * len(strides)),
        rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_test=500,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(7 * 7 * channels, config.hidden),
        box_predictor=FastRCNNPredictor(config.hidden, num_classes),
        box_batch_size_per_image=TRAINED_PROPOSALS, box_detections_per_img=config.max_detections)
    kind = FasterRCNN
    if config.masks:
        kind = MaskRCNN
        parts.update(
            mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes))
    detector = kind(ViTDetBackbone(vit, pyramid, channels), **parts)
    detector.transform = ResizedToFit(
        min(config.image_size), max(config.image_size), list(config.mean), list(config.std), size_divisible=32)
    detector.config = config
    return detector


def create_detector(
        config: DetectorConfig,
        checkpoint: str | Path | None = None,
        seed: int = 0,
) -> nn.Module:
    """A detector on a trained backbone, with a new pyramid and new heads, which are to be trained.

    timm resizes position embeddings to the grid of the config's image size, and patch embeddings to 16 pixels
    (FlexiViT's pseudo-inverse resize, arXiv 2212.08013).

    Args:
        config: What it is built of; mean and std become those that the backbone was trained with.
        checkpoint: Weights of the backbone; its published ones if None.
        seed: Seed of the new weights.

    Raises:
        SFormerError: If there is no such backbone, or its weights cannot be had or do not fit.
    """
    with alone, torch.random.fork_rng(devices=[]):  # torchvision's layers take no generator
        torch.manual_seed(seed)
        vit: Any = create_backbone(config, True, checkpoint)
        cfg = vit.pretrained_cfg
        return build_detector(dataclasses.replace(config, mean=cfg['mean'], std=cfg['std']), vit)


def create_backbone(
        config: DetectorConfig,
        pretrained: bool,
        checkpoint: str | Path | None = None,
) -> nn.Module:
    arguments: dict[str, Any] = dict(
        num_classes=0, img_size=config.image_size, patch_size=PATCH_SIZE, dynamic_img_size=True)
    if pretrained:
        vit = create_source(config.backbone, checkpoint, **arguments).network
    else:
        try:
            vit = timm.create_model(config.backbone, pretrained=False, **arguments)
        except (TypeError, RuntimeError) as e:
            raise SFormerError(f'{config.backbone} cannot be the backbone of a detector: {e}') from e
    if type(vit) not in PLAIN_MODELS:
        raise SFormerError(f'{config.backbone} is no plain vision transformer, which a simple feature pyramid needs.')
    return vit
