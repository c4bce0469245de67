"""Proof from a graph alone that every processor sums its products of bytes exactly.

How large the bytes of a product can be is followed through the graph by interval arithmetic, from what clips them on;
how large its weights are stands in the file.
"""
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .saturation import LARGEST_PAIR, SHIFT

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ['saturating']

Interval = tuple[np.ndarray, np.ndarray]  # per channel or of all, float64
ANYTHING: Interval = (np.array(-np.inf), np.array(np.inf))
PRODUCTS = ('MatMul', 'Gemm', 'Conv', 'ConvTranspose', 'FusedMatMul')
MOVED = ('Transpose', 'Reshape', 'Squeeze', 'Unsqueeze', 'Expand', 'Slice', 'Split', 'Identity', 'Flatten', 'Gather',
         'Cast')


class Bytes(NamedTuple):
    """An operand of a product that is bytes.

    Args:
        signed: Whether they are int8.
        highest: The largest of them, as a number of their type: of all, or of each channel, (C,).
        magnitude: The largest magnitude of what they stand for, likewise.
        weight: Whether they are constants.
    """
    signed: bool
    highest: np.ndarray
    magnitude: np.ndarray
    weight: bool


def saturating(model: 'ModelProto') -> list[str]:
    """Names of the products of an `onnx.ModelProto` that an x86 processor without VNNI may sum with saturation."""
    from onnx import numpy_helper
    constants = {init.name: numpy_helper.to_array(init) for init in model.graph.initializer}
    made_by = {}
    for node in model.graph.node:
        made_by.update(dict.fromkeys(node.output, node))
        if node.op_type == 'Constant' and node.attribute[0].name == 'value':
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    reach = _intervals(model.graph.node, constants, made_by)
    found = []
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            a, b = (_bytes(name, made_by, constants, reach) for name in node.input[:2])
            if a is not None and b is not None and not _sums_exactly(a, b):
                found.append(node.name or node.output[0])
    return found


def _sums_exactly(a: Bytes, b: Bytes) -> bool:
    """Whether no pair of products leaves 16 bits, whichever of both an engine takes as the signed one."""
    ways = [(x, y) for x, y in ((a, b), (b, a)) if not x.weight and (y.signed or not x.signed)]
    return all((2 * (x.highest + SHIFT * x.signed) * y.magnitude <= LARGEST_PAIR).all() for x, y in ways)


def _bytes(
        name: str,
        made_by: dict[str, 'NodeProto'],
        constants: dict[str, np.ndarray],
        reach: dict[str, Interval],
) -> Bytes | None:
    """What a product reads, if it is bytes: followed to where they are dequantised."""
    node, moved = made_by.get(name), False
    while node is not None and node.op_type in MOVED:
        node, moved = made_by.get(node.input[0]), True
    if node is None or node.op_type != 'DequantizeLinear':
        return None
    source, zero = node.input[0], constants[node.input[2]]
    if source in constants:
        magnitude = np.abs(constants[source].astype(np.int64) - zero.astype(np.int64).max())
        # of what a linear layer sums over, channels are in rows
        magnitude = magnitude.max(1) if magnitude.ndim == 2 and not moved else magnitude.max()
        return Bytes(zero.dtype == np.int8, magnitude, magnitude, True)
    low, high = _either(reach[source]) if moved else reach[source]
    return Bytes(zero.dtype == np.int8, high, np.maximum(np.abs(low - zero), np.abs(high - zero)), False)


def _intervals(
        nodes: 'Sequence[NodeProto]',
        constants: dict[str, np.ndarray],
        made_by: dict[str, 'NodeProto'],
) -> dict[str, Interval]:
    """Between which numbers the values of each tensor lie; graphs have their nodes in the order of computation."""
    reach: dict[str, Interval] = {}
    for name, values in constants.items():
        if values.dtype.kind in 'fiub' and values.size:
            numbers = values.astype(np.float64)
            reach[name] = (numbers, numbers) if values.ndim < 2 else (numbers.min(), numbers.max())
    for node in nodes:
        given = [reach.get(name, ANYTHING) for name in node.input]
        found = ANYTHING
        if node.op_type == 'QuantizeLinear':
            found = _quantised(given[0], constants[node.input[1]], constants[node.input[2]])
        elif _is_below_its_maximum(node, made_by):
            found = (np.array(-np.inf), np.array(0.))
        elif _is_what_is_a_number(node, made_by):
            found = given[2]
        elif node.op_type == 'ConstantOfShape' and not node.attribute:
            found = (np.array(0.), np.array(0.))
        elif node.op_type in RULES:
            found = RULES[node.op_type](*given)
        for name in node.output:
            reach.setdefault(name, found)
    return reach


