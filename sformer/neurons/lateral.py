"""Scale-and-fire neurons that take one another into account.

Neurons that fire by themselves make the same noise in every direction, of which the weights that follow barely see
most. Here the channels of a site fire in groups, and what a group leaves out moves the potentials of those that fire
after it, such that the errors of all cancel in what follows.

Let e be what all channels leave out, and `e' H e` what that costs (H from the weights that follow). Of errors of the
groups so far, those of all others are best `-H_rr^-1 H_rg e_g`. If so much is fed back, the cost is, whatever fires,

    e' H e = sum over groups of d_g' S_g d_g,     S_g = H_gg - H_gr H_rr^-1 H_rg,

with d_g what a group leaves out of its potential as it was fed, and r the channels that fire after g: a Schur
complement instead of the diagonal block that noise costs otherwise. This is the triangular solve by which GPTQ (arXiv
2210.17323) rounds weights, for what is rounded at run time.
"""
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Unpack

import torch

from .base import Spikes
from .config import SFNConfig
from .levels import EXACT
from .scale_and_fire import ScaleAndFire, SiteOptions

__all__ = ['LateralScaleAndFire', 'group_sizes', 'num_feedback']

SPIKES_PER_LEVEL = 4  # lateral spikes that make up the mean distance between two levels
LARGEST_SPIKE = 31  # 5 bits and a sign
LARGEST_WEIGHT = 127
FEEDBACK_DAMPING = 0.01  # of the mean cost of a channel: no channel has to take up what others take up more easily


