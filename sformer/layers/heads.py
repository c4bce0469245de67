"""What gives queries, keys and values, and what reads the output of attention: where a transform of heads folds in."""
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm import layers as tl
from timm.models import beit, eva

from ..neurons import Neuron
from .attention import SpikingAttentionMixin
from .linear import SpikingLinear

__all__ = ['HeadWeights', 'head_weights']


@dataclass(frozen=True)
class HeadWeights:
    """Weights of an attention layer whose operands may be written in another way, which others undo.

    Args:
        queries: Weights and bias of queries, views of the layer's own, (H D, C) and (H D,); None where a norm or a
            rotary embedding acts on them.
        keys: Likewise.
        values: Likewise; None where a norm or a gate acts on the output of attention.
        projection: Weights that read that output, (C', H D).
        gamma: Factor of each output of the projection, (C',), or None.
        heads: Number of heads.
        neurons: What fires queries, keys, values and the output of attention.
    """
    queries: list[torch.Tensor] | None
    keys: list[torch.Tensor] | None
    values: list[torch.Tensor] | None
    projection: torch.Tensor
    gamma: torch.Tensor | None
    heads: int
    neurons: tuple[Neuron, Neuron, Neuron, Neuron]

    def tensors(self) -> list[torch.Tensor]:
        """All that may be written anew."""
        return [*(self.queries or []), *(self.keys or []), *(self.values or []), self.projection]


def head_weights(module: nn.Module) -> Iterator[tuple[str, HeadWeights]]:
    """Weights of the attention layers of a spiking module, with names: of self-attention with one head of keys per head
    of queries, whose weights are its own."""
    read = Counter(id(parameter) for layer in module.modules() for parameter in layer._parameters.values())
    for name, block in module.named_modules():
        for part, child in block.named_children():
            if isinstance(child, SpikingAttentionMixin):
                found = _weights_of(block, child, read)
                if found is not None:
                    yield f'{name}.{part}'.lstrip('.'), found


def _weights_of(block: nn.Module, layer: Any, read: Counter[int]) -> HeadWeights | None:
    kind: type[Any] = type(layer)
    if not issubclass(kind, (tl.Attention, tl.AttentionRope, eva.EvaAttention, beit.Attention)):
        return None
    packed = getattr(layer, 'qkv', None)
    linears = [layer.proj, *([layer.q_proj, layer.k_proj, layer.v_proj] if packed is None else [packed])]
    own = [parameter for linear in linears for parameter in linear.parameters()]
    if (any(type(linear) is not SpikingLinear for linear in linears) or getattr(layer, 'num_kv_groups', 1) != 1
            or any(read[id(parameter)] != 1 for parameter in own)):
        return None
    queries, keys, values = _operands(layer)
    turned = issubclass(kind, (tl.AttentionRope, eva.EvaAttention))
    fixed = turned or not isinstance(getattr(layer, 'q_norm', nn.Identity()), nn.Identity)
    gated = getattr(layer, 'gate', None) is not None
    free = not gated and isinstance(getattr(layer, 'norm', nn.Identity()), nn.Identity)
    if fixed and not free:
        return None
    gamma = getattr(getattr(block, 'ls1', None), 'gamma', getattr(block, 'gamma_1', None))
    product = layer.products[0]
    return HeadWeights(
        None if fixed else queries, None if fixed else keys, values if free else None, layer.proj.weight.detach(),
        None if gamma is None else gamma.detach(), layer.num_heads,
        (product.q_neuron, product.k_neuron, product.v_neuron, layer.proj.neuron))


def _operands(layer: Any) -> list[list[torch.Tensor]]:
    """Weights and biases that give queries, keys and values, as views."""
    packed = getattr(layer, 'qkv', None)
    if packed is None:
        return [[p.detach() for p in linear.parameters()] for linear in (layer.q_proj, layer.k_proj, layer.v_proj)]
    parts = [[rows] for rows in packed.weight.detach().chunk(3)]
    # of keys it is zero where it is no parameter, which no transform changes
    biases = getattr(layer, 'q_bias', None), None, getattr(layer, 'v_bias', None)
    if packed.bias is not None:
        biases = packed.bias.chunk(3)
    for part, bias in zip(parts, biases, strict=True):
        if bias is not None:
            part.append(bias.detach())
    return parts
