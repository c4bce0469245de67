"""Integer execution in torch: spikes of int8 times weights of int8, summed exactly by whatever is fastest at it here.

The step of each input channel folds into the weights, which are then rounded to int8 with a step per output channel.
Attention, where spikes meet spikes, keeps its float form: its operands are int8 levels times a step already.
"""
import dataclasses
import functools
import time
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import SFormerError, UncalibratedError
from ..layers import (
    SpikingConv2d,
    SpikingConvTranspose2d,
    SpikingLayer,
    SpikingLinear,
    is_calibrated,
    shared_copy,
    uncalibrated,
)
from ..neurons import Float32Buffers, Neuron, ScaleAndFire, SharedScaleAndFire
from .rounding import IntegerWeights, integer_weights, rounded
from .saturation import MAX_WEIGHT, upright, weight_limit

__all__ = [
    'to_integer_', 'folded_bias', 'multiplies_int8', 'IntegerLinear', 'IntegerConv2d', 'IntegerConvTranspose2d',
    'IntegerReport', 'MAX_WEIGHT_ERROR',
]

MAX_WEIGHT_ERROR = 0.03
MOMENTS_MEMORY = 2 ** 30  # bytes that second moments of levels may take at once
EXACT = 2 ** 24  # integers below it are exact in float32, and so are their sums


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
    neuron: Neuron

    def remove_neurons(self) -> None:
        raise SFormerError('the weights of this network are int8, so its source is gone: keep a copy of the model that '
                           'to_integer_() is given.')


