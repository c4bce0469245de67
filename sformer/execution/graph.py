"""What a graph says of spikes, in the words of ONNX and in the form that engines execute fastest.

"Levels of step 1 times int8 weights with a step per output channel" is QuantizeLinear, DequantizeLinear and MatMul,
which engines multiply in int8. Levels that meet weights are unsigned bytes with a zero point, and weights as large as
that leaves them (`saturation`), so that every processor sums exactly.
"""
from collections.abc import Callable, Collection

import torch
import torch.nn as nn

from ..errors import SFormerError
from ..layers import Product, named_neurons, named_products
from ..layers.multiplying import AV, CONVOLUTION, GATE, LINEAR, MAPS, POSITION, QK, kinds_of
from ..layers.products import keys_rest, softmax_numerators, with_rest
from ..layers.table import replace_
from ..neurons import MAX_BYTE_LEVEL, Neuron, ScaleAndFire, Spikes
from .early import early_neurons
from .fired import DecodedLevels, FiredLevels, beside_levels, beside_weights, fired_levels, signed_levels
from .integer import folded_bias
from .operators import onnx_operator
from .saturation import fits, zero_point
from .table_products import Compute, IntegerTables, integer_form

__all__ = ['linear_neurons', 'to_graph_']

LARGEST = 3e38  # that no current exceeds


def to_graph_(network: nn.Module, early: bool = True, portable: bool = True) -> None:
    """Replace what spikes in a network, in integers where it is so already, by what a graph says of it, in place.

    Args:
        network: Calibrated spiking network on the CPU.
        early: Let queries, keys and values fire in the layer that gives them, where that can be; of timm models.
        portable: As of `to_integer_`, which the network has been through.

    Raises:
        SFormerError: If a layer or a fire function has no form in ONNX; names it.
    """
    for _, neuron in named_neurons(network):
        fired_levels(neuron)  # which names what has no form, before the network is run
    layers = list(named_products(network))
    for name, layer, products in layers:
        if kinds_of(products) not in GRAPH_FORMS:
            raise SFormerError(f'{name or "(root)"} ({type(layer).__name__}) has no form in ONNX: it multiplies '
                               f'{" and ".join(kinds_of(products))}.')
    floating: set[Neuron] = set()  # what spikes to be multiplied in floating point
    for _, _, products in layers:
        if portable and kinds_of(products) in ((QK, AV), (QK,)) and not levels_fit(products[0]):
            floating.update(*(product.operands for product in products))
    neurons, fired = early_neurons(network, floating) if early else ({}, set())
    for name, layer, products in layers:
        step, columns = (layer._buffers.get(key) for key in ('weight_step', 'columns'))
        kinds = kinds_of(products)
        if kinds == (LINEAR,):
            replace_(network, name, _Linear(products[0], step, columns, neurons.get(name)))
        elif kinds == (CONVOLUTION,):
            replace_(network, name, _Conv2d(products[0], step))
        elif kinds in ATTENTION_FORMS:
            replace_(network, name, ATTENTION_FORMS[kinds](*products, fired, portable))
    for name, neuron in list(named_neurons(network)):  # of gates, maps and positions
        tables = integer_form(neuron)
        network.set_submodule(name, DecodedLevels(neuron) if tables is None else _BesideTables(neuron, tables))


def linear_neurons(network: nn.Module) -> dict[str, FiredLevels]:
    """Neurons that linear layers of a network of `to_graph_` read from, by the path of the layer."""
    return {name: layer.neuron for name, layer in network.named_modules()
            if isinstance(layer, _Linear) and isinstance(layer.neuron, FiredLevels)}


GRAPH_FORMS = ((LINEAR,), (CONVOLUTION,), (QK, AV), (QK,), (AV,), (GATE,), (MAPS,), (POSITION,))


def _weights(weight: torch.Tensor, step: torch.Tensor, axis: int) -> torch.Tensor:
    """Int8 weights times the step of their output channel."""
    zero = torch.zeros(step.shape, dtype=torch.int8)
    return onnx_operator('DequantizeLinear', weight, torch.float32, weight, step, zero, axis=axis)


