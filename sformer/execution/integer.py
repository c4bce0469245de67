"""Integer execution in torch: spikes of int8 times weights of int8, summed exactly by whatever is fastest at it here.

The step of each input channel folds into the weights, which are then rounded to int8 with a step per output channel.
Attention, where spikes meet spikes, keeps its float form: its operands are int8 levels times a step already.
"""
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import SFormerError, UncalibratedError
from ..layers import Product, SpikingLayer, is_calibrated, named_products, shared_copy, uncalibrated
from ..layers.multiplying import CONVOLUTION, LINEAR, POSITION, kinds_of
from ..layers.table import replace_
from ..neurons import Float32Buffers, Neuron, ScaleAndFire, SharedScaleAndFire, Spikes
from ..neurons.levels import EXACT
from .rounding import IntegerWeights, integer_weights, rounded
from .saturation import MAX_WEIGHT, upright, weight_limit
from .table_products import IntegerTables

__all__ = [
    'to_integer_', 'folded_bias', 'multiplies_int8', 'IntegerLinear', 'IntegerConv2d', 'IntegerReport',
    'MAX_WEIGHT_ERROR',
]

MAX_WEIGHT_ERROR = 0.03
MOMENTS_MEMORY = 2 ** 30  # bytes that second moments of levels may take at once


@dataclasses.dataclass(frozen=True)
class IntegerReport:
    """What became of a layer.

    Args:
        name: Path of the layer.
        error: Relative error of its int8 weights, with the steps of their input folded in; of its products where images
            were given.
        columns: Columns of the int8 weights over those of the layer: more than one where outliers are split.
        integer: Whether it computes in integers; if not, `reason` says why.
        reason: Why it stays in floating point.
    """
    name: str
    error: float
    columns: float = 1.
    integer: bool = True
    reason: str = ''


class IntegerLayer(Float32Buffers, SpikingLayer):
    """A layer whose weights are int8, with steps in float32. Its source is gone."""
    executed = True
    neuron: Neuron

    def remove_neurons(self) -> None:
        raise SFormerError('the weights of this network are int8, so its source is gone: keep a copy of the model that '
                           'to_integer_() is given.')

    def fired(self, x: torch.Tensor) -> Spikes:
        """What the neuron fires on a current."""
        if not x.is_floating_point():
            raise SFormerError(f'{type(self).__name__} was given {x.dtype} instead of a current: a forward that casts '
                               f'what it hands to a layer to the type of its weights does not suit int8 weights.')
        return self.neuron.encode(x)


