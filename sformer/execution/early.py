"""Neurons that fire before their currents are moved about.

Queries, keys and values are often parts of what a linear layer gives. Where nothing but their neurons reads it, these
may fire in that layer: an engine then writes int8 instead of float32, and moves a quarter of the bytes.
"""
import functools
import itertools
from collections import Counter
from collections.abc import Collection

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..layers import named_products
from ..layers.multiplying import AV, LINEAR, QK, kinds_of
from ..neurons import Neuron, ScaleAndFire

__all__ = ['early_neurons']

Part = tuple[Neuron, torch.Tensor]  # what fires, and its current


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _storages(tree: object) -> set[int]:
    return {_storage(x) for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


class _Readers(TorchDispatchMode):
    """What is computed with outside of neurons: storages that are read for something else than a view of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.read: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self.read |= _storages((args, kwargs)) - _storages(out)
        return out


def early_neurons(
        network: nn.Module,
        left_out: Collection[Neuron] = (),
) -> tuple[dict[str, ScaleAndFire], set[Neuron]]:
    """Neurons of attention that may fire in the linear layer which gives their current, found by running the network
    on one empty image.

    Args:
        network: Calibrated spiking network on the CPU, whose layers have been through `to_integer_`.
        left_out: Neurons that fire where they are.

    Returns:
        By name of a linear layer, one neuron with a step per output channel; and neurons that it fires for.
    """
    outputs: list[tuple[str, torch.Tensor, int]] = []  # kept, so that no other tensor gets their storage
    parts: list[Part] = []
    readers, hooks = _Readers(), []

    def gives(name: str, layer: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        outputs.append((name, out, out._version))
        readers.read.discard(_storage(out))  # which another tensor had that is gone

    def takes(neuron: Neuron, args: tuple[torch.Tensor]) -> None:
        parts.append((neuron, args[0]))
        readers.inside = True

    def leaves(neuron: Neuron, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        readers.inside = False

    for name, layer, products in named_products(network):
        if kinds_of(products) == (LINEAR,) and not products[0].weights.is_floating_point():
            hooks.append(layer.register_forward_hook(functools.partial(gives, name)))
        elif kinds_of(products) == (QK, AV):
            for neuron in itertools.chain.from_iterable(product.operands for product in products):
                hooks.append(neuron.register_forward_pre_hook(takes))
                hooks.append(neuron.register_forward_hook(leaves))
    try:
        with torch.no_grad(), readers:
            network(torch.zeros(1, *resolve_input_data_config(network)['input_size']))
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(name for name, *_ in outputs)
    fires = Counter(neuron for neuron, _ in parts)
    neurons: dict[str, ScaleAndFire] = {}
    fired: set[Neuron] = set()
    for name, out, version in outputs:
        read = [part for part in parts if _storage(part[1]) == _storage(out)]
        once = calls[name] == 1 and all(fires[neuron] == 1 for neuron, _ in read)
        unchanged = out._version == version and _storage(out) not in readers.read
        wanted = read and not any(neuron in left_out for neuron, _ in read)
        merged = _per_channel(read, out) if wanted and once and unchanged else None
        if merged is not None:
            neurons[name] = merged
            fired.update(neuron for neuron, _ in read)
    return neurons, fired


def _per_channel(parts: list[Part], out: torch.Tensor) -> ScaleAndFire | None:
    """One neuron for the channels of a current (1, L, C) of which operands (1, H, L, D) are parts; None if their
    neurons are too different, follow each token, or leave something out."""
    length, width = (int(size) for size in out.shape[-2:])
    scale_and_fire = [(neuron, x) for neuron, x in parts if type(neuron) is ScaleAndFire]
    first = scale_and_fire[0][0] if scale_and_fire else None
    if first is None or len(scale_and_fire) < len(parts):
        return None
    for neuron, x in scale_and_fire:
        alike = neuron.fire_function == first.fire_function and not neuron.token
        if not alike or not torch.equal(neuron.levels, first.levels) or (x.shape[2], x.stride(2)) != (length, width):
            return None
        if neuron.step.shape[0] not in (1, x.shape[1]):  # heads of keys that several of queries share
            return None
    merged = ScaleAndFire((width,), first.config, center_shape=(width,))
    merged.token = False
    merged.levels.copy_(first.levels)
    filled = torch.zeros(width, dtype=torch.int64)
    for neuron, x in scale_and_fire:
        shape = int(x.shape[1]), 1, int(x.shape[3])
        # their channels, as those of the first token
        place = torch.arange(width).as_strided(shape, (x.stride(1), width, x.stride(3)), x.storage_offset()).flatten()
        merged.multiplier[:, place] = neuron.multiplier.expand(2, *shape).flatten(1)
        merged.step[place] = (neuron.step / neuron.gain).expand(shape).flatten()  # thresholds, which is what fires
        for mine, theirs in ((merged.center, neuron.center), (merged.quiet, neuron.quiet)):
            if mine is not None and theirs is not None:
                mine[place] = theirs.expand(shape).flatten()
        filled[place] += 1
    return merged if (filled == 1).all() else None
