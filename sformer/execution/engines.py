"""Engines that execute ONNX graphs on CPUs: OpenVINO and ONNX Runtime."""
import importlib
import importlib.util
import threading
from typing import Any, Callable, Dict, Optional

import torch

from ..errors import SFormerError, first_line, install_hint

__all__ = [
    'ENGINES', 'find_engine', 'engine_version', 'compile_graph', 'openvino_config',
]

Run = Callable[[Any], Any]  # of an array (B, C, H, W), float32


def openvino_config() -> Dict[str, Any]:
    """Properties that OpenVINO compiles with: where it may, it computes norms in bfloat16, which moves spikes."""
    return dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=torch.get_num_threads())


def _openvino(graph: Any) -> Run:
    import openvino
    core = openvino.Core()
    model = core.read_model(graph) if isinstance(graph, bytes) else graph
    compiled = core.compile_model(model, 'CPU', openvino_config())
    local = threading.local()  # a request serves one thread

    def run(images: Any) -> Any:
        if not hasattr(local, 'request'):
            local.request = compiled.create_infer_request()
        return local.request.infer([images])[0].copy()
    return run


def _onnxruntime(graph: bytes) -> Run:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


ENGINES: Dict[str, Callable[[Any], Run]] = {'openvino': _openvino, 'onnxruntime': _onnxruntime}
EXTRAS = {'openvino': 'openvino', 'onnxruntime': 'onnx'}  # of this package


def find_engine(engine: Optional[str] = None) -> str:
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


def compile_graph(graph: Any, engine: Optional[str] = None) -> Run:
    """Let an engine compile a serialised ONNX model; OpenVINO takes one of its own, too.

    Raises:
        SFormerError: If the engine is missing or too old for the graph.
    """
    name = find_engine(engine)
    try:
        return ENGINES[name](graph)
    except ImportError as e:
        raise SFormerError(f'{name} is installed and does not load ({first_line(e)}): '
                           f'pip install --force-reinstall {name}.') from e
    except Exception as e:  # whatever an engine raises of an operator or a type that it does not know
        raise SFormerError(
            f'{name} {engine_version(name)} cannot run this graph ({first_line(e)}); a newer one may.') from e
