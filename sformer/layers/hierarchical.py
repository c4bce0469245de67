"""Layers of hierarchical transformers and of convolutional networks of timm.

Their attention calls `F.scaled_dot_product_attention`, within windows or on keys of fewer places; gates are those of
squeeze and excitation.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import layers as tl
from timm.layers import adaptive_avgmax_pool, blur_pool, grn
from timm.models import (
    _efficientnet_blocks,
    convnext,
    hiera,
    hieradet_sam2,
    inception_next,
    maxxvit,
    metaformer,
    nest,
    pvt_v2,
    swin_transformer,
    tiny_vit,
    twins,
    xcit,
)
from timm.models._features_fx import register_notrace_module

from ..neurons import SFNConfig
from .attention import SpikingAttentionMixin
from .meeting import MeetingMixin
from .products import AttentionProduct
from .table import register_floating, register_spiking

__all__: list[str] = []

register_floating(
    convnext.ConvNeXtBlock, inception_next.MetaNeXtBlock, grn.GlobalResponseNorm,
    hiera.Unroll, hiera.Reroll, swin_transformer.SwinTransformerBlock, nest.NestLevel, xcit.XCABlock,
    metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias, metaformer.GroupNorm1NoBias, metaformer.StarReLU,
    metaformer.Scale, tl.LayerScale2d, adaptive_avgmax_pool.FastAdaptiveAvgPool, blur_pool.BlurPool2d, nn.Softmax,
    nn.BatchNorm1d, nn.LeakyReLU, nn.AvgPool1d, nn.ZeroPad2d)


class _WindowsMixin(SpikingAttentionMixin):
    """Attention whose queries, keys and values have a dimension of windows, which do not see one another."""
    windows = 2  # that dimension, of five

    def attend(self, product: AttentionProduct, *args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        examples = args[0].movedim(self.windows, 1).shape[:2]
        out = product(*(x.movedim(self.windows, 1).flatten(0, 1) for x in args), **kwargs)
        return out.unflatten(0, examples).movedim(1, self.windows)


@register_spiking(swin_transformer.WindowAttention)
class SpikingSwinAttention(SpikingAttentionMixin, swin_transformer.WindowAttention):  # type: ignore[misc]
    """Swin's attention within windows, shifted or not, on spikes."""


@register_spiking(hiera.MaskUnitAttention)
class SpikingMaskUnitAttention(_WindowsMixin, hiera.MaskUnitAttention):  # type: ignore[misc]
    """Hiera's attention within mask units, or of all tokens, on spikes; pooled queries are currents until they fire."""

    def attend(self, product: AttentionProduct, *args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return super().attend(product, *args, **kwargs) if args[0].ndim == 5 else product(*args, **kwargs)

    def head_widths(self) -> tuple[int, int, int]:
        return self.heads, self.head_dim, self.head_dim


@register_spiking(hieradet_sam2.MultiScaleAttention)
class SpikingMultiScaleAttention(SpikingAttentionMixin, hieradet_sam2.MultiScaleAttention):  # type: ignore[misc]
    """Attention of SAM 2's encoder on spikes."""


@register_spiking(nest.Attention)
class SpikingNestAttention(_WindowsMixin, nest.Attention):  # type: ignore[misc]
    """NesT's attention within blocks of an image on spikes."""


@register_spiking(pvt_v2.Attention)
class SpikingPvtAttention(SpikingAttentionMixin, pvt_v2.Attention):  # type: ignore[misc]
    """Attention to keys of fewer places on spikes."""


@register_spiking(twins.LocallyGroupedAttn)
class SpikingLocallyGroupedAttn(_WindowsMixin, twins.LocallyGroupedAttn):  # type: ignore[misc]
    """Twins' attention within windows on spikes."""
    windows = 1


@register_spiking(twins.GlobalSubSampleAttn)
class SpikingGlobalSubSampleAttn(SpikingAttentionMixin, twins.GlobalSubSampleAttn):  # type: ignore[misc]
    """Twins' attention to keys of fewer places on spikes."""


@register_spiking(tiny_vit.Attention)
class SpikingTinyVitAttention(SpikingAttentionMixin, tiny_vit.Attention):  # type: ignore[misc]
    """TinyViT's attention with a table of relative positions on spikes."""

    def head_widths(self) -> tuple[int, int, int]:
        return self.num_heads, self.key_dim, self.val_dim


@register_spiking(maxxvit.Attention2d)
class SpikingMaxxVitAttention2d(SpikingAttentionMixin, maxxvit.Attention2d):  # type: ignore[misc]
    """Attention of CoAtNet on spikes."""

    def head_widths(self) -> tuple[int, int, int]:
        return self.num_heads, self.dim_head, self.dim_head


@register_spiking(maxxvit.AttentionCl)
class SpikingMaxxVitAttention(SpikingAttentionMixin, maxxvit.AttentionCl):  # type: ignore[misc]
    """Attention of MaxViT, within windows and on grids, on spikes."""

    def head_widths(self) -> tuple[int, int, int]:
        return self.num_heads, self.dim_head, self.dim_head


@register_spiking(metaformer.Attention)
class SpikingMetaFormerAttention(SpikingAttentionMixin, metaformer.Attention):  # type: ignore[misc]
    """CAFormer's attention on spikes."""


class _SqueezeMixin(MeetingMixin):
    """Gate per channel, made of the mean over all places, that spikes before it multiplies the value.

    Shape:
        Input and output (B, C, H, W).
    """
    gate_functions = (torch.sigmoid, torch.Tensor.sigmoid, torch.Tensor.sigmoid_, F.hardsigmoid)
    expands: str  # name of the layer that gives the gate

    def add_neurons(self, config: SFNConfig) -> None:
        self.add_gate((getattr(self, self.expands).out_channels, 1, 1), config)


@register_notrace_module
@register_spiking(tl.SEModule)
class SpikingSEModule(_SqueezeMixin, tl.SEModule):  # type: ignore[misc]
    """Squeeze and excitation on spikes."""
    expands = 'fc2'


@register_notrace_module
@register_spiking(tl.EffectiveSEModule)
class SpikingEffectiveSEModule(_SqueezeMixin, tl.EffectiveSEModule):  # type: ignore[misc]
    """Squeeze and excitation by one layer on spikes."""
    expands = 'fc'


@register_notrace_module
@register_spiking(_efficientnet_blocks.SqueezeExcite)
class SpikingSqueezeExcite(_SqueezeMixin, _efficientnet_blocks.SqueezeExcite):  # type: ignore[misc]
    """EfficientNet's squeeze and excitation on spikes."""
    expands = 'conv_expand'
