"""Paired timings of the executions of a model, of its source, and of a plain int8 network of the same shape."""
import copy
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..conversion.record import library_versions
from ..errors import SFormerError, enough_memory, quiet, working_compiler
from ..layers import source_of
from .engines import compile_graph, engine_version, find_engine, load_onnx
from .integer import to_integer_
from .onnx import export_onnx, to_onnx

__all__ = ['EXECUTIONS', 'benchmark']

Forward = Callable[[torch.Tensor], Any]


def _compiled(network: nn.Module, dtype: torch.dtype = torch.float32) -> Forward:
    compiled = torch.compile(network.to(dtype))

    def run(x: torch.Tensor) -> Any:
        with working_compiler('measure openvino or onnxruntime against one another'):
            return compiled(x.to(dtype))
    return run


def _integer(model: nn.Module, dtype: torch.dtype = torch.float32) -> Forward:
    network = copy.deepcopy(model)
    to_integer_(network)
    return _compiled(network, dtype)


def _exported(model: nn.Module, engine: str) -> Forward:
    find_engine(engine)  # before the work
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder, 'model.onnx'))
        return load_onnx(Path(folder, 'model.onnx'), engine)


def _plain_int8(model: nn.Module, engine: str) -> Forward:
    find_engine(engine)
    images = normalised_images(4, resolve_input_data_config(model))
    run = compile_graph(plain_int8(source_of(model).eval().float(), images), engine)
    return lambda x: run(x.numpy())


def plain_int8(network: nn.Module, images: torch.Tensor) -> bytes:
    """A network without neurons as ONNX Runtime's quantiser makes it: symmetric int8, weights per channel, activations
    per tensor, whose ranges are those on some images (B, C, H, W).

    Returns:
        A serialised ONNX model.

    Raises:
        SFormerError: If packages are missing.
    """
    try:
        from onnxruntime import quantization
    except ImportError:
        raise SFormerError("onnxruntime is missing, which quantises: pip install 'sformer[onnx]'.") from None

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{'images': image[None].numpy()} for image in images])

        def get_next(self):
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = f'{folder}/plain.onnx', f'{folder}/int8.onnx'
        Path(plain).write_bytes(to_onnx(network).SerializeToString())
        with quiet('root'):  # which recommends to prepare the graph, as torch's exporter has done
            quantization.quantize_static(
                plain, quantised, Reader(), op_types_to_quantize=['MatMul', 'Gemm', 'Conv'], per_channel=True,
                activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
                extra_options=dict(ActivationSymmetric=True, WeightSymmetric=True))
        return Path(quantised).read_bytes()


EXECUTIONS: Dict[str, Callable[[nn.Module], Forward]] = {
    'source:fp32': lambda model: _compiled(source_of(model)),
    'source:bf16': lambda model: _compiled(source_of(model), torch.bfloat16),
    'simulate': lambda model: _compiled(copy.deepcopy(model)),
    'integer': _integer,
    'integer:bf16': lambda model: _integer(model, torch.bfloat16),  # what is no spike in bfloat16
    'openvino': lambda model: _exported(model, 'openvino'),
    'onnxruntime': lambda model: _exported(model, 'onnxruntime'),
    'openvino:int8': lambda model: _plain_int8(model, 'openvino'),
    'onnxruntime:int8': lambda model: _plain_int8(model, 'onnxruntime'),
}


def normalised_images(num: int, cfg: Dict[str, Any], seed: int = 0) -> torch.Tensor:
    """Images (num, C, H, W) of uniform noise, normalised as a preprocessing config says."""
    pixels = torch.rand(num, *cfg['input_size'], generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    return (pixels - mean) / std


@torch.inference_mode()
def benchmark(
        model: nn.Module,
        executions: Sequence[str] = ('openvino',),
        against: Sequence[str] = ('source:fp32', 'source:bf16'),
        batch_sizes: Iterable[int] = (8,),
        pairs: int = 9,
        warmup: int = 2,
) -> Dict[str, Any]:
    """Time executions of an SFormer on this machine's CPU, each in turn, round after round.

    Ratios are taken within a round, so a machine that drifts slows down both sides.

    Args:
        model: Calibrated SFormer.
        executions: What is measured, names of `EXECUTIONS`. All but `openvino*` and `onnxruntime*` are compiled by
            torch.
        against: What it is compared with, likewise.
        batch_sizes: Images per forward pass.
        pairs: Rounds that count.
        warmup: Rounds that do not.

    Returns:
        `results`, one per batch size and execution: median `seconds` per batch, and per reference the median, smallest
        and largest `speedup` over the rounds; and processor, threads, versions.

    Raises:
        SFormerError: If there is no execution of a name, or its engine is missing.
    """
    names = list(dict.fromkeys([*executions, *against]))
    for name in names:
        if name not in EXECUTIONS:
            raise SFormerError(f'no execution {name!r}: there are {", ".join(EXECUTIONS)}.')
    with torch.inference_mode(False), torch.no_grad():
        runs = {name: EXECUTIONS[name](model) for name in names}
    cfg, results = resolve_input_data_config(model), []
    for batch_size in batch_sizes:
        images = normalised_images(batch_size, cfg)
        rounds: List[Dict[str, float]] = []
        for i in range(warmup + pairs):
            times = {name: _seconds(run, images) for name, run in runs.items()}
            if i >= warmup:
                rounds.append(times)
        for name in names:
            speedups = {
                other: _spread([times[other] / times[name] for times in rounds]) for other in against if other != name}
            results.append(dict(
                execution=name, batch_size=batch_size, seconds=statistics.median(times[name] for times in rounds),
                speedup=speedups))
    return dict(results=results, pairs=pairs, processor=_processor(), threads=torch.get_num_threads(),
                versions=library_versions() | _engine_versions(runs))


def _seconds(run: Forward, images: torch.Tensor) -> float:
    start = time.perf_counter()
    with enough_memory(f'choose fewer than {len(images)} images per batch.'):
        run(images)
    return time.perf_counter() - start


def _spread(ratios: List[float]) -> Dict[str, float]:
    return dict(median=statistics.median(ratios), min=min(ratios), max=max(ratios))


def _engine_versions(runs: Dict[str, Forward]) -> Dict[str, str]:
    engines = {name.partition(':')[0] for name in runs} & {'openvino', 'onnxruntime'}
    return {engine: engine_version(engine) for engine in sorted(engines)}


def _processor() -> str:
    """Name of the processor and what it knows of int8."""
    name, flags = platform.processor() or platform.machine(), ''
    if os.path.exists('/proc/cpuinfo'):
        lines = dict(line.partition(':')[::2] for line in Path('/proc/cpuinfo').read_text().splitlines() if ':' in line)
        about = {key.strip(): value.strip() for key, value in lines.items()}
        name = about.get('model name', name)
        known = set(about.get('flags', '').split()) & {'avx512_vnni', 'avx_vnni', 'avx512_bf16', 'amx_int8', 'amx_bf16'}
        flags = ' '.join(sorted(known))
    return f'{name} ({flags})' if flags else name
