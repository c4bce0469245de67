"""Whether weights moved: the one answer to "are these still the source's weights".

Conversion adds neurons and leaves weights as they are. What moves them on purpose says so in the record
(`Conversion.changed`); what said nothing is found, as the record knows the hash of the weights that it speaks of.
"""
import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..errors import SFormerError
from ..files import state_hash
from ..layers import named_neurons, without_neurons
from .record import (
    ADAPTED,
    BALANCED,
    COMPENSATED,
    CONCENTRATED,
    DISTILLED,
    FINE_TUNED,
    REASONS,
    RECONSTRUCTED,
    Conversion,
    set_record_,
)
from .sources import label_names_of

__all__ = [
    'another_source', 'changed', 'check_alike', 'in_words', 'kept_record', 'network_inside', 'record_of', 'recorded_as',
    'source_of', 'warn_of_changes',
]

_logger = logging.getLogger(__name__)

WORDS = {
    COMPENSATED: 'compensate for its neurons',
    BALANCED: 'are balanced for its neurons',
    CONCENTRATED: 'have few channels of the residual stream carry most of it',
    RECONSTRUCTED: 'were trained block by block to follow its source',
    DISTILLED: 'were trained to follow its source',
    FINE_TUNED: 'were trained or set to other values since it was converted',
    ADAPTED: 'have other names, shapes or precision than those of its source',
}
SAME_FUNCTION = (BALANCED, CONCENTRATED, ADAPTED)  # of which the network is what it was, as far as can be told


def changed(model: nn.Module) -> tuple[str, ...]:
    """Why the weights of a model are not those of the source that it was converted from; empty if they are.

    Args:
        model: A module that is, or has in it, what was converted.

    Returns:
        Some of `record.REASONS`: `compensated`, `balanced`, `concentrated`, `reconstructed` and `distilled` are as
        recorded; `fine-tuned` are weights whose hash is another, though nothing recorded why; `adapted` ones have other
        names, shapes or dtypes (another number of classes, half precision, adapters), so that nothing more can be told
        of them.
    """
    found: set[str] = set()
    for part, record in _records(model):
        found.update(_as_it_is(part, record).changed)
    if any(neuron.compensated for _, neuron in named_neurons(model)):  # which a state dict brings along
        found.add(COMPENSATED)
    return _in_order(found)


def record_of(model: nn.Module) -> Conversion:
    """The record of a model's conversion as it is now: with what `changed` says, and hashes of its weights."""
    record = vars(model).get('conversion') or Conversion(source=type(model).__name__)
    return dataclasses.replace(_as_it_is(model, record), changed=changed(model))


@contextlib.contextmanager
def recorded_as(model: nn.Module, reason: str) -> Iterator[None]:
    """Let the record of a model say why its weights have moved where they do so inside of the context, however it ends.
    """
    before = record_of(model)
    try:
        yield
    finally:
        now = _with_hashes(model, before)
        if now.state_sha256 != before.state_sha256:
            set_record_(model, dataclasses.replace(now, changed=_in_order({*before.changed, reason})))


def source_of(model: nn.Module) -> nn.Module:
    """The source network of an SFormer, as a copy: the inverse of conversion.

    Args:
        model: Spiking model.

    Returns:
        A model of the class that it was converted from, with the same weights and no neurons.

    Raises:
        SFormerError: If its weights are not those of the source any more; says why.
    """
    network, reasons = without_neurons(model), changed(model)
    if {*reasons} - {ADAPTED}:  # bit for bit
        raise SFormerError(f'the weights of this model {in_words(reasons)}, so its source is not inside. Use the '
                           f'source itself; source_view() is the network that these weights are without neurons.')
    if reasons:
        _logger.warning(f'the weights of this model {in_words(reasons)}: whether they still have the values of the '
                        f'source is not known.')
    return network


def network_inside(model: nn.Module) -> nn.Module:
    """A copy of what an SFormer is without neurons, to start from, or to compare with, as if it were the source.

    Weights that were trained since are taken with a warning: whoever has fine-tuned a network means that one.

    Raises:
        SFormerError: If they are fitted to its neurons, without which they are no network that anybody trained.
    """
    reasons = _check_inside(model)
    if {*reasons} - {*SAME_FUNCTION}:
        _logger.warning(f'the weights of this model {in_words(reasons)}: what they are without neurons is taken for '
                        f'its source.')
    return without_neurons(model)


