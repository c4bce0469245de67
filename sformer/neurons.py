""" Spiking neurons: integrate-and-fire, multi-threshold and scale-and-fire

Implements the neurons of `One-Timestep is Enough: Achieving High-performance ANN-to-SNN Conversion via
Scale-and-Fire Neurons` - https://arxiv.org/abs/2510.23383

The mathematics and nothing else: no timm, no I/O. Currents are tensors of any shape; a threshold broadcasts against
them, so its shape decides whether it is shared by a tensor, a head or a channel.
"""
import dataclasses
import math
from typing import Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    'MAX_LEVEL', 'FIRE_FUNCTIONS', 'SFNConfig',
    'integrate_and_fire', 'multi_threshold', 'level_values', 'firing_boundaries', 'fire',
    'Neuron', 'ScaleAndFire', 'DirectCoding',
]

MAX_LEVEL = 127  # a level is one int8 on hardware
FIRE_FUNCTIONS = ('uniform', 'quadratic', 'power2', 'density')
DEFAULT_RANGE = 4.  # uncalibrated neurons fire over +-4: four standard deviations of a LayerNorm output


@dataclasses.dataclass(frozen=True)
class SFNConfig:
    """How the scale-and-fire neurons of a model fire and how their thresholds are estimated.

    Args:
        levels: Number of thresholds N per branch, 1 to 127 (1 to 7 for `power2`).
        fire: Fire function of signed currents, one of `uniform`, `quadratic`, `power2`, `density`.
        attention_fire: Fire function of the softmax numerators. `quadratic` follows their distribution closely
            enough that nothing has to be fitted there.
        firing: `round` starts the membrane at half a step, `floor` at zero (the paper's).
        dead_zone: No spike below this many steps; 0 leaves the first boundary where `firing` puts it.
        scale: The paper's scaling factor lambda, one number on top of every fitted threshold.
        estimator: Threshold estimator: `mse`, `quantile` (top-p) or `max`.
        quantile: The p of `quantile`: the share of a branch's currents that its firing range covers.

    Raises:
        ValueError: If a value is out of its range; the message names it.
    """
    levels: int = 32
    fire: str = 'uniform'
    attention_fire: str = 'quadratic'
    firing: str = 'round'
    dead_zone: float = 0.
    scale: float = 1.
    estimator: str = 'mse'
    quantile: float = 0.999

    def __post_init__(self):
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(message)
        check(type(self.levels) is int and 1 <= self.levels <= MAX_LEVEL,
              f'levels must be an integer from 1 to {MAX_LEVEL}, got {self.levels!r}.')
        for name in ('fire', 'attention_fire'):
            value = getattr(self, name)
            check(value in FIRE_FUNCTIONS, f'{name} must be one of {", ".join(FIRE_FUNCTIONS)}, got {value!r}.')
            check(value != 'power2' or self.levels <= 7,
                  f'{name}=power2 has levels 1, 2, 4 ... 64, so at most 7 of them, got levels={self.levels}.')
        check(self.firing in ('round', 'floor'), f'firing must be round or floor, got {self.firing!r}.')
        check(self.estimator in ('mse', 'quantile', 'max'),
              f'estimator must be mse, quantile or max, got {self.estimator!r}.')
        for name in ('dead_zone', 'scale', 'quantile'):
            value = getattr(self, name)
            check(isinstance(value, (int, float)), f'{name} must be a number, got {value!r}.')
        check(0 <= self.dead_zone < math.inf, f'dead_zone must be a finite number >= 0, got {self.dead_zone!r}.')
        tops = dict(quadratic=min(self.levels ** 2, MAX_LEVEL), power2=2 ** (self.levels - 1))
        top = tops.get(self.attention_fire, self.levels)
        check(self.dead_zone <= top,
              f'dead_zone must not exceed {top}, the top level of {self.attention_fire} attention with {self.levels} '
              f'levels, or no key would ever fire, got {self.dead_zone!r}.')
        check(1e-3 <= self.scale <= 1e3, f'scale (lambda) must lie in [0.001, 1000], got {self.scale!r}.')
        check(0 < self.quantile <= 1, f'quantile must lie in (0, 1], got {self.quantile!r}.')


