"""Levels that neurons fire, and what they stand for, in the words of ONNX.

A neuron is written as few elementwise operations, which engines fuse; its levels are those of `encode` but for currents
within float rounding of a boundary. Levels that meet weights are unsigned bytes with a zero point.
"""
from typing import cast

import torch
import torch.nn as nn

from ..errors import SFormerError
from ..neurons import (
    GradedCoding,
    LateralScaleAndFire,
    Neuron,
    ScaleAndFire,
    SharedScaleAndFire,
    fire,
    firing_boundaries,
)
from ..neurons.lateral import SPIKES_PER_LEVEL
from ..neurons.scale_and_fire import TINY
from .operators import onnx_operator
from .saturation import Range, upright, zero_point

__all__ = [
    'DecodedLevels', 'FiredLevels', 'LateralLevels', 'PixelLevels', 'beside_levels', 'beside_weights', 'fired_levels',
    'signed_levels',
]


BRANCHES = ('multiplier', 'inward', 'outward')  # factors by which branches differ, by channel


def _as_bytes(k: torch.Tensor, dtype: torch.dtype, zero: int = 0, left: int = 0) -> torch.Tensor:
    """Levels, which are whole numbers or are rounded here, as bytes with a zero point, and what these stand for at a
    step of 1, but for a part of the zero point that is left in."""
    one = torch.ones(())
    point = torch.full((), zero, dtype=dtype)
    rest = torch.full((), zero - left, dtype=dtype)
    levels = onnx_operator('QuantizeLinear', k, dtype, k, one, point)
    return onnx_operator('DequantizeLinear', k, torch.float32, levels, one, rest)


def beside_weights(k: torch.Tensor, levels: Range, left: int = 0) -> torch.Tensor:
    """Levels that meet weights, as unsigned bytes; plus `left`."""
    return _as_bytes(k, torch.uint8, zero_point(levels), left)


def beside_levels(k: torch.Tensor, levels: Range) -> torch.Tensor:
    """Levels that meet other levels: engines multiply these in int8 if they have no zero point."""
    return _as_bytes(k, torch.uint8 if levels[0] >= 0 else torch.int8)


def _by_branch(x: torch.Tensor, ratio: torch.Tensor | None) -> torch.Tensor:
    """x, of which what is negative is multiplied by a ratio per channel."""
    return x if ratio is None else onnx_operator('PRelu', x, x.dtype, x, ratio)


