"""Integer execution in torch: spikes of int8 times weights of int8, summed exactly.

The step of each input channel folds into the weights, which are then rounded to int8 with a step per output channel.
Attention, where spikes meet spikes, keeps its float form: its operands are int8 levels times a step already.
"""
import dataclasses
from typing import Any, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import SFormerError, UncalibratedError
from ..layers import SpikingConv2d, SpikingLayer, SpikingLinear, is_calibrated, uncalibrated
from ..neurons import Float32Buffers, Neuron

__all__ = ['to_integer_', 'IntegerLinear', 'IntegerConv2d', 'IntegerReport', 'IntegerWeights', 'MAX_WEIGHT_ERROR']

MAX_WEIGHT_ERROR = 0.03
TARGET_ERROR = 0.015  # a little more than that of normal weights, whose largest is at four standard deviations
MAX_SPLIT = 1.125  # columns, as a multiple
MAX_WEIGHT = 127


@dataclasses.dataclass(frozen=True)
class IntegerWeights:
    """Weights as int8, and what rounding them costs.

    Args:
        weight: (D, C') int8.
        step: What a weight of one stands for, float32 (D,).
        columns: Input channel that each of the C' columns reads, int64; None if C' = C and each reads its own.
        error: Relative error of the weights, as levels see them.
    """
    weight: torch.Tensor
    step: torch.Tensor
    columns: Optional[torch.Tensor]
    error: float


@dataclasses.dataclass(frozen=True)
class IntegerReport:
    """What became of a layer.

    Args:
        name: Path of the layer.
        error: Relative error (Frobenius) of its int8 weights, as levels see them: with their steps folded in.
        columns: Columns of the int8 weights over those of the layer: more than one where outliers are split.
        integer: Whether it computes in integers; if not, `reason` says why.
        reason: Why it stays in floating point.
    """
    name: str
    error: float
    columns: float = 1.
    integer: bool = True
    reason: str = ''


def integer_weights(weight: torch.Tensor) -> IntegerWeights:
    """Round weights (D, C), with the steps of their input folded in, to int8 with a step per output channel.

    A few input channels with a large step would leave all other weights of a row few levels. Such a channel is read
    by several columns, whose weights share its own: the spikes are the same, and a row's largest weight falls.
    """
    weight = weight.detach().to(torch.float32)
    largest = weight.abs().amax(0)
    best = _rounded(weight)
    typical = largest.median().clamp_min(torch.finfo(torch.float32).tiny)
    for factor in (16, 8, 4, 3, 2):
        if best.error <= TARGET_ERROR:
            break
        parts = (largest / (factor * typical)).ceil().clamp(1, 2 ** 15).to(torch.int64)
        if parts.sum() > MAX_SPLIT * len(parts):
            break
        split = _rounded(weight, parts)
        best = split if split.error < best.error else best
    return best


def _rounded(weight: torch.Tensor, parts: Optional[torch.Tensor] = None) -> IntegerWeights:
    """Int8 weights in which column c is the sum of `parts[c]` columns, or itself."""
    reach = (weight if parts is None else weight / parts).abs().amax(1)
    step = (reach / MAX_WEIGHT).clamp_min(torch.finfo(torch.float32).tiny)
    whole = (weight / step[:, None]).round()
    norm = weight.norm()
    error = ((whole * step[:, None] - weight).norm() / norm).item() if norm > 0 else 0.
    columns = None
    if parts is not None:
        columns = torch.arange(len(parts), device=parts.device).repeat_interleave(parts)
        place = torch.arange(len(columns), device=parts.device) - (parts.cumsum(0) - parts)[columns]
        # n = sum over p parts of floor((n + i) / p), i = 0 ... p - 1
        whole = torch.floor((whole[:, columns] + place) / parts[columns])
    return IntegerWeights(whole.clamp(-MAX_WEIGHT, MAX_WEIGHT).to(torch.int8), step, columns, error)


class IntegerLayer(Float32Buffers, SpikingLayer):
    """A layer whose weights are int8, with steps in float32. Its source is gone."""
    neuron: Neuron

    def remove_neurons(self) -> None:
        raise SFormerError('the weights of this network are int8, so its source is gone: keep a copy of the model that '
                           'to_integer_() is given.')


class IntegerLinear(IntegerLayer):
    """Linear layer on spikes with int8 weights.

    `y = (levels @ weight.T) * weight_step * row + bias`, where the bracket is a sum of int8 products in int32.

    Args:
        layer: Calibrated layer.
        weights: Its weights in integers.

    Shape:
        Input (..., C), output (..., D).
    """
    weight: torch.Tensor
    weight_step: torch.Tensor
    columns: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]

    def __init__(self, layer: SpikingLinear, weights: IntegerWeights):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.neuron = layer.neuron
        self.register_buffer('weight', weights.weight)
        self.register_buffer('weight_step', weights.step)
        self.register_buffer('columns', weights.columns)
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach().to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = self.neuron.encode(x)
        out = _product(self._read(spikes.levels), self.weight).to(torch.float32) * self.weight_step
        if spikes.row is not None:
            out = out * spikes.row
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def _read(self, levels: torch.Tensor) -> torch.Tensor:
        return levels if self.columns is None else levels[..., self.columns]

    def extra_repr(self) -> str:
        columns = '' if self.columns is None else f', columns={len(self.columns)}'
        return f'in_features={self.in_features}, out_features={self.out_features}, int8 weights{columns}'


