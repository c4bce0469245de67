"""What all neurons share: spikes, state that is validated when it is loaded, and whether it is calibrated."""
from typing import Any, Mapping, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn as nn

from .config import FitConfig
from .functional import straight_through

__all__ = ['Float32Buffers', 'Neuron', 'Spikes']


class Spikes(NamedTuple):
    """What a neuron fires: signed integers times a step.

    Args:
        levels: Integers, int8 (int16 where a site has wide levels), the shape of the input current.
        step: float32, > 0, broadcasts against levels: a step per channel, head or tensor.
        row: Factor of the step per token (and head), float32, (..., 1), free after the product; None where there is
            none.
        center: Constant that was taken off the current before it fired, broadcasts against levels; None where there is
            none. It folds into the bias of the layer that follows.
    """
    levels: torch.Tensor
    step: torch.Tensor
    row: Optional[torch.Tensor] = None
    center: Optional[torch.Tensor] = None

    def decode(self) -> torch.Tensor:
        """The current that the spikes stand for, float32: `levels * step * row + center`."""
        current = self.levels * self.step
        if self.row is not None:
            current = current * self.row
        return current if self.center is None else current + self.center


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

    def __init__(self, device=None):
        super().__init__()
        # a number, since averages of models subtract it; a bool where it is saved
        self.register_buffer('calibrated', torch.zeros((), dtype=torch.uint8, device=device))

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
    def level_range(self) -> Tuple[int, int]:
        """The lowest and the highest level that this neuron can fire: those of int8, if a type knows no less."""
        return -127, 127

    def statistics(self) -> Any:
        """A new observer, whose `update(x)` takes the currents that enter this neuron; None if nothing is fitted."""
        raise NotImplementedError

    def fit(self, statistics: Any, config: FitConfig = FitConfig()) -> None:
        """Set thresholds by what was observed, and mark the neuron as calibrated."""
        raise NotImplementedError

    def moments(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Sums of h^2 and of h o over a batch of currents, of membrane potentials h and outputs o in steps, float64,
        (2,); None if the neuron is not to be corrected by them."""
        return None

    def correct(self, moments: torch.Tensor) -> None:
        """Let spikes carry what they lack: `moments` as above, summed over batches."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f'{prefix}calibrated'] = self.calibrated.view(torch.bool)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        names = [name for name, _ in self.named_buffers(recurse=False)]
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

    def _set(self, **state: Union[float, torch.Tensor]) -> None:
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
