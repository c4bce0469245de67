"""What all neurons share: spikes, state that is validated when it is loaded and is not averaged, and whether it is
calibrated."""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
import torch.nn as nn

from .config import FitConfig, SFNConfig
from .functional import straight_through

__all__ = ['Float32Buffers', 'Neuron', 'Observed', 'Observer', 'Spikes', 'fits_octaves']


class Spikes(NamedTuple):
    """What a neuron fires: signed integers times a step.

    Args:
        levels: Integers, int8 (int16 where a site has wide levels), the shape of the input current.
        step: float32, > 0, broadcasts against levels: a step per channel, head or tensor.
        token_scale: Factor of the step per token (and head), float32, (..., 1), free after the product; None where
            there is none.
        center: Constant that was taken off the current before it fired, broadcasts against levels; None where there is
            none. It folds into the bias of the layer that follows.
        lateral: Lateral spikes, by which neurons of a site told one another what they left out: integers, int8, the
            shape of levels; None where there are none. They enter no product but that of the feedback.
    """
    levels: torch.Tensor
    step: torch.Tensor
    token_scale: torch.Tensor | None = None
    center: torch.Tensor | None = None
    lateral: torch.Tensor | None = None

    def decode(self) -> torch.Tensor:
        """The current that the spikes stand for, float32: `levels * step * token_scale + center`."""
        current = self.levels * self.step
        if self.token_scale is not None:
            current = current * self.token_scale
        return current if self.center is None else current + self.center


class Observer(Protocol):
    """What looks at the currents that enter a neuron."""

    def update(self, x: torch.Tensor) -> None:
        """Add a batch of currents (B, ...)."""


Observed = Any  # an observer of the type that the `statistics` of a neuron makes, or None: its `fit` alone knows which


# What `calibrated` is where it is true: numbers that no float is, so that whatever averages buffers changes them. A
# type of one's own may say 1, and 2 is what is saved of the other.
FITTED, MADE_UP_FOR = 2 ** 53 + 1, 2 ** 53 + 3  # the second where weights compensate for the neuron
MARKS = (0, 1, 2, FITTED, MADE_UP_FOR)
BLUR = 0.01  # relative: what rounding of many averages, each of them close to the last, adds up to


