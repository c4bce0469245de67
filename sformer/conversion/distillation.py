"""Distillation: training, without labels, that makes a converted network more silent or brings it closer to its source.

Conversion needs none of this. Whoever wants fewer spikes than thresholds alone allow lets the weights follow: the
source is the teacher, gradients are straight-through (`neurons.functional.straight_through`), and a spike has a price.
"""
import contextlib
import copy
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from ..errors import SFormerError, UncalibratedError, check, check_flag, check_number
from ..files import state_hash
from ..layers import is_calibrated, named_neurons, uncalibrated
from ..neurons import Neuron, count_spikes
from .changes import changed, network_inside, recorded_as
from .record import CONCENTRATED, DISTILLED
from .training_state import Interrupt, TrainingState, deferred_interrupt

__all__ = ['DistillConfig', 'distill_', 'learn_from_spikes', 'outputs', 'shuffled', 'squared_error', 'unary_spikes']

_logger = logging.getLogger(__name__)

KEPT = 200  # steps between two states on disk
JUDGED = 10  # last steps that tell whether a training has diverged


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
        state: TrainingState | None = None,
) -> nn.Module:
    """Train the weights of a calibrated SFormer such that its output stays that of its source, in place, no labels.

    Thresholds stay as they are: what a channel's current is beside its threshold is up to the weights before it.
    Gradients pass neurons that fire. Through silent ones they would push weights for ever: what they do there changes
    nothing, and steps of Adam are as long for small gradients as for large ones.

    Args:
        model: Calibrated SFormer. Afterwards its source is not inside any more, which its record says, also where
            training fails.
        batches: Normalised images (B, C, H, W), a batch per step; where a training goes on, those of its first steps
            are passed over.
        steps: Number of steps; the learning rate is scheduled over them.
        config: Learning rate, price of spikes.
        report: Called with each step, the squared relative error of its output and its unary spikes per neuron.
        teacher: The source, where it is not what is inside of the model at the start.
        state: Where the training is kept every `KEPT` steps and when Ctrl-C ends it, and where it goes on from.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If the loss is NaN, there are fewer batches than steps, nothing can be trained, the teacher has
            other classes, image size or blocks, or the state is of another training.
    """
    check(type(steps) is int and steps > 0, f'steps must be an integer of at least 1, got {steps!r}.')
    parameters = _trainable(model)
    taught: Any = (network_inside(model) if teacher is None else copy.deepcopy(teacher)).eval().requires_grad_(False)
    _check_teacher(model, taught)
    check(teacher is None or not config.features or CONCENTRATED not in changed(model),
          'tokens of blocks of this SFormer are in a basis of its own (concentrate), which a teacher that is given '
          '(--source-model) does not have: leave it out, and what is inside teaches.')
    model.eval()
    student: Any = model
    like = next(iter(parameters.values()))
    taught.to(like.device, like.dtype)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise SFormerError(_too_few(steps, 0))
    with torch.enable_grad(), recorded_as(model, DISTILLED), contextlib.ExitStack() as stack:
        for _, neuron in named_neurons(model):  # before spikes are counted, so that what is silent has no price
            stack.callback(neuron.register_forward_hook(learn_from_spikes).remove)
        spikes = stack.enter_context(unary_spikes(model))
        optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.)
        step = 0
        if state is not None:
            step = state.open(_training_key(model, taught, first, steps, config), parameters, optimizer)
        history: list[list[float]] = [] if state is None else state.history
        schedule = _decay(optimizer, steps, step)
        interrupt = stack.enter_context(deferred_interrupt()) if state is not None else Interrupt()
        for batch in itertools.islice(itertools.chain([first], batches), step, steps):
            spikes.clear()
            error, features = _errors(student, taught, batch.to(like.device, like.dtype), config.amp)
            fired = spikes.mean()
            loss = error + config.features * features + config.price * fired
            _check_loss(loss, batch, step + 1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), config.max_norm)
            optimizer.step()
            schedule.step()
            step += 1
            history.append([error.item(), fired.item()])
            report(step, *history[-1])
            if state is not None and step < steps and (interrupt.asked or step % KEPT == 0):
                state.save(step)
            if interrupt.asked and step < steps:
                raise KeyboardInterrupt
    if step < steps:
        raise SFormerError(_too_few(steps, step))
    _warn_if_diverged(history)
    return model


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of a calibrated model that can be trained, of which there are some."""
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; fit it with sformer.convert() first.')
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise SFormerError('no weight of the model can be trained: all of them are frozen (requires_grad_).')
    return parameters


def _training_key(model: nn.Module, taught: nn.Module, first: torch.Tensor, steps: int, config: DistillConfig) -> str:
    """What tells a training from others: whose weights, towards whose, on which images, how."""
    of = [state_hash(network.state_dict()) for network in (model, taught)]
    return ' '.join([*of, state_hash(dict(images=first)), repr(config), str(steps)])


def _check_teacher(model: Any, taught: Any) -> None:
    """Raise SFormerError if a teacher reads or gives something else than the model that it teaches."""
    mine, other = model.num_classes, taught.num_classes
    if mine != other:
        raise SFormerError(f'the teacher has {other} classes, the model has {mine}.')
    mine, other = (getattr(getattr(network, 'patch_embed', None), 'img_size', None) for network in (model, taught))
    if mine != other and getattr(getattr(taught, 'patch_embed', None), 'strict_img_size', False):
        raise SFormerError(f'the teacher reads images of {other} pixels, the model of {mine}.')


def _check_loss(loss: torch.Tensor, batch: torch.Tensor, step: int) -> None:
    if torch.isfinite(loss):
        return
    if not torch.isfinite(batch).all():
        raise SFormerError(f'images of step {step} have NaN or infinity in them.')
    raise SFormerError(f'the loss is not finite in step {step}: choose a smaller learning rate.')


def _too_few(steps: int, batches: int) -> str:
    return f'{steps} steps need as many batches, got {batches}.'


def _warn_if_diverged(history: list[list[float]]) -> None:
    """Say so where the output has less to do with that of the source than nothing has, whose relative error is 1."""
    begin, last = history[0][0], history[-JUDGED:]
    end = sum(error for error, _ in last) / len(last)
    if end > max(1., begin):
        _logger.warning(
            f'the training has diverged: the relative error of the output is {end ** 0.5:.3g} in its last steps, and '
            f'was {begin ** 0.5:.3g} before the first. Start over with a smaller learning rate (--learning-rate).')


def _errors(student: Any, taught: Any, batch: torch.Tensor, amp: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared relative error of the output, and that of patch tokens, the mean over blocks."""
    with torch.no_grad():
        expected = outputs(taught, batch)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
        found = outputs(student, batch)
    if [of.shape for of in found] != [of.shape for of in expected]:
        raise SFormerError('the teacher has other blocks than the model, or tokens of another shape.')
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
        error, *features = map(squared_error, found, expected)
    return error, torch.stack(features).mean()


def _decay(optimizer: torch.optim.Optimizer, steps: int, done: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(
        (i + 1) / max(1, steps // 10), (1 + math.cos(math.pi * i / steps)) / 2), last_epoch=done - 1)


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
    """Unary spikes of all forward passes inside of the context, as they are counted everywhere, with a straight-through
    gradient: that of the output over its step.

    Where thresholds follow the token its factor has no gradient, or spikes would be saved by raising the largest of a
    token, such that all others seem small.
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
        spikes = neuron.encode(args[0].detach())
        step = spikes.step if spikes.token_scale is None else spikes.step * spikes.token_scale
        current = out if spikes.center is None else out - spikes.center.to(out.dtype)
        learns = (current.abs() / step).sum()
        self.sums.append(learns - learns.detach() + count_spikes(spikes.levels)['unary'])
        self.neurons += out.numel()

    def clear(self) -> None:
        self.sums, self.neurons = [], 0

    def mean(self) -> torch.Tensor:
        """Unary spikes per neuron since `clear`."""
        return torch.stack(self.sums).sum() / self.neurons
