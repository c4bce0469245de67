"""The products: the one place where spikes meet weights, and spikes meet spikes.

Whatever else computes an SFormer (integers, bit planes, another library) replaces what is here.
"""
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from timm.models._features_fx import register_notrace_function, register_notrace_module

from ..neurons import FitConfig, LateralScaleAndFire, Neuron, SFNConfig, Spikes, new_neuron
from ..neurons.base import Observed, fits_octaves
from ..neurons.thresholds import MIN_STEP
from .multiplying import AV, MAPS, QK, Multiplying, Product
from .padding import fired

__all__ = [
    'linear', 'multiply', 'fired_for_tables', 'meet_table', 'softmax_numerators', 'ScoreProduct', 'ValueProduct',
    'AttentionProduct', 'MixedProduct',
]

register_notrace_module(Neuron)  # symbolic tracing keeps neurons as they are: modules that fire

MASKED = -50.  # less is added to scores of keys that are not to be seen
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


def multiply(
        a_neuron: Neuron,
        a: torch.Tensor,
        b_neuron: Neuron,
        b: torch.Tensor,
        compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mul,
) -> torch.Tensor:
    """Product of the spikes on two currents: elementwise, as of a gate and a value, whose shapes broadcast, or by
    another function linear in both, to whose result the steps of both broadcast."""
    product = getattr(a_neuron, 'multiply', None)  # of an execution whose neurons do so spike by spike
    if product is not None:
        return product(a, b_neuron, b, compute)
    return compute(fired(a_neuron, a), fired(b_neuron, b))


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
    return compute(cast(torch.Tensor, spikes), table) if meet is None else meet(spikes, table, compute)


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


def keys_rest(neuron: object, attn_mask: torch.Tensor | None, is_causal: bool = False) -> bool:
    """Whether keys for which the neuron of the softmax is silent count as the mean of all values. Each row is then
    divided by the sum of its numerators, of which fired keys have their own part. Not where some keys are hidden."""
    config = getattr(neuron, 'config', None)
    return getattr(config, 'keys_rest', False) and not is_causal and (
        attn_mask is None or attn_mask.dtype != torch.bool)


