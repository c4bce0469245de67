"""A view of an SFormer that NeuroBench counts right.

NeuroBench hooks what is an `nn.Linear` or `nn.Conv2d` and reads its input; a spiking layer is one whose input is a
current, and its products of spikes with spikes are no layers at all. In the view each neuron and each product is a
module of its own, and a product's input is what the neuron fired.
"""
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from ..errors import SFormerError, UncalibratedError, needed_packages
from ..execution import SPIKE_CODINGS, spike_planes
from ..layers import Product, is_calibrated, named_products, shared_copy, uncalibrated
from ..layers.multiplying import AV, CONVOLUTION, GATE, LINEAR, QK, kinds_of
from ..layers.products import keys_rest, softmax_numerators, with_rest
from ..neurons import Neuron

if TYPE_CHECKING:
    from neurobench.models import TorchModel

__all__ = ['neurobench_view']


class FiredSpikes(nn.Module):
    """A neuron whose output are the spikes that it fires: levels or, in binary coding, bit planes of -1, 0 and 1,
    (planes, B, ...). The current that they stand for is `current`."""
    current: torch.Tensor
    product: 'PairProduct'  # of gates alone

    def __init__(self, neuron: Neuron, coding: str):
        super().__init__()
        self.neuron, self.coding = neuron, coding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.current = self.neuron(x)
        levels = self.neuron.encode(x).levels
        return spike_planes(levels) if self.coding == 'binary' else levels.to(torch.float32)

    def multiply(self, x: torch.Tensor, other: 'FiredSpikes', y: torch.Tensor) -> torch.Tensor:
        """Elementwise product with what another neuron fires, in a module of its own."""
        return self.product.meet(self(x), other(y), lambda: self.current * other.current)


class WeightProduct(nn.Module):
    """Weights on spikes. Called with the current, it is the layer; with spikes alone, as a counter calls a copy whose
    weights and spikes are 0 or 1, it sums exactly."""
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, product: Product):
        nn.Module.__init__(self)  # an nn.Linear or nn.Conv2d to counters alone: parameters are those of the layer
        self.compute = product.compute
        self.weight, self.bias = product.weights, product.bias

    def forward(self, spikes: torch.Tensor, current: torch.Tensor | None = None) -> torch.Tensor:
        if current is not None:
            return self.compute(current, self.weight, self.bias)
        images = spikes.double()
        return self.compute(images.flatten(0, -4) if self.weight.ndim == 4 else images, self.weight.double())

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))


class LinearProduct(WeightProduct, nn.Linear):  # type: ignore[misc]
    """Weights of a linear layer on spikes."""


class ConvProduct(WeightProduct, nn.Conv2d):  # type: ignore[misc]
    """Weights of a convolution on spikes."""


