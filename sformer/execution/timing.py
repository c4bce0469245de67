"""Paired timings of the executions of a model, and what they say of the processor at hand."""
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..conversion.record import library_versions
from ..errors import SFormerError, enough_memory
from .engines import ENGINES, engine_version
from .executions import EXECUTIONS, SPIKING, Execution, memory_to_run, normalised_images
from .prepared import slow_neurons
from .processor import instruction_set, int8_gain, int8_verdict, processor, slowdown

__all__ = ['BenchmarkResult', 'Timing', 'benchmark', 'default_executions', 'verdict_of']

MAX_SLOWDOWN = 10  # of a dtype over float32, beyond which an execution in it is left out


class Timing(TypedDict):
    """Figures of an execution.

    Args:
        execution: Its name.
        batch_size: Images per forward pass.
        seconds: Median time of a forward pass.
        p95: Time that 95 of 100 passes do not exceed, of those that were timed [s].
        images_per_second: By the median.
        size: Bytes of the file or, in torch, of parameters and buffers.
        memory: Bytes that a process takes at most which runs the file in its engine; None in torch.
        speedup: Over each other execution, median, smallest and largest.
    """
    execution: str
    batch_size: int
    seconds: float
    p95: float
    images_per_second: float
    size: int
    memory: int | None
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
        against: What it is compared with, likewise. `openvino:bf16` and `source:bf16` are the source in bfloat16,
            `openvino:nncf` is NNCF's int8, `openvino:int8` and `onnxruntime:int8` plain int8.
        batch_sizes: Images per forward pass.
        pairs: Rounds that count.
        warmup: Rounds that do not.

    Returns:
        `results`, one per batch size and execution; what was `skipped` and why; a `verdict` of two sentences: what this
        processor has, and which recipe and engine to take; and processor, its instruction set, threads, versions.

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
    with tempfile.TemporaryDirectory() as folder:
        with torch.inference_mode(False), torch.no_grad():
            runs = {name: EXECUTIONS[name](model, _made(Path(folder, str(i)))) for i, name in enumerate(names)}
        results = _results(model, runs, against, batch_sizes, pairs, warmup)
    versions = _engine_versions(runs)
    return BenchmarkResult(
        results=results, pairs=pairs, skipped=skipped, verdict=verdict_of(model, results, [*versions]),
        processor=processor(), instruction_set=instruction_set(), threads=torch.get_num_threads(),
        versions=library_versions() | versions)


def default_executions(model: nn.Module) -> tuple[list[str], list[str]]:
    """What there is to compare where nothing is named: a model as engines that are here run it, and its source by
    recipe `fast` if that is another; and its source, in floating point and as NNCF quantises it if that is here."""
    engines = [engine for engine in ENGINES if _is_here(engine)]
    if not engines:
        return ['integer'], ['source:fp32']
    executions = [*engines, *(f'{engine}:fast' for engine in engines if slow_neurons(model))]
    against = [f'{engine}:fp32' for engine in engines]
    if 'openvino' in engines:
        against += ['openvino:bf16', *(['openvino:nncf'] if _is_here('nncf') else [])]
    return executions, against


def _is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _results(
        model: nn.Module,
        runs: dict[str, Execution],
        against: Sequence[str],
        batch_sizes: Iterable[int],
        pairs: int,
        warmup: int,
) -> list[Timing]:
    cfg = resolve_input_data_config(model)
    results: list[Timing] = []
    for batch_size in batch_sizes:
        images = normalised_images(batch_size, cfg)
        rounds: list[dict[str, float]] = []
        for i in range(warmup + pairs):
            times = {name: _seconds(run, images) for name, run in runs.items()}
            if i >= warmup:
                rounds.append(times)
        for name, run in runs.items():
            speedups = {}
            for other in against:
                if other in runs and other != name:
                    speedups[other] = _spread([times[other] / times[name] for times in rounds])
            seconds = [times[name] for times in rounds]
            median = statistics.median(seconds)
            results.append(Timing(
                execution=name, batch_size=batch_size, seconds=median, p95=float(np.percentile(seconds, 95)),
                images_per_second=batch_size / median, size=run.size,
                memory=memory_to_run(run, name.partition(':')[0], images), speedup=speedups))
    return results


def verdict_of(model: nn.Module, results: list[Timing], engines: list[str]) -> str:
    """What this processor has, and which recipe and engine to take, by what was measured."""
    gains = [f'{engine} multiplies int8 {int8_gain(engine):.1f} times as fast as float32' for engine in engines]
    has = ' '.join(filter(None, map(int8_verdict, engines))) or (
        f'This processor has {instruction_set()}{": " if gains else ""}{", ".join(gains)}.')
    mine = [row for row in results if row['execution'] in SPIKING]
    if not mine:
        return has
    best = max(mine, key=lambda row: row['images_per_second'])
    others = [row for row in results if row['execution'] not in SPIKING and row['batch_size'] == best['batch_size']]
    engine, _, recipe = best['execution'].partition(':')
    named = getattr(getattr(model, 'conversion', None), 'recipe', None)
    recipe = 'the recipe fast' if recipe == 'fast' else f'the recipe {named}' if named else 'this model as it is'
    figures = f'{best["images_per_second"]:.1f} images per second at batch {best["batch_size"]}'
    rival = max(others, key=lambda row: row['images_per_second'], default=None)
    if rival is None:
        return f'{has} Take {recipe} and {engine}: {figures}.'
    ratio = best['speedup'][rival['execution']]['median']
    figures = f'{figures}, {ratio:.2f} times as fast as {rival["execution"]}'
    if ratio >= 1:
        return f'{has} Take {recipe} and {engine}: {figures}.'
    return (f'{has} Take {rival["execution"]} where nothing but time counts: the fastest SFormer is {recipe} by '
            f'{engine}, {figures}.')


def _too_slow(name: str) -> str:
    """Why an execution is left out, if it would not end within minutes on this processor."""
    factor = slowdown(torch.bfloat16) if name.endswith(':bf16') else 1.
    if factor < MAX_SLOWDOWN:
        return ''
    return f'bfloat16 products take {factor:.0f} times as long as float32 ones on this processor'


def _seconds(execution: Execution, images: torch.Tensor) -> float:
    start = time.perf_counter()
    with enough_memory(f'choose fewer than {len(images)} images per batch.'):
        execution.run(images)
    return time.perf_counter() - start


def _spread(ratios: list[float]) -> dict[str, float]:
    return dict(median=statistics.median(ratios), min=min(ratios), max=max(ratios))


def _engine_versions(runs: dict[str, Execution]) -> dict[str, str]:
    engines = {name.partition(':')[0] for name in runs} & {'openvino', 'onnxruntime'}
    return {engine: engine_version(engine) for engine in sorted(engines)}