def _is_below_its_maximum(node: 'NodeProto', made_by: dict[str, 'NodeProto']) -> bool:
    """x - max(x), as softmax begins."""
    largest = made_by.get(node.input[1]) if node.op_type == 'Sub' else None
    return (largest is not None and largest.op_type == 'ReduceMax' and largest.input[0] == node.input[0]
            and all(attribute.i for attribute in largest.attribute if attribute.name == 'keepdims'))


def _is_what_is_a_number(node: 'NodeProto', made_by: dict[str, 'NodeProto']) -> bool:
    """x where it is not a number, another tensor elsewhere."""
    condition = made_by.get(node.input[0]) if node.op_type == 'Where' else None
    return condition is not None and condition.op_type == 'IsNaN' and condition.input[0] == node.input[1]


def _quantised(x: Interval, step: np.ndarray, zero: np.ndarray) -> Interval:
    kind = np.iinfo(zero.dtype)
    low, high = (np.clip(np.round(edge / step) + zero, kind.min, kind.max) for edge in x)
    return low, high


def _gathered(x: Interval, index: Interval) -> Interval:
    """Of a row per channel those that are read, if it is known which; of anything else, all together."""
    if not np.array_equal(*index):
        return _either(x)
    read = index[0].astype(np.int64)
    channels = len(x[0]) if np.ndim(x[0]) == 1 else 0
    return (x[0][read], x[1][read]) if read.ndim == 1 and read.max() < channels else _either(x)


def _monotone(function: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Interval]:
    return lambda x: (function(x[0]), function(x[1]))


def _products(a: Interval, b: Interval) -> Interval:
    with np.errstate(invalid='ignore'):
        found = [np.nan_to_num(x * y, nan=0., posinf=np.inf, neginf=-np.inf) for x, y in itertools.product(a, b)]
    return np.minimum.reduce(np.broadcast_arrays(*found)), np.maximum.reduce(np.broadcast_arrays(*found))


def _quotients(a: Interval, b: Interval) -> Interval:
    return _products(a, (1 / b[1], 1 / b[0])) if np.all(b[0] > 0) or np.all(b[1] < 0) else ANYTHING


def _powers(x: Interval, exponent: Interval) -> Interval:
    grows = np.all(x[0] >= 0) and np.all(exponent[0] == exponent[1]) and np.all(exponent[0] >= 0)
    return (x[0] ** exponent[0], x[1] ** exponent[1]) if grows else ANYTHING


def _magnitudes(x: Interval) -> Interval:
    ends = np.abs(x[0]), np.abs(x[1])
    return np.where((x[0] <= 0) & (x[1] >= 0), 0., np.minimum(*ends)), np.maximum(*ends)


def _bent(x: Interval, slope: Interval) -> Interval:
    """PRelu, which multiplies what is negative by a slope, here a positive one."""
    low, high = (np.where(edge < 0, edge * factor, edge) for edge, factor in ((x[0], slope[1]), (x[1], slope[0])))
    return low, high


def _either(*intervals: Interval) -> Interval:
    return min(np.min(low) for low, _ in intervals), max(np.max(high) for _, high in intervals)


RULES: dict[str, Callable[..., Interval]] = {
    **dict.fromkeys(MOVED, lambda x, *rest: _either(x)),
    'Gather': _gathered,
    'GatherND': lambda x, index: _either(x),
    'Concat': _either,
    'Where': lambda condition, a, b: _either(a, b),
    'Clip': lambda x, low=ANYTHING, high=ANYTHING: tuple(np.clip(edge, low[0], high[1]) for edge in x),
    'Min': lambda *xs: tuple(np.minimum.reduce(np.broadcast_arrays(*ends)) for ends in zip(*xs, strict=True)),
    'Max': lambda *xs: tuple(np.maximum.reduce(np.broadcast_arrays(*ends)) for ends in zip(*xs, strict=True)),
    'Relu': _monotone(lambda x: np.maximum(x, 0)),
    'Round': _monotone(np.round),
    'Floor': _monotone(np.floor),
    'Ceil': _monotone(np.ceil),
    'Sqrt': _monotone(lambda x: np.sqrt(np.maximum(x, 0))),
    'Exp': _monotone(np.exp),
    'Sign': _monotone(np.sign),
    'Neg': lambda x: (-x[1], -x[0]),
    'Abs': _magnitudes,
    'Add': lambda a, b: (a[0] + b[0], a[1] + b[1]),
    'Sub': lambda a, b: (a[0] - b[1], a[1] - b[0]),
    'Mul': _products,
    'Div': _quotients,
    'Pow': _powers,
    'PRelu': _bent,
}
