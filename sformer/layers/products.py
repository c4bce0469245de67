"""The products: the one place where spikes meet weights, and spikes meet spikes.

Whatever else computes an SFormer (integers, bit planes, another library) replaces what is here.
"""
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from timm.models._features_fx import register_notrace_function, register_notrace_module

from ..neurons import FitConfig, LateralScaleAndFire, Neuron, SFNConfig, Spikes, new_neuron
from ..neurons.base import Observed, fits_octaves
from ..neurons.thresholds import MIN_STEP
from .multiplying import AV, QK, Multiplying, Product
from .padding import fired

__all__ = ['linear', 'multiply', 'softmax_numerators', 'AttentionProduct']

register_notrace_module(Neuron)  # symbolic tracing keeps neurons as they are: modules that fire

MAX_SCORES = 2 ** 22  # that attention computes at once at inference: all of ViT-B at 224 pixels, batch 8


def linear(
        neuron: Neuron | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
) -> torch.Tensor:
    """Product of the spikes on a current (..., C) with weights (D, C), plus a bias (D,): a current (..., D). Without a
    neuron, x is the decode of spikes.

    Raises:
        AssertionError: If x has another number of channels; the neuron would spread one over all.
    """
    torch._assert(x.shape[-1] == weight.shape[1], 'currents have another number of channels than the weights')
    return F.linear(x if neuron is None else fired(neuron, x), weight, bias)


def multiply(a_neuron: Neuron, a: torch.Tensor, b_neuron: Neuron, b: torch.Tensor) -> torch.Tensor:
    """Elementwise product of the spikes on two currents, as of a gate and a value, whose shapes broadcast."""
    product = getattr(a_neuron, 'multiply', None)  # of an execution whose neurons do so spike by spike
    return fired(a_neuron, a) * fired(b_neuron, b) if product is None else product(a, b_neuron, b)


def fired_for_tables(neuron: Neuron, x: torch.Tensor) -> torch.Tensor | Spikes:
    """What a neuron fires to meet tables, which `meet_table` takes."""
    return fired(neuron, x) if getattr(neuron, 'meet', None) is None else neuron.encode(x)


