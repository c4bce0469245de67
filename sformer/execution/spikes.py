"""Spikes, executed: products of bit planes of zeros and ones, T = 1, one plane per power of two and branch.

`to_spikes_(model)` changes every product of a model such that what meets weights, or other spikes, are tensors of 0 and
1; with `coding='graded'` the same products read whole levels. All sums are exact, so both give the same logits bit for
bit: weights are fixed-point numbers of 30 bits (or int8, after `to_integer_`) and sums of less than 53 bits are taken
in float64. It shows and counts; it is slow.
"""
import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn

from ..errors import SFormerError, UncalibratedError
from ..layers import (
    AttentionProduct,
    Product,
    ScoreProduct,
    SpikingLayer,
    ValueProduct,
    is_calibrated,
    named_products,
    uncalibrated,
)
from ..layers.multiplying import AV, CONVOLUTION, GATE, LINEAR, MAPS, POSITION, QK, kinds_of
from ..layers.products import keys_rest, softmax_numerators, with_rest
from ..layers.table import become_, replace_
from ..neurons import Neuron, ScaleAndFire
from .integer import IntegerConv2d, IntegerLinear
from .table_products import Compute, IntegerTables, TableProduct, TableWeights, integer_form

__all__ = ['SPIKE_CODINGS', 'spike_planes', 'spike_trains', 'to_spikes_']

SPIKE_CODINGS = ('binary', 'graded')
WEIGHT_BITS = 30  # and 8 of a level, and 15 of a sum over 2^15 inputs: 53 of float64


def spike_trains(levels: torch.Tensor, coding: str = 'binary') -> Iterator[tuple[int, torch.Tensor]]:
    """What a coding sends of levels: spikes and what each of them counts; their products sum up to the levels.

    Args:
        levels: Of an integer dtype, of whatever shape.
        coding: `binary`: bit planes of 0 and 1, of the positive and then of the negative branch, those of which any
            spike fires; `graded`: the levels, once.

    Yields:
        Weight (+- 2^b) and spikes, float64, the shape of levels.

    Raises:
        SFormerError: If there is no such coding.
    """
    if coding not in SPIKE_CODINGS:
        raise SFormerError(f'coding must be one of {", ".join(SPIKE_CODINGS)}, got {coding!r}.')
    k = levels.to(torch.int64)
    if coding == 'graded':
        yield 1, k.to(torch.float64)
        return
    for sign in (1, -1):
        magnitude = (sign * k).clamp_min(0)
        for bit in range(int(magnitude.max()).bit_length() if k.numel() else 0):
            plane = (magnitude >> bit) & 1
            if plane.any():
                yield sign * 2 ** bit, plane.to(torch.float64)


def spike_planes(levels: torch.Tensor) -> torch.Tensor:
    """Bit planes of levels with their signs, -1, 0 or 1, lowest first, float32, (planes, *levels.shape)."""
    k = levels.to(torch.int64)
    bits = torch.arange(int(k.abs().max()).bit_length() if k.numel() else 0, device=k.device)
    return (((k.abs() >> bits.view(-1, *[1] * k.ndim)) & 1) * k.sign()).to(torch.float32)


