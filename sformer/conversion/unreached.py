"""Products that no neuron would ever reach: those of currents in a forward of a module's own."""
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import UnsupportedLayerError
from ..layers.spiking import multiplies_currents
from ..layers.watch import ForwardWatch

__all__ = ['UnreachedProducts']


class UnreachedProducts(ForwardWatch):
    """Raises where a module multiplies currents in a forward of its own, which no neuron would ever reach: matrices, or
    in a timm model elementwise what depends on the image, both of it. Norms and boxes of detectors are full of that."""
    OPERATIONS = {'mm', 'bmm', 'addmm', 'baddbmm', 'addbmm', 'convolution', 'linear', 'matmul', 'einsum',
                  '_scaled_dot_product_flash_attention_for_cpu', '_scaled_dot_product_attention_math',
                  'scaled_dot_product_attention'}
    GATES = {'mul', 'mul_', 'addcmul', 'addcmul_'}

    def __init__(self, module: nn.Module, batch: object):
        super().__init__(module)
        self.gates = not getattr(module, 'vetted', True)
        self.currents = WeakTensorKeyDictionary()
        self._keep(batch)

    def _keep(self, values: object) -> None:
        """Remember what depends on the image."""
        for value in tree_leaves(values) if self.gates else ():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.currents[value] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func.overloadpacket.__name__
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x in self.currents]
        gated = operation in self.GATES and len(read) > 1
        if (gated or operation in self.OPERATIONS) and self.stack:
            name, module = self.stack[-1]
            if multiplies_currents(module):
                kind = type(module)
                raise UnsupportedLayerError(
                    f'{name or "(root)"} ({kind.__module__}.{kind.__qualname__}) multiplies currents in its own '
                    f'forward ({operation}), which has no spiking counterpart. Register one with '
                    f'sformer.layers.register_spiking.')
        out = func(*args, **(kwargs or {}))
        if read:
            self._keep(out)
        return out
