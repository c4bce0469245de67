"""Engines that execute ONNX graphs on CPUs: OpenVINO and ONNX Runtime."""
import importlib
import importlib.util
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import SFormerError, first_line, install_hint, needed_packages

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from openvino import Model, Node

__all__ = [
    'ENGINES', 'find_engine', 'engine_version', 'compile_graph', 'openvino_config', 'unfuse',
]

Run = Callable[[np.ndarray], np.ndarray]  # of images (B, C, H, W), float32


def openvino_config(precision: str = 'f32') -> dict[str, str | int]:
    """Properties that OpenVINO compiles with: where it may, it computes norms in bfloat16, which moves spikes."""
    return dict(INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=torch.get_num_threads())


def _openvino(graph: 'bytes | Model', precision: str = 'f32') -> Run:
    import openvino
    core = openvino.Core()
    model = core.read_model(graph) if isinstance(graph, bytes) else graph
    compiled = core.compile_model(model, 'CPU', openvino_config(precision))
    local = threading.local()  # a request serves one thread

    def run(images: np.ndarray) -> np.ndarray:
        if not hasattr(local, 'request'):
            local.request = compiled.create_infer_request()
        return local.request.infer([images])[0].copy()
    return run


def unfuse(graph: bytes) -> 'Model':
    """An OpenVINO model of a graph that keeps what follows a product of int8 weights out of its kernel, by a minimum
    with a number that nothing exceeds.

    Without VNNI the kernel of OpenVINO (2026.4) applies what is fused with it ten times as slowly as an operation of
    its own does. A residual that is added, and what it gives at the end, stay.
    """
    import openvino
    import openvino.opset13 as operators
    model = openvino.Core().read_model(graph)
    for node in model.get_ordered_ops():
        if node.get_type_name() != 'MatMul' or not _is_int8_constant(node.input_value(1).get_node()):
            continue
        output = node.output(0)
        readers = [reader.get_node() for reader in output.get_target_inputs()]
        if len(readers) == 1 and _adds_constant(readers[0]):
            output = readers[0].output(0)
        targets = [*output.get_target_inputs()]
        if all(target.get_node().get_type_name() not in ('Add', 'Result') for target in targets):
            limited = operators.minimum(output, operators.constant(np.finfo(np.float32).max, np.float32))
            for target in targets:
                target.replace_source_output(limited.output(0))
    model.validate_nodes_and_infer_types()
    return model


def _adds_constant(node: 'Node') -> bool:
    return node.get_type_name() == 'Add' and any(
        value.get_node().get_type_name() == 'Constant' for value in node.input_values())


def _is_int8_constant(node: 'Node') -> bool:
    """Whether an operand is int8 weights times their steps."""
    while node.get_type_name() in ('Multiply', 'Subtract', 'Convert', 'Transpose'):
        node = node.input_value(0).get_node()
    return node.get_type_name() == 'Constant' and node.get_element_type().get_type_name() == 'i8'


def onnxruntime_session(graph: bytes) -> 'InferenceSession':
    """ONNX Runtime with a graph, on the threads of torch."""
    with needed_packages('onnx'):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])


def _onnxruntime(graph: bytes, precision: str = 'f32') -> Run:
    session = onnxruntime_session(graph)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


ENGINES: dict[str, Callable[..., Run]] = {'openvino': _openvino, 'onnxruntime': _onnxruntime}
EXTRAS = {'openvino': 'openvino', 'onnxruntime': 'onnx'}  # of this package


def find_engine(engine: str | None = None) -> str:
    """The engine of a name, or the first one that is installed.

    Raises:
        SFormerError: If there is none of that name, or none is installed.
    """
    if engine is not None and engine not in ENGINES:
        raise SFormerError(f'no engine {engine!r}: there are {", ".join(ENGINES)}.')
    for name in [engine] if engine else ENGINES:
        if importlib.util.find_spec(name) is not None:
            return name
    raise SFormerError(f'{engine or "no engine"} is {"not " if engine else ""}installed: '
                       f'{install_hint(EXTRAS[engine or "openvino"])}.')


def engine_version(name: str) -> str:
    """Version of an engine that is installed, whichever of its packages (onnxruntime-gpu ...) it is of."""
    return getattr(importlib.import_module(name), '__version__', 'of unknown version')


def compile_graph(
        graph: 'bytes | Model',
        engine: str | None = None,
        unfused: bool = False,
        precision: str = 'f32',
) -> Run:
    """Let an engine compile a serialised ONNX model; OpenVINO takes one of its own, too.

    Args:
        graph: The model.
        engine: Its name; the first one that is installed if None.
        unfused: Keep elementwise operations out of OpenVINO's kernels of int8 products, which are faster so without
            VNNI. Values are the same.
        precision: `f32` or, of OpenVINO alone, `bf16`: what floating-point operations compute in.

    Raises:
        SFormerError: If the engine is missing or too old for the graph.
    """
    name = find_engine(engine)
    try:
        unfuses = unfused and name == 'openvino' and isinstance(graph, bytes)
        return ENGINES[name](unfuse(graph) if unfuses else graph, precision)
    except ImportError as e:
        raise SFormerError(f'{name} is installed and does not load ({first_line(e)}): '
                           f'pip install --force-reinstall {name}.') from e
    except Exception as e:  # whatever an engine raises of an operator or a type that it does not know
        raise SFormerError(
            f'{name} {engine_version(name)} cannot run this graph ({first_line(e)}); a newer one may.') from e
