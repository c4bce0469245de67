"""Reconstruction: training, without labels, that brings each block of a converted network closer to that of its source.

Conversion needs none of this. Whoever wants few levels lets the weights of each block, one after the other, make up for
what neurons leave out in it and before it (BRECQ, arXiv 2102.05426): what arrives is what spikes have given so far,
what is to leave is what the source gives, and gradients are straight-through. No block ends further from that than it
was: where training does not help, its weights stay.
"""
import dataclasses
import functools
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn as nn

from ..data.batches import progress
from ..errors import SFormerError
from ..layers import named_products, shared_copy
from .importance import ForwardFn, Importance, importance_of

__all__ = ['Reconstruction', 'block_names', 'reconstruct_', 'take_weights_']

_logger = logging.getLogger(__name__)

IMAGES = 8  # images of a step
STEPS = 80  # of a block
LEARNING_RATE = 1e-4
WARM_UP = 10  # a step in so many of those that the learning rate takes to rise
HELD_BYTES = 2 ** 31  # of what blocks read and give, on all images
HELD = 5  # tensors of such a size: what the source reads and gives, what spikes do, and what they will

NO_BLOCKS = 'this network has no blocks in a row that can be trained one after the other: leave out effort=high.'

Outputs = dict[str, torch.Tensor]  # what blocks have given, by path


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """How far what a block gives is from what that of the source gives, where spikes arrive: as of `Importance.error`.

    Args:
        name: Path of the block.
        before: As it was converted.
        after: As it was trained, or was left.
    """
    name: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a block is called with."""
    args: tuple[object, ...]
    kwargs: dict[str, object]

    def of(self, block: nn.Module) -> torch.Tensor:
        """What a block gives."""
        out = block(*self.args, **self.kwargs)
        assert isinstance(out, torch.Tensor)
        return out

    def is_alike(self, other: '_Call') -> bool:
        """Whether tensors are the same; whatever else there is, such as sizes, is not compared."""
        mine, theirs = ([x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor)]
                        for call in (self, other))
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


class _Arrived(Exception):  # noqa: N818  it is what was asked for
    """A network has come to the block that it is run up to."""

    def __init__(self, call: _Call):
        super().__init__()
        self.call = call


class _Replay:
    """A network that is run up to a block again and again; blocks before it need not be run.

    Args:
        network: The network; it is not changed.
        names: Paths of its blocks.
        forward: Runs a network on a batch.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], forward: ForwardFn):
        self.view = shared_copy(network).eval()
        self.forward = forward
        self.given: Outputs = {}
        for name in names:
            vars(self.view.get_submodule(name))['forward'] = functools.partial(self._stand_in, name)

    def _stand_in(self, name: str, *args: object, **kwargs: object) -> torch.Tensor:
        if name not in self.given:
            raise _Arrived(_Call(args, kwargs))
        return self.given[name].clone()  # what follows may write to it

    def call(self, batch: object, given: Outputs) -> _Call | None:
        """What arrives at the first block that has not `given` anything yet; None if all have."""
        self.given = given
        try:
            self.forward(self.view, batch)
        except _Arrived as arrived:
            return arrived.call
        return None


def _passed(given: Outputs, name: str, out: torch.Tensor) -> Outputs:
    """What blocks have given, after one more has; of those before it, whose values it alone has read, shapes are left.
    """
    shapes = {before: value.new_zeros(()).expand(value.shape) for before, value in given.items()}
    return {**shapes, name: out}


def block_names(module: nn.Module) -> list[str]:
    """Paths of the blocks of a spiking module: of what stands in a row, with numbers for names, the smallest parts that
    have several products with weights."""
    products: Counter[str] = Counter()
    for name, _, found in named_products(module):
        parts = name.split('.')
        for i in range(len(parts)):
            products['.'.join(parts[:i + 1])] += sum(product.weight is not None for product in found)
    names = []
    for name, child in module.named_modules():
        inside = [part for part, _ in child.named_children()]
        if all(part.isdigit() for part in inside):
            paths = [f'{name}.{part}'.lstrip('.') for part in inside]
            names += [path for path in paths if products[path] > 1]
    return [name for name in names if not any(other.startswith(f'{name}.') for other in names)]


def _in_a_row(source: nn.Module, names: Sequence[str], forward: ForwardFn, batch: object) -> Outputs:
    """Blocks in the order in which they are called, as far as each reads nothing but what the one before it gave, with
    what they give on a batch."""
    seen: list[tuple[str, _Call, object]] = []

    def see(name: str, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], out: object) -> None:
        seen.append((name, _Call(args, kwargs), out))

    view = shared_copy(source).eval()
    for name in names:
        view.get_submodule(name).register_forward_hook(functools.partial(see, name), with_kwargs=True)
    forward(view, batch)
    times = Counter(name for name, _, _ in seen)
    replay = _Replay(source, names, forward)
    given: Outputs = {}
    outputs: Outputs = {}
    for name, call, out in seen:
        found = replay.call(batch, given)
        if times[name] > 1 or not isinstance(out, torch.Tensor) or found is None or not found.is_alike(call):
            break
        given = _passed(given, name, out)
        outputs[name] = out
    left = [name for name, _, _ in seen if name not in outputs]
    if outputs and left:
        _logger.warning(f'{left[0]} reads more than what the block before it gives: it and what follows stay as '
                        f'they are.')
    return outputs