def integrate_and_fire(
        x: torch.Tensor,
        threshold: Union[float, torch.Tensor],
        initial_potential: Union[float, torch.Tensor] = 0.,
) -> torch.Tensor:
    """Integrate-and-fire over T timesteps with reset by subtraction.

    `h(t) = v(t-1) + x(t)`, `s(t) = [h(t) >= threshold]`, `o(t) = threshold * s(t)`, `v(t) = h(t) - o(t)`.

    Args:
        x: Input current, (T, ...).
        threshold: Firing threshold, broadcasts against x[0].
        initial_potential: Membrane potential v(0), in the unit of the threshold.

    Returns:
        Mean output current over the T timesteps, (...).
    """
    v = torch.zeros_like(x[0]) + initial_potential
    total = torch.zeros_like(x[0])
    for current in x:
        h = v + current
        o = (h >= threshold) * threshold
        total = total + o
        v = h - o
    return total / x.shape[0]


def multi_threshold(
        x: torch.Tensor,
        threshold: Union[float, torch.Tensor],
        levels: int,
        initial_potential: Union[float, torch.Tensor] = 0.,
) -> torch.Tensor:
    """Multi-threshold neuron, one timestep: `o = threshold * clip(floor((v + x) / threshold), 0, levels)`.

    Temporal-to-spatial equivalence (arXiv 2510.23383): where `0 <= x(t) <= threshold` and `0 <= v(0) < threshold`,
    `integrate_and_fire(x, threshold, v)` over T steps equals
    `multi_threshold(x.mean(0), threshold / T, levels=T, initial_potential=v / T)`. Outside of these conditions it
    does not hold: a negative current can leave a spike that was already sent, a current above the threshold is
    left in the membrane when time is up.

    Args:
        x: Input current, any shape.
        threshold: Firing threshold, broadcasts against x.
        levels: Number of thresholds N.
        initial_potential: Membrane potential before the input.

    Returns:
        Output current, the shape of x.
    """
    return torch.floor((x + initial_potential) / threshold).clamp(0, levels) * threshold


def level_values(fire_function: str, levels: int) -> torch.Tensor:
    """Level values y_1 < ... < y_N of a closed-form fire function.

    Args:
        fire_function: `uniform` (y_i = i), `quadratic` (y_i = max(i, round(S i^2 / N^2)), S = min(N^2, 127)) or
            `power2` (y_i = 2^(i-1)). `density` has no closed form and starts out as `uniform`.
        levels: Number of levels N.

    Returns:
        Integers in float32, (N,).
    """
    i = torch.arange(1, levels + 1, dtype=torch.float32, device='cpu')  # also inside of torch.device('meta')
    if fire_function == 'quadratic':
        return torch.maximum(i, torch.round(i * i * _quadratic_slope(levels)))
    if fire_function == 'power2':
        return 2. ** (i - 1)
    return i


def firing_boundaries(
        fire_function: str,
        values: torch.Tensor,
        firing: str = 'round',
        dead_zone: float = 0.,
) -> torch.Tensor:
    """Firing boundaries b_1 <= ... <= b_N in steps: a current of h steps reaches level #{j : h >= b_j}.

    Args:
        fire_function: Name of the fire function.
        values: Level values y_1 ... y_N, (N,).
        firing: `floor` (b_j = y_j) or `round` (b_j half-way between y_{j-1} and y_j).
        dead_zone: No boundary lies below it.

    Returns:
        Boundaries in float32, (N,).
    """
    values = values.to(torch.float32)
    if firing == 'floor':
        boundaries = values
    elif fire_function == 'quadratic':
        # of the parabola itself rather than of its rounded levels: this is what has a closed form
        j = torch.arange(1, len(values) + 1, dtype=torch.float32, device=values.device)
        boundaries = torch.maximum(j - 0.5, ((j - 0.5) ** 2 + 0.25) * _quadratic_slope(len(values)))
    else:
        boundaries = (values + torch.cat([values.new_zeros(1), values[:-1]])) / 2
    return boundaries.clamp_min(dead_zone)


def _quadratic_slope(levels: int, top: int = MAX_LEVEL) -> float:  # an argument, TorchScript sees no globals
    return min(levels * levels, top) / (levels * levels)