def with_rest(
        out: torch.Tensor,
        total: torch.Tensor,
        whole: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of values and of their weights once silent keys count as the mean of the values that a row may see
    (`keys_rest`); keys that a mask adds less than -50 to, as of padding and of shifted windows, are hidden.

    Args:
        out: Sums over keys that fired, (B, H, L, D).
        total: Sums of what they fired, (B, H, L, 1).
        whole: Sums of numerators in the same unit, (B, H, L, 1).
        v: Values, (B, H, S, D).
        attn_mask: What was added to scores, broadcastable to (B, H, L, S).
    """
    if attn_mask is None:
        mean = v.mean(dim=-2, keepdim=True)
    else:
        seen = (attn_mask > MASKED).to(v.dtype)
        mean = seen @ v / seen.sum(dim=-1, keepdim=True).clamp_min(1)
    return out + (whole - total) * mean, whole


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """QK^T, (B, H, L, S), of (B, H, L, D) and (B, H, S, D)."""
    return q @ k.transpose(-2, -1)


def _scores_total(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q.sum(-2) * k.sum(-2)).sum()


def _values_total(attn: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (attn.sum(-2) * v.sum(-1)).sum()


class ScoreProduct(Multiplying):
    """QK^T on spikes.

    Keys are centred per channel before they fire: a constant added to all keys moves every score of a row alike, to
    which softmax is blind.

    Args:
        num_heads: Heads H of queries and keys.
        head_dim: Channels D of queries and keys per head; 1 where they are tokens, whose number is the image's.
        config: Neurons: a step per head times a power of two per channel, which cancel in QK^T, and of k a centre per
            channel.
        device: Device of the neurons.
        group_size: Heads of queries that share a head of keys, which so fires once for all of them.
        centered: Whether the softmax is what reads scores, so that keys have a centre.

    Shape:
        q (B, H, L, D), k (B, H, S, D), output (B, H, L, S).
    """

    def __init__(
            self,
            num_heads: int,
            head_dim: int,
            config: SFNConfig = SFNConfig(),
            device=None,
            group_size: int = 1,
            centered: bool = True,
    ):
        Multiplying.__init__(self)  # and nothing of the other half of attention
        self.group_size = group_size
        channel = (num_heads, 1, head_dim)
        make: Callable[..., Neuron] = LateralScaleAndFire if config.lateral and head_dim > 1 else new_neuron
        options = dict(token=True, meets_levels=True, device=device)
        self.q_neuron = make(channel, config, **options)
        self.k_neuron = make(channel, config, center_shape=channel if centered else None, **options)

    def multiplies(self) -> list[Product]:
        return [Product(QK, (self.q_neuron, self.k_neuron), scores, _scores_total)]

    def fit_neurons(self, statistics: dict[str, Observed], config: FitConfig) -> None:
        """Fit the neurons to what was observed at them, by name.

        QK^T sums over channels, so the steps of a channel of q and of k have to have one product in all channels of a
        head; what one of them gains, the other gives. Errors of a channel of q count by the power of that channel of k
        and the other way round, so balanced powers are best.
        """
        statistics = dict(statistics)
        if fits_octaves(self.q_neuron) and fits_octaves(self.k_neuron):
            q, k = statistics.pop('q_neuron'), statistics.pop('k_neuron')
            octaves = (q.rms().clamp_min(MIN_STEP).log2() - k.rms().clamp_min(MIN_STEP).log2()).div(2)
            octaves = octaves.unflatten(0, (-1, self.group_size)).mean(1, keepdim=True)
            octaves = octaves.expand(-1, self.group_size, -1, -1)
            octaves = (octaves - octaves.mean(-1, keepdim=True)).round().to(torch.int64).flatten(0, 1)
            self.q_neuron.fit(q, config, octaves)
            self.k_neuron.fit(k, config, -octaves)
        super().fit_neurons(statistics, config)

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return scores(fired(self.q_neuron, query), fired(self.k_neuron, key))


class ValueProduct(Multiplying):
    """AV on spikes, of scores that are masked and biased.

    Softmax spikes are levels of the *numerators* exp(s - max s) in (0, 1], and each row of AV is divided by its own
    spike sum (or, with `config.keys_rest`, by that of its numerators, and silent keys count as the mean of all values).
    The strongest key of a row always fires at the top level, whether the row is flat or peaked, and rows sum to one
    exactly; spikes of the normalised softmax would have to cover 0.01 and 1 with the same levels.

    Args:
        num_heads: Heads H.
        head_dim: Channels D' of values per head; 1 where they are tokens.
        config: Neurons: of v a step per channel (and a centre, with `config.silence`, which is free as rows sum to
            one), of the softmax a step per head.
        device: Device of the neurons.

    Shape:
        Scores (B, H, L, S), v (B, H, S, D'), output (B, H, L, D').
    """

    def __init__(self, num_heads: int, head_dim: int, config: SFNConfig = SFNConfig(), device=None):
        Multiplying.__init__(self)
        make: Callable[..., Neuron] = LateralScaleAndFire if config.lateral and head_dim > 1 else new_neuron
        self.v_neuron = make((num_heads, 1, head_dim), config, folds=True, meets_levels=True, device=device)
        self.attn_neuron = new_neuron((num_heads, 1, 1), config, signed=False, device=device)

    def multiplies(self) -> list[Product]:
        return [Product(AV, (self.attn_neuron, self.v_neuron), torch.matmul, _values_total)]

    def forward(self, scores: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.) -> torch.Tensor:
        return self._weighed(scores, fired(self.v_neuron, value) / 32, None, dropout_p)

    def _weighed(
            self,
            scores: torch.Tensor,
            v: torch.Tensor,
            attn_mask: torch.Tensor | None,
            dropout_p: float,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Means of values, which are decoded spikes divided by 32: in float16 a sum over many keys would overflow
        before it is divided. That is exact, and the strongest key fires its top level, near 1, so a sum of spikes is
        either that or zero."""
        numerators = softmax_numerators(scores, attn_mask, is_causal)
        attn = fired(self.attn_neuron, numerators)
        total = attn.sum(dim=-1, keepdim=True)
        if dropout_p:
            attn = F.dropout(attn, dropout_p)
        out = attn @ v
        if keys_rest(self.attn_neuron, attn_mask, is_causal):
            out, total = with_rest(out, total, numerators.sum(dim=-1, keepdim=True), v, attn_mask)
        return out / (total / 32).clamp_min(1e-4)


class AttentionProduct(ScoreProduct, ValueProduct):
    """Scaled dot-product attention on spikes: QK^T and AV.

    Without gradients, more than `max_scores` scores are computed in blocks of queries, which fit into caches, so memory
    grows with the number of tokens and not with its square. A row depends on no other: blocks fire the same levels, but
    for currents within float rounding of a boundary, as a matrix product may round otherwise than a part of it.

    Args:
        num_heads: Heads H of queries, keys and values.
        head_dim: As of `ScoreProduct`.
        v_head_dim: Channels of values per head, if they are others.
        config: As of `ScoreProduct` and `ValueProduct`.
        device: Device of the neurons.
        group_size: As of `ScoreProduct`.

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
        ScoreProduct.__init__(self, num_heads, head_dim, config, device, group_size)
        values = ValueProduct(num_heads, v_head_dim or head_dim, config, device)
        self.v_neuron, self.attn_neuron = values.v_neuron, values.attn_neuron

    def multiplies(self) -> list[Product]:
        return [*ScoreProduct.multiplies(self), *ValueProduct.multiplies(self)]

    def forward(  # type: ignore[override]
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
        v = fired(self.v_neuron, value) / 32
        q = q * (query.shape[-1] ** -0.5 if scale is None else scale)
        rows = self._rows_at_once(q, k, is_causal)
        if rows is None:
            return self._weighed(scores(q, k), v, attn_mask, dropout_p, is_causal)
        blocks = q.split(rows, dim=-2)
        if attn_mask is None or attn_mask.shape[-2] == 1:
            masks: Sequence[torch.Tensor | None] = [attn_mask] * len(blocks)
        else:
            masks = attn_mask.split(rows, dim=-2)
        pairs = zip(blocks, masks, strict=True)
        rows_of = [self._weighed(scores(block, k), v, mask, dropout_p) for block, mask in pairs]
        return torch.cat(rows_of, dim=-2)

    def _rows_at_once(self, q: torch.Tensor, k: torch.Tensor, is_causal: bool) -> int | None:
        """Queries in a block; None if all of them are, as they are where a graph is made of what is computed."""
        if (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
                or isinstance(q, torch.fx.Proxy) or is_causal):
            return None
        scores = q.shape[:-1].numel() * k.shape[-2]
        return None if scores <= self.max_scores else math.ceil(q.shape[-2] / math.ceil(scores / self.max_scores))


class MixedProduct(Multiplying):
    """Maps of attention that were mixed after the softmax, whose rows sum to anything, times values.

    Args:
        num_heads: Heads H.
        head_dim: Channels D of values per head.
        config: Neurons: of maps a step per head, of v one per channel.
        device: Device of the neurons.

    Shape:
        Maps (B, H, L, S), v (B, H, S, D), output (B, H, L, D).
    """

    def __init__(self, num_heads: int, head_dim: int, config: SFNConfig = SFNConfig(), device=None):
        super().__init__()
        self.attn_neuron = new_neuron((num_heads, 1, 1), config, token=True, device=device)
        self.v_neuron = new_neuron((num_heads, 1, head_dim), config, device=device)

    def multiplies(self) -> list[Product]:
        return [Product(MAPS, (self.attn_neuron, self.v_neuron), torch.matmul, _values_total)]

    def forward(self, maps: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return multiply(self.attn_neuron, maps, self.v_neuron, value, torch.matmul)