@torch.inference_mode(False)
def reconstruct_(
        module: nn.Module,
        source: nn.Module,
        batches: Iterable[object],
        forward: ForwardFn,
        seed: int = 0,
) -> list[Reconstruction]:
    """Train the weights of each block of a calibrated spiking module such that it gives what that of the source gives,
    in place, no labels.

    Thresholds stay, and so do weights that are frozen or read elsewhere, and whatever is no block.

    Args:
        module: Calibrated spiking module.
        source: The network that it was converted from.
        batches: Images; of what does not fit into `HELD_BYTES`, the first ones.
        forward: Runs a network on a batch, to which it does not write.
        seed: Seed of the order of images.

    Returns:
        What came of each block, in the order in which they are called.

    Raises:
        SFormerError: If the network has no blocks, no weight of them can be trained, or a loss is NaN.
    """
    names = block_names(module)
    if not names:
        raise SFormerError(NO_BLOCKS)
    generator = torch.Generator().manual_seed(seed)
    source, spiking = (shared_copy(network).eval() for network in (source, module))
    with torch.no_grad():
        parts = _in_parts(batches)
        outputs = _in_a_row(source, names, forward, parts[0])
        if not outputs:
            raise SFormerError(NO_BLOCKS)
        held = HELD * max(out.numel() * out.element_size() for out in outputs.values())
        parts = parts[:max(1, HELD_BYTES // held)]
        importance = importance_of(source, list(outputs), parts, forward)
        own = {name: _own_parameters(spiking, name) for name in outputs}
        if not any(own.values()):
            raise SFormerError('no weight of a block can be trained: all are frozen (requires_grad_), of half '
                               'precision, or read elsewhere too.')
        replays = [_Replay(network, names, forward) for network in (source, spiking)]
        given: list[list[Outputs]] = [[{} for _ in parts] for _ in replays]
        bar = iter(progress(range(STEPS * len(outputs)), 'Reconstructing', STEPS * len(outputs)))
        found = []
        for name in outputs:
            calls = [[_called(replay, part, before) for part, before in zip(parts, each, strict=True)]
                     for replay, each in zip(replays, given, strict=True)]
            targets = [call.of(source.get_submodule(name)) for call in calls[0]]
            block = _Block(name, spiking.get_submodule(name), own[name], calls[1], targets, importance[name])
            out = block.train(generator, bar)
            found.append(block.result)
            given = [[_passed(before, name, gave) for before, gave in zip(each, now, strict=True)]
                     for each, now in zip(given, (targets, out), strict=True)]
        return found


@torch.no_grad()
def take_weights_(module: nn.Module, source: nn.Module) -> None:
    """Give a module the values of another one's parameters of the same names."""
    for name, parameter in source.named_parameters():
        module.get_parameter(name).copy_(parameter)


def _in_parts(batches: Iterable[object]) -> list[object]:
    """Batches of `IMAGES` images, where they are tensors."""
    parts: list[object] = []
    for batch in batches:
        parts += batch.split(IMAGES) if isinstance(batch, torch.Tensor) else [batch]
    return parts


def _called(replay: _Replay, batch: object, given: Outputs) -> _Call:
    call = replay.call(batch, given)
    assert call is not None
    return call


def _own_parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Parameters of a block that nothing else reads, and that can be trained."""
    block = module.get_submodule(name)
    inside, everywhere = (Counter(id(p) for _, p in part.named_parameters(remove_duplicate=False))
                          for part in (block, module))
    return [p for p in block.parameters()
            if p.requires_grad and p.dtype in (torch.float32, torch.float64) and inside[id(p)] == everywhere[id(p)]]


class _Block:
    """A block that is trained.

    Args:
        name: Its path.
        block: It.
        parameters: What of it is trained.
        calls: What spikes call it with, per batch.
        targets: What the source's gives.
        importance: What errors cost.
    """

    def __init__(
            self,
            name: str,
            block: nn.Module,
            parameters: list[nn.Parameter],
            calls: list[_Call],
            targets: list[torch.Tensor],
            importance: Importance,
    ):
        self.name = name
        self.block = block
        self.parameters = parameters
        self.calls = calls
        self.targets = targets
        self.importance = importance

    def train(self, generator: torch.Generator, bar: Iterator[int]) -> list[torch.Tensor]:
        """Train it, and return what it gives then, per batch."""
        out, before = self._outputs()
        self.result = Reconstruction(self.name, before, before)
        if not self.parameters:
            for _ in range(STEPS):
                next(bar)
            return out
        kept = [p.detach().clone() for p in self.parameters]
        optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
        for index in itertools.islice(_orders(len(self.targets), generator), STEPS):
            next(bar)
            with torch.enable_grad():
                loss = self.importance.error(self.calls[index].of(self.block), self.targets[index])
                optimizer.zero_grad()
                loss.backward()
            self._check(loss.item())
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        trained, after = self._outputs()
        if after < before:
            self.result = Reconstruction(self.name, before, after)
            return trained
        for parameter, value in zip(self.parameters, kept, strict=True):
            parameter.copy_(value)
        return out

    def _outputs(self) -> tuple[list[torch.Tensor], float]:
        """What the block gives, per batch, and its mean error."""
        out = [call.of(self.block) for call in self.calls]
        errors = [self.importance.error(*pair).item() for pair in zip(out, self.targets, strict=True)]
        self._check(sum(errors))
        return out, sum(errors) / len(errors)

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise SFormerError(f'the error of {self.name} is not finite: leave out effort=high.')


def _rate(step: int) -> float:
    """Share of the learning rate in a step."""
    return min((step + 1) * WARM_UP / STEPS, (1 + math.cos(math.pi * step / STEPS)) / 2)


def _orders(count: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers below `count` without end, in another order each time."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
