"""Neurons that fire before their currents are moved about.

Queries, keys and values are often parts of what a linear layer gives. Where nothing but their neurons reads it, these
may fire in that layer: an engine then writes int8 instead of float32, and moves a quarter of the bytes.
"""
from collections import Counter
from typing import Any, Collection, Dict, List, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..layers import AttentionProduct
from ..neurons import ScaleAndFire
from .integer import IntegerLinear

__all__ = ['early_neurons']

OPERANDS = ('q_neuron', 'k_neuron', 'v_neuron')

Part = Tuple[str, int, ScaleAndFire, torch.Tensor]  # name of a product, which of its operands, its neuron, its current


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _storages(tree: Any) -> Set[int]:
    return {_storage(x) for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


class _Readers(TorchDispatchMode):
    """What is computed with outside of the products: storages that are read for something else than a view of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.read: Set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self.read |= _storages((args, kwargs)) - _storages(out)
        return out


def early_neurons(
        network: nn.Module,
        left_out: Collection[str] = (),
) -> Tuple[Dict[str, ScaleAndFire], Dict[str, Set[int]]]:
    """Neurons of attention that may fire in the linear layer which gives their current, found by running the network
    on one empty image.

    Args:
        network: Calibrated spiking network on the CPU, whose layers have been through `to_integer_`.
        left_out: Names of `AttentionProduct`s whose neurons fire where they are.

    Returns:
        By name of a linear layer, one neuron with a step per output channel; and by name of an `AttentionProduct`,
        which of query, key and value (0, 1, 2) have fired by then.
    """
    outputs: List[Tuple[str, torch.Tensor, int]] = []  # kept, so that no other tensor gets their storage
    parts: List[Part] = []
    readers, hooks = _Readers(), []

    def watch(name: str) -> None:
        def gives(layer: Any, args: Any, out: torch.Tensor) -> None:
            outputs.append((name, out, out._version))
            readers.read.discard(_storage(out))  # which another tensor had that is gone

        def takes(product: Any, args: Any, kwargs: Any) -> None:
            operands = [*args, *(kwargs[key] for key in ('query', 'key', 'value') if key in kwargs)]
            parts.extend((name, i, getattr(product, neuron), operands[i]) for i, neuron in enumerate(OPERANDS))
            readers.inside = True

        def leaves(product: Any, args: Any, out: Any) -> None:
            readers.inside = False

        module = network.get_submodule(name)
        if isinstance(module, IntegerLinear):
            hooks.append(module.register_forward_hook(gives))
        elif isinstance(module, AttentionProduct):
            hooks.append(module.register_forward_pre_hook(takes, with_kwargs=True))
            hooks.append(module.register_forward_hook(leaves))

    for name, _ in network.named_modules():
        watch(name)
    try:
        with torch.no_grad(), readers:
            network(torch.zeros(1, *resolve_input_data_config(network)['input_size']))
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(name for name, *_ in outputs) + Counter(name for name, i, *_ in parts if not i)
    neurons: Dict[str, ScaleAndFire] = {}
    fired: Dict[str, Set[int]] = {}
    for layer, out, version in outputs:
        read = [part for part in parts if _storage(part[3]) == _storage(out)]
        once = all(calls[name] == 1 for name in (layer, *(part[0] for part in read)))
        unchanged = out._version == version and _storage(out) not in readers.read
        wanted = read and not any(part[0] in left_out for part in read)
        neuron = _per_channel(read, out) if wanted and once and unchanged else None
        if neuron is not None:
            neurons[layer] = neuron
            for name, i, *_ in read:
                fired.setdefault(name, set()).add(i)
    return neurons, fired


def _per_channel(parts: List[Part], out: torch.Tensor) -> Optional[ScaleAndFire]:
    """One neuron for the channels of a current (1, L, C) of which operands (1, H, L, D) are parts; None if their
    neurons are too different, follow each token, or leave something out."""
    length, width = (int(size) for size in out.shape[-2:])
    first = parts[0][2]
    for _, _, neuron, x in parts:
        alike = type(neuron) is ScaleAndFire and neuron.fire_function == first.fire_function and not neuron.token
        if not alike or not torch.equal(neuron.levels, first.levels) or (x.shape[2], x.stride(2)) != (length, width):
            return None
        if neuron.step.shape[0] not in (1, x.shape[1]):  # heads of keys that several of queries share
            return None
    merged = ScaleAndFire((width,), first.config, center_shape=(width,))
    merged.token = False
    merged.levels.copy_(first.levels)
    filled = torch.zeros(width, dtype=torch.int64)
    for _, _, neuron, x in parts:
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