def meet_table(
        neuron: Neuron,
        spikes: torch.Tensor | Spikes,
        table: torch.Tensor,
        compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Product of what a neuron fired with a table of weights, by a function linear in both."""
    meet = getattr(neuron, 'meet', None)  # of an execution that has its own way
    return compute(spikes, table) if meet is None else meet(spikes, table, compute)


@torch.fx.wrap
@register_notrace_function
def softmax_numerators(
        scores: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
) -> torch.Tensor:
    """Numerators exp(s - max s) of the softmax over the keys, in [0, 1], of scores (B, H, L, S); zero in a row that may
    see no key, which so attends to nothing, as in torch's own attention."""
    masked = is_causal or attn_mask is not None
    if masked:
        scores = maybe_add_mask(scores, resolve_self_attn_mask(scores.shape[-2], scores, attn_mask, is_causal))
    strongest = scores.detach().amax(dim=-1, keepdim=True)
    if masked:  # or a row that sees no key is the difference of two infinities, and so is its gradient
        strongest = strongest.clamp_min(torch.finfo(strongest.dtype).min)
    return (scores - strongest).exp()


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """QK^T, (B, H, L, S), of (B, H, L, D) and (B, H, S, D)."""
    return q @ k.transpose(-2, -1)


def _scores_total(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q.sum(-2) * k.sum(-2)).sum()


def _values_total(attn: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (attn.sum(-2) * v.sum(-1)).sum()


class AttentionProduct(Multiplying):
    """Scaled dot-product attention on spikes: QK^T and AV.

    Softmax spikes are levels of the *numerators* exp(s - max s) in (0, 1], and each row of AV is divided by its own
    spike sum. The strongest key of a row always fires at the top level, whether the row is flat or peaked, and rows
    sum to one exactly; spikes of the normalised softmax would have to cover 0.01 and 1 with the same levels.

    Keys are centred per channel before they fire: a constant added to all keys moves every score of a row alike, to
    which softmax is blind.

    Without gradients, more than `max_scores` scores are computed in blocks of queries, which fit into caches, so memory
    grows with the number of tokens and not with its square. A row depends on no other: blocks fire the same levels, but
    for currents within float rounding of a boundary, as a matrix product may round otherwise than a part of it.

    Args:
        num_heads: Heads H of queries, keys and values.
        head_dim: Channels D of queries and keys per head.
        v_head_dim: Channels of values per head, if they are others.
        config: Neurons: of q and k a step per head times a power of two per channel, which cancel in QK^T, and of k a
            centre per channel; of v a step per channel (and a centre, with `config.silence`, which is free as rows sum
            to one), of the softmax a step per head.
        device: Device of the neurons.
        group_size: Heads of queries that share a head of keys, which so fires once for all of them.

    Shape:
        q (B, H, L, D), k (B, H, S, D), v (B, H, S, D'), output (B, H, L, D').
    """
    max_scores: float = MAX_SCORES

    def __init__(
            self,
            num_heads: int,
            head_dim: int,
            v_head_dim: int | None = None,
            config: SFNConfig = SFNConfig(),
            device=None,
            group_size: int = 1,
    ):
        super().__init__()
        self.group_size = group_size
        head, channel = (num_heads, 1, 1), (num_heads, 1, head_dim)
        meets = dict(meets_levels=True, device=device)
        make: Callable[..., Neuron] = LateralScaleAndFire if config.lateral else new_neuron
        self.q_neuron = make(channel, config, token=True, **meets)
        self.k_neuron = make(channel, config, center_shape=channel, token=True, **meets)
        self.v_neuron = make((num_heads, 1, v_head_dim or head_dim), config, folds=True, **meets)
        self.attn_neuron = new_neuron(head, config, signed=False, device=device)

    def multiplies(self) -> list[Product]:
        return [Product(QK, (self.q_neuron, self.k_neuron), scores, _scores_total),
                Product(AV, (self.attn_neuron, self.v_neuron), torch.matmul, _values_total)]

    def fit_neurons(self, statistics: dict[str, Observed], config: FitConfig) -> None:
        """Fit the neurons to what was observed at them, by name.

        QK^T sums over channels, so the steps of a channel of q and of k have to have one product in all channels of a
        head; what one of them gains, the other gives. Errors of a channel of q count by the power of that channel of k
        and the other way round, so balanced powers are best.
        """
        if not (fits_octaves(self.q_neuron) and fits_octaves(self.k_neuron)):
            super().fit_neurons(statistics, config)
            return
        q, k = statistics['q_neuron'], statistics['k_neuron']
        octaves = (q.rms().clamp_min(MIN_STEP).log2() - k.rms().clamp_min(MIN_STEP).log2()).div(2)
        octaves = octaves.unflatten(0, (-1, self.group_size)).mean(1, keepdim=True).expand(-1, self.group_size, -1, -1)
        octaves = (octaves - octaves.mean(-1, keepdim=True)).round().to(torch.int64).flatten(0, 1)
        self.q_neuron.fit(q, config, octaves)
        self.k_neuron.fit(k, config, -octaves)
        for neuron, name in ((self.v_neuron, 'v_neuron'), (self.attn_neuron, 'attn_neuron')):
            neuron.fit(statistics[name], config)

    def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.,
            is_causal: bool = False,
            scale: float | None = None,
    ) -> torch.Tensor:
        """Arguments are those of `F.scaled_dot_product_attention`."""
        q = fired(self.q_neuron, query)
        k = fired(self.k_neuron, key)
        v = fired(self.v_neuron, value)
        q = q * (query.shape[-1] ** -0.5 if scale is None else scale)
        # exact, and in float16 a sum over many keys would overflow before it is divided
        # (the strongest key fires its top level, near 1, so a sum is either that or zero)
        v = v / 32
        rows = self._rows_at_once(q, k, is_causal)
        if rows is None:
            return self._attend(q, k, v, attn_mask, dropout_p, is_causal)
        blocks = q.split(rows, dim=-2)
        if attn_mask is None or attn_mask.shape[-2] == 1:
            masks: Sequence[torch.Tensor | None] = [attn_mask] * len(blocks)
        else:
            masks = attn_mask.split(rows, dim=-2)
        pairs = zip(blocks, masks, strict=True)
        return torch.cat([self._attend(block, k, v, mask, dropout_p) for block, mask in pairs], dim=-2)

    def _rows_at_once(self, q: torch.Tensor, k: torch.Tensor, is_causal: bool) -> int | None:
        """Queries in a block; None if all of them are, as they are where a graph is made of what is computed."""
        if (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
                or isinstance(q, torch.fx.Proxy) or is_causal):
            return None
        scores = q.shape[:-1].numel() * k.shape[-2]
        return None if scores <= self.max_scores else math.ceil(q.shape[-2] / math.ceil(scores / self.max_scores))

    def _attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            attn_mask: torch.Tensor | None,
            dropout_p: float,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Attention of queries, which are scaled, to keys, on values that are divided by 32: all are decoded spikes."""
        attn = fired(self.attn_neuron, softmax_numerators(q @ k.transpose(-2, -1), attn_mask, is_causal))
        total = attn.sum(dim=-1, keepdim=True)
        if dropout_p:
            attn = F.dropout(attn, dropout_p)
        return (attn @ v) / (total / 32).clamp_min(1e-4)
