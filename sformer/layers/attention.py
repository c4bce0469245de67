"""Attention in which every product is between spikes and spikes, or spikes and weights.

Each class is built by `spiking_` from the timm layer that it subclasses, whose parameters and options it keeps, and
its forward is that layer's, with neurons before the products. Rotary embeddings, norms, softmax and sigmoids act on
currents.
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionPoolPrr,
    AttentionRope,
    DiffAttention,
    apply_rot_embed_cat,
)
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from timm.models import beit
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock

from ..neurons import ScaleAndFire, SFNConfig

__all__ = [
    'SpikingProductMixin', 'SpikingAttention', 'SpikingAttentionRope', 'SpikingEvaAttention', 'SpikingBeitAttention',
    'SpikingDiffAttention', 'SpikingParallelScalingBlock', 'SpikingDiffParallelScalingBlock',
    'SpikingAttentionPoolLatent', 'SpikingAttentionPoolPrr',
]


class SpikingProductMixin(nn.Module):
    """The two products of attention on spikes, for any attention layer with `scale` and `attn_drop`.

    Softmax spikes are levels of the *numerators* exp(s - max s) in (0, 1], and each row of AV is divided by its own
    spike sum. The strongest key of a row always fires at the top level, whether the row is flat or peaked, and rows
    sum to one exactly; spikes of the normalised softmax would have to cover 0.01 and 1 with the same levels.

    Keys are centred per channel before they fire: a constant added to all keys moves every score of a row alike, to
    which softmax is blind.
    """

    def add_product_neurons(
            self,
            config: SFNConfig,
            num_heads: int,
            head_dim: int,
            num_kv_heads: int,
            device=None,
            num_v_heads: int = 0,
            v_head_dim: int = 0,
    ) -> None:
        """Add neurons for q (a threshold per head), k (head, centred per channel), v (channel) and softmax (head)."""
        self.q_neuron = ScaleAndFire((num_heads, 1, 1), config, device=device)
        self.k_neuron = ScaleAndFire(
            (num_kv_heads, 1, 1), config, center_shape=(num_kv_heads, 1, head_dim), device=device)
        self.v_neuron = ScaleAndFire((num_v_heads or num_kv_heads, 1, v_head_dim or head_dim), config, device=device)
        self.attn_neuron = ScaleAndFire((num_heads, 1, 1), config, config.attention_fire, signed=False, device=device)

    def spiking_softmax(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Spikes of the softmax numerators (B, H, Q, K) and their sums (B, H, Q, 1), from spikes q and k (B, H, L, D).
        """
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = maybe_add_mask(attn, resolve_self_attn_mask(q.shape[-2], attn, attn_mask, is_causal))
        attn = attn.softmax(dim=-1)
        attn = attn / attn.detach().amax(dim=-1, keepdim=True)
        if attn_mask is not None:
            attn = attn.nan_to_num()  # a query that may see no key attends to nothing, as in torch's own attention
        attn = self.attn_neuron(attn)
        return self.attn_drop(attn), attn.sum(dim=-1, keepdim=True)

    def spiking_product(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Attention output (B, H, L, D) from spikes q, k and v, each (B, H, L, D)."""
        attn, attn_sum = self.spiking_softmax(q, k, attn_mask, is_causal)
        return self.weighted_mean(attn, v, attn_sum)

    def weighted_mean(self, attn: torch.Tensor, v: torch.Tensor, attn_sum: torch.Tensor) -> torch.Tensor:
        """Product of spikes attn (..., Q, K) and v (..., K, D), divided by the spike sums (..., Q, 1)."""
        # exact, and in float16 a sum over many keys would overflow before it is divided
        # (the strongest key fires its top level, near 1, so a sum is either that or zero)
        return (attn @ (v / 32)) / (attn_sum / 32).clamp_min(1e-4)

    def add_gate_neurons(self, config: SFNConfig) -> None:
        """Add neurons for both operands of a sigmoid gate on the attention output, where there is one."""
        shape, device = (self.proj.in_features,), self.proj.weight.device
        self.gate_neuron = ScaleAndFire(shape, config, device=device) if self.gate is not None else None
        self.value_neuron = ScaleAndFire(shape, config, device=device) if self.gate is not None else None

    def rotate(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            rope: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of q and k (B, H, L, D), in the dtype of v; prefix tokens are left as they are."""
        if rope is not None:
            npt, half = self.num_prefix_tokens, self.rotate_half
            q = torch.cat([q[:, :, :npt, :], apply_rot_embed_cat(q[:, :, npt:, :], rope, half=half)], dim=2).type_as(v)
            k = torch.cat([k[:, :, :npt, :], apply_rot_embed_cat(k[:, :, npt:, :], rope, half=half)], dim=2).type_as(v)
        return q, k

    def spiking_diff_product(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            lambda_full: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Difference of two attentions on the same values (arXiv 2410.05258), each on spikes with sums of its own.

        q and k are (B, 2 H, L, D), v and the output (B, H, L, 2 D).
        """
        attn, attn_sum = self.spiking_softmax(q, k, attn_mask, is_causal)
        x = self.weighted_mean(attn.unflatten(1, (-1, 2)), v.unsqueeze(2), attn_sum.unflatten(1, (-1, 2)))
        return x[:, :, 0] - lambda_full * x[:, :, 1]


class SpikingAttention(SpikingProductMixin, Attention):
    """Multi-head self-attention on spikes: `qkv`, QK^T, AV and `proj`.

    Shape:
        Input and output (B, L, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.add_product_neurons(config, self.num_heads, self.head_dim, self.num_heads, self.proj.weight.device)
        self.add_gate_neurons(config)

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

        q, k, v = self.q_neuron(q), self.k_neuron(k), self.v_neuron(v)
        x = self.spiking_product(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

        x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
        x = self.norm(x)
        if gate is not None and self.gate_neuron is not None and self.value_neuron is not None:
            x = self.value_neuron(x) * self.gate_neuron(gate)
        x = self.proj(x)
        x = self.proj_drop(x)
        return x


class SpikingAttentionRope(SpikingProductMixin, AttentionRope):
    """Self-attention with rotary embedding on spikes; keys of grouped queries fire once for their group.

    Shape:
        Input and output (B, L, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.add_product_neurons(config, self.num_heads, self.head_dim, self.num_kv_heads, self.proj.weight.device)
        self.add_gate_neurons(config)

    def forward(
            self,
            x,
            rope: Optional[torch.Tensor] = None,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ):
        B, N, C = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None

        if self.qkv is not None:
            qkv = self.qkv(x)
            qkv = qkv.reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            q = self.q_proj(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
            k = self.k_proj(x).reshape(B, N, self.num_kv_heads, self.head_dim).transpose(1, 2)
            v = self.v_proj(x).reshape(B, N, self.num_kv_heads, self.head_dim).transpose(1, 2)

        q, k = self.rotate(self.q_norm(q), self.k_norm(k), v, rope)

        q, k, v = self.q_neuron(q), self.k_neuron(k), self.v_neuron(v)
        if self.num_kv_groups > 1:
            k = k.repeat_interleave(self.num_kv_groups, dim=1)
            v = v.repeat_interleave(self.num_kv_groups, dim=1)
        x = self.spiking_product(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

        x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
        x = self.norm(x)
        if gate is not None and self.gate_neuron is not None and self.value_neuron is not None:
            x = self.value_neuron(x) * self.gate_neuron(gate)
        x = self.proj(x)
        x = self.proj_drop(x)
        return x


class SpikingEvaAttention(SpikingProductMixin, EvaAttention):
    """EVA's self-attention with rotary embedding on spikes.

    Shape:
        Input and output (B, L, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.add_product_neurons(config, self.num_heads, self.head_dim, self.num_heads, self.proj.weight.device)
        self.add_gate_neurons(config)

    def forward(
            self,
            x,
            rope: Optional[torch.Tensor] = None,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ):
        B, N, C = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None

        if self.qkv is not None:
            qkv = self.qkv(x)
            if self.q_bias is not None:
                qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))
            qkv = qkv.reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            q = self.q_proj(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)
            k = self.k_proj(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)
            v = self.v_proj(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)

        q, k = self.rotate(self.q_norm(q), self.k_norm(k), v, rope)

        q, k, v = self.q_neuron(q), self.k_neuron(k), self.v_neuron(v)
        x = self.spiking_product(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

        x = x.transpose(1, 2).reshape(B, N, C)
        x = self.norm(x)
        if gate is not None and self.gate_neuron is not None and self.value_neuron is not None:
            x = self.value_neuron(x) * self.gate_neuron(gate)
        x = self.proj(x)
        x = self.proj_drop(x)
        return x


class SpikingBeitAttention(SpikingProductMixin, beit.Attention):
    """BEiT's self-attention on spikes; the relative position bias is added to the scores, which are currents.

    Shape:
        Input and output (B, L, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        head_dim = self.proj.in_features // self.num_heads
        self.add_product_neurons(config, self.num_heads, head_dim, self.num_heads, self.proj.weight.device)

    def forward(self, x: torch.Tensor, shared_rel_pos_bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        B, N, C = x.shape

        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = qkv.reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)

        rel_pos_bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            rel_pos_bias = self._get_rel_pos_bias()
            if shared_rel_pos_bias is not None:
                rel_pos_bias = rel_pos_bias + shared_rel_pos_bias
        q, k, v = self.q_neuron(q), self.k_neuron(k), self.v_neuron(v)
        x = self.spiking_product(q, k, v, attn_mask=rel_pos_bias)

        x = x.transpose(1, 2).reshape(B, N, C)
        x = self.proj(x)
        x = self.proj_drop(x)
        return x


class SpikingDiffAttention(SpikingProductMixin, DiffAttention):
    """Differential attention (arXiv 2410.05258) on spikes.

    Shape:
        Input and output (B, L, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.add_product_neurons(
            config, 2 * self.num_heads, self.head_dim, 2 * self.num_heads, self.proj.weight.device,
            num_v_heads=self.num_heads, v_head_dim=2 * self.head_dim)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        B, N, C = x.shape

        q, k, v = self.qkv(x).chunk(3, dim=2)
        q = q.reshape(B, N, 2 * self.num_heads, self.head_dim).transpose(1, 2)
        k = k.reshape(B, N, 2 * self.num_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(B, N, self.num_heads, 2 * self.head_dim).transpose(1, 2)

        q, k = self.q_norm(q), self.k_norm(k)

        lambda_full = self._compute_lambda().type_as(q)
        q, k, v = self.q_neuron(q), self.k_neuron(k), self.v_neuron(v)
        x = self.spiking_diff_product(q, k, v, lambda_full, attn_mask=attn_mask, is_causal=is_causal)

        x = self.sub_norm(x)
        x = x * (1 - self.lambda_init)
        x = x.transpose(1, 2).reshape(B, N, C)

        x = self.norm(x)
        x = self.proj(x)
        x = self.proj_drop(x)
        return x


class SpikingParallelScalingBlock(SpikingProductMixin, ParallelScalingBlock):
    """Block with MLP and attention in parallel, fed by one projection, on spikes.

    Shape:
        Input and output (B, L, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.add_product_neurons(config, self.num_heads, self.head_dim, self.num_heads, self.in_proj.weight.device)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        B, N, C = x.shape

        # Combined MLP fc1 & qkv projections
        y = self.in_norm(x)
        y = self.in_proj(y)
        x_mlp, q, k, v = torch.split(y, self.in_split, dim=-1)
        if self.mlp_bias is not None:
            x_mlp = x_mlp + self.mlp_bias

        q = self.q_norm(q.view(B, N, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(k.view(B, N, self.num_heads, self.head_dim)).transpose(1, 2)
        v = v.view(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        q, k, v = self.q_neuron(q), self.k_neuron(k), self.v_neuron(v)
        x_attn = self.spiking_product(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        x_attn = x_attn.transpose(1, 2).reshape(B, N, C)

        x_mlp = self.mlp_act(x_mlp)
        x_mlp = self.mlp_drop(x_mlp)

        if self.out_proj is not None:
            y = self.out_proj(torch.cat((x_attn, x_mlp), dim=-1))
        else:
            y = self.attn_out_proj(x_attn) + self.mlp_out_proj(x_mlp)

        x = x + self.drop_path(self.ls(y))
        return x


class SpikingDiffParallelScalingBlock(SpikingProductMixin, DiffParallelScalingBlock):
    """Block with MLP and differential attention in parallel on spikes.

    Shape:
        Input and output (B, L, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.add_product_neurons(
            config, 2 * self.num_heads, self.head_dim, 2 * self.num_heads, self.in_proj.weight.device,
            num_v_heads=self.num_heads, v_head_dim=2 * self.head_dim)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        B, N, C = x.shape

        # Combined MLP fc1 & qkv projections
        y = self.in_norm(x)
        y = self.in_proj(y)
        x_mlp, q, k, v = torch.split(y, self.in_split, dim=-1)
        if self.mlp_bias is not None:
            x_mlp = x_mlp + self.mlp_bias

        q = q.reshape(B, N, 2 * self.num_heads, self.head_dim).transpose(1, 2)
        k = k.reshape(B, N, 2 * self.num_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(B, N, self.num_heads, 2 * self.head_dim).transpose(1, 2)

        q, k = self.q_norm(q), self.k_norm(k)

        lambda_full = self._compute_lambda().type_as(q)
        q, k, v = self.q_neuron(q), self.k_neuron(k), self.v_neuron(v)
        x_attn = self.spiking_diff_product(q, k, v, lambda_full, attn_mask=attn_mask, is_causal=is_causal)

        x_attn = self.sub_norm(x_attn)
        x_attn = x_attn * (1 - self.lambda_init)
        x_attn = x_attn.transpose(1, 2).reshape(B, N, C)

        x_mlp = self.mlp_act(x_mlp)
        x_mlp = self.mlp_drop(x_mlp)

        y = self.out_proj(torch.cat((x_attn, x_mlp), dim=-1))

        x = x + self.drop_path(self.ls(y))
        return x


class SpikingAttentionPoolLatent(SpikingProductMixin, AttentionPoolLatent):
    """Attention pooling with latent queries on spikes.

    Shape:
        Input (B, L, in_features), output (B, out_features), or (B, latent_len, out_features) without a pool type.
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.attn_drop = nn.Identity().train(self.training)  # this layer has none
        self.add_product_neurons(config, self.num_heads, self.head_dim, self.num_heads, self.kv.weight.device)

    def forward(self, x, attn_mask: Optional[torch.Tensor] = None):
        B, N, C = x.shape

        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)

        q_latent = self.latent.expand(B, -1, -1)
        q = self.q(q_latent).reshape(B, self.latent_len, self.num_heads, self.head_dim).transpose(1, 2)

        kv = self.kv(x).reshape(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)

        q, k = self.q_norm(q), self.k_norm(k)

        q, k, v = self.q_neuron(q), self.k_neuron(k), self.v_neuron(v)
        x = self.spiking_product(q, k, v, attn_mask=attn_mask)
        x = x.transpose(1, 2).reshape(B, self.latent_len, C)
        x = self.proj(x)
        x = self.proj_drop(x)

        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))

        if self.pool == 'token':
            x = x[:, 0]
        elif self.pool == 'avg':
            x = x.mean(1)
        return x


class SpikingAttentionPoolPrr(SpikingProductMixin, AttentionPoolPrr):
    """Patch representation refinement, an attention pool without weights, on spikes.

    Shape:
        Input (B, L, dim), output (B, dim).
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.attn_drop = nn.Identity().train(self.training)  # this layer has none
        self.add_product_neurons(config, self.num_heads, self.head_dim, self.num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape

        x = self.pre_norm(x)

        qkv = x.reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        q, k, v = self.q_neuron(qkv), self.k_neuron(qkv), self.v_neuron(qkv)
        x = self.spiking_product(q, k, v)
        x = x.transpose(1, 2).reshape(B, N, C)

        x = self.post_norm(x)

        if self.pool == 'token':
            x = x[:, 0]
        elif self.pool == 'avg':
            x = x.mean(1)
        return x
