"""Paired timings of the executions of a model, of its source, and of int8 networks of the same shape."""
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..conversion.record import library_versions
from ..errors import SFormerError, enough_memory, working_compiler
from ..layers import without_neurons
from .engines import compile_graph, engine_version, find_engine
from .exported import load_onnx
from .integer import to_integer_
from .onnx import export_onnx, to_onnx
from .processor import instruction_set, int8_verdict, processor, slowdown
from .quantisers import nncf_graph, plain_int8

__all__ = ['EXECUTIONS', 'BenchmarkResult', 'benchmark']

Forward = Callable[[torch.Tensor], object]

MAX_SLOWDOWN = 10  # of a dtype over float32, beyond which an execution in it is left out


class Timing(TypedDict):
    """Times of an execution: the median per batch, and the median, smallest and largest speed-up over each other."""
    execution: str
    batch_size: int
    seconds: float
    speedup: dict[str, dict[str, float]]


class BenchmarkResult(TypedDict):
    """What `benchmark` says."""
    results: list[Timing]
    pairs: int
    skipped: dict[str, str]
    verdict: str
    processor: str
    instruction_set: str
    threads: int
    versions: dict[str, str]


def _compiled(network: nn.Module, dtype: torch.dtype = torch.float32) -> Forward:
    compiled = torch.compile(network.to(dtype))

    def run(x: torch.Tensor) -> object:
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
    run = compile_graph(plain_int8(without_neurons(model).eval().float(), images), engine)
    return lambda x: run(x.numpy())


def _float32(model: nn.Module, engine: str) -> Forward:
    find_engine(engine)
    run = compile_graph(to_onnx(without_neurons(model).eval().float()).SerializeToString(), engine)
    return lambda x: run(x.numpy())


def _nncf_int8(model: nn.Module) -> Forward:
    find_engine('openvino')
    images = normalised_images(4, resolve_input_data_config(model))
    run = compile_graph(nncf_graph(without_neurons(model).eval().float(), images.split(1)), 'openvino')
    return lambda x: run(x.numpy())


EXECUTIONS: dict[str, Callable[[nn.Module], Forward]] = {
    'source:fp32': lambda model: _compiled(without_neurons(model)),
    'source:bf16': lambda model: _compiled(without_neurons(model), torch.bfloat16),
    'simulate': lambda model: _compiled(copy.deepcopy(model)),
    'integer': _integer,
    'integer:bf16': lambda model: _integer(model, torch.bfloat16),  # what is no spike in bfloat16
    'openvino': lambda model: _exported(model, 'openvino'),
    'onnxruntime': lambda model: _exported(model, 'onnxruntime'),
    'openvino:fp32': lambda model: _float32(model, 'openvino'),
    'onnxruntime:fp32': lambda model: _float32(model, 'onnxruntime'),
    'openvino:nncf': _nncf_int8,
    'openvino:int8': lambda model: _plain_int8(model, 'openvino'),
    'onnxruntime:int8': lambda model: _plain_int8(model, 'onnxruntime'),
}


def normalised_images(num: int, cfg: dict[str, Any], seed: int = 0) -> torch.Tensor:
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
) -> BenchmarkResult:
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
        and largest `speedup` over the rounds; what was `skipped` and why; a `verdict` where an engine gains little by
        int8 on this processor; and processor, its instruction set, threads, versions.

    Raises:
        SFormerError: If there is no execution of a name, or its engine is missing.
    """
    names = list(dict.fromkeys([*executions, *against]))
    for name in names:
        if name not in EXECUTIONS:
            raise SFormerError(f'no execution {name!r}: there are {", ".join(EXECUTIONS)}.')
    skipped = {name: reason for name in names if (reason := _too_slow(name))}
    names = [name for name in names if name not in skipped]
    if not set(names) & set(executions):
        raise SFormerError(f'nothing is left to measure: {"; ".join(f"{k}: {v}" for k, v in skipped.items())}.')
    with torch.inference_mode(False), torch.no_grad():
        runs = {name: EXECUTIONS[name](model) for name in names}
    cfg = resolve_input_data_config(model)
    results: list[Timing] = []
    for batch_size in batch_sizes:
        images = normalised_images(batch_size, cfg)
        rounds: list[dict[str, float]] = []
        for i in range(warmup + pairs):
            times = {name: _seconds(run, images) for name, run in runs.items()}
            if i >= warmup:
                rounds.append(times)
        for name in names:
            others = [other for other in against if other in runs and other != name]
            speedups = {}
            for other in others:
                speedups[other] = _spread([times[other] / times[name] for times in rounds])
            results.append(Timing(
                execution=name, batch_size=batch_size, seconds=statistics.median(times[name] for times in rounds),
                speedup=speedups))
    versions = _engine_versions(runs)
    return BenchmarkResult(
        results=results, pairs=pairs, skipped=skipped, verdict=' '.join(filter(None, map(int8_verdict, versions))),
        processor=processor(), instruction_set=instruction_set(), threads=torch.get_num_threads(),
        versions=library_versions() | versions)


def _too_slow(name: str) -> str:
    """Why an execution is left out, if it would not end within minutes on this processor."""
    factor = slowdown(torch.bfloat16) if name.endswith(':bf16') else 1.
    if factor < MAX_SLOWDOWN:
        return ''
    return f'bfloat16 products take {factor:.0f} times as long as float32 ones on this processor'


def _seconds(run: Forward, images: torch.Tensor) -> float:
    start = time.perf_counter()
    with enough_memory(f'choose fewer than {len(images)} images per batch.'):
        run(images)
    return time.perf_counter() - start


def _spread(ratios: list[float]) -> dict[str, float]:
    return dict(median=statistics.median(ratios), min=min(ratios), max=max(ratios))


def _engine_versions(runs: dict[str, Forward]) -> dict[str, str]:
    engines = {name.partition(':')[0] for name in runs} & {'openvino', 'onnxruntime'}
    return {engine: engine_version(engine) for engine in sorted(engines)}
