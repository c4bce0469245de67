"""Graded-spike coding of pixels."""
import contextlib
import logging

import torch

from .base import Neuron, Spikes
from .config import FitConfig
from .functional import straight_through
from .statistics import CurrentStatistics

__all__ = ['GradedCoding']

_logger = logging.getLogger(__name__)


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
    watched = 16  # batches that are still looked at for pixels out of range, which another normalisation soon shows

    def __init__(self, in_chans: int, device=None):
        super().__init__(device=device)
        dd = dict(device=device, dtype=torch.float32)  # whatever the default dtype is
        self.register_buffer('step', torch.full((in_chans, 1, 1), 1 / 127.5, **dd))
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
        self._set(step=step.view(-1, 1, 1), center=(low + 128 * step).view(-1, 1, 1))
        self.calibrated.fill_(True)

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
        with contextlib.suppress(RuntimeError):  # of tensors without values, as those of vmap
            level = (x.detach() - self.center.expand_as(x)) / self.step
            if level.amin() < -129 or level.amax() > 128:
                self.watched = 0
                low, high = self.center - 128 * self.step, self.center + 127 * self.step
                _logger.warning(
                    f'images hold values from {x.min():.3g} to {x.max():.3g}, but pixels are coded from '
                    f'{low.min():.3g} to {high.max():.3g}, as mean and std of pretrained_cfg say, and clipped. If that '
                    f'is how the source was trained, set mean and std accordingly (sformer convert --mean --std) and '
                    f'convert it again.')

    def statistics(self) -> CurrentStatistics:
        return CurrentStatistics(tuple(self.step.shape), signed=True)

    def fit(self, statistics: CurrentStatistics, config: FitConfig = FitConfig()) -> None:
        """Keep the range that the model's normalisation implies; widen it where images of another one were seen."""
        step = self.step.flatten().cpu()
        low = self.center.flatten().cpu() - 128 * step
        high = low + 255 * step
        highest, lowest = statistics.peak[0], 0 - statistics.peak[1]
        if (highest > high + step).any() or (lowest < low - step).any():
            _logger.warning(
                f'calibration images hold values from {lowest.min():.3g} to {highest.max():.3g}, but images that are '
                f'normalised by mean and std of pretrained_cfg lie between {low.min():.3g} and {high.max():.3g}. '
                f'Normalise them so or, if the source was trained otherwise, set mean and std accordingly; pixels are '
                f'coded coarsely now, over both ranges.')
            low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
        self.set_range(low, high)

    def extra_repr(self) -> str:
        return f'levels=256, graded, {self._range_repr("step", self.step)}{self._state_repr()}'