class PairProduct(nn.Linear):
    """Spikes on spikes, for counters a linear layer whose weights are the spikes of the second operand."""

    def __init__(self, product: Callable[..., torch.Tensor], coding: str):
        nn.Module.__init__(self)  # there are no parameters
        self.product, self.coding = product, coding
        self.register_parameter('bias', None)
        self.weight = torch.zeros(0)

    def forward(self, spikes: torch.Tensor, compute: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        return self.product(spikes.double(), self.weight.double()) if compute is None else compute()

    def meet(self, a: torch.Tensor, b: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`compute()`, seen as the product of spikes a with spikes b, every plane of one with every plane of the
        other."""
        binary = self.coding == 'binary'
        self.weight = b[None] if binary else b
        return self(a[:, None] if binary else a, compute=compute)

    def extra_repr(self) -> str:
        return self.coding


class SplitLayer(nn.Module):
    """A layer as a neuron and a product."""

    def __init__(self, product: Product, coding: str):
        super().__init__()
        self.neuron = FiredSpikes(product.operands[0], coding)
        self.product = (LinearProduct if product.kind == LINEAR else ConvProduct)(product)

    def forward(self, x: torch.Tensor, fired: bool = False) -> torch.Tensor:
        return self.product(self.neuron(x), current=self.neuron.current)


class SplitAttention(nn.Module):
    """An `AttentionProduct` as four neurons and two products."""

    def __init__(self, scores: Product, values: Product, coding: str):
        super().__init__()
        q, k = scores.operands
        attn, v = values.operands
        self.q = FiredSpikes(q, coding)
        self.k = FiredSpikes(k, coding)
        self.attn = FiredSpikes(attn, coding)
        self.v = FiredSpikes(v, coding)
        self.scores = PairProduct(scores.compute, coding)
        self.values = PairProduct(values.compute, coding)

    def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.,
            is_causal: bool = False,
            scale: float | None = None,
    ) -> torch.Tensor:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = self.scores.meet(
            self.q(query), self.k(key), lambda: (self.q.current * factor) @ self.k.current.transpose(-2, -1))
        numerators = softmax_numerators(scores, attn_mask, is_causal)
        spikes = self.attn(numerators)
        total = self.attn.current.sum(dim=-1, keepdim=True)
        out = self.values.meet(spikes, self.v(value), lambda: self.attn.current @ (self.v.current / 32))
        if keys_rest(self.attn.neuron, attn_mask, is_causal):
            out, total = with_rest(out, total, numerators.sum(dim=-1, keepdim=True), self.v.current / 32, attn_mask)
        return out / (total / 32).clamp_min(1e-4)


def neurobench_view(model: nn.Module, coding: str = 'graded') -> 'TorchModel':
    """A model of NeuroBench (https://neurobench.ai, 2.3) that computes what an SFormer computes, for its metrics.

    `SynapticOperations` are those of `profile_model` to the unit: effective multiply-accumulates in graded, effective
    accumulates in binary coding, where no weight is 0 (NeuroBench leaves such out) and neurons do not feed back, which
    is inside of them. `ActivationSparsity` in graded coding is one minus the share of neurons that fire, pixels among
    them. `Footprint` counts weights and the state of neurons, as of the model.

    Args:
        model: Calibrated SFormer; it is not changed. The view shares its parameters.
        coding: `graded`: levels; `binary`: bit planes of -1, 0 and 1.

    Returns:
        A `neurobench.models.TorchModel`, for inference; its neurons are registered as activations.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If there is no such coding, a layer is of a kind that is not split (names it), or NeuroBench is
            missing.
    """
    if coding not in SPIKE_CODINGS:
        raise SFormerError(f'coding must be one of {", ".join(SPIKE_CODINGS)}, got {coding!r}.')
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; its spikes would mean nothing. Use sformer.convert().')
    with needed_packages('neurobench'):
        from neurobench.models import TorchModel
    wrapped = TorchModel(_split(nn.ModuleList([shared_copy(model).eval()]), coding)[0])
    wrapped.add_activation_module(FiredSpikes)
    return wrapped


def _split(view: nn.ModuleList, coding: str) -> nn.ModuleList:
    """Put a neuron and a product in the place of each layer below."""
    for name, layer, products in list(named_products(view)):
        path = name.removeprefix('0.')
        if name.endswith('.base_layer'):
            raise SFormerError(f'{path.removesuffix(".base_layer")} has an adapter: merge it into the weights first.')
        if kinds_of(products) == (QK, AV):
            scores, values = products
            view.set_submodule(name, SplitAttention(scores, values, coding))
        elif kinds_of(products) == (GATE,):
            _split_gate(layer, products[0], coding)
        elif kinds_of(products) in ((LINEAR,), (CONVOLUTION,)) and not products[0].transposed:
            view.set_submodule(name, SplitLayer(products[0], coding))
        else:
            raise SFormerError(f'{path} ({type(layer).__name__}) is of a kind that is not split into neurons and '
                               f'products.')
    return view


def _split_gate(layer: nn.Module, product: Product, coding: str) -> None:
    pair = PairProduct(product.compute, coding)
    for part, neuron in list(layer.named_children()):
        if neuron in product.operands:
            fired = FiredSpikes(neuron, coding)
            fired.__dict__['product'] = pair  # of both, whichever comes first, and a module once
            setattr(layer, part, fired)
    layer.add_module('gate_product', pair)