def kept_record(model: nn.Module) -> Conversion | None:
    """What the record of an SFormer goes on saying of its source and its weights when it is converted again; None of
    what has no record. Says so where weights have moved.

    Raises:
        SFormerError: If weights are fitted to neurons, without which they are no network to convert.
    """
    reasons = _check_inside(model)
    if not vars(model).get('conversion'):
        return None
    if {*reasons} - {*SAME_FUNCTION}:
        _logger.warning(f'the weights of this SFormer {in_words(reasons)}: what they are without neurons is converted, '
                        f'and its record goes on saying so.')
    return dataclasses.replace(record_of(model), weights_sha256=None, zoo_entry=None)


def _check_inside(model: nn.Module) -> tuple[str, ...]:
    """Why weights have moved; an SFormerError if they are another network without neurons."""
    reasons = changed(model)
    if COMPENSATED in reasons:
        raise SFormerError(f'the weights of this SFormer {in_words([COMPENSATED])}, so its source is not inside: '
                           f'convert the source itself.')
    return reasons


def another_source(model: nn.Module, source: nn.Module) -> nn.Module:
    """The source network that a model is compared with, which is not inside of it.

    Args:
        model: What is compared.
        source: A network, or an SFormer that has its source inside.

    Raises:
        SFormerError: If the source is not inside, or reads or gives something else than the model.
    """
    network = network_inside(source)
    check_alike(model, network)
    mine, other = label_names_of(model), label_names_of(network)
    if mine and other and mine != other:
        raise SFormerError('the source to compare the model with has other names of classes, or in another order.')
    recorded = getattr(getattr(model, 'conversion', None), 'source_sha256', None)
    if recorded not in (None, state_hash(network.state_dict())):
        _logger.warning('the source that the model is compared with has other weights than the network that it was '
                        'converted from, or they are of another precision.')
    return network


def check_alike(model: nn.Module, source: nn.Module) -> None:
    """Raise SFormerError if a source reads or gives something else than the model that is compared with it."""
    for what, of in (('classes', lambda m: getattr(m, 'num_classes', None)),
                     ('input', lambda m: tuple(resolve_input_data_config(m)['input_size']))):
        mine, other = of(model), of(source)
        if mine != other:
            raise SFormerError(f'the source to compare the model with has other {what}: {other}, not {mine}.')


def warn_of_changes(name: str, model: nn.Module) -> None:
    """Warn where the network inside of an SFormer, which it is compared with, is not what it was converted from."""
    reasons = changed(model)
    if {*reasons} - {BALANCED, CONCENTRATED}:
        _logger.warning(f'the weights of {name} have moved since it was converted ({", ".join(reasons)}), and it is '
                        f'compared with what they are without neurons. --source-model names what it was converted '
                        f'from.')


def in_words(reasons: Iterable[str]) -> str:
    """What is to be said of weights, as a predicate."""
    return ' and '.join(WORDS[reason] for reason in reasons)


def _records(model: nn.Module) -> Iterator[tuple[nn.Module, Conversion]]:
    """Modules that have a record of their conversion, which may lie in wrappers, with it."""
    for part in model.modules():
        record = vars(part).get('conversion')
        if isinstance(record, Conversion):
            yield part, record


def _as_it_is(module: nn.Module, record: Conversion) -> Conversion:
    """The record of a module, true of the weights that it has now."""
    now = _with_hashes(module, record)
    reasons, known = {*record.changed}, record.state_sha256
    if known is None and not reasons:
        known = record.source_sha256
    if record.source_sha256 == now.state_sha256:
        reasons = set()
    elif known not in (None, now.state_sha256):
        reasons.add(FINE_TUNED if record.layout_sha256 in (None, now.layout_sha256) else ADAPTED)
    return dataclasses.replace(now, changed=_in_order(reasons))


def _with_hashes(module: nn.Module, record: Conversion) -> Conversion:
    """The record of a module with hashes of the weights that it has now; without values they have none."""
    weights = _without_neurons(module)
    if any(tensor.is_meta for tensor in weights.values()):
        return record
    return dataclasses.replace(record, state_sha256=state_hash(weights), layout_sha256=_layout(weights))


def _without_neurons(module: nn.Module) -> dict[str, torch.Tensor]:
    """State of a module without that of its neurons: that of its source, where nothing moved."""
    neurons = tuple(f'{name}.' if name else '' for name, _ in named_neurons(module))
    return {name: value for name, value in module.state_dict().items() if not name.startswith(neurons)}


def _layout(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes and shapes."""
    lines = [f'{name} {getattr(value, "dtype", "")} {tuple(getattr(value, "shape", ()))}'
             for name, value in sorted(weights.items())]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def _in_order(reasons: set[str]) -> tuple[str, ...]:
    return tuple(reason for reason in REASONS if reason in reasons)