class IntegerLinear(IntegerLayer):
    """Linear layer on spikes with int8 weights.

    `y = (levels @ weight.T) * weight_step * row + bias`. The bracket is an exact sum of integers: of int8 in int32
    where the processor accelerates that, else of float32 in blocks of columns whose sums stay below 2^24.

    Args:
        layer: Calibrated layer.
        weights: Its weights in integers.
        bias: Its bias, with what the centre of its input adds, float32 (D,), if there is one.

    Shape:
        Input (..., C), output (..., D).
    """
    weight: torch.Tensor
    weight_step: torch.Tensor
    columns: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]

    def __init__(self, layer: SpikingLinear, weights: IntegerWeights, bias: Optional[torch.Tensor]):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.neuron = layer.neuron
        self.register_buffer('weight', weights.weight)
        self.register_buffer('weight_step', weights.step)
        self.register_buffer('columns', weights.columns)
        self.register_buffer('bias', bias)
        self.blocks = exact_blocks(weights.weight, _largest_level(self.neuron))
        self.int8 = multiplies_int8()  # on a CPU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = self.neuron.encode(x)
        out = self.sums(spikes.levels).to(torch.float32) * self.weight_step
        if spikes.row is not None:
            out = out * spikes.row
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def sums(self, levels: torch.Tensor) -> torch.Tensor:
        """Sums (..., D) of products of levels (..., C) and weights, exact, int32 or float32."""
        levels = self.read(levels)
        if levels.is_cuda or self.int8:
            return _int8_sums(levels, self.weight)
        return _float_sums(levels, self.weight, self.blocks)

    def read(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels that the columns of the weights read: outliers are split over several."""
        return levels if self.columns is None else levels[..., self.columns]

    def extra_repr(self) -> str:
        columns = '' if self.columns is None else f', columns={len(self.columns)}'
        product = 'int8' if self.weight.is_cuda or self.int8 else 'float32'
        return (f'in_features={self.in_features}, out_features={self.out_features}, int8 weights{columns}, '
                f'exact sums by {product} products')


class IntegerConv2d(IntegerLayer):
    """Convolution on spikes with int8 weights; the centre of its input is folded into the bias.

    torch has no convolution of integers: sums below 2^24, as nearly all are, are exact in float32, others in float64.

    Args:
        layer: Calibrated layer.
        weights: Its weights in integers, a row per output channel.
        bias: Its bias, with what the centre of its input adds, float32 (D,), if there is one.

    Shape:
        As of `nn.Conv2d`.
    """
    weight: torch.Tensor
    weight_step: torch.Tensor
    bias: Optional[torch.Tensor]

    def __init__(self, layer: Any, weights: IntegerWeights, bias: Optional[torch.Tensor]):
        super().__init__()
        self.neuron: Any = layer.neuron
        self.geometry: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self.in_channels = layer.in_channels
        one_block = len(exact_blocks(weights.weight, _largest_level(self.neuron))) == 1
        self.exact = torch.float32 if one_block else torch.float64
        self.register_buffer('weight', _by_output(layer, weights.weight.view(_by_output(layer).shape)))
        self.register_buffer('weight_step', weights.step.view(-1, 1, 1))
        self.register_buffer('bias', bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._current(x, F.conv2d(self._levels(x), self.weight.to(self.exact), None, *self.geometry))

    def _levels(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[-3] == self.in_channels, 'currents have another number of channels than the weights')
        return self.neuron.encode(x).levels.to(self.exact)

    def _current(self, x: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        out = sums.to(torch.float32) * self.weight_step
        return (out if self.bias is None else out + self.bias.view(-1, 1, 1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f'{tuple(self.weight.shape)}, stride={tuple(self.geometry[0])}, int8 weights'


class IntegerConvTranspose2d(IntegerConv2d):
    """Transposed convolution on spikes with int8 weights.

    Shape:
        As of `nn.ConvTranspose2d`.
    """

    def __init__(self, layer: Any, weights: IntegerWeights, bias: Optional[torch.Tensor]):
        super().__init__(layer, weights, bias)
        self.geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._current(x, F.conv_transpose2d(self._levels(x), self.weight.to(self.exact), None, *self.geometry))


def _by_output(layer: Any, weight: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Weights of a convolution as (D, C / groups, *kernel), whose rows are output channels, or such ones as the layer
    has them: those of a transposed convolution are (C, D / groups, *kernel)."""
    if weight is None:
        weight = layer.weight.detach().to(torch.float32)
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight
    # the same both ways: within each group, input and output channels change places
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _per_output(layer: Any, values: torch.Tensor) -> torch.Tensor:
    """Values (C, 1, 1) of input channels as (D or 1, C / groups, 1, 1), for the rows that read them."""
    grouped = values.expand(layer.in_channels, 1, 1).reshape(layer.groups, -1, 1, 1)
    return grouped if layer.groups == 1 else grouped.repeat_interleave(layer.out_channels // layer.groups, 0)


def exact_blocks(weight: torch.Tensor, largest: int) -> List[int]:
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


def _float_sums(levels: torch.Tensor, weight: torch.Tensor, blocks: List[int]) -> torch.Tensor:
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

    def seconds(sums: Any) -> float:
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
        batches: Optional[Iterable[torch.Tensor]] = None,
        portable: bool = True,
) -> List[IntegerReport]:
    """Let the layers of a calibrated spiking model compute with int8 weights, in place.

    Nothing else changes: neurons fire as they do, LayerNorm, softmax and activation functions act on currents. The
    weights of the source are dropped, so the model has no source, cannot be trained or saved, and takes a quarter of
    the memory.

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
    layers = [(name, layer) for name, layer in model.named_modules()
              if isinstance(layer, (SpikingLinear, SpikingConv2d, SpikingConvTranspose2d)) and layer.neuron is not None]
    for name, layer in layers:
        if not name:
            raise SFormerError('a layer cannot be replaced in itself: hand over a module that it is part of.')
        if name.endswith('.base_layer'):
            raise SFormerError(f'{name.removesuffix(".base_layer")} has an adapter: merge it into the weights first.')
        _check_step(f'{name}.neuron', layer)
    made: List[Tuple[str, nn.Module, Optional[nn.Module]]] = []
    reports, images = [], None if batches is None else [*batches]
    for name, layer, moments in _with_moments(model, layers, images):
        limit = _weight_limit(layer) if portable else MAX_WEIGHT
        if isinstance(layer, SpikingLinear):
            new, report = _linear(name, layer, moments, limit)
        else:
            new, report = _convolution(name, layer, limit)
        if report.error > max_error:
            new, report = None, dataclasses.replace(
                report, integer=False, columns=1.,
                reason=f'its int8 weights have an error of {report.error:.3f}, more than {max_error:g}')
        reports.append(report)
        made.append((name, layer, new))
    for name, layer, new in made:  # now that no moments of the simulation are needed any more
        if new is not None:
            model.set_submodule(name, new.train(layer.training))
    return reports


def _check_step(name: str, layer: Any) -> None:
    """Raise SFormerError if a neuron of one's own has no step that folds into the weights of its layer."""
    step = getattr(layer.neuron, 'step', None)
    channels = layer.in_features if isinstance(layer, SpikingLinear) else layer.in_channels
    if not isinstance(step, torch.Tensor) or step.numel() not in (1, channels):
        raise SFormerError(f'{name} is a {type(layer.neuron).__name__}, whose spikes have no step per channel (`step`) '
                           f'that folds into weights, so its layer does not compute in integers.')


def _with_moments(
        model: nn.Module,
        layers: List[Tuple[str, Any]],
        images: Optional[List[torch.Tensor]],
) -> Iterator[Tuple[str, Any, Optional[torch.Tensor]]]:
    """Layers with the second moments of the levels that they read on some images; groups of layers at a time, so that
    memory is bounded."""
    while layers:
        group: List[Tuple[str, Any]] = []
        size = 0
        while layers and (not group or images is None or size < MOMENTS_MEMORY):
            group.append(layers[0])
            size += 4 * getattr(layers[0][1], 'in_features', 0) ** 2
            layers = layers[1:]
        moments = {} if images is None else _moments(model, group, images)
        for name, layer in group:
            yield name, layer, moments.pop(name, None)


@torch.inference_mode()
def _moments(model: nn.Module, layers: List[Tuple[str, Any]], images: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Sums of k k^T, (C, C), of the levels k that layers read, times the factor of their token."""
    view = shared_copy(model).eval()
    found: Dict[str, torch.Tensor] = {}
    for name, layer in layers:
        if isinstance(layer, SpikingLinear):
            def add(layer: Any, args: Any, name: str = name) -> None:
                spikes = layer.neuron.encode(args[0])
                k = spikes.levels.to(torch.float32)
                k = (k if spikes.row is None else k * spikes.row).flatten(0, -2)
                found[name] = found[name].addmm_(k.T, k) if name in found else k.T @ k
            view.get_submodule(name).register_forward_pre_hook(add)
    for batch in images:
        view(batch)
    return found


def _weight_limit(layer: Any) -> Union[int, torch.Tensor]:
    """Largest magnitude of the int8 weights of a layer, or of each of its input channels, that every processor sums
    exactly."""
    if isinstance(layer.neuron, SharedScaleAndFire):
        return weight_limit((0, 2 * layer.neuron.config.levels))
    if isinstance(layer, SpikingLinear) and isinstance(layer.neuron, ScaleAndFire):
        return upright(layer.neuron.top_levels).limits
    return weight_limit(layer.neuron.level_range)


def _linear(
        name: str,
        layer: SpikingLinear,
        moments: Optional[torch.Tensor],
        limit: Union[int, torch.Tensor],
) -> Tuple[Optional[nn.Module], IntegerReport]:
    weights = integer_weights(layer.weight * layer.neuron.step, moments, limit)
    columns = weights.weight.shape[1] / layer.in_features
    return IntegerLinear(layer, weights, folded_bias(layer)), IntegerReport(name, weights.error, columns)


def _convolution(name: str, layer: Any, limit: Union[int, torch.Tensor]) -> Tuple[Optional[nn.Module], IntegerReport]:
    neuron: Any = layer.neuron
    shifted = getattr(neuron, 'center', None) is not None
    if layer.padding_mode != 'zeros' or (layer.padding not in ((0, 0), 'valid') and shifted):
        return None, IntegerReport(name, 0., integer=False, reason='what it pads with is no zero')
    weight = _by_output(layer)
    weights = rounded((weight * _per_output(layer, neuron.step)).flatten(1), limit=limit)
    kind = IntegerConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else IntegerConv2d
    return kind(layer, weights, folded_bias(layer)), IntegerReport(name, weights.error)


def folded_bias(layer: Any) -> Optional[torch.Tensor]:
    """Bias of a layer, into which the centre of its input is folded, float32, (D,); None if there is neither."""
    bias = None if layer.bias is None else layer.bias.detach().to(torch.float32)
    center = getattr(layer.neuron, 'center', None)
    if center is None:
        return bias
    if isinstance(layer, SpikingLinear):
        folded = layer.weight.detach().to(torch.float32) @ center.flatten()
    else:
        folded = (_by_output(layer) * _per_output(layer, center)).flatten(1).sum(1)
    return folded if bias is None else folded + bias
