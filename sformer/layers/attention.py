"""Attention layers of timm in which every product is between spikes.

Their forwards are timm's own. With `fused_attn` they all leave QK^T and AV to `F.scaled_dot_product_attention`; inside
of a spiking layer that call goes to its `AttentionProduct`. Rotary embeddings, norms and softmax act on currents.
"""
import functools
import operator
from typing import cast

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import layers as tl
from timm.models import beit, eva
from timm.models import vision_transformer as vit
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedLayerError
from ..neurons import Neuron, SFNConfig, new_neuron
from . import products
from .linear import SpikingLinear
from .multiplying import GATE, Multiplying, Product
from .products import AttentionProduct
from .table import SpikingLayer, register_spiking

__all__ = ['SpikingAttentionMixin', 'SpikingAttention']

# mypy is told to ignore below that `fused_attn` is a constant in timm: the property answers before it


class _ToProducts(TorchFunctionMode):
    """While the forward of an attention layer runs, hand its products of activations to the layer's neurons."""

    def __init__(self, layer: 'SpikingAttentionMixin', met: list[str]):
        super().__init__()
        self.layer = layer
        self.met = met  # names of the products that came by; the caller's own, as dynamo reads no attribute of a mode
        self.gate: torch.Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.met.append('attention')
            call = self.met.count('attention')
            if call <= self.layer.num_products:  # one too many is refused when the forward is over
                return self.layer.products[call - 1](*args, **(kwargs or {}))
        gate_neuron, value_neuron = self.layer.gate_neuron, self.layer.value_neuron
        if gate_neuron is not None and value_neuron is not None:
            if func is torch.Tensor.sigmoid:
                self.gate = func(*args, **(kwargs or {}))
                return self.gate
            multiplied = func in (torch.Tensor.mul, operator.mul)  # the latter in a strict export
            if multiplied and self.gate is not None and args[1] is self.gate:
                self.met.append('gate')
                return products.multiply(value_neuron, args[0], gate_neuron, args[1])
        return func(*args, **(kwargs or {}))


class SpikingAttentionMixin(SpikingLayer):
    """Attention on spikes, for any layer of timm that calls `F.scaled_dot_product_attention`.

    Shape:
        Input and output as of the layer.
    """
    spiking_parts = ('products', 'gate_neuron', 'value_neuron')
    num_products = 1  # calls of the layer's forward
    num_heads: int
    proj: nn.Linear
    gate_neuron: Neuron | None
    value_neuron: Neuron | None

    # Before the layer's own attributes, which stay for the source: the fused path is the one that makes the call, and
    # with separate biases `qkv` is called as a layer instead of having its weights read.
    fused_attn = cast(bool, property(lambda self: True))
    qkv_bias_separate = cast(bool, property(lambda self: True))

    def add_neurons(self, config: SFNConfig) -> None:
        for name in ('proj', 'attn_out_proj', 'mlp_out_proj'):  # no norm is in front of these
            projection = getattr(self, name, None)
            if isinstance(projection, SpikingLinear):
                projection.neuron.unbounded = True
        head_dim = getattr(self, 'head_dim', None) or self.proj.in_features // self.num_heads
        device = next((p.device for p in self.parameters()), None)
        group_size = getattr(self, 'num_kv_groups', 1)
        self.products = nn.ModuleList(
            AttentionProduct(self.num_heads, head_dim, self.num_products * head_dim, config, device, group_size)
            for _ in range(self.num_products))
        # where a sigmoid gate multiplies the output of attention, both spike, with a step per channel
        gated = getattr(self, 'gate', None) is not None
        for name in ('gate_neuron', 'value_neuron'):
            setattr(self, name, new_neuron((self.proj.in_features,), config, device=device) if gated else None)

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Give the forward the signature of the source's, by which symbolic tracing makes its proxies."""
        super().__init_subclass__(**kwargs)
        source = next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Multiplying))
        if source is not nn.Module:  # a mixin has no source yet
            @functools.wraps(source.forward)
            def forward(self: SpikingAttentionMixin, *args: object, **kwargs: object) -> torch.Tensor:
                return SpikingAttentionMixin.forward(self, *args, **kwargs)
            cls.forward = forward  # type: ignore[method-assign]

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        met: list[str] = []
        with _ToProducts(self, met):
            x = super().forward(*args, **kwargs)
        if met != ['attention'] * self.num_products + ['gate'] * (self.gate_neuron is not None):
            raise UnsupportedLayerError(
                f'a product of {type(self).__name__} was not met on its way through timm {timm.__version__}'
                f'{", as symbolic tracing of a gated layer hides it: use torch.export" if met else ""}.')
        return x

    def multiplies(self) -> list[Product]:
        if self.gate_neuron is None or self.value_neuron is None:
            return []
        return [Product(GATE, (self.gate_neuron, self.value_neuron), torch.mul)]


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