class IntegerConv2d(IntegerLayer):
    """Convolution on spikes with int8 weights; the centre of its input is folded into the bias.

    The sums of an embedding of patches are below 2^24, so float32 holds them exactly, and torch has no convolution of
    integers.

    Shape:
        As of `nn.Conv2d`.
    """
    weight: torch.Tensor
    weight_step: torch.Tensor
    bias: torch.Tensor

    def __init__(self, layer: SpikingConv2d, weights: IntegerWeights, bias: torch.Tensor):
        super().__init__()
        self.neuron: Any = layer.neuron
        self.geometry: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self.register_buffer('weight', weights.weight.view(layer.weight.shape))
        self.register_buffer('weight_step', weights.step.view(-1, 1, 1))
        self.register_buffer('bias', bias.view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = self.neuron.encode(x).levels.to(torch.float32)
        out = F.conv2d(levels, self.weight.to(torch.float32), None, *self.geometry)
        return (out * self.weight_step + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f'{tuple(self.weight.shape)}, stride={tuple(self.geometry[0])}, int8 weights'


def _product(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums (..., D) int32 of products of levels (..., C) and weights (D, C), both int8."""
    rows = levels.reshape(-1, levels.shape[-1])
    if rows.is_cuda:  # whose kernel takes more than 16 rows, and multiples of 8
        num, (out, columns) = len(rows), weight.shape
        rows = F.pad(rows, (0, -columns % 8, 0, max(17 - num, 0)))
        product = torch._int_mm(rows, F.pad(weight, (0, -columns % 8, 0, -out % 8)).t())[:num, :out]
    else:
        product = torch._int_mm(rows, weight.t())
    return product.view(*levels.shape[:-1], -1)


def to_integer_(model: nn.Module, max_error: float = MAX_WEIGHT_ERROR) -> List[IntegerReport]:
    """Let the layers of a calibrated spiking model compute with int8 weights, in place.

    Nothing else changes: neurons fire as they do, LayerNorm, softmax and activation functions act on currents. The
    weights of the source are dropped, so the model has no source, cannot be trained or saved, and takes a quarter of
    the memory.

    Args:
        model: Calibrated SFormer, or any module that `spiking_` and `calibrate_` have been through.
        max_error: A layer whose int8 weights have a larger relative error stays in floating point.

    Returns:
        What became of each layer, in the order of the modules.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If layers have adapters.
    """
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; fit it with sformer.convert() or calibrate_() first.')
    layers = [(name, layer) for name, layer in model.named_modules()
              if isinstance(layer, (SpikingLinear, SpikingConv2d)) and layer.neuron is not None]
    for name, _ in layers:
        if name.endswith('.base_layer'):
            raise SFormerError(f'{name.removesuffix(".base_layer")} has an adapter: merge it into the weights first.')
    reports = []
    for name, layer in layers:
        new, report = _linear(name, layer) if isinstance(layer, SpikingLinear) else _convolution(name, layer)
        if report.error > max_error:
            new, report = None, dataclasses.replace(
                report, integer=False, columns=1.,
                reason=f'its int8 weights have an error of {report.error:.3f}, more than {max_error:g}')
        reports.append(report)
        if new is not None:
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, new.train(layer.training))
    return reports


def _linear(name: str, layer: SpikingLinear) -> Tuple[Optional[nn.Module], IntegerReport]:
    weights = integer_weights(layer.weight * layer.neuron.step)
    columns = weights.weight.shape[1] / layer.in_features
    return IntegerLinear(layer, weights), IntegerReport(name, weights.error, columns)


def _convolution(name: str, layer: SpikingConv2d) -> Tuple[Optional[nn.Module], IntegerReport]:
    neuron: Any = layer.neuron
    padded = layer.padding not in ((0, 0), 'valid')
    if (layer.padding_mode != 'zeros' or isinstance(layer.padding, str) or (padded and neuron.center is not None)
            or (layer.groups > 1 and neuron.step.numel() > 1)):
        return None, IntegerReport(name, 0., integer=False, reason='its padding or its groups depend on the channel')
    weight = layer.weight.detach().to(torch.float32)
    weights = _rounded((weight * neuron.step.view(1, -1, 1, 1)).flatten(1))
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().to(torch.float32)
    if neuron.center is not None:
        bias = bias + (weight * neuron.center.view(1, -1, 1, 1)).sum((1, 2, 3))
    return IntegerConv2d(layer, weights, bias), IntegerReport(name, weights.error)
