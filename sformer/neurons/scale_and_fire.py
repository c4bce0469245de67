"""The scale-and-fire neuron."""
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch

from .base import Neuron, Spikes
from .config import DEFAULT_RANGE, FitConfig, SFNConfig
from .functional import fire, firing_boundaries, level_values, straight_through, token_reach
from .levels import MAX_LEVEL, MAX_MET_LEVEL, MAX_WIDE_LEVEL
from .statistics import CurrentStatistics
from .thresholds import exact_step, fit_density_levels, fit_steps

__all__ = ['ScaleAndFire', 'SiteOptions']

FEW_LEVELS = 11
TINY = 1e-30  # a token without any current is silent at whatever threshold


class SiteOptions(TypedDict, total=False):
    """What a place says of the neurons that fire there: further arguments of `ScaleAndFire`."""
    signed: bool
    center_shape: Sequence[int] | None
    folds: bool
    token: bool
    fire_function: str | None
    meets_levels: bool
    device: torch.device | None


class ScaleAndFire(Neuron):
    """Scale-and-fire neuron (SFN), one timestep.

    On the positive branch a membrane potential h fires the level `k = m y_i`, `i = #{j : h >= step * m * b_j}`, with
    the multiplier m of that branch; a signed neuron does the same on -h with the multiplier of its negative branch. The
    output is `step * k`, one step times one signed integer. `step * m` are the thresholds of the paper. Backward is
    straight-through inside of the firing range, which ends half a threshold beyond the top level, and zero outside.

    A spike may carry `gain` thresholds instead of one, as rounding and clipping would shrink the signal otherwise:
    `step` is what a spike carries, and the threshold is `step * m / gain`.

    With `config.silence` potentials of a magnitude below `quiet`, in the unit of the current, are silent, whatever the
    thresholds are.

    Source: arXiv 2510.23383, scale-and-fire neuron, extended by commensurate thresholds per branch.

    Args:
        shape: Shape of the step; broadcasts against the input current: (C,) for channels of (..., C), (H, 1, 1) for
            heads of (B, H, L, D), (1,) for a tensor.
        config: Number of levels, fire function, initial membrane potential and dead zone.
        signed: Two branches of int8 levels by `config.signed_fire`; or only the positive one, for softmax numerators,
            by `config.attention_fire`, with levels of up to 14 bits.
        fire_function: Name of the fire function, if it is another than that of signed currents or softmax numerators in
            `config`.
        meets_levels: Whether its spikes are multiplied by spikes, not by weights. Its levels are then fitted such that
            none exceeds 63, if `config.levels` allows and they are not few: two operands of 6 bits and a sign are what
            every processor multiplies exactly in 8 bits.
        center_shape: If given, a buffer `center` of this shape is subtracted from the input before it fires.
        folds: Whether a constant is free after the product that follows; with `config.silence`, `center` is one per
            element of `shape`.
        token: Whether a factor per token, over the last dimension, is free after the product that follows; it is used
            if `config.token_scale` says so. The last of `shape` is the number of potentials that share it.
        device: Device of the buffers; they are float32 on every device.

    Shape:
        Input and output (B, ...), where `shape` broadcasts.
    """
    takes_octaves = True
    token_reach: float
    step: torch.Tensor
    gain: torch.Tensor
    multiplier: torch.Tensor
    levels: torch.Tensor
    center: torch.Tensor | None
    quiet: torch.Tensor | None

    def __init__(
            self,
            shape: Sequence[int],
            config: SFNConfig = SFNConfig(),
            signed: bool = True,
            center_shape: Sequence[int] | None = None,
            folds: bool = False,
            token: bool = False,
            fire_function: str | None = None,
            meets_levels: bool = False,
            device=None,
    ):
        super().__init__(device=device)
        self.config = config
        self.meets_levels = meets_levels
        self.signed = signed
        self.fire_function = fire_function or (config.signed_fire if signed else config.softmax_fire)
        self.token = token and config.token_scale
        self.token_reach = token_reach(
            self.fire_function, config.levels, shape[-1], config.initial_potential) if self.token else 1.
        self.top = MAX_LEVEL if signed else MAX_WIDE_LEVEL
        values = self._level_values()
        dd = dict(device=device, dtype=torch.float32)  # whatever the default dtype is
        # a number where levels are known, whose buffer is of integers, which inductor does not vectorise
        known = self.fire_function != 'density'
        self.level_reach = (values.new_tensor(self.token_reach) / values[-1]).item() if known else None
        reach = DEFAULT_RANGE * config.scale if signed else 1.
        step = _reaching(reach, values[-1])
        self.register_buffer('step', torch.full(tuple(shape), step, **dd))
        self.register_buffer('gain', torch.ones((), **dd))
        # float32 for the same reason, uint8 where it is saved
        self.register_buffer('multiplier', torch.ones((2 if signed else 1, *shape), **dd))
        # int32, which gloo and NCCL broadcast, int16 where it is saved
        self.register_buffer('levels', values.to(self.step.device, torch.int32))
        if folds and config.silence:
            center_shape = shape
        self.register_buffer('center', None if center_shape is None else torch.zeros(tuple(center_shape), **dd))
        self.register_buffer('quiet', torch.zeros(tuple(shape), **dd) if config.silence else None)

    def _level_values(self) -> torch.Tensor:
        """Level values before any fit, (N,)."""
        return level_values(self.fire_function, self.config.levels, self.top)

    @property
    def threshold(self) -> torch.Tensor:
        """Thresholds `step * m / gain`, float32, (2, *shape): of the positive and the negative branch; (1, *shape) if
        unsigned."""
        return self.multiplier * self.step / self.gain

    @property
    def top_levels(self) -> torch.Tensor:
        """The largest level that each branch fires, as a magnitude, float32, (2, *shape); (1, *shape) if unsigned."""
        return self.multiplier * self.levels[-1]

    @property
    def level_range(self) -> tuple[int, int]:
        highest = self.top_levels.flatten(1).amax(1).tolist()
        return (-int(highest[1]) if self.signed else 0), int(highest[0])

    def set_state(
            self,
            step: torch.Tensor,
            multiplier: torch.Tensor | None = None,
            levels: torch.Tensor | None = None,
            center: torch.Tensor | None = None,
            gain: float = 1.,
            **more: torch.Tensor,
    ) -> None:
        """Set fitted values and mark the neuron as calibrated.

        Args:
            step: (*shape), in the unit of the input current. Its lowest bits are dropped, so that all products with
                levels are exact in float32.
            multiplier: (2, *shape) or, for one branch, (1, *shape) integers >= 1; ones if None.
            levels: New level values, (N,) integers. Only `density` may change them.
            center: New centre, the shape of `center`.
            gain: What a spike carries, in thresholds.
            **more: What a subclass adds.

        Raises:
            ValueError: If a value is not finite, not positive, of another shape, or levels do not fit into their bits.
        """
        self._set(
            step=exact_step(step),
            gain=gain,
            multiplier=torch.ones_like(self.multiplier) if multiplier is None else multiplier,
            levels=self.levels if levels is None else levels,
            **({} if center is None else {'center': center}), **more)
        self.mark_calibrated()

    def set_quiet(self, quiet: torch.Tensor) -> None:
        """Set the magnitudes below which potentials are silent, (*shape), in the unit of the current.

        Raises:
            ValueError: If a value is not finite, negative or of another shape.
        """
        self._set(quiet=quiet)

    def encode(self, x: torch.Tensor) -> Spikes:
        """Spikes on a current (B, ...): levels int8, or int16 of softmax numerators; step (*shape); token_scale
        (..., 1) where thresholds follow the token."""
        k, row = self._fire(x.detach(), self.threshold)
        k = self._multiplied_(k, self.multiplier)
        return Spikes(k.to(torch.int8 if self.signed else torch.int16), self.step, row, self.center)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        amplitude = self.multiplier * self.step  # exact, and so is its product with levels, as steps are short
        threshold = amplitude / self.gain
        k, row = self._fire(x.detach(), threshold)
        out = self._multiplied_(k, amplitude)
        if row is not None:
            out = out.mul_(row)
        if self.center is not None:
            out = out.add_(self.center)
        out = out.to(x.dtype)
        if torch.is_grad_enabled():
            top = self.step / self.gain * (self.top_levels + self.multiplier / 2)
            upper, lower = top[0], -top[1] if self.signed else torch.zeros_like(top[0])
            if row is not None:
                upper, lower = upper * row, lower * row
            out = straight_through(out, self._potential(x), lower, upper)
        return out

    def _potential(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()  # as thresholds are, so that bfloat16 currents fire where float32 ones do
        return x if self.center is None else x - self.center

    def _loud(self, x: torch.Tensor) -> torch.Tensor:
        """Membrane potential, 0 where it is silent whatever the thresholds are."""
        h = self._potential(x)
        return h if self.quiet is None else torch.where(h.abs() < self.quiet, 0., h)

    # Each branch by itself, and their sum, which is exact: a select per element takes torch six times as long on CPUs.
    # In place where it may be: large tensors are as slow to come by as to compute.

    def _divided(self, h: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """Membrane potential in thresholds (2, *shape) of the branch that it is on."""
        if not self.signed:
            return h / threshold[0]
        return h.clamp_min(0).div_(threshold[0]).add_(h.clamp_max(0).div_(threshold[1]))

    def _multiplied_(self, k: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Levels times the value (2, *shape) of their branch; k is used up."""
        if not self.signed:
            return k.mul_(values[0])
        return k.clamp_min(0).mul_(values[0]).add_(k.clamp_max_(0).mul_(values[1]))

    def _fire(self, x: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Levels before they are multiplied, and factor per token."""
        u = self._divided(self._loud(x), threshold)
        row = self._row(u)
        return self._levels_at(u if row is None else u.div_(row)), row

    def _row(self, u: torch.Tensor) -> torch.Tensor | None:
        """Factor per token of potentials in thresholds, (..., 1); None where thresholds do not follow tokens."""
        if not self.token:
            return None
        # torch's vector_norm is not vectorised
        largest = torch.maximum(u.amax(-1, keepdim=True), -u.amin(-1, keepdim=True)).clamp_min(TINY)
        return largest * (self.token_reach / self.levels[-1] if self.level_reach is None else self.level_reach)

    def _levels_at(self, u: torch.Tensor) -> torch.Tensor:
        """Levels, before they are multiplied, that potentials in thresholds fire."""
        config = self.config
        k = fire(u, self.fire_function, self.levels, config.initial_potential, config.dead_zone, self.top)
        return k if self.signed else k.clamp_(min=0)

    def statistics(self) -> CurrentStatistics | None:
        if not self.signed and self.fire_function != 'density':
            return None  # the strongest key of a row is exactly 1, whatever the image
        center = None if self.center is None else tuple(self.center.shape)
        return CurrentStatistics(tuple(self.step.shape), self.signed, center, self.quiet)

    def fit(
            self,
            statistics: CurrentStatistics | None,
            config: FitConfig = FitConfig(),
            octaves: torch.Tensor | None = None,
    ) -> None:
        """Fit step, multipliers, levels (`density`) and centre to what was observed.

        Args:
            statistics: As `statistics()` made it and currents updated it; None where that is None.
            config: Estimator and its parameters.
            octaves: If given, groups along the last dimension share one step but for these powers of two, (*shape).
        """
        values = self.levels.to('cpu', torch.float32)
        if self.fire_function == 'density':
            assert statistics is not None
            values = fit_density_levels(statistics, self.config.levels, self.config.initial_potential, self.top)
        if not self.signed:
            self.set_state(torch.full_like(self.step, _reaching(1., values[-1])), levels=values)
            return
        assert statistics is not None
        boundaries = firing_boundaries(values, self.config.initial_potential, self.config.dead_zone)
        center, relative = statistics.center, torch.ones(())
        if self.quiet is not None:
            statistics = statistics.loud(self.quiet)
        shape: tuple[int, ...] = tuple(self.step.shape)
        if octaves is not None:
            shape, relative = (*shape[:-1], 1), 2. ** octaves
            statistics = statistics.pooled(octaves, shape)
        # silent networks have one threshold for both branches: a multiplier takes as many times the unary spikes
        most = 1 if self.config.silence else self._most_multiplier(values)
        step, multiplier = fit_steps(statistics, values, boundaries, config, most)
        step = step.view(shape) * relative
        if self.quiet is not None and octaves is None:
            # what is loud now and then may not lie far beyond the top level, or it would be the scale of a token
            step = torch.maximum(step, self.quiet.to(step.device) / values[-1])
        self.set_state(step * self.config.scale,
                       multiplier.view(-1, *shape).expand(self.multiplier.shape), values, center)

    def widen(self, weight: torch.Tensor, floor: float, margin: float) -> None:
        """Let no channel's firing range be smaller than a quantile (`floor`) of all of them, each times a weight
        (*shape): how much it adds to what follows; and let all be `margin` times as large. What calibration images left
        quiet is then not clipped where others let it speak."""
        reach = self.step * self.top_levels.amax(0)
        weight = weight.to(self.step.device).clamp_min(torch.finfo(torch.float32).tiny)
        lowest = (reach * weight).flatten().quantile(floor) / weight
        self._rescale((lowest / reach).clamp_min(1) * margin)

    def _rescale(self, factor: float | torch.Tensor, gain: float = 1.) -> None:
        """Multiply the step by a factor (*shape), and what a spike carries, in thresholds, by another."""
        self.set_state(self.step * factor, self.multiplier, self.levels, self.center, self.gain.item() * gain)

    def _most_multiplier(self, values: torch.Tensor) -> int:
        """The largest multiplier that levels leave room for. Few levels need it more than they need to be multiplied in
        8 bits: with room for 63 instead of 127 a ViT-S has an error of 0.418 instead of 0.376 at N = 4."""
        limit = MAX_MET_LEVEL if self.meets_levels and self.config.levels > FEW_LEVELS else MAX_LEVEL
        return max(1, limit // int(values[-1]))

    def moments(self, x: torch.Tensor) -> torch.Tensor | None:
        if not self.signed:
            return None  # each row of attention is divided by its own spike sum
        x = x.float()
        # in steps, so that each channel counts alike, whatever its unit
        h, out = self._loud(x) / self.step, self._potential(self.encode(x).decode()) / self.step
        return torch.stack([(h * h).sum(), (h * out).sum()]).to('cpu', torch.float64)

    def correct(self, moments: torch.Tensor) -> None:
        signal, carried = moments.tolist()
        if carried > 0:  # no signal, no loss
            self._rescale(signal / carried, signal / carried)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f'{prefix}multiplier'] = self.multiplier.to(torch.uint8)
        destination[f'{prefix}levels'] = self.levels.to(torch.int16)

    def _problem(self, name: str, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> str:
        problem = super()._problem(name, value, state)
        if problem or value.is_meta:
            return problem
        if name == 'quiet' and (value < 0).any():
            return 'is negative'
        if name == 'levels':
            v = value.to(torch.int64)
            if (v < 1).any() or (v > self.top).any() or (v.diff() <= 0).any():
                return f'must increase strictly from at least 1 to at most {self.top}, got {value.tolist()}'
            expected = self._level_values().tolist()
            if self.fire_function != 'density' and v.tolist() != expected:
                return f'are not the levels of {self.fire_function} firing'
        if name == 'multiplier':
            if value.is_floating_point() and (value != value.round()).any():
                return 'is not an integer'
            levels = state.get('levels', self.levels)
            top = self.top // max(1, int(levels.max())) if levels.numel() and not levels.is_meta else self.top
            if (value < 1).any() or (value > top).any():
                return f'must lie in [1, {top}], or levels would not fit into their bits'
        return ''

    def extra_repr(self) -> str:
        c = self.config
        extra = [f'levels={c.levels}', self.fire_function, 'signed' if self.signed else 'unsigned']
        if self.token:
            extra.append('per token')
        if c.initial_potential != 0.5:
            extra.append(f'initial_potential={c.initial_potential:g}')
        if c.dead_zone:
            extra.append(f'dead_zone={c.dead_zone:g}')
        if self.quiet is not None:
            extra.append(self._range_repr('quiet', self.quiet))
        return ', '.join([*extra, self._range_repr('threshold', self.threshold)]) + self._state_repr()


def _reaching(current: float, top: torch.Tensor) -> float:
    """The largest exact step whose top level a current reaches."""
    step = exact_step(current / top)
    while step * top > current:
        step = exact_step(step.nextafter(step.new_zeros(())))
    return step.item()
