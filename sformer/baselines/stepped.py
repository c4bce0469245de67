"""Networks of several timesteps, run step by step.

No forward is written for that. Let x(t) be what enters a layer at timestep t, and X(t) the mean of x(1) ... x(t).
Linear layers map means to means; layers that are not linear, and products of two activations, act on the means of what
came in so far ("expectation compensation", arXiv 2502.21193). So a whole network that is run step by step is the
source's own forward on running means, once per timestep, and only neurons have a state: one that is given X(t) knows
x(t) = t X(t) - (t - 1) X(t - 1), and gives the mean of what it sent so far.
"""
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn as nn

from ..conversion import convert
from ..layers import named_neurons, shared_copy
from ..neurons import FitConfig, Neuron, ScaleAndFire, SFNConfig, Spikes, fire, level_values
from ..neurons.config import SEPARATE_BRANCHES

__all__ = [
    'SteppedNeuron', 'IntegrateAndFire', 'MultiThreshold', 'MultiStep', 'integrate_and_fire_network',
    'multi_threshold_network',
]

POWERS = 7  # thresholds of a branch, s ... 64 s: as many as the levels of an int8 hold


class SteppedNeuron(Neuron):
    """A neuron that fires once per call, on the mean current of the timesteps so far, and gives the mean of what it
    sent; `reset()` comes before the first one.

    Two branches, reset by subtraction, each with the threshold that the one-step neuron was fitted with.

    Args:
        neuron: One-step neuron whose thresholds, centre and gain it takes.
        span: Its thresholds in those of that neuron.
        window: Timesteps per call. With 1, a network is run step by step. With T, each layer waits until the one before
            has fired T times, and spends its T timesteps on the mean of that (layer-synchronous).

    Attributes:
        latest: Spikes of the latest timestep, in the lowest threshold of their branch, int8, (B, ...) each: one tensor
            per membrane.
    """
    threshold: torch.Tensor
    multiplier: torch.Tensor
    step: torch.Tensor
    gain: torch.Tensor
    center: torch.Tensor | None
    latest: Sequence[torch.Tensor]
    counted = False  # each call is a timestep

    def __init__(self, neuron: ScaleAndFire, span: int = 1, window: int = 1):
        super().__init__(device=neuron.step.device)
        self.window = window
        multiplier = neuron.multiplier.expand(2, *neuron.step.shape)  # softmax numerators get a second branch, too
        self.register_buffer('multiplier', multiplier.clone())
        self.register_buffer('step', span * neuron.step)
        self.register_buffer('gain', neuron.gain.clone())
        self.register_buffer('threshold', self.step * multiplier / self.gain)
        self.register_buffer('center', None if neuron.center is None else neuron.center.clone())
        self.mark_calibrated()
        self.reset()

    def reset(self) -> None:
        """To before the first timestep: nothing was sent, and membranes are at half a threshold."""
        self.time = 0
        self.sent: torch.Tensor | float = 0.  # levels, in steps
        self.latest = ()

    def fired(self, charge: torch.Tensor) -> torch.Tensor:
        """Let a timestep pass, given all charge that came in since the first: levels, in steps, that are sent now."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor) -> Spikes:
        """Spikes of the next timestep.

        Args:
            x: Mean current of all timesteps up to and with this one, (B, ...).
        """
        return Spikes(self._advance(x).to(torch.int8), self.step)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.window > 1:
            self.reset()
        for _ in range(self.window):
            self._advance(x)
        out = self.sent * (self.step / self.time)
        return (out if self.center is None else out + self.center).to(x.dtype)

    def _advance(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().float()
        self.time += 1
        levels = self.fired(self.time * (x if self.center is None else x - self.center))
        self.sent = self.sent + levels
        return levels

    def statistics(self) -> None:
        return None

    def extra_repr(self) -> str:
        return self._range_repr('threshold', self.threshold)


class IntegrateAndFire(SteppedNeuron):
    """Dual-branch integrate-and-fire (IF): one neuron is fed the current, one its negative, each has a membrane

    `h(t) = v(t - 1) + x(t)`, `s(t) = [h(t) >= threshold]`, `v(t) = h(t) - threshold s(t)`, `v(0) = threshold / 2`.
    """

    def reset(self) -> None:
        super().reset()
        self.counts: list[torch.Tensor | float] = [0., 0.]  # spikes of each branch

    def fired(self, charge: torch.Tensor) -> torch.Tensor:
        spikes = [sign * charge - threshold * count >= threshold / 2
                  for sign, threshold, count in zip((1, -1), self.threshold, self.counts, strict=True)]
        self.counts = [count + s for count, s in zip(self.counts, spikes, strict=True)]
        self.latest = [spikes[0].to(torch.int8), -spikes[1].to(torch.int8)]
        return spikes[0] * self.multiplier[0] - spikes[1] * self.multiplier[1]


class MultiThreshold(SteppedNeuron):
    """Thresholds s, 2 s, 4 s ... of both signs around one membrane: at each timestep the one nearest to its potential
    fires, or none where zero is nearer, and is subtracted. With s alone, a signed integrate-and-fire neuron.

    Args:
        neuron: As of `SteppedNeuron`.
        span: Likewise.
        window: Likewise.
        count: Number of thresholds per branch.
    """
    levels: torch.Tensor

    def __init__(self, neuron: ScaleAndFire, span: int = 1, window: int = 1, count: int = POWERS):
        super().__init__(neuron, span, window)
        self.register_buffer('levels', level_values('power2', count).to(self.step.device))

    def fired(self, charge: torch.Tensor) -> torch.Tensor:
        h = charge - self.sent * (self.step / self.gain)
        u = h.clamp_min(0).div_(self.threshold[0]).add_(h.clamp_max(0).div_(self.threshold[1]))
        k = fire(u, 'power2' if len(self.levels) > 1 else 'uniform', self.levels)
        self.latest = [k.to(torch.int8)]
        return k.clamp_min(0) * self.multiplier[0] + k.clamp_max(0) * self.multiplier[1]


class MultiStep(nn.Module):
    """A network that is run T times on the same images; its output is that on the running means of the last timestep.

    Args:
        model: Calibrated SFormer; it is not changed, and shares its parameters.
        steps: Timesteps T.
        neuron: Called with each scale-and-fire neuron, makes the one that takes its place.

    Raises:
        ValueError: If there are no timesteps.
    """

    def __init__(self, model: nn.Module, steps: int, neuron: Callable[[ScaleAndFire], SteppedNeuron]):
        super().__init__()
        if steps < 1:
            raise ValueError(f'steps must be at least 1, got {steps!r}.')
        self.network = shared_copy(model).eval()
        self.steps = steps
        for name, old in list(named_neurons(self.network)):
            if isinstance(old, ScaleAndFire):
                self.network.set_submodule(name, neuron(old))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        neurons = [neuron for _, neuron in named_neurons(self.network) if isinstance(neuron, SteppedNeuron)]
        for neuron in neurons:
            neuron.reset()
        for _ in range(self.steps):
            out = self.network(images)
        for neuron in neurons:
            neuron.reset()  # currents of the last images are no part of the network
        return out


def integrate_and_fire_network(
        source: nn.Module,
        batches: Iterable[torch.Tensor],
        steps: int,
        *,
        signed: bool = False,
        synchronous: bool = False,
        fit: FitConfig = FitConfig(),
) -> tuple[MultiStep, nn.Module]:
    """A network of integrate-and-fire neurons over T timesteps.

    Thresholds are those that the temporal-to-spatial equivalence (arXiv 2510.23383) says: T times those of a network of
    one-step multi-threshold neurons with T levels, which is fitted as SFormers are, but for what follows the token.

    Args:
        source: timm model.
        batches: Images to calibrate with, normalised.
        steps: Timesteps T, 1 to 127.
        signed: One membrane for both branches, so that a spike can be taken back, instead of a pair of neurons.
        synchronous: Each layer waits for the T timesteps of the one before. Pairs are equal to the multi-threshold
            network then.
        fit: How thresholds are fitted.

    Returns:
        The network, and that of multi-threshold neurons.
    """
    model = convert(source, batches, SFNConfig(
        levels=steps, fire='uniform', attention_fire='uniform', activation_fire='uniform', token_scale=False,
        neuron=SEPARATE_BRANCHES), fit)
    window = steps if synchronous else 1
    kind: Callable[..., SteppedNeuron] = functools.partial(MultiThreshold, count=1) if signed else IntegrateAndFire
    return MultiStep(model, 1 if synchronous else steps, lambda old: kind(old, steps, window)), model


def multi_threshold_network(
        source: nn.Module,
        batches: Iterable[torch.Tensor],
        steps: int,
) -> tuple[MultiStep, nn.Module]:
    """A network of multi-threshold neurons over T timesteps, in the manner of ECMT (arXiv 2502.21193).

    From its description: `POWERS` thresholds per branch, each half of the next, of which a timestep fires one; reset by
    subtraction; layers that are not linear and products of two activations on the means of what came in so far. Ours:
    sites, a threshold per channel or head with the least squared error in place of a percentile per tensor, and
    softmax numerators in place of the softmax; 7 thresholds where the paper's code has 8 by default.

    Args:
        source: timm model.
        batches: Images to calibrate with, normalised.
        steps: Timesteps T.

    Returns:
        The network, and that of one timestep.
    """
    # no gain: what one timestep lacks, the next one sends
    model = convert(source, batches, SFNConfig(
        levels=POWERS, fire='power2', attention_fire='power2', activation_fire='power2', token_scale=False),
        FitConfig(unbiased=False))
    return MultiStep(model, steps, MultiThreshold), model
