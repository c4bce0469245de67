"""Graded-spike coding of pixels."""
import contextlib
import logging

import torch

from .base import Neuron, Spikes
from .config import FitConfig
from .functional import straight_through
from .statistics import CurrentStatistics

__all__ = ['GradedCoding', 'PatchCoding']

_logger = logging.getLogger(__name__)

OVERSHOOT = 1 / 16  # of the range


class GradedCoding(Neuron):
    """Graded-spike coding of pixels: each 8-bit pixel value p becomes one graded spike of level p - 128.

    A normalised pixel is `x = (p / 255 - mean) / std`, so with `step = 1 / (255 std)` and
    `center = (128 / 255 - mean) / std` the code is lossless for images that were 8-bit before normalisation. The
    centre folds into the bias of the layer that follows.

    Args:
        in_chans: Number of image channels C.
        device: Device of the buffers; they are float32 on every device.

    Shape:
        Input and output (B, C, H, W).
    """
    step: torch.Tensor
    center: torch.Tensor
    dim = -3  # of channels
    counted = False  # pixels always fire
    watched = 16  # batches that are still looked at for pixels out of range, which another normalisation soon shows

    def __init__(self, in_chans: int, device=None):
        super().__init__(device=device)
        self.in_chans = in_chans
        shape = self._spread(torch.ones(in_chans, device='cpu')).shape
        dd = dict(device=device, dtype=torch.float32)  # whatever the default dtype is
        self.register_buffer('step', torch.full(shape, 1 / 127.5, **dd))
        self.register_buffer('center', torch.full(shape, 1 / 255, **dd))  # mean = std = 0.5

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Code [low, high] with 256 levels and mark the neuron as calibrated.

        Args:
            low: Normalised value of a black pixel per channel, (C,).
            high: Normalised value of a white pixel per channel, (C,).

        Raises:
            ValueError: If a range is empty or not finite.
        """
        self._code(self._spread(low), self._spread(high))

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of normalised pixels per channel (C,) as the currents that they are here, the shape of the step."""
        return values.view(-1, 1, 1)

    def _code(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Code currents from low to high, the shape of the step."""
        step = (high - low) / 255
        self._set(step=step, center=low + 128 * step)
        self.mark_calibrated()

    @property
    def level_range(self) -> tuple[int, int]:
        return -128, 127

    def encode(self, x: torch.Tensor) -> Spikes:
        """Spikes on normalised pixels (B, C, H, W): levels p - 128, int8.

        Raises:
            RuntimeError: If the images have another number of channels.
        """
        return Spikes(self._levels(x.detach()).to(torch.int8), self.step, center=self.center)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and self.watched > 0 and type(x) is torch.Tensor:  # no proxy of a tracer
            self._watch(x)
        out = self._levels(x.detach()).mul_(self.step).add_(self.center).to(x.dtype)
        if torch.is_grad_enabled():
            out = straight_through(out, x, self.center - 128.5 * self.step, self.center + 127.5 * self.step)
        return out

    def _levels(self, x: torch.Tensor) -> torch.Tensor:
        center = self.center.expand_as(x)  # or images of one channel would become images of all
        return ((x - center) / self.step).round_().clamp_(-128, 127)

    def _watch(self, x: torch.Tensor) -> None:
        """Say so if pixels are out of range, once."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self.watched -= 1
        with contextlib.suppress(RuntimeError, IndexError):  # of tensors without values: of vmap, or empty
            channels = x.detach().float().movedim(self.dim, 0).flatten(1)
            seen = self._out_of_range(channels.amin(1), channels.amax(1))
            if seen:
                self.watched = 0
                _logger.warning(f'images have {seen}, and are clipped. If that is how the source was trained, set mean '
                                f'and std accordingly (sformer convert --mean --std) and convert it again.')

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the lowest and the highest level stand for, (C,)."""
        step = self.step.flatten()
        low = self.center.flatten() - 128 * step
        return low, low + 255 * step

    def _out_of_range(self, lowest: torch.Tensor, highest: torch.Tensor) -> str:
        """What to say of pixels with these extremes, (C,), by the channel that is worst; nothing if they are out of
        range by no more than what resizing overshoots."""
        low, high = (edge.to(lowest.device) for edge in self._range())
        excess = torch.maximum(highest - high, low - lowest) / (high - low)
        if not excess.max() > OVERSHOOT:
            return ''
        c = int(excess.argmax())
        return (f'values from {lowest[c]:.3g} to {highest[c]:.3g} in channel {self._channel(c)}, where mean and std of '
                f'pretrained_cfg allow {low[c]:.3g} to {high[c]:.3g}')

    def _channel(self, index: int) -> int:
        """The channel of an element of the step."""
        return index

    def statistics(self) -> CurrentStatistics:
        return CurrentStatistics(tuple(self.step.shape), signed=True)

    def fit(self, statistics: CurrentStatistics, config: FitConfig = FitConfig()) -> None:
        """Keep the range that the model's normalisation implies; widen it where images of another one were seen."""
        low, high = (edge.cpu() for edge in self._range())
        highest, lowest = statistics.peak[0], 0 - statistics.peak[1]
        step = (high - low) / 255
        if (highest > high + step).any() or (lowest < low - step).any():
            seen = self._out_of_range(lowest, highest)
            if seen:
                _logger.warning(f'calibration images have {seen}. Normalise them so or, if the source was trained '
                                f'otherwise, set mean and std accordingly; pixels are coded coarsely now, over both.')
            low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
        self._code(low.view(self.step.shape), high.view(self.step.shape))

    def extra_repr(self) -> str:
        return f'levels=256, graded, {self._range_repr("step", self.step)}{self._state_repr()}'


class PatchCoding(GradedCoding):
    """Graded-spike coding of pixels in flat patches, each pixel of which has a weight of its own.

    Args:
        in_chans: Number of image channels C.
        pixels: Pixels P of a patch.
        channels_last: Whether channels of a pixel lie beside one another.
        gain: Factor of normalised pixels before they arrive.
        offset: What is added to them then.
        device: Device of the buffers.

    Shape:
        Input and output (B, N, P C).
    """
    dim = -1

    def __init__(
            self,
            in_chans: int,
            pixels: int,
            channels_last: bool = True,
            gain: float = 1.,
            offset: float = 0.,
            device=None,
    ):
        self.pixels = pixels
        self.channels_last = channels_last
        self.gain = gain
        self.offset = offset
        super().__init__(in_chans, device)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        values = self.gain * values + self.offset
        return values.repeat(self.pixels) if self.channels_last else values.repeat_interleave(self.pixels)

    def _channel(self, index: int) -> int:
        return index % self.in_chans if self.channels_last else index // self.pixels
