"""A watch on the forwards of a network: whose operation is it?"""
from typing import Any, List, Tuple

import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ['ForwardWatch']


class ForwardWatch(TorchDispatchMode):
    """While entered, knows in whose own forward each operation of torch is: `stack[-1]`, the name of a module below the
    watched one, and that module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.stack: List[Tuple[str, nn.Module]] = []
        self.handles: List[Any] = []

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
