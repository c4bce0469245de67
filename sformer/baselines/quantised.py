"""Quantised networks by a plain method: symmetric and uniform, with the least squared error."""
import copy
import math
from collections.abc import Iterable

import torch
import torch.nn as nn

from ..conversion import calibrate_
from ..layers import named_neurons, named_products
from ..models import spiking_model_
from ..neurons import CurrentStatistics, FitConfig, Neuron, ScaleAndFire, Spikes
from ..neurons.functional import firing_boundaries, level_values
from ..neurons.thresholds import branch_error, candidate_tops

__all__ = ['Quantiser', 'quantise_weights_', 'quantised', 'quantised_twin', 'twin_bits']

CLIPS = torch.linspace(1, 0.3, 71)  # candidate tops of weights, in the largest


class Quantiser(Neuron):
    """Uniform quantiser of an activation, symmetric: integers from -(2^(b-1) - 1) to 2^(b-1) - 1 times one step, which
    has the least squared error under the observed distribution. Softmax numerators, in [0, 1], have 2^b - 1 levels.

    Args:
        neuron: Neuron in whose place it is.
        bits: Bits b, 2 to 8.
        fine: With the granularity of that neuron, a step per channel or head and the centre of keys; else one step for
            the tensor.
    """
    takes_octaves = True
    step: torch.Tensor
    center: torch.Tensor | None

    def __init__(self, neuron: ScaleAndFire, bits: int, fine: bool = False):
        super().__init__(device=neuron.step.device)
        self.shape, self.signed = tuple(neuron.step.shape), neuron.signed
        self.top = 2 ** (bits - 1) - 1 if self.signed else 2 ** bits - 1
        self.fine = fine and self.signed
        self.register_buffer('step', torch.full(
            self.shape if self.fine else (1,) * len(self.shape), 1 / self.top, device=neuron.step.device))
        center = neuron.center if self.fine else None
        self.register_buffer('center', None if center is None else torch.zeros_like(center))

    def encode(self, x: torch.Tensor) -> Spikes:
        h = x.detach().float()
        h = h if self.center is None else h - self.center
        k = (h / self.step).round_().clamp_(-self.top if self.signed else 0, self.top)
        return Spikes(k.to(torch.int8 if self.signed else torch.int16), self.step, center=self.center)

    def statistics(self) -> CurrentStatistics | None:
        if not self.signed:
            return None
        return CurrentStatistics(self.shape, True, None if self.center is None else tuple(self.center.shape))

    def fit(
            self,
            statistics: CurrentStatistics | None,
            config: FitConfig = FitConfig(),
            octaves: torch.Tensor | None = None,
    ) -> None:
        """Arguments as of `ScaleAndFire.fit`; the config is not used, the octaves only where steps are fine."""
        if statistics is not None:
            relative = torch.zeros(self.shape, dtype=torch.int64)
            shape = tuple(self.step.shape)
            if octaves is not None and self.fine:  # one step per head, but for these powers of two
                relative, shape = octaves, (*self.shape[:-1], 1)
            pooled = statistics.pooled(relative, shape)
            values = level_values('uniform', self.top)
            error = branch_error(pooled.counts.sum(0), values, firing_boundaries(values))
            step = (candidate_tops()[error.argmin(-1)] / self.top).to(torch.float32).view(shape)
            self._set(step=(step * 2. ** relative).expand_as(self.step) if self.fine else step)
            if self.center is not None and statistics.center is not None:
                self._set(center=statistics.center)
        self.mark_calibrated()

    def extra_repr(self) -> str:
        return f'top={self.top}, {self._range_repr("step", self.step)}'


@torch.no_grad()
def quantise_weights_(module: nn.Module, bits: int) -> nn.Module:
    """Round the weights of every layer that reads spikes to integers of b bits times a step per output channel, in
    place: symmetric, clipped where that has the least squared error (as at 8 bits it nearly never has).

    Args:
        module: Module that `spiking_` converted.
        bits: Bits b, 2 to 8.
    """
    top = 2 ** (bits - 1) - 1
    for _, _, products in named_products(module):
        for product in products:
            if product.weight is None:
                continue
            weight = product.by_output(product.weight)
            rows = weight.flatten(1)
            best, least = rows.clone(), torch.full_like(rows[:, :1], math.inf)
            for clip in CLIPS.tolist():
                step = clip * rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
                rounded = (rows / step).round().clamp(-top, top) * step
                error = (rounded - rows).square().sum(1, keepdim=True)
                best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
            product.weight.copy_(product.by_output(best.view_as(weight)))
    return module


def quantised(
        source: nn.Module,
        batches: Iterable[torch.Tensor],
        activation_bits: int,
        weight_bits: int | None = None,
        *,
        fine: bool = False,
) -> nn.Module:
    """A source whose products are those of integers: a quantiser wherever an SFormer has a neuron, pixels apart, which
    have 8 bits as they come.

    Args:
        source: timm model; it is not changed.
        batches: Images to calibrate with, normalised.
        activation_bits: Bits of what enters products, QK^T and AV included.
        weight_bits: Bits of weights, of all layers; None leaves them in floating point.
        fine: As of `Quantiser`.
    """
    model = spiking_model_(copy.deepcopy(source)).eval()
    for name, neuron in list(named_neurons(model)):
        if isinstance(neuron, ScaleAndFire):
            model.set_submodule(name, Quantiser(neuron, activation_bits, fine))
    calibrate_(model, batches, FitConfig(unbiased=False))
    return model if weight_bits is None else quantise_weights_(model, weight_bits)


def twin_bits(levels: int) -> int:
    """Bits of a signed integer with N levels per branch: ceil(log2(2 N + 1))."""
    return (2 * levels).bit_length()


def quantised_twin(source: nn.Module, batches: Iterable[torch.Tensor], levels: int) -> nn.Module:
    """The fair twin of an SFormer with N levels: as many bits, the same sites and granularity, the source's weights."""
    return quantised(source, batches, twin_bits(levels), fine=True)
