"""Operators of ONNX have values while torch's older exporter traces: those that an engine would give."""
import numpy as np
import pytest
import torch
from layer_tools import rng

from sformer.execution.operators import onnx_operator


def traced(operator, dtype, *inputs, **attributes):
    """What an operator gives while a function that calls it is traced."""
    seen = []

    def function(*inputs):
        out = onnx_operator(operator, inputs[0], dtype, *inputs, **attributes)
        seen.append(out.detach().clone())
        return out
    torch.jit.trace(function, inputs, check_trace=False)
    return seen[0]


@pytest.mark.parametrize('dtype, zero', [(torch.uint8, 63), (torch.uint8, 0), (torch.int8, 0), (torch.int8, -5)])
def test_bytes_and_back(dtype, zero):
    x = 40 * torch.randn(3, 50, generator=rng(0))
    step, zeros = torch.tensor(0.5), torch.tensor(zero, dtype=dtype)
    lowest, highest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    expected = np.clip(np.rint(x.numpy() / 0.5) + zero, lowest, highest)
    levels = traced('QuantizeLinear', dtype, x, step, zeros)
    assert levels.dtype == dtype and (levels.numpy() == expected).all()
    assert (levels.min(), levels.max()) == (lowest, highest), 'both ends clip'
    back = traced('DequantizeLinear', torch.float32, levels, step, zeros)
    assert (back.numpy() == (expected - zero) * 0.5).all()


def test_steps_of_channels():
    weight = torch.randint(-127, 128, (4, 6), generator=rng(1)).to(torch.int8)
    step, zero = torch.arange(1., 5.) / 8, torch.tensor([0, 1, 2, 3], dtype=torch.int8)
    out = traced('DequantizeLinear', torch.float32, weight, step, zero, axis=0)
    assert torch.equal(out, (weight.float() - zero.float()[:, None]) * step[:, None])


def test_two_slopes():
    x = torch.tensor([[-2., -0., 0., 3.]])
    assert torch.equal(traced('PRelu', torch.float32, x, torch.tensor([0.25])), torch.tensor([[-0.5, 0., 0., 3.]]))