def group_sizes(channels: int, groups: int) -> list[int]:
    """Channels of each group, all alike but for the last ones."""
    size = -(-channels // groups)
    return [min(size, channels - start) for start in range(0, channels, size)]


def num_feedback(channels: int, groups: int) -> int:
    """Weights of the feedback: from each channel to those of all groups that fire after it."""
    return (channels ** 2 - sum(size ** 2 for size in group_sizes(channels, groups))) // 2


class LateralFired(NamedTuple):
    """What a site fires, in the order in which its channels do.

    Args:
        levels: Before they are multiplied, as of `ScaleAndFire`.
        token_scale: Factor per token.
        spikes: Lateral spikes, whole numbers in float32, in the shape of levels: what each channel tells those that
            fire after it.
    """
    levels: torch.Tensor
    token_scale: torch.Tensor | None
    spikes: torch.Tensor


class LateralScaleAndFire(ScaleAndFire):
    """Scale-and-fire neuron, one timestep, whose channels fire in groups that feed back to one another.

    What a channel leaves out is sent as a lateral spike, a small signed integer of quarters of the mean distance
    between its levels; residuals below `config.lateral_zone` of that distance send none. Feedback weights are int8 with
    a step per channel that they move. So sums of lateral spikes are exact wherever they are computed, and all
    executions agree on them. The factor per token is taken of potentials before feedback.

    Args:
        shape: (C,), or (H, 1, C) of heads that fire each by itself.
        config: `config.lateral` groups.
        **kwargs: As of `ScaleAndFire`.

    Attributes:
        order: Channels in the order in which they fire, int64 (C,).
        feedback: Feedback weights, int8: for each group but the last a matrix (channels of the group, channels after
            it), or one per head, one after the other.
        feedback_step: What a feedback weight of one stands for, by channel in that order, float32 (*shape).

    Shape:
        As of `ScaleAndFire`.
    """
    order: torch.Tensor
    feedback: torch.Tensor
    feedback_step: torch.Tensor

    def __init__(self, shape: Sequence[int], config: SFNConfig = SFNConfig(), **kwargs: Unpack[SiteOptions]):
        super().__init__(shape, config, **kwargs)
        self.heads, channels = tuple(shape[:-2]), shape[-1]
        self.sizes = group_sizes(channels, config.lateral)
        self.largest_spike = min(LARGEST_SPIKE, EXACT // (LARGEST_WEIGHT * channels))
        device = self.step.device
        self.register_buffer('order', torch.arange(channels, device=device))
        size = math.prod(self.heads) * num_feedback(channels, config.lateral)
        self.register_buffer('feedback', torch.zeros(size, dtype=torch.int8, device=device))
        self.register_buffer('feedback_step', torch.ones(tuple(shape), dtype=torch.float32, device=device))

    @property
    def spacing(self) -> torch.Tensor:
        """Mean distance between the levels of each channel, in the unit of the current, of the branch that reaches
        further, float32 (*shape)."""
        return self.step * self.top_levels.amax(0) / self.config.levels

    @torch.no_grad()
    def set_feedback(self, cost: torch.Tensor) -> torch.Tensor:
        """Set order and feedback weights such that errors are least in what follows.

        Args:
            cost: The matrix H of the cost `e' H e` of errors e of the current, (C, C), or one per head, (H, C, C), as
                of `weight.T @ weight`; computed with in float64.

        Returns:
            Share of its cost that noise of a channel keeps, in (0, 1], float32 (*shape): the diagonal of Schur
            complements over that of H.

        Raises:
            ValueError: If it is not finite.
        """
        spacing = self.spacing.to('cpu', torch.float64).view(*self.heads, -1)
        # of errors in distances between levels
        cost = spacing[..., None] * cost.detach().to('cpu', torch.float64) * spacing[..., None, :]
        if not torch.isfinite(cost).all():
            raise ValueError('the cost of errors is NaN or infinite.')
        each = cost.diagonal(dim1=-2, dim2=-1)
        order = torch.argsort(each.reshape(-1, len(self.order)).mean(0), descending=True, stable=True)
        damping = FEEDBACK_DAMPING * each.mean(-1)[..., None, None]
        damping = torch.where(damping > 0, damping, 1.)  # of what nothing reads, nothing is fed back
        cost = cost[..., order, :][..., order] + damping * torch.eye(len(order), dtype=torch.float64, device='cpu')
        # H^-1 = U'U, and so H_gr H_rr^-1 = -U_gg^-1 U_gr, of all groups at once
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(cost)), upper=True)
        parts = [-torch.linalg.solve_triangular(
            factor[..., group, group], factor[..., group, group.stop:], upper=True) for group in self._places()]
        largest = torch.zeros_like(spacing)
        for group, part in zip(self._places(), parts, strict=True):
            after = largest[..., group.stop:]
            after.copy_(torch.maximum(after, part.abs().amax(-2)))
        step = torch.where(largest > 0, largest / LARGEST_WEIGHT, 1.).clamp_min(torch.finfo(torch.float32).tiny)
        whole = [(part / step[..., None, group.stop:]).round().flatten()
                 for group, part in zip(self._places(), parts, strict=True)]
        shares = [torch.linalg.inv(factor[..., group, group]).square().sum(-1) for group in self._places()]
        share = torch.empty_like(spacing)
        share[..., order] = torch.cat(shares, -1) / cost.diagonal(dim1=-2, dim2=-1)
        self._set(order=order, feedback_step=step.view(self.step.shape).to(torch.float32),
                  feedback=torch.cat(whole).to(torch.int8))
        return share.view(self.step.shape).to(torch.float32)

    def _places(self) -> list[slice]:
        """Where in the order the channels of each group are."""
        ends = [*itertools.accumulate(self.sizes)]
        return [slice(end - size, end) for size, end in zip(self.sizes, ends, strict=True)]

    def groups(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Places in the order of the channels of each group, and its feedback weights to those after it, int8 (channels
        of the group, channels after it), or so for each head."""
        places, channels = self._places(), len(self.order)
        shapes = [(*self.heads, group.stop - group.start, channels - group.stop) for group in places]
        parts = self.feedback.split([math.prod(shape) for shape in shapes])
        for group, part, shape in zip(places, parts, shapes, strict=True):
            yield group, part.view(shape)

    @property
    def listeners(self) -> torch.Tensor:
        """Channels that each channel feeds back to, int64 (C,)."""
        after = [len(self.order) - group.stop for group in self._places()]
        device = self.order.device
        each = torch.tensor(after, device=device).repeat_interleave(torch.tensor(self.sizes, device=device))
        return torch.empty_like(self.order).scatter_(0, self.order, each)

    def _problem(self, name: str, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> str:
        problem = super()._problem(name, value, state)
        if problem or value.is_meta:
            return problem
        if name == 'order' and not torch.equal(value.sort().values.cpu(), torch.arange(len(value), device='cpu')):
            return 'does not name each channel once'
        if name == 'feedback_step' and not (value > 0).all():
            return 'is not positive'
        return ''

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, feedback between {len(self.sizes)} groups'

    def encode(self, x: torch.Tensor) -> Spikes:
        """Spikes on a current, as of `ScaleAndFire`, and lateral spikes, int8."""
        fired, back = self._fire_in_groups(x.detach(), self.threshold), torch.argsort(self.order)
        k = self._multiplied_(_taken(fired.levels, back), self.multiplier)
        spikes = _taken(fired.spikes, back).to(torch.int8)
        return Spikes(k.to(torch.int8), self.step, fired.token_scale, self.center, spikes)

    def _fire(self, x: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        fired = self._fire_in_groups(x, threshold)
        return _taken(fired.levels, torch.argsort(self.order)), fired.token_scale

    def _fire_in_groups(self, x: torch.Tensor, threshold: torch.Tensor) -> LateralFired:
        row = self._row(self._divided(self._loud(x), threshold))
        order = self.order
        h = self._potential(x)
        rest = _taken(h if row is None else h / row, order)
        threshold = threshold[..., order]
        amplitude = (self.multiplier * self.step)[..., order]
        quiet = None if self.quiet is None else self.quiet[..., order]
        spacing = self.spacing[..., order]
        moved = self.feedback_step * spacing / SPIKES_PER_LEVEL  # by a sum of one
        parts = SPIKES_PER_LEVEL / spacing
        levels, spikes = [], []
        for group, feedback in self.groups():
            h, rest = rest[..., :feedback.shape[-2]], rest[..., feedback.shape[-2]:]
            loud = h
            if quiet is not None:
                loud = torch.where((h if row is None else h * row).abs() < quiet[..., group], 0., h)
            k = self._levels_at(self._divided(loud, threshold[..., group]))
            levels.append(k)
            if not feedback.numel():  # nobody listens to the last group
                spikes.append(torch.zeros_like(k))
                break
            sent = self._spikes_of(h - self._multiplied_(k.clone(), amplitude[..., group]), parts[..., group])
            spikes.append(sent)
            rest = rest + _sums(sent, feedback) * moved[..., group.stop:]
        return LateralFired(torch.cat(levels, -1), row, torch.cat(spikes, -1))

    def _spikes_of(self, left_out: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Lateral spikes that tell what levels leave out."""
        e = left_out * parts
        sent = e.round().clamp(-self.largest_spike, self.largest_spike)
        return sent.mul_(e.abs() >= SPIKES_PER_LEVEL * self.config.lateral_zone)


def _taken(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Channels of a tensor in an order; as a matrix, since torch takes a tenth of the time for that."""
    return x.reshape(-1, x.shape[-1]).index_select(1, order).view(x.shape)


def _sums(sent: torch.Tensor, feedback: torch.Tensor) -> torch.Tensor:
    """Sums of lateral spikes times feedback weights, exact in float32, which is not to be cast to less."""
    kind = sent.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return sent @ feedback.to(torch.float32)
    return sent @ feedback.to(torch.float32)
