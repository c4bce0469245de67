"""Attention of timm that multiplies queries by keys, and maps by values, in so many words.

Their forwards are timm's own: the products are met where they are computed, and the softmax between them leaves scores
to what multiplies their numerators by values. Cosines, scales, biases and masks are currents, and act on scores.
"""
import torch
from timm.models import cait, crossvit, davit, gcvit, swin_transformer_v2, swin_transformer_v2_cr, xcit
from timm.models._features_fx import register_notrace_module

from ..neurons import SFNConfig
from .attention import SpikingAttentionMixin
from .multiplying import Multiplying
from .products import MixedProduct, ScoreProduct, ValueProduct
from .table import register_floating, register_spiking

__all__: list[str] = []

register_floating(
    cait.LayerScaleBlock, cait.LayerScaleBlockClassAttn, xcit.ClassAttentionBlock,
    swin_transformer_v2.SwinTransformerV2Block, swin_transformer_v2_cr.SwinTransformerV2CrBlock)


@register_notrace_module
class _ByHandMixin(SpikingAttentionMixin):
    """Attention by two products of matrices with a softmax in between."""
    by_hand = True

    def new_products(self, config: SFNConfig, device: torch.device | None) -> list[Multiplying]:
        num_heads, head_dim, v_head_dim = self.head_widths()
        return [ScoreProduct(num_heads, head_dim, config, device), ValueProduct(num_heads, v_head_dim, config, device)]

    def expected(self) -> list[str]:
        return ['product', 'softmax', 'product']


@register_spiking(swin_transformer_v2.WindowAttention)
class SpikingSwinV2Attention(_ByHandMixin, swin_transformer_v2.WindowAttention):  # type: ignore[misc]
    """Swin V2's attention within windows on spikes: cosines of queries and keys, times a scale per head."""
    constant_parts = ('cpb_mlp',)


@register_spiking(swin_transformer_v2_cr.WindowMultiHeadAttention)
class SpikingSwinV2CrAttention(  # type: ignore[misc]
        _ByHandMixin, swin_transformer_v2_cr.WindowMultiHeadAttention):
    """The same, as another implementation of Swin V2 has it, on spikes."""
    constant_parts = ('meta_mlp',)


@register_spiking(crossvit.CrossAttention)
class SpikingCrossAttention(_ByHandMixin, crossvit.CrossAttention):  # type: ignore[misc]
    """CrossViT's attention of a class token to the tokens of another branch on spikes."""


@register_spiking(gcvit.WindowAttentionGlobal)
class SpikingGlobalWindowAttention(_ByHandMixin, gcvit.WindowAttentionGlobal):  # type: ignore[misc]
    """GCViT's attention within windows, with queries of its own or of the whole image, on spikes."""


@register_spiking(davit.ChannelAttention)
class SpikingChannelAttention(_ByHandMixin, davit.ChannelAttention):  # type: ignore[misc]
    """DaViT's attention of channels to channels, whose queries and keys are tokens, on spikes."""

    def head_widths(self) -> tuple[int, int, int]:
        return self.num_heads, 1, 1


@register_spiking(davit.ChannelAttentionV2)
class SpikingChannelAttentionV2(_ByHandMixin, davit.ChannelAttentionV2):  # type: ignore[misc]
    """The same with another scale, on spikes."""

    def head_widths(self) -> tuple[int, int, int]:
        return self.groups, 1, 1


@register_spiking(davit.WindowAttention)
class SpikingDavitAttention(SpikingAttentionMixin, davit.WindowAttention):  # type: ignore[misc]
    """DaViT's attention within windows on spikes."""


@register_spiking(cait.ClassAttn)
class SpikingClassAttention(SpikingAttentionMixin, cait.ClassAttn):  # type: ignore[misc]
    """Attention of a class token to all tokens on spikes."""


@register_spiking(cait.TalkingHeadAttn)
class SpikingTalkingHeadAttention(_ByHandMixin, cait.TalkingHeadAttn):  # type: ignore[misc]
    """Attention whose heads are mixed, before and after the softmax, by weights that spikes meet: scores and maps fire
    there, a head being a channel, and mixed maps once more before they meet values."""

    def new_products(self, config: SFNConfig, device: torch.device | None) -> list[Multiplying]:
        num_heads, head_dim, v_head_dim = self.head_widths()
        return [ScoreProduct(num_heads, head_dim, config, device, centered=False),  # weights read scores
                MixedProduct(num_heads, v_head_dim, config, device)]

    def expected(self) -> list[str]:
        return ['product', 'product']


@register_spiking(xcit.XCA)
class SpikingCrossCovarianceAttention(SpikingAttentionMixin, xcit.XCA):  # type: ignore[misc]
    """XCiT's attention of channels to channels, whose queries and keys are tokens, on spikes."""

    def head_widths(self) -> tuple[int, int, int]:
        return self.num_heads, 1, 1
