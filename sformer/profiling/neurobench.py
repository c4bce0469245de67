"""A view of an SFormer that NeuroBench counts right.

NeuroBench hooks what is an `nn.Linear` or `nn.Conv2d` and reads its input; a spiking layer is one whose input is a
current, and its products of spikes with spikes are no layers at all. In the view each neuron and each product is a
module of its own, and a product's input is what the neuron fired.
"""
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import SFormerError, UncalibratedError, needed_packages
from ..execution import SPIKE_CODINGS, spike_planes
from ..layers import AttentionProduct, SpikingConv2d, SpikingLinear, is_calibrated, shared_copy, uncalibrated
from ..layers.products import softmax_numerators
from ..neurons import Neuron

__all__ = ['neurobench_view']


class FiredSpikes(nn.Module):
    """A neuron whose output are the spikes that it fires: levels or, in binary coding, bit planes of -1, 0 and 1,
    (planes, B, ...). The current that they stand for is `current`."""

    def __init__(self, neuron: Neuron, coding: str):
        super().__init__()
        self.neuron, self.coding = neuron, coding
        self.current: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.current = self.neuron(x)
        levels = self.neuron.encode(x).levels
        return spike_planes(levels) if self.coding == 'binary' else levels.to(torch.float32)

    def multiply(self, x: torch.Tensor, other: 'FiredSpikes', y: torch.Tensor) -> torch.Tensor:
        """Elementwise product with what another neuron fires, in a module of its own."""
        product: Any = self.product
        return product.meet(self(x), other(y), lambda: self.current * other.current)


class LinearProduct(nn.Linear):
    """Weights on spikes. Called with the current, it is the layer; with spikes alone, as a counter calls a copy whose
    weights and spikes are 0 or 1, it sums exactly."""

    def forward(self, spikes: torch.Tensor, current: Optional[torch.Tensor] = None) -> torch.Tensor:
        if current is not None:
            return F.linear(current, self.weight, self.bias)
        return F.linear(spikes.double(), self.weight.double())


class ConvProduct(nn.Conv2d):
    """The same of a convolution."""

    def forward(self, spikes: torch.Tensor, current: Optional[torch.Tensor] = None) -> torch.Tensor:
        if current is not None:
            return self._conv_forward(current, self.weight, self.bias)
        return self._conv_forward(spikes.double().flatten(0, -4), self.weight.double(), None)


class PairProduct(nn.Linear):
    """Spikes on spikes, for counters a linear layer whose weights are the spikes of the second operand."""

    def __init__(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], coding: str):
        nn.Module.__init__(self)  # there are no parameters
        self.product, self.coding = product, coding
        self.bias: Any = None
        self.weight: Any = torch.zeros(0)

    def forward(self, spikes: torch.Tensor, compute: Optional[Callable[[], torch.Tensor]] = None) -> torch.Tensor:
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

    def __init__(self, layer: Any, coding: str):
        super().__init__()
        self.neuron = FiredSpikes(layer.neuron, coding)
        layer._modules.pop('neuron')
        layer.__class__ = LinearProduct if isinstance(layer, nn.Linear) else ConvProduct
        self.product = layer

    def forward(self, x: torch.Tensor, fired: bool = False) -> torch.Tensor:
        return self.product(self.neuron(x), current=self.neuron.current)


class SplitAttention(nn.Module):
    """An `AttentionProduct` as four neurons and two products."""

    def __init__(self, attention: AttentionProduct, coding: str):
        super().__init__()
        for name in ('q_neuron', 'k_neuron', 'v_neuron', 'attn_neuron'):
            setattr(self, name, FiredSpikes(getattr(attention, name), coding))
        self.scores = PairProduct(lambda q, k: q @ k.transpose(-2, -1), coding)
        self.values = PairProduct(torch.matmul, coding)

    def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            dropout_p: float = 0.,
            is_causal: bool = False,
            scale: Optional[float] = None,
    ) -> torch.Tensor:
        neurons: Dict[str, Any] = dict(self.named_children())
        q, k, v = neurons['q_neuron'], neurons['k_neuron'], neurons['v_neuron']
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = self.scores.meet(q(query), k(key), lambda: (q.current * factor) @ k.current.transpose(-2, -1))
        fired = neurons['attn_neuron']
        spikes = fired(softmax_numerators(scores, attn_mask, is_causal))
        total = fired.current.sum(dim=-1, keepdim=True)
        out = self.values.meet(spikes, v(value), lambda: fired.current @ (v.current / 32))
        return out / (total / 32).clamp_min(1e-4)


def neurobench_view(model: nn.Module, coding: str = 'graded') -> Any:
    """A model of NeuroBench (https://neurobench.ai, 2.3) that computes what an SFormer computes, for its metrics.

    `SynapticOperations` are those of `profile_model` to the unit: effective multiply-accumulates in graded, effective
    accumulates in binary coding, where no weight is 0 (NeuroBench leaves such out). `ActivationSparsity` in graded
    coding is one minus the activity, over all neurons. `Footprint` counts weights and the state of neurons, as of the
    model.

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
    for name, module in list(view.named_modules()):
        new: Optional[nn.Module] = None
        if name.endswith('.base_layer'):
            adapted = name.removeprefix('0.').removesuffix('.base_layer')
            raise SFormerError(f'{adapted} has an adapter: merge it into the weights first.')
        # exact types: a subclass may multiply in a forward of its own
        if type(module) in (SpikingLinear, SpikingConv2d) and isinstance(module.neuron, Neuron):
            new = SplitLayer(module, coding)
        elif type(module) is AttentionProduct:
            new = SplitAttention(module, coding)
        if new is not None:
            view.set_submodule(name, new)
        gate, value = (getattr(module, part, None) for part in ('gate_neuron', 'value_neuron'))
        if isinstance(gate, Neuron) and isinstance(value, Neuron):
            product: Any = PairProduct(torch.mul, coding)
            for part, neuron in (('gate_neuron', gate), ('value_neuron', value)):
                fired = FiredSpikes(neuron, coding)
                fired.__dict__['product'] = product  # of both, whichever comes first, and a module once
                setattr(module, part, fired)
            module.add_module('gate_product', product)
    for name, module in view.named_modules():
        if not isinstance(module, FiredSpikes) and any(isinstance(child, Neuron) for child in module.children()):
            raise SFormerError(f'{name.removeprefix("0.")} ({type(module).__name__}) is of a kind that is not split '
                               f'into neurons and products.')
    return view
