"""Distillation: training, without labels, that makes a converted network more silent or brings it closer to its source.

Conversion needs none of this. Whoever wants fewer spikes than thresholds alone allow lets the weights follow: the
source is the teacher, gradients are straight-through (`neurons.functional.straight_through`), and a spike has a price.
"""
import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from ..errors import SFormerError, UncalibratedError, check, check_flag, check_number
from ..layers import is_calibrated, named_neurons, uncalibrated
from ..neurons import Neuron, ScaleAndFire
from .changes import network_inside, recorded_as
from .record import DISTILLED

__all__ = ['DistillConfig', 'distill_', 'learn_from_spikes', 'outputs', 'shuffled', 'squared_error', 'unary_spikes']


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How an SFormer is trained to follow its source.

    Args:
        learning_rate: Highest learning rate of AdamW; it rises over a tenth of the steps and falls as a cosine.
        price: What a unary spike per neuron costs, in squared relative errors of the output.
        features: Weight of the squared relative error of patch tokens, the mean over blocks: they say more about an
            image than a few logits do, so that gradients are less noisy.
        max_norm: Gradients are scaled down to this norm.
        amp: Autocast of the SFormer to bfloat16.

    Raises:
        ConfigError: If a value is out of its range; the message names it.
    """
    learning_rate: float = 1e-4
    price: float = 0.01
    features: float = 1.
    max_norm: float = 1.
    amp: bool = False

    def __post_init__(self) -> None:
        check_number(self, 'learning_rate', 0, 1)
        check_number(self, 'price', 0)
        check_number(self, 'features', 0)
        check_number(self, 'max_norm', math.ulp(0.), interval='above 0')
        check_flag(self, 'amp')


@torch.inference_mode(False)
def distill_(
        model: nn.Module,
        batches: Iterable[torch.Tensor],
        steps: int,
        config: DistillConfig = DistillConfig(),
        report: Callable[[int, float, float], None] = lambda step, error, spikes: None,
        teacher: nn.Module | None = None,
) -> nn.Module:
    """Train the weights of a calibrated SFormer such that its output stays that of its source, in place, no labels.

    Thresholds stay as they are: what a channel's current is beside its threshold is up to the weights before it.
    Gradients pass neurons that fire. Through silent ones they would push weights for ever: what they do there changes
    nothing, and steps of Adam are as long for small gradients as for large ones.

    Args:
        model: Calibrated SFormer. Afterwards its source is not inside any more, which its record says, also where
            training fails.
        batches: Normalised images (B, C, H, W), a batch per step.
        steps: Number of steps; the learning rate is scheduled over them.
        config: Learning rate, price of spikes.
        report: Called with each step, the squared relative error of its output and its unary spikes per neuron.
        teacher: The source, where it is not what is inside of the model at the start.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If the loss is NaN, there are fewer batches than steps, or nothing can be trained.
    """
    check(type(steps) is int and steps > 0, f'steps must be an integer of at least 1, got {steps!r}.')
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; fit it with sformer.convert() first.')
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise SFormerError('no weight of the model can be trained: all of them are frozen (requires_grad_).')
    taught: Any = (network_inside(model) if teacher is None else copy.deepcopy(teacher)).eval().requires_grad_(False)
    model.eval()
    student: Any = model
    taught.to(parameters[0].device, parameters[0].dtype)
    optimizer, schedule = _scheduled(parameters, config.learning_rate, steps)
    step, handles = 0, [neuron.register_forward_hook(learn_from_spikes) for _, neuron in named_neurons(model)]
    with torch.enable_grad(), unary_spikes(model) as spikes, contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(recorded_as(model, DISTILLED))
        for step, batch in zip(range(1, steps + 1), batches, strict=False):  # noqa: B007
            spikes.clear()
            batch = batch.to(parameters[0].device, parameters[0].dtype)
            error, features = _errors(student, taught, batch, config.amp)
            fired = spikes.mean()
            loss = error + config.features * features + config.price * fired
            if not torch.isfinite(loss):
                raise SFormerError(f'the loss is not finite in step {step}: choose a smaller learning rate.')
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.max_norm)
            optimizer.step()
            schedule.step()
            report(step, error.item(), fired.item())
    if step < steps:
        raise SFormerError(f'{steps} steps need as many batches, got {step}.')
    return model


def _errors(student: Any, taught: Any, batch: torch.Tensor, amp: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared relative error of the output, and that of patch tokens, the mean over blocks."""
    with torch.no_grad():
        expected = outputs(taught, batch)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
        error, *features = (squared_error(*pair) for pair in zip(outputs(student, batch), expected, strict=True))
    return error, torch.stack(features).mean()


