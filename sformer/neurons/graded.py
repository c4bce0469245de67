"""Graded-spike coding of pixels."""
import torch

from .base import Neuron, Spikes
from .config import FitConfig
from .functional import straight_through
from .statistics import CurrentStatistics

__all__ = ['GradedCoding']


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
        out = self._levels(x.detach()).mul_(self.step).add_(self.center).to(x.dtype)
        if torch.is_grad_enabled():
            out = straight_through(out, x, self.center - 128.5 * self.step, self.center + 127.5 * self.step)
        return out

    def _levels(self, x: torch.Tensor) -> torch.Tensor:
        center = self.center.expand_as(x)  # or images of one channel would become images of all
        return ((x - center) / self.step).round_().clamp_(-128, 127)

    def statistics(self) -> CurrentStatistics:
        return CurrentStatistics(tuple(self.step.shape), signed=True)

    def fit(self, statistics: CurrentStatistics, config: FitConfig = FitConfig()) -> None:
        """Keep the range that the model's normalisation implies; widen it where images of another one were seen."""
        step = self.step.flatten().cpu()
        low = self.center.flatten().cpu() - 128 * step
        high = low + 255 * step
        highest, lowest = statistics.peak[0], -statistics.peak[1]
        if (highest > high + step).any() or (lowest < low - step).any():
            low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
        self.set_range(low, high)

    def extra_repr(self) -> str:
        return f'levels=256, graded, {self._range_repr("step", self.step)}{self._state_repr()}'
