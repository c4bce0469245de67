"""What each idea brings: errors of SFormers with one of them left out, or with one added, beside what that costs.

    python scripts/ablation.py sformer_micro.cifar10 sformer_eva02_micro.cifar10 --images data/cifar10 --split test
    python scripts/ablation.py vit_small_saliency.safetensors --images photos/ -o docs/figures/ablation.json

A network is one that ships with the package or any SFormer with weights, whose source is taken, or the source that
`scripts/saliency_source.py` built. The error is |source - sformer| / |source| over logits (over all tokens of a network
without a classifier) on images that calibration did not see; an idea that a network refuses is no row. Operations are
those that spikes cause, times those of the CPU on one thread, over the SFormer with nothing left out or added, in pairs
of runs. A file that is there is gone on with: what it has is not measured again. `scripts/make_tables.py` makes the
tables of it.
"""
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Optional

import timm
import torch
import torch.nn as nn
import typer
from fidelity import BATCH_SIZE, split_images
from saliency_source import load_source, relative_error

import sformer
from sformer.conversion.record import library_versions
from sformer.evaluation.activity import Activity
from sformer.files import write_json
from sformer.neurons import CODINGS, FitConfig, SFNConfig
from sformer.profiling import profile_operations

Fields = dict[str, Any]

# idea -> fields of SFNConfig and FitConfig; where they say the same as the default nothing is measured
LEFT_OUT: dict[str, tuple[Fields, Fields]] = {
    'nothing': ({}, {}),
    'thresholds that follow the token': (dict(token_scale=False), {}),
    'wide levels of the softmax (uniform instead)': (dict(attention_fire='uniform'), {}),
    'levels that spread out after GELU, SwiGLU (uniform instead)': (dict(activation_fire='uniform'), {}),
    'levels that widen elsewhere (uniform instead)': (dict(fire='uniform'), {}),
    'correction of gains': ({}, dict(unbiased=False)),
    'least squares (maximum instead)': ({}, dict(estimator='max')),
    'least squares (quantile 0.999 instead)': ({}, dict(estimator='quantile')),
}
PRICE = dict(silence=0.008)
GROUPS = dict(lateral=8)
BYTE = dict(attention_fire='byte')
ADDED: dict[str, tuple[Fields, Fields]] = {
    'feedback, 8 groups': (GROUPS, {}),
    'feedback, 8 groups, not at `fc2`': (dict(lateral=8, lateral_cost=1.), {}),
    'balance': ({}, dict(balance=True)),
    'feedback and balance': (GROUPS, dict(balance=True)),
    'softmax of a byte': (BYTE, {}),
    'feedback, balance and softmax of a byte': (GROUPS | BYTE, dict(balance=True)),
    'price of activity 0.008': (PRICE, {}),
    'price and feedback': (PRICE | GROUPS, {}),
    'price, feedback and balance': (PRICE | GROUPS, dict(balance=True)),
    'price and concentration': (PRICE, dict(concentrate=True)),
    'reconstruction': ({}, dict(effort='high')),
    'reconstruction, feedback and balance': (GROUPS, dict(balance=True, effort='high')),
}
IDEAS = LEFT_OUT | ADDED
PAIRS, TIMED_IMAGES, PROFILED_IMAGES = 5, 4, 2


def says_nothing(n: int, fields: Fields) -> bool:
    """Whether a fire function that is named is the one that neurons have by themselves."""
    named = fields.keys() & {'fire', 'activation_fire'}
    plain, config = SFNConfig(n), SFNConfig(n, **fields)
    return bool(named) and all(
        getattr(plain, name) == getattr(config, name) for name in ('signed_fire', 'mlp_fire', 'gated_fire'))


def open_source(name: str) -> nn.Module:
    if name.endswith('.safetensors'):
        return load_source(Path(name))
    return sformer.source_of(timm.create_model(name, pretrained=True)).eval()


@torch.inference_mode()
def outputs(network: Any, images: torch.Tensor) -> torch.Tensor:
    """Logits, or all tokens of a network without a classifier."""
    forward = network if network.num_classes else network.forward_features
    return torch.cat([forward(batch) for batch in images.split(BATCH_SIZE)])


