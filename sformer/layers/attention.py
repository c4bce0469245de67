"""Self-attention in which every product is between spikes and spikes, or spikes and weights."""
from typing import Optional

import torch
import torch.nn as nn
from timm.layers import Attention
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask

from ..neurons import ScaleAndFire, SFNConfig

__all__ = ['SpikingAttention', 'SpikingProductMixin']


class SpikingProductMixin(nn.Module):
    """The two products of attention on spikes, for any attention layer with `num_heads`, `scale` and `attn_drop`.

    Softmax spikes are levels of the *numerators* exp(s - max s) in (0, 1], and each row of AV is divided by its own
    spike sum. The strongest key of a row always fires at the top level, whether the row is flat or peaked, and rows
    sum to one exactly; spikes of the normalised softmax would have to cover 0.01 and 1 with the same levels.

    Keys are centred per channel before they fire: a constant added to all keys moves every score of a row alike, to
    which softmax is blind.
    """

    def add_product_neurons(self, config: SFNConfig, num_heads: int, head_dim: int, device=None) -> None:
        heads = (num_heads, 1, 1)
        self.q_neuron = ScaleAndFire(heads, config, device=device)
        self.k_neuron = ScaleAndFire(heads, config, center_shape=(num_heads, 1, head_dim), device=device)
        self.v_neuron = ScaleAndFire((num_heads, 1, head_dim), config, device=device)
        self.attn_neuron = ScaleAndFire(heads, config, config.attention_fire, signed=False, device=device)

    def spiking_product(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Attention output on spiking q, k, v and softmax, each (B, H, L, D); returns (B, H, L, D)."""
        q = self.q_neuron(q) * self.scale
        attn = q @ self.k_neuron(k).transpose(-2, -1)
        attn = maybe_add_mask(attn, resolve_self_attn_mask(q.shape[-2], attn, attn_mask, is_causal))
        attn = attn.softmax(dim=-1)
        attn = self.attn_neuron(attn / attn.detach().amax(dim=-1, keepdim=True))
        attn_sum = attn.sum(dim=-1, keepdim=True)
        return (self.attn_drop(attn) @ self.v_neuron(v)) / attn_sum


class SpikingAttention(SpikingProductMixin, Attention):
    """Multi-head self-attention on spikes: `qkv`, QK^T, AV and `proj`.

    Built by `spiking_` from `timm.layers.Attention`, whose parameters and options it keeps.

    Shape:
        Input and output (B, L, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.add_product_neurons(config, self.num_heads, self.head_dim, device=self.qkv.weight.device)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        B, N, C = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)

        x = self.spiking_product(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

        x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        x = self.proj(x)
        x = self.proj_drop(x)
        return x
