"""Intervals of what a graph computes: no point of the inputs leaves them, and their ends are reached."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sformer.execution.proof import RULES, saturating

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


def bounded_by(*nodes, **constants):
    """Whether it is proven that bytes of `levels` and weights of 127 are summed exactly, after these nodes."""
    onnx = pytest.importorskip('onnx')
    helper = onnx.helper
    tensors = {'one': np.float32(1), 'zero': np.uint8(0), 'none': np.int8(0), 'w': np.full((4, 4), 127, np.int8),
               **constants}
    graph = helper.make_graph(
        [*nodes, helper.make_node('QuantizeLinear', ['levels', 'one', 'zero'], ['q']),
         helper.make_node('DequantizeLinear', ['q', 'one', 'zero'], ['a']),
         helper.make_node('DequantizeLinear', ['w', 'one', 'none'], ['b']),
         helper.make_node('MatMul', ['a', 'b'], ['y'])],
        'levels', [helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, ['n', 4])],
        [helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, ['n', 4])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()])
    return not saturating(helper.make_model(graph))


def test_what_bounds_levels_in_a_graph():
    onnx = pytest.importorskip('onnx')
    node = onnx.helper.make_node
    table = node('GatherND', ['values', 'x'], ['levels'])
    assert bounded_by(table, values=np.float32([0, 1, 128])) and not bounded_by(table, values=np.float32([0, 1, 255]))
    softmax = (node('ReduceMax', ['x'], ['top'], keepdims=1), node('Sub', ['x', 'top'], ['low']),
               node('Exp', ['low'], ['share']), node('Mul', ['share', 'scale'], ['levels']))
    assert bounded_by(*softmax, scale=np.float32(128)) and not bounded_by(*softmax, scale=np.float32(255))
    assert not bounded_by(node('ReduceMax', ['x'], ['top'], keepdims=0), *softmax[1:], scale=np.float32(128))
    assert not bounded_by(softmax[0], node('Sub', ['top', 'x'], ['low']), *softmax[2:], scale=np.float32(128))
    numbers = node('IsNaN', ['x'], ['nan']), node('Where', ['nan', 'x', 'top'], ['levels'])
    assert bounded_by(*numbers, top=np.float32(128)) and not bounded_by(*numbers, top=np.float32(255))
    assert not bounded_by(numbers[0], node('Where', ['nan', 'top', 'x'], ['levels']), top=np.float32(128))
    assert bounded_by(node('ConstantOfShape', ['size'], ['levels']), size=np.int64([1, 4]))
    ones = onnx.helper.make_tensor('ones', onnx.TensorProto.FLOAT, [1], [200.])
    assert not bounded_by(node('ConstantOfShape', ['size'], ['levels'], value=ones), size=np.int64([1, 4]))
