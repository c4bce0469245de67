"""Paired timings: SFormer against its source network, conversion, loading, import; peak memory.

    python scripts/benchmark.py simulate            # eager; --compile for both compiled
    python scripts/benchmark.py convert             # time and peak memory of converting ViT-B
    python scripts/benchmark.py engine              # where OpenVINO spends its time on a ViT-B in integers
    python scripts/benchmark.py load                # pretrained=True with a warm cache
    python scripts/benchmark.py memory              # peak memory of converting eva_giant_patch14_336
    python scripts/benchmark.py inference-memory    # ... of one forward pass of ViT-B at 1024 pixels
    python scripts/benchmark.py import

Runs alternate A B A B ... in one process (import: in fresh ones), and the ratio is taken pair by pair, so a machine
that drifts slows down both sides of a pair.
"""
import collections
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def paired(a: Callable[[], object], b: Callable[[], object], pairs: int, warmup: int = 2) -> None:
    """Print the times of a and b, and the median, smallest and largest ratio a / b over the pairs."""
    def seconds(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    for _ in range(warmup):
        a(), b()
    times = [(seconds(a), seconds(b)) for _ in range(pairs)]
    ratios = [x / y for x, y in times]
    print(f'  {statistics.median(x for x, _ in times):.3f} s against {statistics.median(y for _, y in times):.3f} s: '
          f'ratio {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}, {pairs} pairs)')


@app.command()
def simulate(
        model: str = 'vit_base_patch16_224',
        batch_size: int = 8,
        levels: int = 32,
        pairs: int = 9,
        compile: Annotated[bool, typer.Option('--compile')] = False,
):
    """Forward pass of the simulated SFormer against the source network."""
    import timm

    import sformer
    from sformer.execution.executions import normalised_images
    source = timm.create_model(model).eval()
    images = normalised_images(batch_size, source.pretrained_cfg)
    spiking = sformer.convert(source, [images], sformer.SFNConfig(levels=levels))
    if compile:
        source, spiking = torch.compile(source), torch.compile(spiking)
    print(f'{model}, batch {batch_size}, N = {levels}, {"compiled" if compile else "eager"}, '
          f'{torch.get_num_threads()} threads')
    with torch.inference_mode():
        paired(lambda: spiking(images), lambda: source(images), pairs)


@app.command()
def convert(model: str = 'vit_base_patch16_224', num_images: int = 128, batch_size: int = 16, pairs: int = 1):
    """Conversion of a random model against one plain forward pass over the same images, and its peak memory."""
    import timm

    import sformer
    from sformer.execution.executions import normalised_images
    source = timm.create_model(model).eval()

    def batches():
        for i in range(0, num_images, batch_size):
            yield normalised_images(min(batch_size, num_images - i), source.pretrained_cfg, seed=i)

    def forward():
        with torch.inference_mode():
            for images in batches():
                source(images)

    print(f'{model}, {num_images} images, batch {batch_size}, {torch.get_num_threads()} threads')
    paired(lambda: sformer.convert(source, batches()), forward, pairs, warmup=0)
    print(f'  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB')


@app.command()
def engine(model: str = 'vit_base_patch16_224', batch_size: int = 8, levels: int = 32, token_scale: bool = True,
           attention_fire: str = 'auto', rounds: int = 5, threads: int = 0):
    """Time per kind of operation that OpenVINO executes, of a random model in integers and of the same network without
    neurons in plain int8; and what this machine's int8 products and memory allow at best."""
    import timm

    import sformer
    from sformer.execution.executions import normalised_images
    from sformer.execution.quantisers import plain_int8
    torch.set_num_threads(threads or torch.get_num_threads())
    source = timm.create_model(model).eval()
    images = normalised_images(batch_size, source.pretrained_cfg)
    config = sformer.SFNConfig(levels=levels, token_scale=token_scale, attention_fire=attention_fire)
    spiking = sformer.convert(source, [images], config)
    macs = sum(op.macs for op in sformer.profiling.profile_operations(spiking, [images[:1]])[0]) * batch_size
    with tempfile.TemporaryDirectory() as folder:
        sformer.export_onnx(spiking, f'{folder}/model.onnx')
        columns = profiled([Path(f'{folder}/model.onnx').read_bytes(), plain_int8(source, images[:4])],
                           images.numpy(), rounds)
    print(f'{model}, batch {batch_size}, N = {levels}, {torch.get_num_threads()} threads: '
          f'{sum(columns[0].values()):.1f} ms, plain int8 {sum(columns[1].values()):.1f} ms')
    for kind in sorted({*columns[0], *columns[1]}, key=lambda kind: -columns[0].get(kind, 0)):
        if max(column.get(kind, 0) for column in columns) >= 1:
            print(f'  {columns[0].get(kind, 0):7.1f} {columns[1].get(kind, 0):7.1f}  {kind}')
    rate, bandwidth = int8_rate(rounds), memory_bandwidth(rounds)
    print(f'one int8 product of 2048 x 4096 x 4096: {rate:.0f} GMAC/s; copying memory: {bandwidth:.1f} GB/s\n'
          f'{macs / 1e9:.1f} GMAC of this model: at least {macs / 1e6 / rate:.1f} ms')


def profiled(graphs: list[bytes], images: Any, rounds: int) -> list[dict[str, float]]:
    """Milliseconds per kind of operation of each graph, run in turn: medians."""
    import openvino

    from sformer.execution.engines import openvino_config, unfuse
    from sformer.execution.processor import unfuses
    core = openvino.Core()
    read = unfuse if unfuses('openvino') else core.read_model  # as `load_onnx` opens graphs here
    requests = [core.compile_model(read(graph), 'CPU', dict(openvino_config(), PERF_COUNT=True))
                .create_infer_request() for graph in graphs]
    times: list[dict[str, list[float]]] = [collections.defaultdict(list) for _ in requests]
    for i in range(rounds + 1):
        for request, found in zip(requests, times, strict=True):
            request.infer([images])
            sums = collections.Counter()
            for info in request.get_profiling_info():
                sums[f'{info.node_type} ({info.exec_type})'] += info.real_time.total_seconds() * 1e3
            for kind, milliseconds in sums.items() if i else ():
                found[kind].append(milliseconds)
    return [{kind: statistics.median(values) for kind, values in found.items()} for found in times]


def int8_rate(rounds: int) -> float:
    """GMAC/s of one large int8 product in OpenVINO, the best of some rounds."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper
    rows, width = 2048, 4096
    one, zero = np.ones((), np.float32), np.zeros((), np.int8)
    weight = np.random.default_rng(0).integers(-127, 128, (width, width), np.int8)
    nodes = [helper.make_node('QuantizeLinear', ['x', 'one', 'zero'], ['k']),
             helper.make_node('DequantizeLinear', ['k', 'one', 'zero'], ['levels']),
             helper.make_node('DequantizeLinear', ['w', 'one', 'zero'], ['weight']),
             helper.make_node('MatMul', ['levels', 'weight'], ['y'])]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, width]) for name in ('x', 'y')]
    constants = [numpy_helper.from_array(np.asarray(value), name)
                 for name, value in dict(one=one, zero=zero, w=weight).items()]
    graph = helper.make_graph(nodes, 'product', values[:1], values[1:], constants)
    serialised = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=9)
    best = min(sum(times.values()) for times in (
        {kind: ms for kind, ms in found.items() if kind.startswith('FullyConnected')}
        for _ in range(rounds) for found in profiled([serialised.SerializeToString()], np.ones((rows, width), 'f'), 1)))
    return rows * width * width / best / 1e6


def memory_bandwidth(rounds: int) -> float:
    """GB/s read and written by copying 512 MiB, the best of some rounds."""
    source = torch.ones(2 ** 27)
    target, best = torch.empty_like(source), float('inf')
    for _ in range(rounds + 1):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best / 1e9


@app.command()
def load(model: str = 'sformer_base', pairs: int = 7):
    """`pretrained=True` of a zoo entry with a warm cache against that of its source (random weights as published)."""
    import huggingface_hub
    import timm
    from safetensors.torch import save_file

    from sformer.models.zoo import source_name
    from sformer.saving import pretrained
    source = source_name(model)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    pretrained.RECIPE['num_images'] = 4  # the neurons are as many, whatever they were fitted to
    with tempfile.TemporaryDirectory() as cache:
        repo = Path(cache, f'models--timm--{source}')
        snapshot = repo / 'snapshots' / ('0' * 40)
        snapshot.mkdir(parents=True)
        (repo / 'refs').mkdir()
        (repo / 'refs' / 'main').write_text(snapshot.name)
        save_file(timm.create_model(source).state_dict(), snapshot / 'model.safetensors')
        print(f'{model} against {source}, pretrained, warm cache')
        paired(lambda: timm.create_model(model, pretrained=True, cache_dir=cache),
               lambda: timm.create_model(source, pretrained=True, cache_dir=cache), pairs)


@app.command()
def memory(model: str = 'eva_giant_patch14_336', num_images: int = 16, batch_size: int = 2):
    """Peak memory (Linux) of `sformer convert` from safetensors to safetensors, random weights, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        def peaks(*command):
            """GiB resident, GiB of it that no file backs, seconds."""
            start, anonymous = time.perf_counter(), 0
            process = subprocess.Popen(command)
            while (done := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                status = Path(f'/proc/{process.pid}/status').read_text()
                anonymous = max([anonymous, *map(int, re.findall(r'RssAnon:\s*(\d+)', status))])
                time.sleep(0.05)
            if done[1]:
                raise SystemExit(f'{command[0]} failed')
            return done[2].ru_maxrss / 2 ** 20, anonymous / 2 ** 20, time.perf_counter() - start

        code = (f"import timm; from safetensors.torch import save_file; "
                f"save_file(timm.create_model('{model}').state_dict(), '{folder}/source.safetensors')")
        peaks(sys.executable, '-c', code)
        gib, anonymous, seconds = peaks(
            sys.executable, '-m', 'sformer', 'convert', model, '--checkpoint', f'{folder}/source.safetensors',
            '--num-images', str(num_images), '--batch-size', str(batch_size), '-o', f'{folder}/out')
        size = os.path.getsize(f'{folder}/source.safetensors') / 2 ** 30
        print(f'{model}, {num_images} images, batch {batch_size}: peak {gib:.2f} GiB, without mapped files '
              f'{anonymous:.2f} GiB, with weights of {size:.2f} GiB, {seconds:.0f} s')


@app.command('inference-memory')
def inference_memory(model: str = 'vit_base_patch16_224', image_size: int = 1024, batch_size: int = 1):
    """Peak memory of one forward pass in eager mode, of the source and of the SFormer, each in its own process."""
    code = f"""
import resource, timm, torch, sformer
network = timm.create_model('{model}', img_size={image_size}, num_classes=0).eval()
if SPIKING:
    sformer.spiking_(network)
with torch.inference_mode():
    network(torch.rand({batch_size}, 3, {image_size}, {image_size}))
print(f'{{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f}}')
"""
    for name in ('source', 'SFormer'):
        arguments = [sys.executable, '-c', code.replace('SPIKING', str(name == 'SFormer'))]
        out = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        print(f'{name} of {model}, {image_size} pixels, batch {batch_size}: peak {out.strip()} GiB')


@app.command('import')
def import_(pairs: int = 7):
    """`import sformer` against `import timm`, each in a fresh process."""
    def run(name):
        return lambda: subprocess.run([sys.executable, '-c', f'import {name}'], check=True)
    paired(run('sformer'), run('timm'), pairs)


if __name__ == '__main__':
    app()
