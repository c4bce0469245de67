"""Adapters, such as LoRA's of peft, read the spikes of the layer that they adapt.

peft puts a layer of its own in the place of the adapted one, which it keeps as `base_layer`, and hands its input to the
adapter and to the adapted layer. Were that the current, an adapter would compute something else once it is merged into
the weights. So the neuron fires first, in whatever layer takes a spiking one as its `base_layer`.

A layer is not told that it was put into another one, and of adapters there are many kinds, so the hook is torch's own
of the process, which sees each module that is put into another. It stays: it has no state that threads could disturb,
holds no module, and compares one name unless that is `base_layer`.
"""
import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook

from .linear import SpikingConv2d, SpikingLinear

__all__: list[str] = []


Arguments = tuple[tuple[object, ...], dict[str, object]]  # those of a call, by place and by name


def _adapted(layer: nn.Module | None) -> nn.Module | None:
    """The layer below any number of adapters."""
    base = getattr(layer, 'base_layer', None)
    return layer if base is None else _adapted(base)


def _fire_first(adapter: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments | None:
    neuron = getattr(_adapted(adapter), 'neuron', None)
    if neuron is None or 'fired' in kwargs:  # a source has none; an outer adapter had it fire
        return None
    return (neuron(args[0]), *args[1:]), dict(kwargs, fired=True)


def _watch_for_adapters(parent: nn.Module, name: str, layer: nn.Module | None) -> None:
    if name == 'base_layer' and isinstance(_adapted(layer), (SpikingLinear, SpikingConv2d)):
        parent.register_forward_pre_hook(_fire_first, with_kwargs=True)


register_module_module_registration_hook(_watch_for_adapters)
