"""What `benchmark` can time: executions of an SFormer, of its source, and of int8 networks of the same shape."""
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..conversion import convert
from ..conversion.changes import network_inside
from ..errors import working_compiler
from ..layers import without_neurons
from .engines import compile_graph, find_engine, openvino_config
from .exported import load_onnx
from .integer import to_integer_
from .onnx import export_onnx, to_onnx
from .quantisers import nncf_graph, plain_int8

__all__ = ['EXECUTIONS', 'SPIKING', 'Execution', 'normalised_images', 'memory_to_run']

Forward = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class Execution:
    """A network that is ready to run.

    Args:
        run: Images to outputs.
        size: Bytes of its file or, in torch, of its parameters and buffers.
        path: The file that an engine reads; None in torch.
        options: What OpenVINO compiles it with.
    """
    run: Forward
    size: int
    path: Path | None = None
    options: dict[str, str | int] | None = None


def normalised_images(num: int, cfg: dict[str, Any], seed: int = 0) -> torch.Tensor:
    """Images (num, C, H, W) of uniform noise, normalised as a preprocessing config says."""
    pixels = torch.rand(num, *cfg['input_size'], generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    return (pixels - mean) / std


def _compiled(network: nn.Module, dtype: torch.dtype = torch.float32) -> Execution:
    compiled = torch.compile(network.to(dtype))

    def run(x: torch.Tensor) -> object:
        with working_compiler('measure openvino or onnxruntime against one another'):
            return compiled(x.to(dtype))
    return Execution(run, sum(tensor.nbytes for tensor in network.state_dict().values()))


def _integer(model: nn.Module, dtype: torch.dtype = torch.float32) -> Execution:
    network = copy.deepcopy(model)
    to_integer_(network)
    return _compiled(network, dtype)


def _exported(model: nn.Module, folder: Path, engine: str, recipe: str | None = None) -> Execution:
    find_engine(engine)  # before the work
    if recipe:  # time does not depend on thresholds, so any images do
        model = convert(network_inside(model), [_noise(model)], recipe=recipe)
    path = folder / 'model.onnx'
    export_onnx(model, path)
    return Execution(load_onnx(path, engine), path.stat().st_size, path)


def _noise(model: nn.Module) -> torch.Tensor:
    return normalised_images(4, resolve_input_data_config(model))


def _compiled_graph(graph: bytes, folder: Path, engine: str, precision: str = 'f32') -> Execution:
    path = folder / 'model.onnx'
    path.write_bytes(graph)
    run = compile_graph(graph, engine, precision=precision)
    return Execution(lambda x: run(x.numpy()), len(graph), path, openvino_config(precision))


def _float_source(model: nn.Module) -> nn.Module:
    return without_neurons(model).eval().float()


def _plain_int8(model: nn.Module, folder: Path, engine: str) -> Execution:
    find_engine(engine)
    return _compiled_graph(plain_int8(_float_source(model), _noise(model)), folder, engine)


def _floating(model: nn.Module, folder: Path, engine: str, precision: str = 'f32') -> Execution:
    find_engine(engine)
    return _compiled_graph(to_onnx(_float_source(model)).SerializeToString(), folder, engine, precision)


def _nncf_int8(model: nn.Module, folder: Path) -> Execution:
    find_engine('openvino')
    graph = nncf_graph(_float_source(model), _noise(model).split(1))
    import openvino
    path = folder / 'model.xml'
    openvino.save_model(graph, path, compress_to_fp16=False)
    run = compile_graph(graph, 'openvino')
    return Execution(lambda x: run(x.numpy()), sum(file.stat().st_size for file in folder.iterdir()), path)


# all but those of openvino and onnxruntime are compiled by torch; each gets an empty folder for its file
EXECUTIONS: dict[str, Callable[[nn.Module, Path], Execution]] = {
    'source:fp32': lambda model, folder: _compiled(without_neurons(model)),
    'source:bf16': lambda model, folder: _compiled(without_neurons(model), torch.bfloat16),
    'simulate': lambda model, folder: _compiled(copy.deepcopy(model)),
    'integer': lambda model, folder: _integer(model),
    'integer:bf16': lambda model, folder: _integer(model, torch.bfloat16),  # what is no spike in bfloat16
    'openvino': lambda model, folder: _exported(model, folder, 'openvino'),
    'onnxruntime': lambda model, folder: _exported(model, folder, 'onnxruntime'),
    'openvino:fast': lambda model, folder: _exported(model, folder, 'openvino', 'fast'),  # its source by that recipe
    'onnxruntime:fast': lambda model, folder: _exported(model, folder, 'onnxruntime', 'fast'),
    'openvino:fp32': lambda model, folder: _floating(model, folder, 'openvino'),
    'openvino:bf16': lambda model, folder: _floating(model, folder, 'openvino', 'bf16'),
    'onnxruntime:fp32': lambda model, folder: _floating(model, folder, 'onnxruntime'),
    'openvino:nncf': _nncf_int8,
    'openvino:int8': lambda model, folder: _plain_int8(model, folder, 'openvino'),
    'onnxruntime:int8': lambda model, folder: _plain_int8(model, folder, 'onnxruntime'),
}
SPIKING = ('simulate', 'integer', 'integer:bf16', 'openvino', 'onnxruntime', 'openvino:fast', 'onnxruntime:fast')

# in a process that has nothing but the engine, as who deploys a graph has
PEAK = '''
import json, re, sys
import numpy
path, engine, shape, options, threads = json.loads(sys.argv[1])
images = numpy.zeros(shape, 'f')
if engine == 'openvino':
    import openvino
    openvino.Core().compile_model(path, 'CPU', options)([images])
else:
    import onnxruntime
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, chosen, providers=['CPUExecutionProvider'])
    session.run(None, {session.get_inputs()[0].name: images})
print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])
'''


def memory_to_run(execution: Execution, engine: str, images: torch.Tensor) -> int | None:
    """Bytes that a process has at most which runs images (B, C, H, W) through a file once, and does nothing else; None
    of what has no file, and where the system does not say so."""
    if execution.path is None or not sys.platform.startswith('linux'):
        return None
    wanted = (str(execution.path), engine, [*images.shape], execution.options or openvino_config(),
              torch.get_num_threads())
    found = subprocess.run([sys.executable, '-c', PEAK, json.dumps(wanted)], capture_output=True, text=True)
    return 1024 * int(found.stdout) if found.returncode == 0 else None