def _scheduled(
        parameters: list[nn.Parameter],
        learning_rate: float,
        steps: int,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(
        (i + 1) / max(1, steps // 10), (1 + math.cos(math.pi * i / steps)) / 2))


def learn_from_spikes(neuron: Neuron, args: object, out: torch.Tensor) -> torch.Tensor:
    """Forward hook: the same currents, without a gradient where the neuron is silent."""
    center = getattr(neuron, 'center', None)
    return torch.where(out == (0. if center is None else center.to(out.dtype)), out.detach(), out)


def outputs(network: Any, batch: torch.Tensor) -> list[torch.Tensor]:
    """Output of a timm model, all tokens if it has no classifier; and patch tokens (B, L, C) that each block gives."""
    tokens, blocks = network.forward_intermediates(batch, output_fmt='NLC')
    out = network.forward_head(tokens)
    return [out if network.num_classes else tokens, *blocks]


def squared_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Squared relative error."""
    return (actual - expected).float().square().sum() / expected.float().square().sum()


def shuffled(batches: Iterable[torch.Tensor], batch_size: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Batches of another size without end, from all images of some batches, in another order each time.

    Raises:
        SFormerError: If there are fewer images than a batch has.
    """
    images = torch.cat([*batches])
    if len(images) < batch_size:
        raise SFormerError(f'{len(images)} images are fewer than a batch of {batch_size}.')
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        yield from (images[index] for index in order.split(batch_size) if len(index) == batch_size)


class unary_spikes:  # noqa: N801  used as a function
    """Unary spikes of all forward passes inside of the context, with a straight-through gradient.

    The level of a neuron is what it gives over its step; that of a neuron with a factor per token is relative to the
    largest of the token, which fires the top level. The gradient leaves the largest alone, which it would raise,
    such that all others seem small.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.sums: list[torch.Tensor] = []
        self.neurons = 0
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> 'unary_spikes':
        self.handles = [neuron.register_forward_hook(self._add) for _, neuron in named_neurons(self.model)
                        if neuron.counted]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _add(self, neuron: Neuron, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if not isinstance(neuron, ScaleAndFire):
            self._add_own(neuron, args[0], out)
            return
        levels = (out if neuron.center is None else out - neuron.center.to(out.dtype)).abs() / neuron.step
        if neuron.token:
            levels = levels * (neuron.levels[-1] / levels.detach().amax(-1, keepdim=True).clamp_min(1e-30))
        self.sums.append(levels.sum())
        self.neurons += out.numel()

    def _add_own(self, neuron: Neuron, x: torch.Tensor, out: torch.Tensor) -> None:
        """The same of a neuron of one's own, by what it says that it fires."""
        spikes = neuron.encode(x.detach())
        step = spikes.step if spikes.token_scale is None else spikes.step * spikes.token_scale
        levels = (out if spikes.center is None else out - spikes.center).abs() / step
        self.sums.append(levels.sum())
        self.neurons += out.numel()

    def clear(self) -> None:
        self.sums, self.neurons = [], 0

    def mean(self) -> torch.Tensor:
        """Unary spikes per neuron since `clear`."""
        return torch.stack(self.sums).sum() / self.neurons
