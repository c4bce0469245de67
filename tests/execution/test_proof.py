"""Intervals of what a graph computes: no point of the inputs leaves them, and their ends are reached."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sformer.execution.proof import RULES

UNARY = {
    'Relu': lambda x: np.maximum(x, 0), 'Round': np.round, 'Floor': np.floor, 'Ceil': np.ceil, 'Exp': np.exp,
    'Sign': np.sign, 'Neg': np.negative, 'Abs': np.abs, 'Sqrt': lambda x: np.sqrt(np.maximum(x, 0)),
}
BINARY = {'Add': np.add, 'Sub': np.subtract, 'Mul': np.multiply, 'Div': np.divide, 'Min': np.minimum, 'Max': np.maximum}
NUMBERS = st.floats(-20, 20, allow_subnormal=False)
SHARES = st.floats(0, 1)


@st.composite
def intervals(draw):
    """An interval, and a point within it."""
    low, high = sorted((draw(NUMBERS), draw(NUMBERS)))
    point = min(max(low + draw(SHARES) * (high - low), low), high)
    return (np.float64(low), np.float64(high)), np.float64(point)


@pytest.mark.parametrize('name', UNARY)
@given(intervals())
def test_functions_of_one(name, drawn):
    x, point = drawn
    low, high = RULES[name](x)
    assert low <= UNARY[name](point) <= high
    ends = [UNARY[name](edge) for edge in x]
    assert high == max(ends)
    assert low == (0 if name == 'Abs' and x[0] <= 0 <= x[1] else min(ends))


@pytest.mark.parametrize('name', BINARY)
@given(intervals(), intervals())
def test_functions_of_two(name, first, second):
    (a, p), (b, q) = first, second
    low, high = RULES[name](a, b)
    if name != 'Div' or q:
        with np.errstate(over='ignore'):
            found = BINARY[name](p, q)
        slack = 1e-9 * (1 + abs(found))  # a quotient is a product of a reciprocal, which was rounded
        assert low - slack <= found <= high + slack