class IntegerLinear(IntegerLayer):
    """Linear layer on spikes with int8 weights.

    `y = (levels @ weight.T) * weight_step * row + bias`. The bracket is an exact sum of integers: of int8 in int32
    where the processor accelerates that, else of float32, with weights kept as such (`floating`), in blocks of columns
    whose sums stay below 2^24.

    Args:
        product: What a calibrated layer multiplies.
        weights: Its weights in integers.

    Shape:
        Input (..., C), output (..., D).
    """
    weight: torch.Tensor
    weight_step: torch.Tensor
    columns: torch.Tensor | None
    bias: torch.Tensor | None
    floating: torch.Tensor | None

    def __init__(self, product: Product, weights: IntegerWeights):
        super().__init__()
        self.in_features, self.out_features = product.in_channels, len(weights.step)
        self.neuron = product.operands[0]
        self.register_buffer('weight', weights.weight)
        self.register_buffer('weight_step', weights.step)
        self.register_buffer('columns', weights.columns)
        self.register_buffer('bias', folded_bias(product))
        self.blocks = exact_blocks(weights.weight, _largest_level(self.neuron))
        self.int8 = multiplies_int8()  # on a CPU
        self.register_buffer('floating', None if self.int8 else weights.weight.to(torch.float32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = self.fired(x)
        out = self.sums(spikes.levels).to(torch.float32) * self.weight_step
        if spikes.token_scale is not None:
            out = out * spikes.token_scale
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def multiplies(self) -> list[Product]:
        def compute(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.linear(self.read(levels), weight)
        return [Product(LINEAR, (self.neuron,), compute, weight=self.weight, bias=self.bias)]

    def sums(self, levels: torch.Tensor) -> torch.Tensor:
        """Sums (..., D) of products of levels (..., C) and weights, exact, int32 or float32."""
        levels = self.read(levels)
        if levels.is_cuda or self.int8:
            return _int8_sums(levels, self.weight)
        return _float_sums(levels, self.weight if self.floating is None else self.floating, self.blocks)

    def read(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels that the columns of the weights read: outliers are split over several."""
        return levels if self.columns is None else levels[..., self.columns]

    def extra_repr(self) -> str:
        columns = '' if self.columns is None else f', columns={len(self.columns)}'
        product = 'int8' if self.weight.is_cuda or self.int8 else 'float32'
        return (f'in_features={self.in_features}, out_features={self.out_features}, int8 weights{columns}, '
                f'exact sums by {product} products')


class IntegerConv2d(IntegerLayer):
    """Convolution on spikes with int8 weights, transposed or not; the centre of its input is folded into the bias.

    torch has no convolution of integers: sums below 2^24, as nearly all are, are exact in float32, others in float64.

    Args:
        product: What a calibrated layer multiplies.
        weights: Its weights in integers, a row per output channel.

    Shape:
        As of `nn.Conv2d` or `nn.ConvTranspose2d`.
    """
    weight: torch.Tensor
    weight_step: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, product: Product, weights: IntegerWeights):
        super().__init__()
        self.neuron = product.operands[0]
        self.product = dataclasses.replace(product, operands=(), weight=None, bias=None)
        self.in_channels = product.in_channels
        one_block = len(exact_blocks(weights.weight, _largest_level(self.neuron))) == 1
        self.exact = torch.float32 if one_block else torch.float64
        rows = weights.weight.view(product.by_output(product.weights).shape)
        self.register_buffer('weight', product.by_output(rows))
        self.register_buffer('weight_step', weights.step.view(-1, 1, 1))
        self.register_buffer('bias', folded_bias(product))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[-3] == self.in_channels, 'currents have another number of channels than the weights')
        out = self.sums(self.fired(x).levels).to(torch.float32) * self.weight_step
        return (out if self.bias is None else out + self.bias.view(-1, 1, 1)).to(x.dtype)

    def multiplies(self) -> list[Product]:
        return [dataclasses.replace(self.product, operands=(self.neuron,), weight=self.weight, bias=self.bias)]

    def sums(self, levels: torch.Tensor) -> torch.Tensor:
        """Sums of products of levels and weights, exact."""
        return self.product.compute(levels.to(self.exact), self.weight.to(self.exact))

    def extra_repr(self) -> str:
        return f'{tuple(self.weight.shape)}, {"transposed, " if self.product.transposed else ""}int8 weights'


def exact_blocks(weight: torch.Tensor, largest: int) -> list[int]:
    """Numbers of columns of int8 weights (D, C) whose products with levels of at most `largest` are summed exactly in
    float32, as few blocks as can be."""
    blocks, start = [], 0
    reach = weight.abs().to(torch.int64).cumsum(1) * largest
    while start < weight.shape[1]:
        sums = reach[:, start:] - (reach[:, start - 1:start] if start else 0)
        count = int((sums.amax(0) < EXACT).sum())
        blocks.append(count)
        start += count
    return blocks or [0]


def _largest_level(neuron: Neuron) -> int:
    return max(map(abs, neuron.level_range))


def _float_sums(levels: torch.Tensor, weight: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    """Sums (..., D) of products of levels (..., C) and weights (D, C), float32, or int32 of more blocks than one."""
    if len(blocks) == 1:
        return F.linear(levels.to(torch.float32), weight.to(torch.float32))
    parts = zip(levels.split(blocks, -1), weight.split(blocks, 1), strict=True)
    sums = [_float_sums(part, columns, [0]).to(torch.int32) for part, columns in parts]
    return torch.stack(sums).sum(0, dtype=torch.int32)


def _int8_sums(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same by products of int8, int32."""
    rows = levels.reshape(-1, levels.shape[-1])
    if rows.is_cuda:  # whose kernel takes more than 16 rows, and multiples of 8
        num, (out, columns) = len(rows), weight.shape
        rows = F.pad(rows, (0, -columns % 8, 0, max(17 - num, 0)))
        product = torch._int_mm(rows, F.pad(weight, (0, -columns % 8, 0, -out % 8)).t())[:num, :out]
    else:
        product = torch._int_mm(rows, weight.t())
    return product.view(*levels.shape[:-1], -1)


@functools.cache
def multiplies_int8() -> bool:
    """Whether this CPU multiplies int8 exactly and faster than float32, by a product of the size of a small ViT's:
    without VNNI torch's own product of int8 takes tens of times as long. Measured once per process."""
    levels = torch.full((256, 384), 127, dtype=torch.int8, device='cpu')
    weight = levels.new_full((384, 384), 127)

    def seconds(sums: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        sums()
        return time.perf_counter() - start
    with torch.inference_mode():
        if (_int8_sums(levels, weight) != 384 * 127 * 127).any():
            return False
        pairs = [(seconds(lambda: _int8_sums(levels, weight)), seconds(lambda: _float_sums(levels, weight, [0])))
                 for _ in range(4)]
    int8, floating = (min(times) for times in zip(*pairs[1:], strict=True))
    return int8 < floating


def to_integer_(
        model: nn.Module,
        max_error: float = MAX_WEIGHT_ERROR,
        batches: Iterable[torch.Tensor] | None = None,
        portable: bool = True,
) -> list[IntegerReport]:
    """Let the layers of a calibrated spiking model compute with int8 weights, in place.

    Nothing else changes: neurons fire as they do, LayerNorm, softmax and activation functions act on currents. The
    weights of the source are dropped, so the model has no source, cannot be trained or saved, and takes a quarter of
    the memory where this processor multiplies int8, otherwise five quarters.

    Args:
        model: Calibrated SFormer, or any module that `spiking_` and `calibrate_` have been through.
        max_error: A layer whose int8 weights have a larger relative error stays in floating point.
        batches: Images as the model reads them, some dozens; no labels. If given, weights are rounded such that errors
            cancel in the products with the spikes on these images, instead of each to the nearest.
        portable: Round weights to so few bits where levels are many that engines, too, sum such products exactly on
            every processor (`saturation`); otherwise to 8 bits, which wants VNNI.

    Returns:
        What became of each layer, in the order of the modules.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If layers have adapters, or the model is a layer itself.
    """
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; fit it with sformer.convert() or calibrate_() first.')
    products: dict[str, list[Product]] = {}
    for name, _, found in named_products(model):
        if any(product.weight is not None and product.weight.is_floating_point() for product in found):
            _check_layer(name, found)
            products[name] = found
    made: dict[str, nn.Module | IntegerTables] = {}
    reports, images = [], None if batches is None else [*batches]
    for name, product, moments in _with_moments(model, products, images):
        new, report = _integer_layer(name, product, moments, portable)
        if report.error > max_error:
            new, report = None, dataclasses.replace(
                report, integer=False, columns=1.,
                reason=f'its int8 weights have an error of {report.error:.3f}, more than {max_error:g}')
        reports.append(report)
        if new is not None:
            made[name] = new
    for name, new in made.items():  # now that no moments of the simulation are needed any more
        if isinstance(new, IntegerTables):
            products[name][0].operands[0].meet = new
        else:
            replace_(model, name, new.train(model.get_submodule(name).training))
    return reports


def _check_layer(name: str, products: list[Product]) -> None:
    """Raise SFormerError if a layer cannot be replaced, or its neuron has no step that folds into its weights."""
    if not name:
        raise SFormerError('a layer cannot be replaced in itself: hand over a module that it is part of.')
    if name.endswith('.base_layer'):
        raise SFormerError(f'{name.removesuffix(".base_layer")} has an adapter: merge it into the weights first.')
    for product in products:
        neuron = product.operands[0]
        step = getattr(neuron, 'step', torch.empty(0))
        if product.kind in INTEGER_FORMS and step.numel() not in (1, product.in_channels):
            raise SFormerError(f'{name}.neuron is a {type(neuron).__name__}, whose spikes have no step per channel '
                               f'(`step`) that folds into weights, so its layer does not compute in integers.')


def _with_moments(
        model: nn.Module,
        layers: dict[str, list[Product]],
        images: list[torch.Tensor] | None,
) -> Iterator[tuple[str, list[Product], torch.Tensor | None]]:
    """Products of layers with the second moments of the levels that they read on some images; groups of layers at a
    time, so that memory is bounded."""
    left = dict(layers)
    while left:
        group: list[str] = []
        size = 0
        while left and (not group or images is None or size < MOMENTS_MEMORY):
            name = next(iter(left))
            group.append(name)
            size += sum(4 * product.in_channels ** 2 for product in left.pop(name) if product.kind == LINEAR)
        moments = {} if images is None else _moments(model, group, images)
        for name in group:
            yield name, layers[name], moments.pop(name, None)


@torch.inference_mode()
def _moments(model: nn.Module, names: list[str], images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums of k k^T, (C, C), of the levels k that linear layers read, times the factor of their token."""
    view = shared_copy(model).eval()
    found: dict[str, torch.Tensor] = {}

    def add(name: str, neuron: Neuron, args: tuple[torch.Tensor]) -> None:
        spikes = neuron.encode(args[0])
        k = spikes.levels.to(torch.float32)
        k = (k if spikes.token_scale is None else k * spikes.token_scale).flatten(0, -2)
        found[name] = found[name].addmm_(k.T, k) if name in found else k.T @ k
    for name, _, products in named_products(view):
        if name in names and products[0].kind == LINEAR:
            products[0].operands[0].register_forward_pre_hook(functools.partial(add, name))
    for batch in images:
        view(batch)
    return found


INTEGER_FORMS: dict[str, type[IntegerLinear | IntegerConv2d]] = {LINEAR: IntegerLinear, CONVOLUTION: IntegerConv2d}


def _integer_layer(
        name: str,
        products: list[Product],
        moments: torch.Tensor | None,
        portable: bool,
) -> tuple[nn.Module | IntegerTables | None, IntegerReport]:
    """A layer in integers, if there is such a form of it, and what became of it."""
    product, neuron = products[0], products[0].operands[0]
    reason = ''
    if kinds_of(products) == (POSITION,) and type(neuron) is ScaleAndFire:
        error = rounded(product.weights.detach().to(torch.float32) * neuron.step).error
        return IntegerTables(), IntegerReport(name, error)
    if len(products) > 1 or product.kind not in INTEGER_FORMS:
        reason = (f'there is no form of {" and ".join(kinds_of(products))} in integers: there are those of '
                  f'{", ".join(INTEGER_FORMS)} and {POSITION}')
    elif product.pads and (product.pads != 'zeros' or getattr(neuron, 'center', None) is not None):
        reason = 'what it pads with is no zero'
    if reason:
        return None, IntegerReport(name, 0., integer=False, reason=reason)
    weight = product.by_output(product.weights.detach().to(torch.float32)) * product.beside(neuron.step)
    limit = _weight_limit(product) if portable else MAX_WEIGHT
    if product.kind == LINEAR:
        weights = integer_weights(weight, moments, limit)
    else:
        weights = rounded(weight.flatten(1), limit=limit)
    columns = weights.weight.shape[1] / weight.flatten(1).shape[1]
    return INTEGER_FORMS[product.kind](product, weights), IntegerReport(name, weights.error, columns)


def _weight_limit(product: Product) -> int | torch.Tensor:
    """Largest magnitude of the int8 weights of a product, or of each of its input channels, that every processor sums
    exactly."""
    neuron = product.operands[0]
    if isinstance(neuron, SharedScaleAndFire):
        return weight_limit((0, 2 * neuron.config.levels))
    if product.kind == LINEAR and isinstance(neuron, ScaleAndFire):
        return upright(neuron.top_levels).limits
    return weight_limit(neuron.level_range)


def folded_bias(product: Product) -> torch.Tensor | None:
    """Bias of a product with weights, into which the centre of its input is folded, float32, (D,); None if there is
    neither."""
    bias = None if product.bias is None else product.bias.detach().to(torch.float32)
    center = getattr(product.operands[0], 'center', None)
    if center is None:
        return bias
    weight = product.by_output(product.weights.detach().to(torch.float32))
    if product.kind == LINEAR:
        folded = weight @ center.flatten()
    else:
        folded = (weight * product.beside(center)).flatten(1).sum(1)
    return folded if bias is None else folded + bias
