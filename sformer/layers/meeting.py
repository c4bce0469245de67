"""Products of activations in the forwards of timm's layers, which are met on their way, so that no forward is copied.

While such a forward runs, calls of `F.scaled_dot_product_attention` go to the layer's `AttentionProduct`, and what an
activation function gates is multiplied by the layer's neurons.
"""
import functools
import operator
from collections.abc import Callable
from typing import Any, cast

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedLayerError
from ..neurons import Neuron, SFNConfig, Spikes, new_neuron
from . import products
from .multiplying import GATE, Multiplying, Product
from .products import AttentionProduct
from .table import SpikingLayer

__all__ = ['MeetingMixin']

MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, operator.matmul)
SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


class _ToNeurons(TorchFunctionMode):
    """While the forward of a layer runs, hand its products of activations to the layer's neurons."""

    def __init__(self, layer: 'MeetingMixin', met: list[str]):
        super().__init__()
        self.layer = layer
        self.met = met  # names of the products that came by; the caller's own, as dynamo reads no attribute of a mode
        self.gate: torch.Tensor | None = None
        self.query: torch.Tensor | None = None
        self.fired: torch.Tensor | Spikes | None = None
        self.dropout_p = 0.

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.layer.by_hand:
            out = self._by_hand(func, args, kwargs)
            return func(*args, **kwargs) if out is None else out
        if func is F.scaled_dot_product_attention:
            self.met.append('attention')
            call = self.met.count('attention')
            if call <= self.layer.num_products:  # one too many is refused when the forward is over
                product = cast(AttentionProduct, self.layer.products[call - 1])
                return self.layer.attend(product, *args, **kwargs)
        if func is torch.einsum and self.layer.position_neuron is not None:
            equation, query, table = args
            neuron = self.layer.position_neuron
            if query is not self.query:  # it fires once, and meets the tables of rows and columns
                self.query, self.fired = query, products.fired_for_tables(neuron, query)
            assert self.fired is not None
            self.met.append('position')
            return products.meet_table(neuron, self.fired, table, functools.partial(func, equation))
        gate_neuron, value_neuron = self.layer.gate_neuron, self.layer.value_neuron
        if gate_neuron is not None and value_neuron is not None:
            if func in self.layer.gate_functions:
                self.gate = func(*args, **kwargs)
                return self.gate
            multiplied = func in (torch.Tensor.mul, operator.mul)  # the latter in a strict export
            if multiplied and self.gate is not None and (args[0] is self.gate or args[1] is self.gate):
                self.met.append('gate')
                value = args[1] if args[0] is self.gate else args[0]
                return products.multiply(value_neuron, value, gate_neuron, self.gate)
        return func(*args, **kwargs)

    def _by_hand(
            self,
            func: Callable[..., torch.Tensor],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """What becomes of QK^T, the softmax, the dropout after it, and AV; None of another operation."""
        scores, values = self.layer.products
        mixes = isinstance(values, products.MixedProduct)
        if func in MATMUL and args[1].ndim == 4:  # of heads: weights have two dimensions
            self.met.append('product')
            if self.met.count('product') == 1:
                return scores(args[0], args[1].transpose(-2, -1))
            if self.met.count('product') == 2:  # one too many is refused when the forward is over
                return values(args[0], args[1]) if mixes else values(args[0], args[1], self.dropout_p)
        if func in SOFTMAX and not mixes:  # `values` weighs by it
            self.met.append('softmax')
            return args[0]
        if func is F.dropout and self.met[-1:] == ['softmax']:
            self.dropout_p = kwargs['p'] if kwargs['training'] else 0.
            return args[0]
        return None


class MeetingMixin(SpikingLayer):
    """A layer of timm whose products of activations are met in its own forward.

    Shape:
        Input and output as of the layer.
    """
    spiking_parts: tuple[str, ...] = ('gate_neuron', 'value_neuron', 'position_neuron')
    num_products = 0  # calls of attention in the layer's forward
    by_hand = False  # whether that multiplies matrices instead
    gate_functions: tuple[Callable[..., torch.Tensor], ...] = (torch.Tensor.sigmoid,)
    products: nn.ModuleList
    gate_neuron: Neuron | None
    value_neuron: Neuron | None
    position_neuron: Neuron | None  # of queries that meet tables of relative positions

    def add_gate(self, shape: tuple[int, ...] | None, config: SFNConfig) -> None:
        """Add the neurons of a gate and of its value, with a step of this shape; None where there is no gate."""
        device = next((p.device for p in self.parameters()), None)
        for name in ('gate_neuron', 'value_neuron'):
            setattr(self, name, None if shape is None else new_neuron(shape, config, device=device))
        self.position_neuron = None

    def attend(self, product: AttentionProduct, *args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """What attention is of the arguments of its call."""
        return product(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Give the forward the signature of the source's, by which symbolic tracing makes its proxies."""
        super().__init_subclass__(**kwargs)
        source = next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Multiplying))
        if source is not nn.Module:  # a mixin has no source yet
            @functools.wraps(source.forward)
            def forward(self: MeetingMixin, *args: object, **kwargs: object) -> torch.Tensor:
                return MeetingMixin.forward(self, *args, **kwargs)
            cls.forward = forward  # type: ignore[method-assign]

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        met: list[str] = []
        with _ToNeurons(self, met):
            x = super().forward(*args, **kwargs)
        if met != self.expected():
            raise UnsupportedLayerError(
                f'a product of {type(self).__name__} was not met on its way through timm {timm.__version__}'
                f'{", as symbolic tracing of a gated layer hides it: use torch.export" if met else ""}.')
        return x

    def expected(self) -> list[str]:
        """Names of the products that a forward meets, in order."""
        return ['attention'] * self.num_products + ['gate'] * (self.gate_neuron is not None)

    def multiplies(self) -> list[Product]:
        if self.gate_neuron is None or self.value_neuron is None:
            return []
        return [Product(GATE, (self.gate_neuron, self.value_neuron), torch.mul)]
