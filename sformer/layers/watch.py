"""Watches on the forwards of a network: whose operation is it, and what does each neuron fire?"""
import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ..neurons import Neuron, Spikes
from .spiking import named_neurons

__all__ = ['ForwardWatch', 'watch_spikes']


class ForwardWatch(TorchDispatchMode):
    """While entered, knows in whose own forward each operation of torch is: `stack[-1]`, the name of a module below the
    watched one, and that module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.stack: list[tuple[str, nn.Module]] = []
        self.handles: list[RemovableHandle] = []

    def __enter__(self):
        for name, child in self.module.named_modules():
            self.handles.append(child.register_forward_pre_hook(
                lambda module, args, name=name: self.stack.append((name, module))))
            self.handles.append(child.register_forward_hook(lambda *args: self.stack.pop() and None, always_call=True))
        return super().__enter__()

    def __exit__(self, *args):
        while self.handles:
            self.handles.pop().remove()
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watch_spikes(model: nn.Module, add: Callable[[str, Spikes], None]) -> Iterator[None]:
    """Hand on what each neuron fires in the forward passes inside of the context, whoever calls the model: whether its
    layer asks it for a current or, where products are executed in integers or spike by spike, for spikes.

    Pixels are left out, which always fire, and neurons that are not to be asked (`Neuron.counted`).

    Args:
        model: Spiking model, in use by nobody else.
        add: Called with the path of a neuron and the spikes that it fires.
    """
    watched = [(name, neuron) for name, neuron in named_neurons(model) if neuron.counted]
    handles = [handle for name, neuron in watched for handle in _watch(name, neuron, add)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, neuron in watched:
            neuron.__dict__.pop('encode', None)


def _watch(name: str, neuron: Neuron, add: Callable[[str, Spikes], None]) -> list[RemovableHandle]:
    encode = neuron.encode

    def asked(x: torch.Tensor) -> Spikes:
        spikes = encode(x)
        add(name, spikes)
        return spikes

    def before(module: Neuron, args: tuple[torch.Tensor]) -> None:
        asked(args[0])
        neuron.__dict__.pop('encode', None)  # a forward may ask itself

    def after(*args: object) -> None:
        neuron.__dict__['encode'] = asked

    after()
    return [neuron.register_forward_pre_hook(before), neuron.register_forward_hook(after, always_call=True)]