def _summed(levels: torch.Tensor, coding: str, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sum of a product over what a coding sends, float64."""
    total: torch.Tensor | int = 0
    for weight, spikes in spike_trains(levels, coding):
        total = total + weight * product(spikes)
    return total if isinstance(total, torch.Tensor) else product(torch.zeros_like(levels, dtype=torch.float64))


def _fixed_point(values: torch.Tensor) -> torch.Tensor:
    """Values as multiples of one power of two, of 30 bits, float64: closer to them than float32 is to the largest."""
    values = values.detach().to(torch.float64)
    unit = 2. ** (values.abs().max().clamp_min(1e-300).log2().ceil() - WEIGHT_BITS)
    return (values / unit).round() * unit


class SpikeForm(nn.Module):
    """A module that multiplies spikes as a coding sends them."""
    coding: str


class SpikeLayer(SpikeForm, SpikingLayer):
    """A layer whose products are of spikes in a coding, for inference."""
    executed = True

    def remove_neurons(self) -> None:
        raise SFormerError('products of this network are executed spike by spike: keep a copy of the model that '
                           'to_spikes_() is given.')


class SpikeProduct(SpikeLayer):
    """Weights on spikes, exact: `y = (sum over planes of 2^b plane @ (step W)^T) row + b`, or a convolution likewise;
    what the centre of its input gives is a current of its own."""
    bias: torch.Tensor | None

    def __init__(self, product: Product):
        super().__init__()
        self.neuron = product.operands[0]
        self.product = dataclasses.replace(product, operands=(), weight=None, bias=None)
        self.weight, self.bias = product.weight, product.bias

    def multiplies(self) -> list[Product]:
        return [dataclasses.replace(self.product, operands=(self.neuron,), weight=self.weight, bias=self.bias)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product, = self.multiplies()
        spikes = self.neuron.encode(x)
        weight = product.by_output(_fixed_point(product.by_output(product.weights) * product.beside(spikes.step)))
        out = _summed(spikes.levels, self.coding, lambda plane: product.compute(plane, weight))
        if spikes.token_scale is not None:
            out = out * spikes.token_scale
        if spikes.center is not None:
            current = spikes.center.expand(x.shape[-spikes.center.ndim:])
            out = out + product.compute(current.to(product.weights.dtype), product.weights)
        if product.bias is not None:
            out = out + product.bias.view(-1, *[1] * (product.weights.ndim - 2))
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f'{self.product.kind}, {self.coding} spikes'


class SpikeSums(SpikeLayer):
    """A layer with int8 weights that reads spikes in a coding."""

    def sums(self, levels: torch.Tensor) -> torch.Tensor:
        product, = self.multiplies()
        weight = product.weights.to(torch.float64)
        return _summed(levels, self.coding, lambda plane: product.compute(plane, weight))


class SpikeIntegerLinear(SpikeSums, IntegerLinear):
    pass


class SpikeIntegerConv2d(SpikeSums, IntegerConv2d):
    pass


def _meet(a: torch.Tensor, b: torch.Tensor, coding: str, compute: Compute) -> torch.Tensor:
    """Product of levels with levels, planes of one with planes of the other."""
    return _summed(a, coding, lambda plane: _summed(b, coding, lambda other: compute(plane, other)))


class SpikeScores(SpikeForm, ScoreProduct):
    """QK^T of spikes with spikes, exact. The centre of keys is left out, to which the softmax is blind."""
    executed = True
    multiplies = ScoreProduct.multiplies

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.scores(query, key).to(query.dtype)

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Scores in float64."""
        q = self.q_neuron.encode(query)
        k = self.k_neuron.encode(key)
        if q.center is not None:
            raise SFormerError(f'queries of a {type(self.q_neuron).__name__} have a centre, which spikes do not carry.')
        steps = q.step.to(torch.float64) * k.step  # one per head: what a channel of q gains, that of k gives
        step = steps.amax(-1, keepdim=True)
        relative = _fixed_point(steps / step)
        scores = _meet(q.levels, k.levels.transpose(-2, -1), self.coding, lambda a, b: (a * relative) @ b) * step
        for row in (q.token_scale, None if k.token_scale is None else k.token_scale.transpose(-2, -1)):
            scores = scores if row is None else scores * row
        return scores


class SpikeValues(SpikeForm, ValueProduct):
    """AV of spikes with spikes, exact: steps of the softmax numerators cancel with those of their sum."""
    executed = True
    multiplies = ValueProduct.multiplies

    def forward(self, scores: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.) -> torch.Tensor:
        return self.values(softmax_numerators(scores), value)

    def values(
            self,
            numerators: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Means of values (B, H, S, D), weighed by softmax numerators (B, H, L, S)."""
        attn, v = self.attn_neuron.encode(numerators), self.v_neuron.encode(value)
        total = attn.levels.sum(dim=-1, keepdim=True)  # int64
        out = _meet(attn.levels, v.levels, self.coding, torch.matmul)
        if keys_rest(self.attn_neuron, attn_mask, is_causal):
            whole = numerators.double().sum(dim=-1, keepdim=True) / attn.step
            out, total = with_rest(out, total, whole, v.levels.double(), attn_mask)
        out = out * v.step / total.clamp_min(1)
        if v.center is not None:  # rows sum to one, those that see no key to nothing
            out = out + v.center * total.clamp(max=1)
        return out.to(value.dtype)


class SpikeAttention(SpikeScores, SpikeValues, AttentionProduct):
    """QK^T and AV of spikes with spikes, exact."""
    multiplies = AttentionProduct.multiplies

    def forward(  # type: ignore[override]
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.,
            is_causal: bool = False,
            scale: float | None = None,
    ) -> torch.Tensor:
        scores = self.scores(query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
        numerators = softmax_numerators(scores.to(query.dtype), attn_mask, is_causal)
        return self.values(numerators, value, attn_mask, is_causal)


class SpikeGate(SpikeForm, ScaleAndFire):
    """Neuron of a gate or of its value, or of maps and values, whose spikes meet those of the other one by one."""
    def multiply(self, x: torch.Tensor, other: Neuron, y: torch.Tensor, compute: Compute) -> torch.Tensor:
        a, b = self.encode(x), other.encode(y)
        out = _meet(a.levels, b.levels, self.coding, compute)
        for spikes in (a, b):
            out = out * spikes.step if spikes.token_scale is None else out * spikes.step * spikes.token_scale
        return out.to(x.dtype)


@dataclasses.dataclass(frozen=True)
class SpikeTables(TableProduct):
    """Tables that meet spikes in a coding.

    Args:
        coding: The coding.
        integer: How spikes meet the tables where these are int8.
    """
    coding: str
    integer: IntegerTables | None

    def weights(self, folded: torch.Tensor) -> TableWeights:
        if self.integer is None:
            return TableWeights(_fixed_point(folded), folded.new_ones(*folded.shape[:-1], 1))
        numbers, step = self.integer.weights(folded)
        return TableWeights(numbers.to(torch.float64), step)

    def sums(self, levels: torch.Tensor, numbers: torch.Tensor, compute: Compute) -> torch.Tensor:
        return _summed(levels, self.coding, lambda plane: compute(plane, numbers))


# what becomes of a layer of these products, with weights in floating point and with int8 ones
Form = type[SpikeForm] | type[SpikeTables]
Forms = dict[tuple[str, ...], Form]
SPIKE_FORMS: Forms = {
    (LINEAR,): SpikeProduct, (CONVOLUTION,): SpikeProduct, (QK, AV): SpikeAttention, (QK,): SpikeScores,
    (AV,): SpikeValues, (GATE,): SpikeGate, (MAPS,): SpikeGate, (POSITION,): SpikeTables}
BY_NEURON = (SpikeGate, SpikeTables)  # forms of the neurons, whose layer stays
SPIKE_INTEGER_FORMS: Forms = {(LINEAR,): SpikeIntegerLinear, (CONVOLUTION,): SpikeIntegerConv2d}


def to_spikes_(model: nn.Module, coding: str = 'binary') -> nn.Module:
    """Let every product of a calibrated spiking model meet spikes as a coding sends them, in place, for inference.

    Neurons fire as they do; LayerNorm, softmax and activation functions act on currents. Logits of the two codings are
    equal bit for bit. They differ from those of the simulation by the rounding of its sums in float32, and where that
    puts a potential on the other side of a boundary.

    Args:
        model: Calibrated SFormer, or any module that `spiking_` and `calibrate_`, and perhaps `to_integer_`, have been
            through. Called again, the coding changes.
        coding: `binary`: bit planes of 0 and 1; `graded`: whole levels.

    Returns:
        The same model, which has no source and can be neither trained nor saved.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If there is no such coding, or a layer has an adapter or is of a kind that this does not execute:
            names it, and the model is unchanged.
    """
    if coding not in SPIKE_CODINGS:
        raise SFormerError(f'coding must be one of {", ".join(SPIKE_CODINGS)}, got {coding!r}.')
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; fit it with sformer.convert() or calibrate_() first.')
    for name, layer, products, form in list(_changes(model)):
        if form is SpikeProduct:
            layer = SpikeProduct(products[0]).train(layer.training)
            replace_(model, name, layer)
        for part in products[0].operands if form in BY_NEURON else (layer,):
            if issubclass(form, SpikeTables):
                assert isinstance(part, Neuron)
                part.meet = form(coding, integer_form(part))
                continue
            become_(part, form)
            assert isinstance(part, SpikeForm)
            part.coding = coding
    return model


def _changes(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Product], Form]]:
    """Modules that multiply, with names and products, and what becomes of them."""
    for name, layer, products in named_products(model):
        if name.endswith('.base_layer'):
            raise SFormerError(f'{name.removesuffix(".base_layer")} has an adapter: merge it into the weights first.')
        kinds = kinds_of(products)
        integer = products[0].weight is not None and not products[0].weight.is_floating_point()
        form = (SPIKE_INTEGER_FORMS if integer else SPIKE_FORMS).get(kinds)
        if form is None:
            known = ', '.join(' and '.join(known) for known in SPIKE_FORMS)
            raise SFormerError(f'products of {name or "(root)"} ({type(layer).__name__}) are not executed spike by '
                               f'spike: they are {" and ".join(kinds)}, not one of {known}.')
        if form is SpikeProduct and not name:
            raise SFormerError('a layer cannot be replaced in itself: hand over a module that it is part of.')
        for neuron in products[0].operands if form in BY_NEURON else ():
            if type(neuron) not in (ScaleAndFire, SpikeGate):
                part = next(part for part, child in layer.named_children() if child is neuron)
                raise SFormerError(f'{f"{name}.{part}".lstrip(".")} is a {type(neuron).__name__}, whose products are '
                                   f'not executed spike by spike: those of a ScaleAndFire are.')
        yield name, layer, products, form
