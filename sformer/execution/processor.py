"""What this processor is, and what it and the engines on it gain by integers: measured once per process."""
import functools
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .engines import compile_graph

__all__ = ['processor', 'instruction_set', 'sums_exactly', 'unfuses', 'int8_gain', 'slowdown', 'int8_verdict']

INSTRUCTION_SETS = (
    'amx_int8', 'amx_bf16', 'avx512_vnni', 'avx_vnni', 'avx512_bf16', 'avx512f', 'avx2', 'asimddp', 'i8mm')
LIMITS = ('ONEDNN_MAX_CPU_ISA', 'OV_CPU_MAX_ISA', 'ATEN_CPU_CAPABILITY')  # variables that keep libraries from using all
LITTLE_GAIN = 1.2
ROUNDS = 5


def _cpu_info() -> dict[str, str]:
    path = Path('/proc/cpuinfo')
    pairs = re.findall(r'^([^:\n]+?)\s*: ?(.*)$', path.read_text(), re.MULTILINE) if path.exists() else []
    return dict(pairs)


def processor() -> str:
    """Name of the processor."""
    return _cpu_info().get('model name') or platform.processor() or platform.machine()


def instruction_set() -> str:
    """What this processor knows that matters to products, and what the environment keeps libraries from using of it."""
    info = _cpu_info()
    flags = (info.get('flags') or info.get('Features') or '').split()
    known = ' '.join(name for name in INSTRUCTION_SETS if name in flags) or platform.machine()
    limits = ', '.join(f'{name}={os.environ[name]}' for name in LIMITS if name in os.environ)
    return f'{known}; limited by {limits}' if limits else known


def _best_seconds(run: Callable[[], object]) -> float:
    """Least time of a few calls, the first of which does not count."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _product_graph(weight: np.ndarray, levels: type[np.integer] | None = None) -> bytes:
    """A graph that multiplies `images` (1, rows, columns) by weights (columns, outputs): float32, or bytes of a type
    and int8 weights; in the latter case by one another, too."""
    from onnx import TensorProto, helper, numpy_helper
    given, made = ['images', 'weight'], []
    constants = [numpy_helper.from_array(weight, 'weight')]
    if levels is not None:
        constants += [numpy_helper.from_array(np.array(1, np.float32), 'one'),
                      numpy_helper.from_array(np.array(0, levels), 'zero'),
                      numpy_helper.from_array(np.ones(weight.shape[1], np.float32), 'steps'),
                      numpy_helper.from_array(np.zeros(weight.shape[1], np.int8), 'zeros')]
        made = [helper.make_node('QuantizeLinear', ['images', 'one', 'zero'], ['bytes']),
                helper.make_node('DequantizeLinear', ['bytes', 'one', 'zero'], ['levels']),
                helper.make_node('DequantizeLinear', ['weight', 'steps', 'zeros'], ['weights'], axis=1)]
        given = ['levels', 'weights']
    made.append(helper.make_node('MatMul', given, ['logits']))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        made, 'product', [value('images', TensorProto.FLOAT, [1, None, weight.shape[0]])],
        [value('logits', TensorProto.FLOAT, [1, None, weight.shape[1]])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10).SerializeToString()


@functools.cache
def sums_exactly(engine: str) -> bool:
    """Whether an engine sums products of the largest signed bytes exactly on this processor."""
    run = compile_graph(_product_graph(np.full((64, 16), 127, np.int8), np.int8), engine)
    return bool((run(np.full((1, 16, 64), 127, np.float32)) == 64 * 127 * 127).all())


def unfuses(engine: str) -> bool:
    """Whether an engine is faster here if elementwise operations are kept out of its products (`compile_graph`)."""
    return engine == 'openvino' and not sums_exactly(engine)


@functools.cache
def int8_gain(engine: str) -> float:
    """How many times as fast as in float32 an engine multiplies bytes by int8 weights, in a layer of a ViT-S."""
    images = np.ones((1, 197, 384), np.float32)
    integer = compile_graph(_product_graph(np.ones((384, 1536), np.int8), np.uint8), engine)
    floating = compile_graph(_product_graph(np.ones((384, 1536), np.float32)), engine)
    return _best_seconds(lambda: floating(images)) / _best_seconds(lambda: integer(images))


def int8_verdict(engine: str) -> str:
    """What to expect of integers of an engine on this processor, where that is little; otherwise nothing."""
    gain = int8_gain(engine)
    if gain >= LITTLE_GAIN:
        return ''
    return (f'On this processor ({instruction_set()}) {engine} multiplies int8 {gain:.2f} times as fast as float32, so '
            f'integers gain {"little" if gain > 1 else "nothing"} in time here; on one with VNNI or AMX they do.')


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 torch takes for a product in a dtype on this processor."""
    def seconds(kind: torch.dtype) -> float:
        rows, weight = torch.ones(64, 384, dtype=kind), torch.ones(384, 384, dtype=kind)
        return _best_seconds(lambda: F.linear(rows, weight))
    with torch.inference_mode():
        return seconds(dtype) / seconds(torch.float32)
