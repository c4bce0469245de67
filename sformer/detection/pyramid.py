"""ViTDet's simple feature pyramid on a plain vision transformer of timm.

Paper: `Exploring Plain Vision Transformer Backbones for Object Detection` (Li et al. 2022)
    - https://arxiv.org/abs/2203.16527

One map, the last of the backbone, becomes all levels: by transposed convolutions, as it is, and by pooling. Norms are
LayerNorms over the channels of each position (`LayerNorm2d`), as in the paper; they need no statistics of a batch.
"""
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import LayerNorm2d

from ..errors import SFormerError
from ..layers import token_grid, windowed_

__all__ = ['SCALES', 'SimpleFeaturePyramid', 'ViTDetBackbone', 'window_']


def _resampling(in_channels: int, scale: float) -> nn.Sequential:
    """From the map of the backbone to `scale` times its size, with fewer channels the larger it gets."""
    def up(channels: int) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)

    if scale == 4:
        half = in_channels // 2
        return nn.Sequential(up(in_channels), LayerNorm2d(half), nn.GELU(), up(half))
    layers: dict[float, Sequence[nn.Module]] = {2: [up(in_channels)], 1: [], 0.5: [nn.MaxPool2d(2)]}
    return nn.Sequential(*layers[scale])


SCALES = {4: 4, 2: 2, 1: 1, 0.5: 1}  # size of a level relative to the map -> what its channels are divided by


class SimpleFeaturePyramid(nn.Module):
    """Maps of several sizes from one.

    Args:
        in_channels: Channels C of the map; a multiple of 4.
        out_channels: Channels of every level.
        scales: Sizes of the levels relative to the map, of 4, 2, 1 and 0.5, largest first.

    Shape:
        Input (B, C, H, W); output a dict from '0', '1' ... to (B, out_channels, scale * H, scale * W).
    """

    def __init__(self, in_channels: int, out_channels: int = 256, scales: Sequence[float] = (4, 2, 1, 0.5)):
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(
            *_resampling(in_channels, scale),
            nn.Conv2d(in_channels // SCALES[scale], out_channels, 1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        ) for scale in scales)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return OrderedDict((str(i), level(x)) for i, level in enumerate(self.levels))


GLOBAL_BLOCKS = 4


def window_(vit: nn.Module, window_size: int) -> None:
    """Let a vision transformer attend within windows, in place, but for four blocks: the last ones of four parts.

    Args:
        vit: timm model.
        window_size: Tokens a side of a window.

    Raises:
        SFormerError: If it has no more than four blocks, or its attention has no windowed form.
    """
    model: Any = vit
    depth = len(model.blocks)
    if depth <= GLOBAL_BLOCKS:
        raise SFormerError(f'a backbone of {depth} blocks has none for windows, as {GLOBAL_BLOCKS} attend globally: '
                           f'leave out window_size (--window-size).')
    whole = {depth * part // GLOBAL_BLOCKS - 1 for part in range(1, GLOBAL_BLOCKS + 1)}
    for i in set(range(depth)) - whole:
        windowed_(getattr(model.blocks[i], 'attn', model.blocks[i]), window_size, model.num_prefix_tokens)


class ViTDetBackbone(nn.Module):
    """A plain ViT or EVA of timm and the pyramid on its last map, as torchvision's detectors read it.

    Args:
        vit: timm model with dynamic or fitting image size.
        pyramid: Levels of its last map.
        out_channels: Channels of every level.

    Shape:
        Input (B, 3, H, W); output as of the pyramid.
    """

    def __init__(self, vit: nn.Module, pyramid: SimpleFeaturePyramid, out_channels: int):
        super().__init__()
        self.vit = vit
        self.pyramid = pyramid
        self.out_channels = out_channels

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The last map of the vision transformer, after its final norm, (B, C, H / patch, W / patch)."""
        vit: Any = self.vit
        with token_grid(*vit.patch_embed.dynamic_feat_size(x.shape[-2:])):
            return vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid(self.features(x))
