"""An SFormer beside networks of several timesteps and quantised networks: same source, same images, one table.

    python scripts/baselines.py sformer_micro.cifar10 --images data/cifar10 -o baselines.json
    python scripts/baselines.py sformer_micro.cifar10 --images data/cifar10 -o baselines.json --timings
    python scripts/baselines.py vit_small_saliency.safetensors --images photos/ --num-images 128 --num-test 48 \\
        -o baselines.json

A network is one of the package or any SFormer with weights, whose source is taken, or the source that
`scripts/saliency_source.py` built. Rows are written as they come; a second call measures what is missing. With
`--timings` it times instead, each row and the source in turn, so run that alone on the machine. `sformer.baselines`
says what each row is, docs/baselines.md what came out.
"""
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import timm
import torch
import torch.nn as nn
import typer
from fidelity import split_images
from saliency_source import load_source, relative_error
from timm.data import resolve_input_data_config

import sformer
from sformer import baselines
from sformer.baselines.toolkits import openvino_float
from sformer.cli.tables import print_table
from sformer.conversion.record import library_versions
from sformer.data import open_images
from sformer.files import state_hash, write_json
from sformer.layers import named_neurons
from sformer.neurons import CODINGS, ScaleAndFire, SFNConfig
from sformer.profiling import energy, profile_model

BATCH_SIZE = 32
PROFILED = 32  # images whose spikes are counted
Run = Callable[[torch.Tensor], torch.Tensor]
Batches = list[torch.Tensor]


@dataclasses.dataclass
class Built:
    """A row.

    Args:
        run: Images to outputs.
        coding: By which the account charges it; `quantised` where it fires nothing, empty where that is not known.
        model: Network of one timestep, whose operations are counted.
        steps: Network of several timesteps that was made of it.
        engine: What runs it.
        equal_to: Layer-synchronous network that is to fire the same.
    """
    run: Run
    coding: str = ''
    model: Optional[nn.Module] = None
    steps: Optional[baselines.MultiStep] = None
    engine: str = 'torch'
    equal_to: Optional[baselines.MultiStep] = None


def step_by_step(source: nn.Module, batches: Batches, steps: int, signed: bool) -> Built:
    network, model = baselines.integrate_and_fire_network(source, batches, steps, signed=signed)
    return Built(network, 'unary', model, network)


def synchronous(source: nn.Module, batches: Batches, steps: int) -> Built:
    network, model = baselines.integrate_and_fire_network(source, batches, steps, synchronous=True)
    return Built(model, 'unary', model, equal_to=network)


def multi_threshold(source: nn.Module, batches: Batches, steps: int) -> Built:
    network, model = baselines.multi_threshold_network(source, batches, steps)
    return Built(network, 'binary', model, network)


def scale_and_fire(source: nn.Module, batches: Batches, levels: int) -> Built:
    model = sformer.convert(source, batches, SFNConfig(levels=levels))
    return Built(model, 'graded', model)


def scale_and_fire_openvino(source: nn.Module, batches: Batches, levels: int) -> Built:
    model = sformer.convert(source, batches, SFNConfig(levels=levels))
    with tempfile.TemporaryDirectory() as folder:
        sformer.export_onnx(model, Path(folder, 'model.onnx'), batches)
        return Built(sformer.load_onnx(Path(folder, 'model.onnx'), 'openvino'), engine='openvino')


def twin(source: nn.Module, batches: Batches, levels: int) -> Built:
    model = baselines.quantised_twin(source, batches, levels)
    return Built(model, 'quantised', model)


def quantised(source: nn.Module, batches: Batches, activation: int, weight: Optional[int]) -> Built:
    model = baselines.quantised(source, batches, activation, weight)
    return Built(model, 'quantised' if weight == 8 else '', model)


TIMESTEPS = (1, 2, 4, 8, 16, 32)
ROWS: dict[str, Callable[[nn.Module, Batches], Built]] = {
    'source': lambda source, batches: Built(source),
    # 7, 15 and 63 are all levels that 4, 5 and 7 bits have, as the twins of 4, 8 and 32 use them
    **{f'SFN, N = {n}': functools.partial(scale_and_fire, levels=n) for n in (4, 7, 8, 15, 32, 63)},
    **{f'twin of N = {n}: A{baselines.twin_bits(n)}, a step per channel': functools.partial(twin, levels=n)
       for n in (4, 8, 32)},
    **{f'W{w or 32}A{a}': functools.partial(quantised, activation=a, weight=w)
       for w, a in ((8, 8), (None, 6), (6, 6), (4, 4))},
    'W8A8, NNCF': lambda source, batches: Built(baselines.nncf_int8(source, batches), engine='openvino'),
    'SFN, N = 32, int8 weights': functools.partial(scale_and_fire_openvino, levels=32),
    'W8A8, torchao (linear layers)': lambda source, batches: Built(baselines.torchao_int8(source)),
    **{f'multi-threshold (ECMT), T = {t}': functools.partial(multi_threshold, steps=t) for t in (1, 4, 8)},
    **{f'IF layer-synchronous = MTN, T = {t}': functools.partial(synchronous, steps=t) for t in TIMESTEPS},
    **{f'IF step by step, T = {t}': functools.partial(step_by_step, steps=t, signed=False) for t in TIMESTEPS},
    **{f'signed IF step by step, T = {t}': functools.partial(step_by_step, steps=t, signed=True) for t in (4, 8, 16)},
}