class _Linear(nn.Module):
    """A linear layer, in integers or, where int8 weights would lose too much, on levels in floating point; and neurons
    that read what it gives, if they fire here.

    In integers, what the zero point adds to a sum is the same for all tokens, and is taken off that sum: engines
    multiply bytes without a zero point fastest.
    """
    weight: torch.Tensor
    step: torch.Tensor
    columns: torch.Tensor | None
    bias: torch.Tensor | None
    excess: torch.Tensor | None

    def __init__(
            self,
            product: Product,
            step: torch.Tensor | None,
            columns: torch.Tensor | None,
            fires: ScaleAndFire | None = None,
    ):
        super().__init__()
        neuron = product.operands[0]
        self.neuron = fired_levels(neuron, stand_up=True)  # of pixels, where they arrive as flat patches
        self.fires = None if fires is None else FiredLevels(fires)
        self.integer = step is not None
        weight = product.weights if self.integer else product.weights.detach() * neuron.step
        bias, excess = product.bias if self.integer else folded_bias(product), None
        self.register_buffer('columns', columns)
        if self.neuron.flip is not None:
            weight = weight * self._read(self.neuron.flip).to(weight.dtype)
        self.zero = zero_point(self.neuron.range) if self.integer else 0
        zeros = torch.tensor(float(self.zero)) if self.neuron.zeros is None else self._read(self.neuron.zeros)
        if zeros.any():
            excess = (zeros * weight.to(torch.float64)).sum(1) * (1 if step is None else step)
            if not self.neuron.token:
                bias, excess = (-excess if bias is None else bias - excess).to(torch.float32), None
        self.register_buffer('weight', weight.t().contiguous())
        self.register_buffer('step', step)
        self.register_buffer('bias', bias)
        self.register_buffer('excess', None if excess is None else excess.to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 2:  # OpenVINO 2026.4 takes a step per channel for one per row there
            return self.forward(x[:, None])[:, 0]
        k, row = self.neuron(x)
        k = self._read(k)  # before they are int8, or OpenVINO multiplies in float32
        if self.integer:
            out = beside_weights(k, self.neuron.range, self.zero) @ _weights(self.weight, self.step, axis=1)
        else:
            out = beside_weights(k, self.neuron.range) @ self.weight
        out = out if self.excess is None else out - self.excess
        out = out if row is None else out * row
        out = out if self.bias is None else out + self.bias
        return out if self.fires is None else beside_levels(self.fires(out)[0], self.fires.range)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """What the columns of the weights read of the channels of the input."""
        return x if self.columns is None else x.index_select(-1, self.columns)


class _Conv2d(nn.Module):
    """A convolution, transposed or not, in integers or, where weights have no step, of what spikes stand for."""
    weight: torch.Tensor
    step: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, product: Product, step: torch.Tensor | None):
        super().__init__()
        neuron = product.operands[0]  # as it is: levels of padding have no sign to change
        levels = fired_levels(neuron)
        self.range = levels.range
        self.neuron: nn.Module = DecodedLevels(neuron) if step is None else levels
        self.compute, self.transposed = product.compute, product.transposed
        self.register_buffer('weight', product.weights.detach())
        self.register_buffer('step', None if step is None else step.flatten())
        bias = None if product.bias is None or not product.bias.any() else product.bias.detach()  # no graph keeps zeros
        self.register_buffer('bias', bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.step is None:
            return self.compute(self.neuron(x), self.weight, self.bias)
        levels = beside_weights(self.neuron(x)[0], self.range)
        if not self.transposed:
            out = self.compute(levels, _weights(self.weight, self.step, axis=0), self.bias)
            # OpenVINO (2026.4) adds other such sums before it multiplies by the steps, if nothing is in between
            return out if self.bias is not None else out.clamp(max=LARGEST)
        # ONNX has no axis for the output channels of its weights where they are grouped
        out = self.compute(levels, self.weight.to(torch.float32)) * self.step.view(-1, 1, 1)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


class _Scores(nn.Module):
    """QK^T; arguments as of `ScoreProduct`.

    Levels that meet levels have no weights that could be made smaller: a product that not every processor would sum
    exactly in int8 is left to float32, if the graph is to be `portable`.
    """
    score_step: torch.Tensor

    def __init__(self, product: Product, fired: Collection[Neuron] = (), portable: bool = True):
        super().__init__()
        q, k = product.operands
        self.q = _Operand(q, q in fired)
        self.k = _Operand(k, k in fired, not portable or levels_fit(product))
        # powers of two per channel cancel, so what remains is one step per head
        self.register_buffer('score_step', (q.step * k.step)[..., :1].clone())

    def forward(self, query: torch.Tensor, key: torch.Tensor, scale: float = 1.) -> torch.Tensor:
        q, q_row = self.q(query)
        k, k_row = self.k(key)
        step = self.score_step * scale
        scores = q @ k.transpose(-2, -1)
        scores = scores * (step if q_row is None else step * q_row)
        return scores if k_row is None else scores * k_row.transpose(-2, -1)


class _Values(nn.Module):
    """AV, each row divided by its spike sum; arguments as of `ValueProduct`."""
    v_step: torch.Tensor
    v_center: torch.Tensor | None
    attn_step: torch.Tensor

    def __init__(self, product: Product, fired: Collection[Neuron] = (), portable: bool = True):
        super().__init__()
        attn, v = product.operands
        self.attn = FiredLevels(attn)
        self.v = _Operand(v, v in fired)
        self.int8 = self.attn.range[1] <= MAX_BYTE_LEVEL and (not portable or levels_fit(product))
        self.register_buffer('v_step', v.step)
        self.register_buffer('v_center', v.center)
        self.register_buffer('attn_step', attn.step)

    def forward(
            self,
            scores: torch.Tensor,
            value: torch.Tensor,
            dropout_p: float = 0.,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        v, _ = self.v(value)
        numerators = softmax_numerators(scores, attn_mask, is_causal)
        attn, _ = self.attn(numerators)
        # of wide levels in float32, which OpenVINO does faster than two planes of int8
        attn = beside_levels(attn, self.attn.range) if self.int8 else attn.round()
        out = attn @ v
        total = attn.sum(dim=-1, keepdim=True)
        if keys_rest(self.attn, attn_mask, is_causal):
            whole = numerators.sum(dim=-1, keepdim=True) / self.attn_step
            out, total = with_rest(out, total, whole, v, attn_mask)
        out = out / total.clamp_min(1.) * self.v_step
        return out if self.v_center is None else out + self.v_center * total.clamp(max=1.)  # none of no key


class _Attention(nn.Module):
    """QK^T and AV; arguments as of `AttentionProduct`."""

    def __init__(self, scores: Product, values: Product, fired: Collection[Neuron] = (), portable: bool = True):
        super().__init__()
        self.scores = _Scores(scores, fired, portable)
        self.values = _Values(values, fired, portable)

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
        scores = self.scores(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
        return self.values(scores, value, dropout_p, attn_mask, is_causal)


ATTENTION_FORMS: dict[tuple[str, ...], Callable[..., nn.Module]] = {
    (QK, AV): _Attention, (QK,): _Scores, (AV,): _Values}


class _Operand(nn.Module):
    """Levels of q, k or v, and their factor per token, of a current or, where neurons fired before, of levels."""

    def __init__(self, neuron: Neuron, fired: bool, int8: bool = True):
        super().__init__()
        self.levels = signed_levels(neuron)
        self.fired, self.int8 = fired, int8

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.fired:
            return x, None
        k, row = self.levels(x)
        return beside_levels(k, self.levels.range) if self.int8 else k.round(), row


class _BesideTables(nn.Module):
    """Levels that meet tables of whole numbers, in float32, which is exact."""
    step: torch.Tensor

    def __init__(self, neuron: Neuron, tables: IntegerTables):
        super().__init__()
        self.levels, self.tables = fired_levels(neuron), tables
        self.register_buffer('step', neuron.step)

    def encode(self, x: torch.Tensor) -> Spikes:
        k, row = self.levels(x)
        return Spikes(beside_levels(k, self.levels.range), self.step, row)

    def meet(self, spikes: Spikes, table: torch.Tensor, compute: Compute) -> torch.Tensor:
        return self.tables(spikes, table, compute)


def levels_fit(product: Product) -> bool:
    """Whether every processor sums a product of spikes with spikes exactly in int8."""
    a, b = product.operands
    return fits(a.level_range, b.level_range)