class Float32Buffers(nn.Module):
    """A module whose buffers stay float32 whatever dtype the model is moved to: a bfloat16 threshold of 1.9084 would be
    1.90625."""

    def _apply(self, fn, recurse=True):
        kept = {name: b for name, b in self.named_buffers(recurse=False) if b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class Neuron(Float32Buffers):
    """A spiking neuron: current in, spikes out.

    A type of neuron has `encode` (fire), `statistics` (what is to be observed of its input, None if nothing is) and
    `fit` (set its thresholds by that). `forward` is the float form, `encode(x).decode()` in the dtype of x, with a
    straight-through gradient; a type may override it with something faster.
    """
    calibrated: torch.Tensor
    config: SFNConfig
    step: torch.Tensor  # of types whose step folds into weights, and their centre
    center: torch.Tensor | None
    counted = True  # by activity: its spikes are news, and asking for them changes nothing
    unbounded = False  # whether no norm bounds its current: that of attention or of an activation function
    meet: Callable[..., torch.Tensor] | None = None  # how an execution multiplies its spikes by tables of weights
    takes_octaves = False  # `fit` does, as of queries and keys, whose steps are related

    def __init__(self, device=None):
        super().__init__()
        # a number, since averages of models subtract it; a bool where it is saved
        self.register_buffer('calibrated', torch.zeros((), dtype=torch.int64, device=device))
        self.unaveraged: dict[str, torch.Tensor] = {}  # state of a copy as it was copied

    def encode(self, x: torch.Tensor) -> Spikes:
        """Spikes on a current (B, ...)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.encode(x).decode().to(x.dtype)
        if torch.is_grad_enabled():  # who has a firing range lets the gradient end with it
            everywhere = x.new_full((), float('inf'), dtype=torch.float32)
            out = straight_through(out, x, -everywhere, everywhere)
        return out

    @property
    def level_range(self) -> tuple[int, int]:
        """The lowest and the highest level that this neuron can fire: those of int8, if a type knows no less."""
        return -127, 127

    def statistics(self) -> Observer | None:
        """A new observer, whose `update(x)` takes the currents that enter this neuron; None if nothing is fitted."""
        raise NotImplementedError

    def fit(self, statistics: Observed, config: FitConfig = FitConfig()) -> None:
        """Set thresholds by what was observed, and mark the neuron as calibrated."""
        raise NotImplementedError

    def moments(self, x: torch.Tensor) -> torch.Tensor | None:
        """Sums of h^2 and of h o over a batch of currents, of membrane potentials h and outputs o in steps, float64,
        (2,); None if the neuron is not to be corrected by them."""
        return None

    def correct(self, moments: torch.Tensor) -> None:
        """Let spikes carry what they lack: `moments` as above, summed over batches."""

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """Buffers that a state dict has, by name."""
        return {name: buffer for name, buffer in self._buffers.items()
                if buffer is not None and name not in self._non_persistent_buffers_set}

    def mark_calibrated(self) -> None:
        """Say that thresholds are fitted."""
        self.calibrated.fill_(FITTED)

    def mark_compensated(self) -> None:
        """Say that the weights that follow compensate for this neuron, whose thresholds are fitted."""
        self.calibrated.fill_(MADE_UP_FOR)

    @property
    def compensated(self) -> bool:
        """Whether the weights that follow compensate for this neuron."""
        return not self.calibrated.is_meta and int(self.calibrated) in (MADE_UP_FOR, 2)

    # Averages of models take buffers along (`AveragedModel(use_buffers=True)`), though thresholds are no weights: an
    # average of 32 with 32 may be 31. What is averaged is a copy, so a copy remembers what it was.

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.undo_average_()
        self._remember()

    def _remember(self) -> None:
        self.unaveraged = {name: buffer.detach().clone() for name, buffer in self.saved_buffers().items()}

    def undo_average_(self) -> None:
        """Put back the state that an average of models has blurred; it is uncalibrated where that was another one."""
        mark = self.calibrated
        if type(mark) is not torch.Tensor or mark.is_meta or int(mark) in MARKS:
            return
        known = {name: value.to(mark.device) for name, value in self.unaveraged.items()}
        state = self.saved_buffers()
        same = known.keys() == state.keys() and all(
            name == 'calibrated' or _blurred(state[name], value) for name, value in known.items())
        with torch.no_grad():
            mark.zero_()
            for name, value in known.items() if same else ():
                state[name].copy_(value)

    def train(self, mode: bool = True):
        self.undo_average_()
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.undo_average_()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, buffer in self.saved_buffers().items():
            if not keep_vars:  # copies, which an average may write to
                destination[f'{prefix}{name}'] = buffer.detach().clone()
        mark = self.calibrated
        saved = mark.new_full((), 2, dtype=torch.uint8) if self.compensated else mark.bool()
        destination[f'{prefix}calibrated'] = saved

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        names = [*self.saved_buffers()]
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if given and len(given) < len(names):
            absent = ', '.join(prefix + name for name in names if name not in given)
            errors.append(f'neuron state is incomplete: {absent} missing')
        num_errors = len(errors)
        for name, value in given.items():
            problem = self._problem(name, value, given)
            if problem:
                errors.append(f'{prefix}{name} {problem}')
            else:  # with assign=True the state's own tensors become the buffers
                state_dict[prefix + name] = value.to(getattr(self, name).dtype)
        if len(errors) > num_errors:
            return  # refused: what was there stays
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if given and not self.calibrated.is_meta:
            saved = int(self.calibrated)
            self.calibrated.fill_({1: FITTED, 2: MADE_UP_FOR}.get(saved, saved))
            self._remember()

    def _problem(self, name: str, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> str:
        """What is wrong with a value of a buffer, among the others that come with it; empty if nothing is."""
        expected = getattr(self, name)
        if value.shape != expected.shape:
            return f'has shape {tuple(value.shape)}, this model needs {tuple(expected.shape)}'
        if value.is_meta:
            return ''
        if value.is_floating_point() and not torch.isfinite(value).all():
            return 'is NaN or infinite'
        if value.is_floating_point() and not expected.is_floating_point() and (value != value.round()).any():
            return 'is not an integer'
        if name in ('step', 'gain') and not (value > 0).all():
            return f'is not positive: a neuron with that {name} is dead'
        return ''

    def _set(self, **state: float | torch.Tensor) -> None:
        """Set buffers: all of them or, with a ValueError if one is refused, none."""
        values = {name: torch.as_tensor(value, device=getattr(self, name).device) for name, value in state.items()}
        for name, value in values.items():
            problem = self._problem(name, value, values)
            if problem:
                raise ValueError(f'{name} {problem}')
        for name, value in values.items():
            getattr(self, name).copy_(value)

    @staticmethod
    def _range_repr(name: str, value: torch.Tensor) -> str:
        if value.is_meta:
            return f'{name}=meta'
        low, high = value.min().item(), value.max().item()
        return f'{name}={low:.4g}' if low == high else f'{name}={low:.4g}..{high:.4g}'

    def _state_repr(self) -> str:
        return '' if self.calibrated.is_meta or self.calibrated else ', uncalibrated'


class _FitsOctaves(Protocol):
    def fit(self, statistics: Observed, config: FitConfig, octaves: torch.Tensor) -> None: ...


def fits_octaves(neuron: Neuron) -> TypeGuard[_FitsOctaves]:
    """Whether the `fit` of a neuron takes octaves."""
    return neuron.takes_octaves


def _blurred(state: torch.Tensor, known: torch.Tensor) -> bool:
    """Whether a state may be averages of a known one with itself: off by rounding, of integers by one or what their
    float form cannot tell apart."""
    if state.shape != known.shape:
        return False
    off = (state.double() - known.double()).abs()
    slack = known.double().abs() * BLUR + (0 if known.is_floating_point() else 1)
    return bool((off <= slack).all())