def open_network(name: str) -> nn.Module:
    """Source network, which gives logits or, without a classifier, all tokens."""
    network: Any = load_source(Path(name)) if name.endswith('.safetensors') else sformer.source_of(
        timm.create_model(name, pretrained=True))
    if not network.num_classes:
        network.reset_classifier(0, '')
    return network.eval()


def open_both(source: Any, images: str, num_images: int, num_test: int, seed: int) -> tuple[Batches, Any, Any]:
    """Batches to calibrate with, test images and their labels; None without a classifier."""
    if not source.num_classes:
        test, others, _ = split_images(source, images, None, num_test, num_images, seed)
        return list(others.split(BATCH_SIZE)), test, None
    cfg = resolve_input_data_config(source)
    train, test = (open_images(images, split, data_config=cfg, num_images=n, seed=seed)
                   for split, n in (('train', num_images), ('test', num_test)))
    pixels, labels = (torch.cat(part) for part in zip(*test.batches(BATCH_SIZE), strict=True))
    return [batch for batch, _ in train.batches(BATCH_SIZE)], pixels, labels


@torch.no_grad()
def outputs(run: Run, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([run(batch) for batch in images.split(BATCH_SIZE)])


def measure(built: Built, images: torch.Tensor, labels: Any, expected: torch.Tensor) -> dict[str, Any]:
    """Figures of a row but for its time."""
    actual = outputs(built.run, images)
    result: dict[str, Any] = dict(error=relative_error(expected, actual))
    if labels is not None:
        right, agree = actual.argmax(1) == labels, actual.argmax(1) == expected.argmax(1)
        source = expected.argmax(1) == labels
        # a drop is a difference of pairs: its standard error
        spread = (source.float() - right.float()).std().item() * len(labels) ** -0.5
        result |= dict(top1=100 * right.float().mean().item(), agreement=100 * agree.float().mean().item(),
                       drop=100 * (source.sum() - right.sum()).item() / len(labels), drop_error=100 * spread)
    if built.equal_to is not None:
        result['unequal'] = unequal(built.model, built.equal_to, images[:PROFILED])
    if built.model is not None:
        result |= cost(built, images[:PROFILED])
    return result


@torch.no_grad()
def unequal(model: Any, network: baselines.MultiStep, images: torch.Tensor) -> float:
    """Share of neurons that fire another level than integrate-and-fire over T timesteps on the same current. Rounding
    of floats on a threshold is the only reason; what one such spike makes of later layers is not counted."""
    others, counts = dict(named_neurons(network.network)), torch.zeros(2)

    def compare(neuron: Any, args: Any, out: torch.Tensor, name: str) -> None:
        differs = (out - others[name](*args)).abs() > neuron.step / 2
        counts.add_(torch.tensor([float(differs.sum()), differs.numel()]))
    handles = [neuron.register_forward_hook(functools.partial(compare, name=name))
               for name, neuron in named_neurons(model) if isinstance(neuron, ScaleAndFire)]
    model(images)
    for handle in handles:
        handle.remove()
    return (counts[0] / counts[1]).item()


def cost(built: Built, images: torch.Tensor) -> dict[str, Any]:
    """Spikes per image by coding, pixels apart, and energies."""
    batches = images.split(BATCH_SIZE)
    profile = profile_model(built.model, batches if built.steps is None else batches[:1])
    if built.steps is not None:
        profile = baselines.profile_steps(built.steps, batches, profile)
    figures = energy(profile.operations, profile.sites, profile.floating)
    result: dict[str, Any] = dict(source_proxy=figures['proxy']['source'])
    if built.coding:
        result |= dict(coding=built.coding, account=figures['account'][built.coding]['total'])
    names = {name for name, neuron in named_neurons(built.model) if isinstance(neuron, ScaleAndFire)}
    if names:
        spiking = [site for site in profile.sites if site.name in names]
        result |= dict(
            proxy=figures['proxy']['sformer'], accounts={c: figures['account'][c]['total'] for c in CODINGS},
            spikes={c: sum(site.neurons * site.spikes[c] for site in spiking) for c in CODINGS})
    return result


@torch.inference_mode()
def timed(run: Run, source: Run, images: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Time of a row in that of the source, by pairs of calls, one after the other."""
    pairs = []
    for i in range(rounds + 1):
        times = []
        for call in (source, run):
            start = time.perf_counter()
            call(images)
            times.append(time.perf_counter() - start)
        pairs += [times] * (i > 0)
    ratios = [mine / others for others, mine in pairs]
    return dict(time=statistics.median(ratios), time_min=min(ratios), time_max=max(ratios),
                source_seconds=statistics.median(others for others, _ in pairs), images=len(images))


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    'top-1 %': lambda row: f'{row["top1"]:.1f}',
    'drop': lambda row: f'{row["drop"]:.1f} ± {row["drop_error"]:.1f}',
    'agreement %': lambda row: f'{row["agreement"]:.1f}',
    'error': lambda row: f'{row["error"]:.3f}',
    'time / source': lambda row: f'{row["timing"]["time"]:.2f}',
    'spikes (unary / binary / graded)': lambda row: ' / '.join(short(row['spikes'][c]) for c in CODINGS),
    'proxy mJ': lambda row: f'{row["proxy"]:.3g}',
    'account mJ': lambda row: f'{row["account"]:.3g} ({row["coding"]})',
}


def short(number: float) -> str:
    return f'{number / 1e6:.2f} M' if number >= 1e6 else f'{number / 1e3:.0f} k'


def cell(column: str, row: dict[str, Any]) -> str:
    try:
        return COLUMNS[column](row)
    except KeyError:  # not measured, or nothing that this row has
        return ''


def show(rows: dict[str, dict[str, Any]], name: str, output: Path) -> None:
    """Print the table of a network, and write it as Markdown beside the JSON file."""
    columns = [column for column in COLUMNS if any(cell(column, row) for row in rows.values())]
    cells = [[label, *(cell(column, rows[label]) for column in columns)] for label in ROWS if label in rows]
    half = 1 + (len(columns) + 1) // 2
    for part in (slice(1, half), slice(half, None)):  # a terminal is not as wide as all of it
        print_table(name, ['', *columns[slice(part.start - 1, part.stop and part.stop - 1)]],
                    [[row[0], *row[part]] for row in cells])
    lines = [f'|  | {" | ".join(columns)} |', f'| --- |{" ---: |" * len(columns)}',
             *(f'| {" | ".join(row)} |' for row in cells)]
    output.with_suffix(f'.{name}.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


def main(
        network: Annotated[str, typer.Argument(help='Name, or a source that saliency_source.py built')],
        images: Annotated[str, typer.Option(help='Images: splits train and test, or photographs')],
        output: Annotated[Path, typer.Option('-o', '--output', help='JSON; what it has is not measured again')],
        only: Annotated[Optional[list[str]], typer.Option(help='Rows that begin so  [default: all]')] = None,
        num_images: Annotated[int, typer.Option(help='Images to calibrate with')] = 256,
        num_test: Annotated[int, typer.Option(help='Images to test with')] = 1000,
        seed: int = 0,
        timings: Annotated[bool, typer.Option('--timings', help='Time rows instead')] = False,
        rounds: Annotated[int, typer.Option(help='Pairs of calls per timing')] = 5,
        batch_size: Annotated[int, typer.Option(help='Images per timed call')] = 32,
        seconds: Annotated[float, typer.Option(help='Begin no further row after so long')] = float('inf'),
) -> None:
    began, source = time.monotonic(), open_network(network)
    record: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    settings = dict(source_sha256=state_hash(source.state_dict()), num_images=num_images, num_test=num_test, seed=seed)
    name = Path(network).name.removesuffix('.safetensors')
    entry = record.setdefault(name, dict(settings=settings, versions=library_versions(), rows={}))
    if entry['settings'] != settings:
        raise SystemExit(f'{output} has {network} with {entry["settings"]}, not {settings}: name another file')
    batches, test, labels = open_both(source, images, num_images, num_test, seed)
    expected = outputs(source, test)
    for label, build in ROWS.items():
        row = entry['rows'].setdefault(label, {})
        wanted = any(label.startswith(prefix) for prefix in only) if only else True
        if not wanted or ('timing' if timings else 'error') in row or time.monotonic() - began > seconds:
            continue
        try:
            built = build(source, batches[:1] if timings else batches)  # time does not depend on thresholds
            if timings:
                other = source if built.engine == 'torch' else openvino_float(source)
                row['timing'] = timed(built.run, other, test[:batch_size], rounds) | dict(
                    engine=built.engine, threads=torch.get_num_threads())
            else:
                row.update(measure(built, test, labels, expected), engine=built.engine)
        except sformer.SFormerError as e:  # a toolkit that is missing
            print(f'{label}: {e}', flush=True)
            continue
        print(f'{label}: {" ".join(f"{column} {cell(column, row)};" for column in COLUMNS if cell(column, row))}',
              flush=True)
        write_json(output, record)
    show({label: row for label, row in entry['rows'].items() if row}, name, output)


if __name__ == '__main__':
    typer.run(main)
