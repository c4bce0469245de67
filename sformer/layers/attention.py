"""Attention layers of timm in which every product is between spikes.

Their forwards are timm's own. With `fused_attn` they all leave QK^T and AV to `F.scaled_dot_product_attention`; inside
of a spiking layer that call goes to its `AttentionProduct`. Rotary embeddings, norms and softmax act on currents.
"""
import functools
from typing import cast

import torch
import torch.nn as nn
from timm import layers as tl
from timm.models import beit, eva, gemma4_vit
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relpos
from timm.models import vision_transformer_sam as sam

from ..neurons import SFNConfig, new_neuron
from .linear import SpikingLinear
from .meeting import MeetingMixin
from .multiplying import POSITION, Multiplying, Product
from .products import AttentionProduct
from .table import register_spiking

__all__ = ['SpikingAttentionMixin', 'SpikingAttention']

# mypy is told to ignore below that `fused_attn` is a constant in timm: the property answers before it


class SpikingAttentionMixin(MeetingMixin):
    """Attention on spikes, for any layer of timm that calls `F.scaled_dot_product_attention`.

    Shape:
        Input and output as of the layer.
    """
    spiking_parts = ('products', *MeetingMixin.spiking_parts)
    num_products = 1
    num_heads: int
    proj: nn.Linear

    # Before the layer's own attributes, which stay for the source: the fused path is the one that makes the call, and
    # with separate biases `qkv` is called as a layer instead of having its weights read.
    fused_attn = cast(bool, property(lambda self: True))
    qkv_bias_separate = cast(bool, property(lambda self: True))

    def add_neurons(self, config: SFNConfig) -> None:
        for name in ('proj', 'attn_out_proj', 'mlp_out_proj', 'o_proj'):  # no norm is in front of these
            projection = getattr(self, name, None)
            projection = getattr(projection, 'linear', projection)
            if isinstance(projection, SpikingLinear):
                projection.neuron.unbounded = True
        self.products = nn.ModuleList(self.new_products(config, next((p.device for p in self.parameters()), None)))
        # where a sigmoid gate multiplies the output of attention, both spike, with a step per channel
        self.add_gate((self.proj.in_features,) if getattr(self, 'gate', None) is not None else None, config)

    def new_products(self, config: SFNConfig, device: torch.device | None) -> list[Multiplying]:
        """Products of activations, in the order in which they are met."""
        num_heads, head_dim, v_head_dim = self.head_widths()
        group_size = getattr(self, 'num_kv_groups', 1)
        return [AttentionProduct(num_heads, head_dim, v_head_dim, config, device, group_size)
                for _ in range(self.num_products)]

    def head_widths(self) -> tuple[int, int, int]:
        """Heads, channels of queries and keys in each, and of values."""
        head_dim = getattr(self, 'head_dim', None) or self.proj.in_features // self.num_heads
        return self.num_heads, head_dim, self.num_products * head_dim


class _DifferentialMixin(SpikingAttentionMixin):
    """Differential attention (arXiv 2410.05258): the difference of two attentions on the same values, which are twice
    as wide, each with neurons of its own."""
    num_products = 2


@register_spiking(tl.Attention)
class SpikingAttention(SpikingAttentionMixin, tl.Attention):  # type: ignore[misc]
    """Multi-head self-attention on spikes."""


@register_spiking(tl.AttentionRope)
class SpikingAttentionRope(SpikingAttentionMixin, tl.AttentionRope):  # type: ignore[misc]
    """Self-attention with rotary embedding on spikes."""


@register_spiking(eva.EvaAttention)
class SpikingEvaAttention(SpikingAttentionMixin, eva.EvaAttention):  # type: ignore[misc]
    """EVA's self-attention with rotary embedding on spikes."""


@register_spiking(beit.Attention)
class SpikingBeitAttention(SpikingAttentionMixin, beit.Attention):  # type: ignore[misc]
    """BEiT's self-attention on spikes; the relative position bias is added to the scores, which are currents."""


@register_spiking(tl.DiffAttention)
class SpikingDiffAttention(_DifferentialMixin, tl.DiffAttention):  # type: ignore[misc]
    """Differential attention on spikes."""


@register_spiking(vit.ParallelScalingBlock)
class SpikingParallelScalingBlock(SpikingAttentionMixin, vit.ParallelScalingBlock):  # type: ignore[misc]
    """Block with MLP and attention in parallel, fed by one projection, on spikes."""


@register_spiking(vit.DiffParallelScalingBlock)
class SpikingDiffParallelScalingBlock(_DifferentialMixin, vit.DiffParallelScalingBlock):  # type: ignore[misc]
    """Block with MLP and differential attention in parallel on spikes."""


@register_spiking(tl.AttentionPoolLatent)
class SpikingAttentionPoolLatent(SpikingAttentionMixin, tl.AttentionPoolLatent):  # type: ignore[misc]
    """Attention pooling with latent queries on spikes."""


@register_spiking(tl.AttentionPoolPrr)
class SpikingAttentionPoolPrr(SpikingAttentionMixin, tl.AttentionPoolPrr):  # type: ignore[misc]
    """Patch representation refinement, an attention pool without weights, on spikes."""


@register_spiking(relpos.RelPosAttention)
class SpikingRelPosAttention(SpikingAttentionMixin, relpos.RelPosAttention):  # type: ignore[misc]
    """Self-attention on spikes; the bias of relative positions is added to the scores, which are currents."""


@register_spiking(gemma4_vit.Gemma4Attention)
class SpikingGemma4Attention(SpikingAttentionMixin, gemma4_vit.Gemma4Attention):  # type: ignore[misc]
    """Gemma's self-attention with norms and rotary embeddings, which act on currents, on spikes."""


@register_spiking(sam.Attention)
class SpikingSamAttention(SpikingAttentionMixin, sam.Attention):  # type: ignore[misc]
    """Self-attention on spikes in which queries meet tables of relative positions, too: a product like any other."""
    def add_neurons(self, config: SFNConfig) -> None:
        super().add_neurons(config)
        if self.use_rel_pos:
            self.position_neuron = new_neuron((self.head_dim,), config, token=True, device=self.rel_pos_h.device)

    def expected(self) -> list[str]:
        return ['position', 'position'] * (self.position_neuron is not None) + super().expected()

    def attend(self, product: AttentionProduct, *args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Of queries, keys and values whose heads are examples of the batch, (B heads, L, D)."""
        mask = cast(torch.Tensor | None, kwargs.pop('attn_mask', None))  # which a tracer has a proxy of
        if mask is not None:
            kwargs['attn_mask'] = mask.unflatten(0, (-1, self.num_heads))
        return product(*(x.unflatten(0, (-1, self.num_heads)) for x in args), **kwargs).flatten(0, 1)

    def multiplies(self) -> list[Product]:
        if self.position_neuron is None:
            return []
        compute = functools.partial(_meet_tables, len(self.rel_pos_h))
        return [Product(POSITION, (self.position_neuron,), compute,
                        weight=torch.cat([self.rel_pos_h, self.rel_pos_w]))]


def _meet_tables(rows: int, query: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Products (B, rows, columns, K) of queries (B, rows, columns, D) with tables of relative rows and columns; so many
    of the tables, the first, are of rows."""
    (height, width), (down, across) = query.shape[1:3], tables.split([rows, len(tables) - rows])
    down = torch.einsum('bhwc,hkc->bhwk', query, sam.get_rel_pos(height, height, down))
    across = torch.einsum('bhwc,wkc->bhwk', query, sam.get_rel_pos(width, width, across))
    return torch.cat([down, across], dim=-1)
