"""What `sformer evaluate` promises at scale, checked and measured on this machine.

    python scripts/check_evaluation.py counts       # any number of processes, samples, batch size, shards: same counts
    python scripts/check_evaluation.py nodes        # two torchrun agents on the loopback interface
    python scripts/check_evaluation.py kill         # SIGKILL at random moments, then --resume
    python scripts/check_evaluation.py loading      # share of decoding and preprocessing, ViT-S
    python scripts/check_evaluation.py overhead     # 2 processes x 1 thread against 1 process x 2 threads
    python scripts/check_evaluation.py detector DIR --data COCO    # a detector: other processes, killed and resumed

Images are the digits of scikit-learn with noise, or generated ones; nothing is downloaded. A check that fails ends
with exit code 1. All processes but those of `nodes` are forked from one that has imported torch already, so what is
timed is evaluation.
"""
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

FORKS = multiprocessing.get_context('forkserver')
NANO = 'sformer_nano.digits'
# what may differ between runs that count the same
VOLATILE = {
    'seconds', 'source_seconds', 'images_per_second', 'decode_seconds', 'preprocess_seconds', 'wall_seconds',
    'wait_seconds', 'peak_memory_mib', 'peak_device_memory_mib', 'world_size', 'workers', 'command'}
COUNTS = ('num_images', 'top1', 'top5', 'source_top1', 'source_top5', 'agreement')


# Processes -----------------------------------------------------------------------------------------------------------


def be_rank(args: list[str], env: dict[str, str], folder: str, threads: int) -> None:
    """Be `sformer ARGS` on one rank."""
    import torch

    from sformer import cli
    torch.set_num_threads(threads)
    multiprocessing.set_start_method('fork', force=True)  # for loader workers, as in a process that was not forked
    os.environ.update(env)
    for fd, name in ((1, 'out'), (2, 'err')):
        path = os.path.join(folder, f'{name}{env.get("RANK", 0)}')
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.argv = ['sformer', *args]
    cli.main()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(args: list[str], world: int, folder: Path, threads: int = 1) -> list[Any]:
    """Start `sformer ARGS` on so many processes, as torchrun would, and serve their store as its agent does."""
    from torch.distributed import TCPStore
    FORKS.set_forkserver_preload(['sformer.cli.app', 'sformer.evaluation', 'datasets', 'accelerate'])
    store, processes = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False), []
    for rank in range(world):
        env = {} if world == 1 else dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(store.port), OMP_NUM_THREADS=str(threads), TORCHELASTIC_USE_AGENT_STORE='True')
        process = FORKS.Process(target=be_rank, args=([str(a) for a in args], env, str(folder), threads))
        process.start()
        process.store = store  # lives as long
        processes.append(process)
    return processes


def finish(processes: list[Any], timeout: float = 3600) -> list[int]:
    """Exit codes, by rank; processes that are late are killed."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def evaluate(folder: Path, world: int, *options: Any, threads: int = 1, command: str = 'evaluate') -> dict[str, Any]:
    """Result of `sformer evaluate OPTIONS` on so many processes."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        file = Path(name, 'result.json')
        codes = finish(start([command, *options, '--results-file', file], world, Path(name), threads))
        if any(codes):
            sys.exit('\n'.join([f'exit codes {codes} of {options}', *(p.read_text() for p in Path(name).glob('err*'))]))
        return json.loads(file.read_text())