def fire(
        u: torch.Tensor,
        fire_function: str,
        values: torch.Tensor,
        firing: str = 'round',
        dead_zone: float = 0.,
) -> torch.Tensor:
    """Level that a current reaches on one branch: `k = y_i` with `i = #{j : u >= b_j}` (y_0 = 0).

    `uniform` and, where it rounds, `quadratic` are closed forms (that of `quadratic` takes a square root: a current
    within an ulp of a boundary may fall on either side of it). The others look up a table on the grid of half steps,
    on which all their boundaries lie. No loop over thresholds.

    Args:
        u: Current in steps, `h / (lambda * threshold)`, any shape, float32.
        fire_function: Name of the fire function.
        values: Level values y_1 ... y_N, (N,).
        firing: `round` or `floor`.
        dead_zone: No spike below this many steps.

    Returns:
        Levels k >= 0, integers in the dtype and shape of u.
    """
    levels = values.shape[0]
    if fire_function == 'uniform':
        if firing == 'round':
            # the float just below the first boundary is silent, too: adding 1/2 would round it up to 1
            k = F.threshold(u, 0.49999997, 0.).add_(0.5).floor_().clamp_(max=levels)
        else:
            k = u.floor().clamp_(0, levels)
    elif fire_function == 'quadratic' and firing == 'round':
        slope = _quadratic_slope(levels)
        i = (u / slope - 0.25).clamp_(min=0).sqrt_()
        if slope < 1:
            i = torch.minimum(i, u)
        i = i.add_(0.5).floor_().clamp_(0, levels)
        k = torch.maximum(i, (i * i).mul_(slope).round_()) if slope < 1 else i * i
    else:
        grid = torch.arange(255, dtype=torch.float32, device=u.device) / 2
        boundaries = firing_boundaries(fire_function, values, firing)
        table = torch.cat([boundaries.new_zeros(1), values.to(torch.float32)])
        table = table[torch.bucketize(grid, boundaries, right=True)].to(u.dtype)
        k = table[(u * 2).floor_().nan_to_num_(0.).clamp_(0, 254).to(torch.int32)]
        k = torch.where(u.isnan(), u, k)  # as the closed forms do
    if dead_zone > 0:
        k = k * (u >= dead_zone)
    return k