def measure(model: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """Error of an SFormer, its activity, spikes per neuron, and what they cause per image in each coding."""
    counts = Activity()
    with counts.observe(model):
        error = relative_error(expected, outputs(model, images))
    operations, _, _ = profile_operations(model, [images[:PROFILED_IMAGES]])
    caused = {coding: sum(o.synaptic_operations.get(coding, 0.) for o in operations) for coding in CODINGS}
    return dict(error=error, activity=counts.mean(), spikes_per_neuron=counts.spikes_per_neuron(), operations=caused)


def seconds(network: nn.Module, images: torch.Tensor) -> float:
    """Seconds that the CPU takes for a forward pass, whatever else it does meanwhile."""
    start = time.process_time()
    outputs(network, images)
    return time.process_time() - start


def paired_times(model: nn.Module, plain: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Times of a model over those of another, on one thread, each in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = [seconds(model, images) / seconds(plain, images) for _ in range(PAIRS + 1)][1:]
    torch.set_num_threads(threads)
    return dict(median=statistics.median(pairs), min=min(pairs), max=max(pairs), pairs=PAIRS)


def gone_on_with(path: Optional[Path], images: Fields) -> dict[str, Any]:
    """What a file has that was begun; refused where the same network was measured on other images."""
    if path is None or not path.exists():
        return dict(networks={}, results=[])
    record = json.loads(path.read_text(encoding='utf-8'))
    for name in images.keys() & record['networks'].keys():
        if record['networks'][name]['images'] != images[name]:
            raise SystemExit(f'{path} has {name} on other images: write to another file.')
    return record


def command_of(network: tuple[str, Fields]) -> str:
    """What measures a network of a record anew."""
    name, images = network[0], network[1]['images']
    file = name if timm.is_model(name) else f'{name}.safetensors'
    split = f' --split {images["split"]}' if images['split'] else ''
    return (f'python scripts/ablation.py {file} --images {images["name"]}{split} --num-images {images["num_images"]} '
            f'--num-test {images["num_test"]} -o ablation.json')


def missing(record: dict[str, Any], network: str, levels: Iterable[int], ideas: Iterable[str]) -> list[tuple[int, str]]:
    """Numbers of levels and ideas that a record does not have of a network, one number after the other."""
    found = {(row['levels'], row['idea']) for row in record['results'] if row['network'] == network}
    return [(n, idea) for n in levels for idea in ideas
            if (n, idea) not in found and not says_nothing(n, IDEAS[idea][0])]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a record: a network after the other, as they came, and ideas as they stand above."""
    networks = list(dict.fromkeys(row['network'] for row in rows))
    return sorted(rows, key=lambda row: (networks.index(row['network']), row['levels'], [*IDEAS].index(row['idea'])))


def printed(row: dict[str, Any]) -> str:
    return (f'{row["network"]}, N = {row["levels"]}, {row["idea"]}: error {row["error"]:.4f}, activity '
            f'{row["activity"]:.3f}, time {row["time"]["median"]:.2f} '
            f'({row["time"]["min"]:.2f} to {row["time"]["max"]:.2f})')


def main(
        networks: Annotated[list[str], typer.Argument(help='Names, or a source that saliency_source.py built')],
        images: Annotated[str, typer.Option(help='Images: a folder, parquet files, a data set of the Hub')],
        split: Annotated[Optional[str], typer.Option(help='Split of these images')] = None,
        levels: Annotated[Optional[list[int]], typer.Option(help='Numbers of levels N  [default: 4 8 32]')] = None,
        ideas: Annotated[Optional[list[str]], typer.Option('--idea', help='Rows of the tables  [default: all]')] = None,
        num_images: Annotated[int, typer.Option(help='Images to calibrate with')] = 128,
        num_test: Annotated[int, typer.Option(help='Images to test with')] = 48,
        seed: int = 0,
        output: Annotated[Optional[Path], typer.Option('-o', '--output', help='JSON, gone on with')] = None,
) -> None:
    unknown = {*(ideas or [])} - IDEAS.keys()
    if unknown:
        raise SystemExit(f'no idea {unknown.pop()!r}: there are {"; ".join(IDEAS)}.')
    for name in networks:
        source, stem = open_source(name), name.removesuffix('.safetensors').rpartition('/')[2]
        test, others, data = split_images(source, images, split, num_test, num_images, seed)
        drawn = dict(name=Path(images).name if Path(images).exists() else data.name, split=data.split,
                     fingerprint=data.fingerprint, seed=seed, num_test=num_test, num_images=num_images)
        record = gone_on_with(output, {stem: drawn})
        record['networks'][stem] = dict(images=drawn)
        record['command'] = ' && '.join(map(command_of, record['networks'].items()))
        record['versions'] = library_versions()
        expected, plain, plain_levels = outputs(source, test), source, 0
        for n, idea in missing(record, stem, levels or [4, 8, 32], ideas or IDEAS):
            fields, fit = IDEAS[idea]
            if n != plain_levels:  # of which only times are measured, whatever its thresholds are
                plain, plain_levels = sformer.convert(source, [others[:BATCH_SIZE]], SFNConfig(n)), n
            try:
                model = sformer.convert(source, others.split(BATCH_SIZE), SFNConfig(n, **fields), FitConfig(**fit))
            except sformer.SFormerError as error:
                print(f'{stem}, N = {n}, {idea}: {error}', flush=True)
                continue
            row = dict(network=stem, levels=n, idea=idea, left_out=idea in LEFT_OUT, config=fields, fit=fit,
                       **measure(model, test, expected), time=paired_times(model, plain, test[:TIMED_IMAGES]))
            print(printed(row), flush=True)
            record['results'] = in_order([*record['results'], row])
            if output:
                write_json(output, record)


if __name__ == '__main__':
    typer.run(main)