def differing(result: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Fields that are not as expected, of those that must not depend on the processes that made a result."""
    return [key for key in expected if key not in VOLATILE and result.get(key) != expected[key]]


# Data ----------------------------------------------------------------------------------------------------------------


def encode(pixels: Any, kind: str, **options: Any) -> dict[str, Any]:
    """An image (H, W) or (H, W, 3), uint8, as a data set holds it."""
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return {'bytes': buffer.getvalue(), 'path': None}


def write_parquet(path: Path, split: str, shards: int, kind: Any, images: list[Any], labels: list[int]) -> Path:
    """A parquet folder of images and labels, in so many files."""
    import datasets
    datasets.disable_progress_bars()
    features = datasets.Features(dict(image=datasets.Image(), label=kind))
    table = datasets.Dataset.from_dict(dict(image=images, label=labels), features=features)
    path.mkdir()
    for i in range(shards):
        table.shard(shards, i).to_parquet(path / f'{split}-{i:05d}-of-{shards:05d}.parquet')
    return path


def write_digits(folder: Path, samples: int, shards: int) -> Path:
    """A parquet folder of noisy digits, in so many files (a sample each at least)."""
    import datasets
    import numpy as np

    from sformer.data.origins import Digits
    rng, digits = np.random.default_rng(0), Digits('train')
    images, labels = [], []
    for index in np.arange(samples) % digits.num_images:
        pixels = digits.images[index] + rng.normal(0, 110, (8, 8))  # so much that a third is missed
        images.append(encode(np.clip(pixels, 0, 255).astype(np.uint8), 'png'))
        labels.append(int(digits.labels[index]))
    return write_parquet(folder / f'digits-{samples}-{shards}', 'test', min(shards, samples),
                         datasets.ClassLabel(names=[str(i) for i in range(10)]), images, labels)


def write_photos(folder: Path, samples: int, size: tuple[int, int] = (375, 500)) -> Path:
    """A parquet folder of generated JPEG images of the usual size of ImageNet's, with labels from 0 to 999."""
    import datasets

    from sformer.data import dead_leaves
    images = [encode(pixels, 'jpeg', quality=90) for pixels in dead_leaves(samples, (3, *size))]
    labels = [i % 1000 for i in range(samples)]
    return write_parquet(folder / 'photos', 'validation', 1, datasets.Value('int64'), images, labels)


def convert_untrained(folder: Path, source: str) -> Path:
    """An SFormer of an architecture with random weights: for timings."""
    import timm
    import torch

    import sformer
    torch.manual_seed(0)
    return sformer.save_model(sformer.convert(timm.create_model(source), num_images=16), folder / source)


# Checks --------------------------------------------------------------------------------------------------------------


def integers(text: str) -> list[int]:
    return [int(x) for x in text.split(',')]


def report(failures: list[str], what: str) -> None:
    for failure in failures:
        print(f'FAILED: {failure}')
    print(f'{what}: {len(failures)} failures')
    sys.exit(1 if failures else 0)


def check_counts(
        folder: Path, worlds: list[int], samples: list[int], batch_sizes: list[int], shards: list[int],
) -> tuple[int, list[str]]:
    """Evaluate in all combinations; returns their number, and what differs."""
    failures, runs = [], 0
    for n in samples:
        sets = {k: write_digits(folder, n, k) for k in shards if k <= n or k == min(shards)}
        ways = {f'streamed from {k} shards': [path, '--streaming'] for k, path in sets.items()}
        ways['local'] = [sets[min(sets)]]  # in memory there are no shards
        counts = {}
        for batch_size, (way, data) in itertools.product(batch_sizes, ways.items()):
            expected, setting = None, f'{n} samples, batch {batch_size}, {way}'
            for world in worlds:
                begin = time.perf_counter()
                result = evaluate(folder, world, NANO, '--dataset', *data, '--batch-size', batch_size,
                                  '--num-processes', world)
                runs += 1
                found = {key: result[key] for key in COUNTS}
                print(f'{setting}, {world} processes, {time.perf_counter() - begin:.1f} s: '
                      + ' '.join(f'{value:g}' for value in found.values()), flush=True)
                if expected is None:
                    expected = result
                    counts[setting] = found
                different = differing(result, expected)
                if different or result['num_images'] != n:
                    failures.append(f'{setting}, {world} processes: {different} differ from those of one')
        if len({json.dumps(c) for c in counts.values()}) > 1:
            failures.append(f'{n} samples: counts differ with batch size or shards: {counts}')
    return runs, failures


@app.command()
def counts(
        worlds: Annotated[str, typer.Option(help='Numbers of processes')] = '1,2,3,4',
        samples: Annotated[str, typer.Option()] = '1,7,103,10000',
        batch_sizes: Annotated[str, typer.Option()] = '1,8,64',
        shards: Annotated[str, typer.Option(help='Numbers of shards')] = '3,12',
):
    """Counts of N processes against those of one: every field of the result but timings has to be the same."""
    with tempfile.TemporaryDirectory() as name:
        runs, failures = check_counts(
            Path(name), integers(worlds), integers(samples), integers(batch_sizes), integers(shards))
    report(failures, f'{runs} evaluations')


@app.command()
def nodes(samples: int = 540, nproc: Annotated[int, typer.Option(help='Processes per node')] = 1):
    """Two torchrun agents that meet on the loopback interface, against one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_digits(folder, samples, 2)
        expected = evaluate(folder, 1, NANO, '--dataset', path)
        port, agents = free_port(), []
        for node in range(2):
            (folder / str(node)).mkdir()
            agents.append(subprocess.Popen(
                [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--nproc-per-node', str(nproc),
                 '--node-rank', str(node), '--rdzv-backend', 'c10d', '--rdzv-id', 'check',
                 '--rdzv-endpoint', f'127.0.0.1:{port}', '-m', 'sformer', 'evaluate', NANO, '--dataset', str(path),
                 '--num-processes', str(2 * nproc), '--results-file', 'result.json'],
                cwd=folder / str(node), env=dict(os.environ, OMP_NUM_THREADS='1'),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        output = [agent.communicate(timeout=600)[0] for agent in agents]
        if any(agent.returncode for agent in agents):
            sys.exit('\n'.join(output))
        files = list(folder.glob('*/result.json'))
        result = json.loads(files[0].read_text())
    failures = [f'{key}: {result.get(key)} instead of {expected[key]}' for key in differing(result, expected)]
    failures += [f'{len(files)} results files'] * (len(files) != 1)
    failures += [f'world_size {result["world_size"]}'] * (result['world_size'] != 2 * nproc)
    report(failures, f'2 nodes x {nproc} processes, {samples} samples')


def check_kill(folder: Path, times: int, samples: int, worlds: list[int], seed: int) -> tuple[int, list[str]]:
    """Kill runs at random moments and resume them; returns how many had counted something, and what differs."""
    rng = random.Random(seed)
    path = write_digits(folder, samples, 3)
    failures, resumed, kills, i = [], 0, 0, 0
    ways, expected, duration = ((), ('--streaming',)), {}, {}
    for way in ways:
        begin = time.perf_counter()
        expected[way] = evaluate(folder, 1, NANO, '--dataset', path, *way)
        duration[way] = time.perf_counter() - begin
    while kills < times and i < 4 * times:
        i += 1
        way = ways[i % 2]
        args, numbers = ['evaluate', NANO, '--dataset', path, *way], (rng.choice(worlds), rng.choice(worlds))
        moment = rng.uniform(0.1, 1.) * duration[way]
        after, problem = kill_and_resume(args, numbers, moment, folder / f'run{i}', expected[way])
        if after is not None:
            kills, resumed = kills + 1, resumed + (after > 0)
            failures += [f'run {i}: {problem}'] if problem else []
    return resumed, failures


def kill_and_resume(
        args: list[Any], worlds: tuple[int, int], moment: float, folder: Path, expected: dict[str, Any],
) -> tuple[Optional[int], str]:
    """SIGKILL to all processes of `sformer ARGS` after so many seconds, then --resume on another number of them.

    Returns images that the resumed run did not count again, None if the run was over before; what is not as expected.
    """
    folder.mkdir()
    args = [*args, '--results-file', folder / 'result.json', '--resume']
    processes = start(args, worlds[0], folder)
    time.sleep(moment)
    for process in processes:
        process.kill()
    if -signal.SIGKILL not in finish(processes):
        return None, ''
    codes = finish(start(args, worlds[1], folder))
    error = (folder / 'err0').read_text()
    after = int((re.search(r'resuming after (\d+)', error) or [0, 0])[1])
    print(f'{" ".join(map(str, args[1:-3]))}, {worlds[0]} processes, killed after {moment:.2f} s; {worlds[1]} resumed '
          f'after {after} images', flush=True)
    if any(codes):
        return after, f'exit codes {codes}: {error}'
    different = differing(json.loads((folder / 'result.json').read_text()), expected)
    left = (folder / 'result.json.progress').exists()
    return after, f'{different} differ' if different else 'progress is left behind' * left


@app.command()
def kill(times: int = 20, samples: int = 4000, worlds: str = '1,2,3', seed: int = 0):
    """SIGKILL to all processes at a random moment, then --resume, perhaps on another number of processes."""
    with tempfile.TemporaryDirectory() as name:
        resumed, failures = check_kill(Path(name), times, samples, integers(worlds), seed)
    if not resumed:
        failures.append('no run was killed after it had counted something')
    report(failures, f'{times} runs killed, {resumed} of them with progress')


@app.command()
def detector(
        model: Annotated[Path, typer.Argument(help='Folder of a detector')],
        data: Annotated[Path, typer.Option(help='Folder in COCO format')],
        split: str = 'val',
        num_images: Annotated[Optional[int], typer.Option(help='The first so many; all if not given')] = None,
        worlds: Annotated[str, typer.Option(help='Numbers of processes')] = '1,2,3',
        source: Annotated[bool, typer.Option('--source', help='Evaluate the source, too')] = False,
):
    """COCO figures of N processes, and of a run that was killed midway and resumed, against those of the first."""
    options = [model, '--dataset', data, '--split', split, *([] if source else ['--no-source'])]
    options += ['--num-images', num_images] if num_images else []
    failures, expected, duration, numbers = [], {}, 0., integers(worlds)
    with tempfile.TemporaryDirectory() as name:
        for world in numbers:
            begin = time.perf_counter()
            result = evaluate(Path(name), world, *options)
            duration = time.perf_counter() - begin
            print(f'{world} processes, {duration:.0f} s, {result["num_images"]} images: '
                  + ', '.join(f'{key} {result["boxes"][key]}' for key in ('mAP', 'mAP50', 'mAP75')), flush=True)
            expected = expected or result
            different = differing(result, expected)
            failures += [f'{world} processes: {different} differ from those of {numbers[0]}'] if different else []
        after, problem = kill_and_resume(
            ['evaluate', *options], (numbers[-1], numbers[0]), duration / 2, Path(name, 'killed'), expected)
        failures += [f'killed: {problem}'] if problem else []
        failures += [] if after else ['the run that was to be killed had counted nothing, or all']
    report(failures, f'{len(numbers)} evaluations and one that was killed')


@app.command()
def loading(
        source: str = 'vit_small_patch16_224',
        samples: int = 128,
        batch_size: int = 16,
        threads: int = 2,
        dataset: Annotated[Optional[Path], typer.Option(help='Images, instead of generated ones of 375x500')] = None,
):
    """Share of decoding and preprocessing in the work, and how much of it loader workers hide."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, extra = (dataset, ['--num-images', samples]) if dataset else (write_photos(folder, samples), [])
        model = convert_untrained(folder, source)
        for options, what in ((['--no-source'], 'SFormer'), ([], 'SFormer and source')):
            for workers in (0, 1, 2):
                r = evaluate(folder, 1, model, '--dataset', path, '--batch-size', batch_size, '--workers', workers,
                             *extra, *options, threads=threads)
                work = r['decode_seconds'] + r['preprocess_seconds']
                compute = r['seconds'] + r.get('source_seconds', 0.)
                print(f'{what}, {workers} workers, {threads} threads: wall {r["wall_seconds"]:.1f} s, networks '
                      f'{compute:.1f} s, decoding {r["decode_seconds"]:.1f} s + preprocessing '
                      f'{r["preprocess_seconds"]:.1f} s = {100 * work / (work + compute):.1f} % of the work, '
                      f'waited {r["wait_seconds"]:.1f} s', flush=True)


@app.command()
def overhead(
        source: str = 'vit_tiny_patch16_224',
        samples: int = 512,
        batch_size: int = 16,
        pairs: int = 5,
):
    """2 processes x 1 thread against 1 process x 2 threads, in pairs of runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, model = write_photos(folder, samples, (256, 256)), convert_untrained(folder, source)
        options = [model, '--dataset', path, '--batch-size', batch_size]
        ratios: dict[str, list[float]] = dict(command=[], loop=[])
        for pair in range(pairs + 1):
            seconds = []
            for world, threads in ((2, 1), (1, 2)):
                begin = time.perf_counter()
                result = evaluate(folder, world, *options, threads=threads)
                seconds.append((time.perf_counter() - begin, result['wall_seconds']))
            if pair:  # the first one warms up
                ratios['command'].append(seconds[0][0] / seconds[1][0])
                ratios['loop'].append(seconds[0][1] / seconds[1][1])
                print(f'2 x 1: {seconds[0][0]:.1f} s ({seconds[0][1]:.1f} s in the loop), 1 x 2: '
                      f'{seconds[1][0]:.1f} s ({seconds[1][1]:.1f} s)', flush=True)
    for what, values in ratios.items():
        print(f'{what}: ratio {statistics.median(values):.3f} (min {min(values):.3f}, max {max(values):.3f})')
    report(['more than 1.15 times as long'] * (statistics.median(ratios['command']) > 1.15), f'{pairs} pairs')


if __name__ == '__main__':
    app()