def _straight_through(out: torch.Tensor, h: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Let the gradient of `out` pass to `h` where lower <= h <= upper; the values of `out` stay."""
    value = h.detach()  # compared in float32, as thresholds are
    inside = torch.where((value >= lower) & (value <= upper), h, torch.zeros_like(h))
    return out + (inside - inside.detach()).to(out.dtype)  # an exact zero


class Neuron(nn.Module):
    """What all neurons share: float32 state that is validated when it is loaded, and whether it is calibrated.

    Buffers stay float32 whatever dtype the model is moved to: a bfloat16 threshold of 1.9084 would be 1.90625.
    """
    threshold: torch.Tensor
    calibrated: torch.Tensor

    def __init__(self, device=None):
        super().__init__()
        self.register_buffer('calibrated', torch.zeros((), dtype=torch.bool, device=device))

    def _apply(self, fn, recurse=True):
        kept = {name: b for name, b in self.named_buffers(recurse=False) if b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        names = [name for name, _ in self.named_buffers(recurse=False)]
        given = [name for name in names if prefix + name in state_dict]
        if given and len(given) < len(names):
            absent = ', '.join(prefix + name for name in names if name not in given)
            errors.append(f'neuron state is incomplete: {absent} missing')
        num_errors = len(errors)
        for name in given:
            problem = self._problem(name, state_dict[prefix + name])
            if problem:
                errors.append(f'{prefix}{name} {problem}')
            else:  # with assign=True the state's own tensors become the buffers
                state_dict[prefix + name] = state_dict[prefix + name].to(getattr(self, name).dtype)
        if len(errors) > num_errors:
            return  # refused: what was there stays
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _problem(self, name: str, value: torch.Tensor) -> str:
        expected = getattr(self, name)
        if value.shape != expected.shape:
            return f'has shape {tuple(value.shape)}, this model needs {tuple(expected.shape)}'
        if value.is_meta:
            return ''
        if value.is_floating_point() and not torch.isfinite(value).all():
            return 'is NaN or infinite'
        if name in ('threshold', 'scale') and not (value > 0).all():
            return 'is not positive: a neuron with that threshold is dead'
        if name == 'levels':
            v = value.to(torch.int64)
            if (v < 1).any() or (v > MAX_LEVEL).any() or (v.diff() <= 0).any():
                return f'must increase strictly from at least 1 to at most {MAX_LEVEL}, got {value.tolist()}'
        return ''

    def _set(self, name: str, value: Union[float, torch.Tensor]) -> None:
        buffer = getattr(self, name)
        value = torch.as_tensor(value, device=buffer.device).to(buffer.dtype)
        problem = self._problem(name, value)
        if problem:
            raise ValueError(f'{name} {problem}')
        buffer.copy_(value)

    def _range_repr(self) -> str:
        if self.threshold.is_meta:
            return 'threshold=meta'
        low, high = self.threshold.min().item(), self.threshold.max().item()
        state = '' if self.calibrated else ', uncalibrated'
        return (f'threshold={low:.4g}' if low == high else f'threshold={low:.4g}..{high:.4g}') + state


class ScaleAndFire(Neuron):
    """Scale-and-fire neuron (SFN), one timestep.

    On the positive branch a membrane potential h fires the level `k = y_i`, `i = #{j : h >= scale * threshold * b_j}`;
    a signed neuron does the same on -h with the threshold of its negative branch. The output is
    `scale * threshold * k`, always a step times a signed integer. Backward is straight-through inside of the firing
    range, which ends half a step beyond the top level, and zero outside.

    Source: arXiv 2510.23383, scale-and-fire neuron, extended by a threshold per branch.

    Args:
        shape: Shape of one branch's threshold; broadcasts against the input current: (C,) for channels of (..., C),
            (H, 1, 1) for heads of (B, H, L, D), (1,) for a tensor.
        config: Number of levels, firing and dead zone.
        fire_function: Overrides `config.fire`.
        signed: Two branches, or only the positive one.
        center_shape: If given, a buffer `center` of this shape is subtracted from the input and not added back.
            Only for sites that are blind to a constant, as softmax is to one that is added to all keys.
        device: Device of the buffers; they are float32 on every device.

    Shape:
        Input and output (B, ...), where `shape` broadcasts.
    """
    levels: torch.Tensor
    scale: torch.Tensor
    center: Optional[torch.Tensor]

    def __init__(
            self,
            shape: Sequence[int],
            config: SFNConfig = SFNConfig(),
            fire_function: Optional[str] = None,
            signed: bool = True,
            center_shape: Optional[Sequence[int]] = None,
            device=None,
    ):
        super().__init__(device=device)
        self.num_levels = config.levels
        self.fire_function = fire_function or config.fire
        self.firing = config.firing
        self.dead_zone = config.dead_zone
        self.signed = signed
        self.centered = center_shape is not None
        values = level_values(self.fire_function, config.levels)
        top = DEFAULT_RANGE if signed else 1.
        threshold = torch.full((2 if signed else 1, *shape), top / values[-1].item(), dtype=torch.float32)
        self.register_buffer('threshold', threshold.to(device))
        self.register_buffer('levels', values.to(torch.uint8).to(device))
        dd = dict(device=device, dtype=torch.float32)  # whatever the default dtype is
        self.register_buffer('scale', torch.full((), config.scale if signed else 1., **dd))
        self.register_buffer('center', torch.zeros(tuple(center_shape), **dd) if self.centered else None)

    def set_threshold(
            self,
            threshold: torch.Tensor,
            levels: Optional[torch.Tensor] = None,
            center: Optional[torch.Tensor] = None,
    ) -> None:
        """Set fitted values and mark the neuron as calibrated.

        Args:
            threshold: (2, *shape) or, for one branch, (1, *shape); in the unit of the input current.
            levels: New level values, (N,) integers. Only `density` may change them.
            center: New centre, the shape of `center`.

        Raises:
            ValueError: If a value is not finite, not positive or of another shape.
        """
        self._set('threshold', threshold)
        if levels is not None:
            self._set('levels', levels)
        if center is not None:
            self._set('center', center)
        self.calibrated.fill_(True)

    def _potential(self, x: torch.Tensor) -> torch.Tensor:
        center = self.center
        return x if center is None else x - center  # float32, as thresholds are

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self._potential(x)
        threshold = self.threshold * self.scale
        out = self._current(h.detach(), threshold).to(x.dtype)
        if torch.is_grad_enabled() or torch.jit.is_tracing():  # whose check compares graphs without gradients
            top = threshold * (self.levels[-1] + 0.5)
            lower = -top[1] if self.signed else torch.zeros_like(top[0])
            out = _straight_through(out, h, lower, top[0])
        return out

    def _levels(self, h: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        # thresholds are float32, so the division promotes and bfloat16 currents fire where float32 ones do
        return fire(h / step, self.fire_function, self.levels, self.firing, self.dead_zone)

    def _current(self, h: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        out = self._levels(h, threshold[0]).mul_(threshold[0])
        if self.signed:
            out = out.addcmul_(self._levels(h, -threshold[1]), threshold[1], value=-1.)
        return out

    @torch.jit.ignore
    def spikes(self, x: torch.Tensor) -> torch.Tensor:
        """Signed levels that the neuron fires on a current.

        Args:
            x: Input current (B, ...), as for `forward`.

        Returns:
            Levels, int8, the shape of x: positive on the positive branch, negative on the negative one.
        """
        h = self._potential(x)
        threshold = self.threshold * self.scale
        k = self._levels(h, threshold[0])
        if self.signed:
            k = k - self._levels(h, -threshold[1])
        return k.to(torch.int8)

    def _problem(self, name: str, value: torch.Tensor) -> str:
        problem = super()._problem(name, value)
        if not problem and name == 'levels' and self.fire_function != 'density' and not value.is_meta:
            expected = level_values(self.fire_function, self.num_levels).tolist()
            if value.tolist() != expected:
                return f'are not the levels of {self.fire_function} firing'
        return problem

    def extra_repr(self) -> str:
        extra = [f'levels={self.num_levels}', self.fire_function, 'signed' if self.signed else 'unsigned']
        if self.firing != 'round':
            extra.append(self.firing)
        if self.dead_zone:
            extra.append(f'dead_zone={self.dead_zone}')
        if not self.scale.is_meta and self.scale.item() != 1:
            extra.append(f'scale={self.scale.item():.4g}')
        return ', '.join(extra + [self._range_repr()])


class DirectCoding(Neuron):
    """Direct coding of pixels: each 8-bit pixel value p becomes one graded spike of level p - 128.

    A normalised pixel is `x = (p / 255 - mean) / std`, so with `threshold = 1 / (255 std)` and
    `center = (128 / 255 - mean) / std` the code is lossless for images that were 8-bit before normalisation.
    Output is `threshold * k + center`; the constant folds into the bias of the layer that follows.

    Args:
        in_chans: Number of image channels C.
        device: Device of the buffers; they are float32 on every device.

    Shape:
        Input and output (B, C, H, W).
    """
    center: torch.Tensor

    def __init__(self, in_chans: int, device=None):
        super().__init__(device=device)
        dd = dict(device=device, dtype=torch.float32)  # whatever the default dtype is
        self.register_buffer('threshold', torch.full((in_chans, 1, 1), 1 / 127.5, **dd))
        self.register_buffer('center', torch.full((in_chans, 1, 1), 1 / 255, **dd))  # mean = std = 0.5

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Code [low, high] with 256 levels and mark the neuron as calibrated.

        Args:
            low: Normalised value of a black pixel per channel, (C,).
            high: Normalised value of a white pixel per channel, (C,).

        Raises:
            ValueError: If a range is empty or not finite.
        """
        step = (high - low) / 255
        self._set('threshold', step.view(-1, 1, 1))
        self._set('center', (low + 128 * step).view(-1, 1, 1))
        self.calibrated.fill_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self._levels(x.detach()).mul_(self.threshold).add_(self.center).to(x.dtype)
        if torch.is_grad_enabled() or torch.jit.is_tracing():  # whose check compares graphs without gradients
            out = _straight_through(
                out, x, self.center - 128.5 * self.threshold, self.center + 127.5 * self.threshold)
        return out

    def _levels(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.center) / self.threshold).round_().clamp_(-128, 127)

    @torch.jit.ignore
    def spikes(self, x: torch.Tensor) -> torch.Tensor:
        """Pixel levels p - 128, int8, the shape of x (B, C, H, W)."""
        return self._levels(x).to(torch.int8)

    def extra_repr(self) -> str:
        return f'levels=256, direct, {self._range_repr()}'