class FiredLevels(nn.Module):
    """Levels that a scale-and-fire neuron fires, in float32, and the factor per token.

    Args:
        neuron: The neuron.
        stand_up: Let levels be `upright`, by the factor `flip` per channel, None if that is 1 everywhere: so do the
            weights that they meet. Those of branches that share thresholds get a zero point per channel, `zeros`.

    Shape:
        As of `ScaleAndFire.encode`.
    """
    flip: torch.Tensor | None
    values: torch.Tensor
    inverse: torch.Tensor
    center: torch.Tensor | None
    quiet: torch.Tensor | None
    multiplier: torch.Tensor | None
    inward: torch.Tensor | None
    outward: torch.Tensor | None
    table: torch.Tensor | None
    zeros: torch.Tensor | None

    def __init__(self, neuron: Neuron, stand_up: bool = False):
        super().__init__()
        shares = type(neuron) is SharedScaleAndFire
        if not isinstance(neuron, ScaleAndFire) or not (shares or type(neuron) is ScaleAndFire):  # but in its own way
            raise SFormerError(f'a {type(neuron).__name__} has no form in ONNX: a ScaleAndFire has.')
        self.config = neuron.config
        self.fire_function = neuron.fire_function
        self.signed = neuron.signed
        self.token = neuron.token
        self.token_reach = neuron.token_reach
        self.top = neuron.top
        self.largest = int(neuron.levels[-1])
        self.range = neuron.level_range
        m = neuron.multiplier
        inverse = 1 / neuron.threshold[0]
        flip = None
        self.register_buffer('zeros', neuron.top_levels[1] if shares else None)
        self.stands_up = stand_up
        if stand_up and shares:
            self.range = (0, 2 * neuron.config.levels)
        elif stand_up:
            flipped, self.range, _ = upright(neuron.top_levels)
            if flipped.any():
                flip = torch.where(flipped, -1., 1.)
                m = torch.where(flipped, m.flip(0), m)
                inverse = flip / (m[0] * neuron.step / neuron.gain)
        self.register_buffer('flip', flip)
        uneven = self.signed and not torch.equal(m[0], m[1])
        self.register_buffer('values', neuron.levels.to(torch.float32))
        self.register_buffer('inverse', inverse)
        self.register_buffer('center', neuron.center)
        self.register_buffer('quiet', neuron.quiet)
        self.register_buffer('multiplier', None if (m[0] == 1).all() else m[0])
        self.register_buffer('inward', m[0] / m[1] if uneven else None)
        self.register_buffer('outward', m[1] / m[0] if uneven else None)
        self.register_buffer('table', self._table())

    def _table(self) -> torch.Tensor | None:
        """Level by twice the potential, where boundaries lie at or halfway between whole levels and no closed form
        exists."""
        if self.fire_function not in ('density', 'power2'):
            return None
        if self.config.initial_potential not in (0, 0.5):
            raise SFormerError(
                f'{self.fire_function} firing with initial_potential={self.config.initial_potential:g} has no form in '
                f'ONNX: 0 and 0.5 have.')
        halves = torch.arange(2 * self.largest + 1) / 2
        index = torch.bucketize(halves, firing_boundaries(self.values, self.config.initial_potential), right=True)
        return torch.cat([torch.zeros(1), self.values])[index]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        u = self.potentials(x)
        row = self.factor(u)
        return self.levels_at(u if row is None else u * (1 / row)), row

    def potentials(self, x: torch.Tensor) -> torch.Tensor:
        """Membrane potentials in thresholds, of a branch that stands up."""
        h = x if self.center is None else x - self.center
        if self.quiet is not None:
            h = torch.where(h.abs() < self.quiet, 0., h)
        return _by_branch(h * self.inverse, self.inward)

    def factor(self, u: torch.Tensor) -> torch.Tensor | None:
        """Factor per token of potentials in thresholds."""
        if not self.token:
            return None
        largest = torch.maximum(u.amax(-1, keepdim=True), -u.amin(-1, keepdim=True)).clamp_min(TINY)
        return largest * (self.token_reach / self.largest)

    def levels_at(self, u: torch.Tensor) -> torch.Tensor:
        k = _by_branch(self._fire(u), self.outward)
        return k if self.multiplier is None else k * self.multiplier

    def _fire(self, u: torch.Tensor) -> torch.Tensor:
        rounds = self.config.initial_potential == 0.5
        dead_zone = self.config.dead_zone
        if self.zeros is not None:
            return self._fire_shared(u, self.zeros)
        if self.table is not None:
            k = self.table[(2 * u.abs()).clamp(max=2 * self.largest).to(torch.int64)]
            k = torch.where(u < 0, -k, k)
        elif self.fire_function in ('uniform', 'byte') and rounds:
            if self.signed:  # also where the largest potential is the top level: a graph says how large levels are
                u = u.clamp(-self.largest, self.largest)
            # OpenVINO (2026.4), which makes one operation of a product, a clip and a rounding to a byte, takes the
            # threshold of the first channel for all, unless channels are last
            rounded = self.signed and self.inverse.ndim > 2 and self.inverse.shape[-1] == 1 < self.inverse.numel()
            if self.multiplier is None and self.outward is None and not dead_zone and not rounded:
                return u  # rounded as it becomes an int8; softmax numerators are not negative
            k = u.round()
        elif self.fire_function == 'quadratic' and rounds and not self.signed and self.largest == len(self.values) ** 2:
            # a power, which engines fuse with what is before, as they would not two factors that are one
            k = torch.pow((u - 0.25).clamp(min=0).sqrt().round(), 2.)
        else:
            k = fire(u, self.fire_function, self.values, self.config.initial_potential, 0., self.top)
        if dead_zone:
            k = torch.where(u.abs() >= dead_zone, k, 0.)
        return k if self.signed else k.clamp(min=0)

    def whole(self, k: torch.Tensor) -> torch.Tensor:
        """Levels of `forward` as the whole numbers that `encode` has, but for signs that `flip` changed."""
        return k.round() if self.zeros is None or not self.stands_up else k.round() - self.zeros

    def _fire_shared(self, u: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Levels of branches that share their thresholds."""
        if self.config.initial_potential != 0.5 or self.config.dead_zone:
            u = fire(u, 'uniform', self.values, self.config.initial_potential, self.config.dead_zone)
        k = (u + zeros).clamp(0, 2 * self.config.levels)
        return k if self.stands_up else k.round() - zeros


class LateralLevels(FiredLevels):
    """Levels of neurons that feed back to one another: a group after the other, with sums of lateral spikes in float32,
    which are exact.

    Args:
        neuron: The neurons.
        stand_up: As of `FiredLevels`.
    """
    order: torch.Tensor
    back: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor
    amplitude: torch.Tensor
    parts: torch.Tensor
    moved: torch.Tensor

    def __init__(self, neuron: LateralScaleAndFire, stand_up: bool = False):
        channels = torch.arange(len(neuron.order))
        whole = _alone(neuron, channels)
        whole.token = neuron.token
        super().__init__(whole, stand_up)
        for name in BRANCHES:  # also where they are 1, so that sites are alike
            if getattr(self, name) is None:
                self.register_buffer(name, torch.ones_like(self.inverse))
        self.token_reach = neuron.token_reach
        self.sizes = neuron.sizes
        self.largest_spike = neuron.largest_spike
        order = neuron.order
        spacing = neuron.spacing[..., order]
        step = neuron.step if self.flip is None else neuron.step * self.flip
        self.register_buffer('order', order)
        self.register_buffer('back', torch.argsort(order))
        self.register_buffer('amplitude', step[..., order])
        self.register_buffer('parts', SPIKES_PER_LEVEL / spacing)
        self.register_buffer('moved', neuron.feedback_step * spacing / SPIKES_PER_LEVEL)
        tops = neuron.top_levels
        if self.flip is not None:
            tops = torch.where(self.flip < 0, tops.flip(0), tops)
        self.register_buffer('lowest', -tops[1])
        self.register_buffer('highest', tops[0].clone())
        self.groups = nn.ModuleList()
        for i, (group, feedback) in enumerate(neuron.groups()):
            levels = FiredLevels(_alone(neuron, order[group]), stand_up)
            for name in ('quiet', 'center', 'flip'):
                setattr(levels, name, None)
            for name in BRANCHES:
                levels.register_buffer(name, self.get_buffer(name)[..., order[group]])
            self.groups.append(levels)
            self.register_buffer(f'feedback{i}', feedback.to(torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        row = self.factor(self.potentials(x))
        h = x if self.center is None else x - self.center
        rest = (h if row is None else h / row).index_select(-1, self.order)
        quiet = None if self.quiet is None else self.quiet[..., self.order]
        fired, start = [], 0
        for i, (group, size) in enumerate(zip(self.groups, self.sizes, strict=True)):
            levels = cast(FiredLevels, group)
            stop = start + size
            h, rest = rest[..., :size], rest[..., size:]
            loud = h
            if quiet is not None:
                loud = torch.where((h if row is None else h * row).abs() < quiet[..., start:stop], 0., h)
            k = levels.levels_at(levels.potentials(loud)).round()
            fired.append(k)
            if stop < len(self.order):
                e = (h - k * self.amplitude[..., start:stop]) * self.parts[..., start:stop]
                sent = e.round().clamp(-self.largest_spike, self.largest_spike)
                sent = torch.where(e.abs() < SPIKES_PER_LEVEL * self.config.lateral_zone, 0., sent)
                rest = rest + (sent @ self.get_buffer(f'feedback{i}')) * self.moved[..., stop:]
            start = stop
        k = torch.cat(fired, -1).index_select(-1, self.back)
        # which says of each channel again how large its levels are, where channels have changed places
        return torch.minimum(torch.maximum(k, self.lowest), self.highest), row


def _alone(neuron: LateralScaleAndFire, channels: torch.Tensor) -> ScaleAndFire:
    """Some channels of neurons that feed back, as they fire by themselves, for all tokens alike."""
    shape = (*neuron.step.shape[:-1], len(channels))
    part = ScaleAndFire(shape, neuron.config, center_shape=None if neuron.center is None else shape,
                        fire_function=neuron.fire_function)
    part.levels.copy_(neuron.levels)
    part.gain.copy_(neuron.gain)
    part.multiplier.copy_(neuron.multiplier[..., channels])
    for mine, theirs in ((part.step, neuron.step), (part.center, neuron.center), (part.quiet, neuron.quiet)):
        if mine is not None and theirs is not None:
            mine.copy_(theirs[..., channels])
    return part


class PixelLevels(nn.Module):
    """Levels of pixels, which QuantizeLinear rounds and clips to -128 ... 127."""
    flip: torch.Tensor | None = None  # as of `FiredLevels`: pixels are levels as they are
    zeros: torch.Tensor | None = None
    token = False
    step: torch.Tensor
    center: torch.Tensor

    def __init__(self, neuron: GradedCoding):
        super().__init__()
        self.range = neuron.level_range
        self.register_buffer('step', neuron.step)
        self.register_buffer('center', neuron.center)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (x - self.center) / self.step, None


def signed_levels(neuron: Neuron, stand_up: bool = False) -> FiredLevels:
    """Levels of scale-and-fire neurons, whether or not they feed back."""
    return LateralLevels(neuron, stand_up) if type(neuron) is LateralScaleAndFire else FiredLevels(neuron, stand_up)


def fired_levels(neuron: Neuron, stand_up: bool = False) -> 'FiredLevels | PixelLevels':
    """Levels of a neuron of any type that has a form in ONNX."""
    return PixelLevels(neuron) if isinstance(neuron, GradedCoding) else signed_levels(neuron, stand_up)


class DecodedLevels(nn.Module):
    """What the spikes of a neuron stand for."""
    step: torch.Tensor
    center: torch.Tensor | None

    def __init__(self, neuron: Neuron):
        super().__init__()
        self.levels = fired_levels(neuron)
        self.register_buffer('step', neuron.step)
        self.register_buffer('center', neuron.center)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, row = self.levels(x)
        out = _as_bytes(k, torch.int8) * self.step
        out = out if row is None else out * row
        return out if self.center is None else out + self.center
