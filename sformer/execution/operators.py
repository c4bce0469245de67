"""Operators of ONNX that torch has no word for, in both of its exporters."""
from typing import Protocol

import torch
from torch.autograd.function import FunctionCtx

__all__ = ['onnx_operator']


class _TracedGraph(Protocol):
    """What torch's older exporter writes to."""

    def op(self, name: str, *inputs: torch.Value, **attributes: int) -> torch.Value: ...


class _Quantize(torch.autograd.Function):
    """What torch's older exporter, by a trace with values in it, calls for QuantizeLinear."""

    @staticmethod
    def forward(  # type: ignore[override]
            ctx: FunctionCtx,
            x: torch.Tensor,
            step: torch.Tensor,
            zero: torch.Tensor,
    ) -> torch.Tensor:
        info = torch.iinfo(zero.dtype)
        return ((x / step).round() + zero).clamp(info.min, info.max).to(zero.dtype)

    @staticmethod
    def symbolic(g: _TracedGraph, x: torch.Value, step: torch.Value, zero: torch.Value) -> torch.Value:
        return g.op('QuantizeLinear', x, step, zero)


class _Dequantize(torch.autograd.Function):
    """The same for DequantizeLinear."""

    @staticmethod
    def forward(  # type: ignore[override]
            ctx: FunctionCtx,
            x: torch.Tensor,
            step: torch.Tensor,
            zero: torch.Tensor,
            axis: int = 0,
    ) -> torch.Tensor:
        shape = [-1 if d == axis else 1 for d in range(x.ndim)] if step.ndim else []
        return (x.to(step.dtype) - zero.view(shape)) * step.view(shape)

    @staticmethod
    def symbolic(
            g: _TracedGraph,
            x: torch.Value,
            step: torch.Value,
            zero: torch.Value,
            axis: int = 0,
    ) -> torch.Value:
        return g.op('DequantizeLinear', x, step, zero, axis_i=axis)


class _PRelu(torch.autograd.Function):
    """The same for PRelu."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.where(x < 0, x * slope, x)

    @staticmethod
    def symbolic(g: _TracedGraph, x: torch.Value, slope: torch.Value) -> torch.Value:
        return g.op('PRelu', x, slope)


TRACED: dict[str, type[torch.autograd.Function]] = {
    'QuantizeLinear': _Quantize, 'DequantizeLinear': _Dequantize, 'PRelu': _PRelu}


def onnx_operator(
        operator: str,
        like: torch.Tensor,
        dtype: torch.dtype,
        *inputs: torch.Tensor,
        **attributes: int,
) -> torch.Tensor:
    """Result of an operator of ONNX.

    Args:
        operator: Its name.
        like: Tensor whose shape the result has.
        dtype: Type of the result.
        *inputs: What it reads.
        **attributes: Its attributes.
    """
    if torch.jit.is_tracing():
        return TRACED[operator].apply(*inputs, *attributes.values())
    return torch.onnx.ops.symbolic(operator, inputs, {**attributes}, dtype=dtype, shape=like.shape)
