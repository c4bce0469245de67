"""Other weights of the same function, in which neurons fire better: what is seen of the source's currents, what is
written, what the record says, and what undoes it."""
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn as nn

from ..errors import SFormerError
from ..files import Json
from ..layers import named_neurons
from ..layers.heads import head_weights
from ..layers.stream import stream_of
from ..neurons import Neuron
from .balance import Moments, balance_
from .changes import record_of, recorded_as
from .concentration import components, fold_norms_, turn_
from .record import BALANCED, CONCENTRATED, set_record_

__all__ = ['write_balanced', 'write_concentrated']

SAME = 0.02  # relative error of outputs that rounding of weights in 16 bits may make; another function has more

# lets modules stand where neurons are in the source, as it runs on some batches; None lets currents pass there
Watch = Callable[[Callable[[str, Neuron], nn.Module | None]], Json]


@torch.inference_mode()
def write_balanced(module: nn.Module, watch: Watch, undo: contextlib.ExitStack, few: bool) -> None:
    """Let neurons of attention make less noise or, with `few`, fewer spikes.

    Args:
        module: A spiking module.
        watch: Lets modules stand where its neurons are.
        undo: Gets what undoes it.
        few: Whether neurons have a price of activity.

    Raises:
        SFormerError: If there is nothing to balance.
    """
    layers = [layer for _, layer in head_weights(module)]
    names = {neuron: name for name, neuron in named_neurons(module)}
    heads = {names[neuron]: layer.heads for layer in layers for neuron in layer.neurons}
    if not layers:
        raise SFormerError('no attention layer of this network can be balanced: leave out balance.')
    seen = watch(lambda name, neuron: Moments(heads[name]) if name in heads else None)
    with _recorded(module, BALANCED, (tensor for layer in layers for tensor in layer.tensors()), undo):
        for layer in layers:
            queries, keys, values, outputs = (seen[names[neuron]] for neuron in layer.neurons)
            balance_(layer, (queries, keys, values, outputs), few)


@torch.inference_mode()
def write_concentrated(
        module: nn.Module,
        watch: Watch,
        output: Callable[[], object],
        undo: contextlib.ExitStack,
) -> None:
    """Write the residual stream of a classifier such that few channels carry most of it.

    Args:
        module: A spiking module.
        watch: Lets modules stand where its neurons are.
        output: What its source gives on a batch.
        undo: Gets what undoes it.

    Raises:
        SFormerError: If something else than a linear classifier may read the residual stream.
    """
    stream = stream_of(module)
    refusal = ('the residual stream of this network cannot be concentrated: it has to be a vision transformer of timm '
               'with a linear classifier, LayerNorm and biases, whose features nobody reads. Leave out concentrate.')
    if stream is None:
        raise SFormerError(refusal)
    before = output()
    names = {neuron: name for name, neuron in named_neurons(module)}
    readers = {names[layer.neuron] for _, layers in stream.readers[:-1] for layer in layers}
    with _recorded(module, CONCENTRATED, stream.tensors(), undo):
        fold_norms_(stream)
        seen = watch(lambda name, neuron: Moments(1) if name in readers else None)
        turn_(stream, components(sum(seen[name].covariance()[0] for name in sorted(readers))))
    after = output()
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
            and (after.double() - before.double()).norm() <= SAME * before.double().norm()):
        raise SFormerError(refusal)


@contextlib.contextmanager
def _recorded(
        module: nn.Module,
        reason: str,
        tensors: Iterable[torch.Tensor],
        undo: contextlib.ExitStack,
) -> Iterator[None]:
    """Let weights be written inside of the context, for a reason that the record then says; and be undone."""
    undo.callback(set_record_, module, vars(module).get('conversion'))
    record = record_of(module)
    set_record_(module, dataclasses.replace(record, source_sha256=record.source_sha256 or record.state_sha256))
    for tensor in tensors:
        undo.callback(tensor.copy_, tensor.clone())
    with recorded_as(module, reason):
        yield
