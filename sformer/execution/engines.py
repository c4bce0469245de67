"""Graphs that `export_onnx` wrote, run by OpenVINO or ONNX Runtime behind the interface of a timm classifier."""
import importlib
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Union

import numpy as np
import torch
import torch.nn as nn

from ..errors import SFormerError, first_line
from .onnx import METADATA, graph_hash

__all__ = [
    'ENGINES', 'EngineNetwork', 'load_onnx', 'find_engine', 'engine_version', 'compile_graph', 'openvino_config',
]

Run = Callable[[Any], Any]  # of an array (B, C, H, W), float32


def openvino_config() -> Dict[str, Any]:
    """Properties that OpenVINO compiles with: where it may, it computes norms in bfloat16, which moves spikes."""
    return dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=torch.get_num_threads())


def _openvino(graph: bytes) -> Run:
    import openvino
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), 'CPU', openvino_config())
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


ENGINES: Dict[str, Callable[[bytes], Run]] = {'openvino': _openvino, 'onnxruntime': _onnxruntime}
RECORDED = {'graph_sha256', 'weights_sha256', 'pretrained_cfg', 'input_size', 'num_classes', 'param_count'}
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
    raise SFormerError(f"{engine or 'no engine'} is {'not ' if engine else ''}installed: "
                       f"pip install 'sformer[{EXTRAS[engine or 'openvino']}]'.")


def engine_version(name: str) -> str:
    """Version of an engine that is installed, whichever of its packages (onnxruntime-gpu ...) it is of."""
    return getattr(importlib.import_module(name), '__version__', 'of unknown version')


def compile_graph(graph: bytes, engine: Optional[str] = None) -> Run:
    """Let an engine compile a serialised ONNX model.

    Raises:
        SFormerError: If the engine is missing or too old for the graph.
    """
    name = find_engine(engine)
    try:
        return ENGINES[name](graph)
    except ImportError as e:
        raise SFormerError(f"{name} is installed and does not load ({first_line(e)}): "
                           f"pip install --force-reinstall 'sformer[{EXTRAS[name]}]'.") from e
    except Exception as e:  # whatever an engine raises of an operator or a type that it does not know
        raise SFormerError(
            f'{name} {engine_version(name)} cannot run this graph ({first_line(e)}); a newer one may.') from e


class EngineNetwork(nn.Module):
    """A network that an engine runs on CPUs.

    Args:
        run: Compiled graph.
        about: What `export_onnx` recorded.
        engine: Name of the engine.

    Shape:
        Input (B, C, H, W) of the size of the export, normalised; output (B, classes), float32.
    """

    def __init__(self, run: Run, about: Dict[str, Any], engine: str):
        super().__init__()
        self.run, self.about, self.engine = run, about, engine
        self.num_classes = about['num_classes']
        self.pretrained_cfg = self.default_cfg = dict(about['pretrained_cfg'], input_size=tuple(about['input_size']))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if list(x.shape[1:]) != self.about['input_size']:
            raise SFormerError(f'the graph was exported for images {tuple(self.about["input_size"])}, got '
                               f'{tuple(x.shape[1:])}.')
        images = x.detach().to('cpu', torch.float32).contiguous().numpy()
        # one pass; integers would hide what is no number. By numpy: threads of torch would go on spinning for a while
        if not np.isfinite(images.sum()):
            raise SFormerError('images have NaN or infinity in them.')
        return torch.from_numpy(self.run(images)).to(x.device)

    def set_input_size(self, img_size: Any) -> None:
        raise ValueError(f'the graph was exported for images {tuple(self.about["input_size"])}; export it of a model '
                         f'of that size')

    def describe(self) -> Dict[str, Any]:
        """What results say of it: the engine, and size and `state_hash` of the model that was exported."""
        return dict(engine=f'{self.engine} {engine_version(self.engine)}',
                    param_count=round(self.about['param_count'] / 1e6, 4),
                    exported_of_sha256=self.about['weights_sha256'])

    def get_extra_state(self) -> str:
        return f'{self.engine} {self.about["graph_sha256"]}'  # tells it from others where results are recorded

    def set_extra_state(self, state: str) -> None:
        pass

    def __deepcopy__(self, memo: Any) -> 'EngineNetwork':
        return type(self)(self.run, self.about, self.engine)  # what is compiled is shared

    def extra_repr(self) -> str:
        return f'{self.engine}, input_size={tuple(self.about["input_size"])}, num_classes={self.num_classes}'


def load_onnx(path: Union[str, Path], engine: Optional[str] = None) -> EngineNetwork:
    """Open a graph that `export_onnx` wrote.

    Args:
        path: The file.
        engine: `openvino` or `onnxruntime`; the first one that is installed if None.

    Raises:
        SFormerError: If the file is missing, damaged or of another origin, or the engine is missing or cannot run it.
    """
    path, engine = Path(path), find_engine(engine)
    if not path.is_file():
        raise SFormerError(f'no graph at {path}.')
    try:
        import onnx
    except ImportError:
        raise SFormerError("onnx is missing: pip install 'sformer[onnx]'.") from None
    try:
        model = onnx.load(path)
        recorded = {p.key: p.value for p in model.metadata_props}.get(METADATA)
        about = json.loads(recorded) if recorded else None
    except Exception as e:  # protobuf's own, of which each version has others
        raise SFormerError(f'{path} is damaged, or no ONNX file ({first_line(e)}).') from None
    if isinstance(about, dict) and 'detector' in about:
        raise SFormerError(f'{path} is the graph of a detector, which reads one image: run it with onnxruntime.')
    if not isinstance(about, dict) or not RECORDED <= {*about}:
        raise SFormerError(f'{path} was not written by `sformer export`.')
    if about['graph_sha256'] != graph_hash(model):
        raise SFormerError(f'{path} is not as it was written: its hash differs from its record. Export it again.')
    return EngineNetwork(compile_graph(model.SerializeToString(), engine), about, engine)
