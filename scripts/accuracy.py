"""Accuracy, activity and spikes over the number of levels N, of any sources: the first two tables of docs/paper.md.

    python scripts/accuracy.py sformer_micro.cifar10 sformer_eva02_micro.cifar10 --dataset cifar10 -o accuracy.json
    torchrun --nproc-per-node 8 scripts/accuracy.py vit_base_patch16_224 vit_large_patch16_224 --dataset imagenet-1k \
        --calibration dead-leaves --batch-size 64 -o accuracy.json

A source is what `sformer convert` takes, or an SFormer, whose source is taken. Each N is a conversion of its own, and
all of a source are evaluated in one pass over the test images.
"""
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import sformer
from sformer.cli.tables import Format, TableFormat, show_table
from sformer.errors import SFormerError
from sformer.evaluation import EvaluationConfig, evaluate_all, write_results
from sformer.evaluation.launch import Group
from sformer.layers import named_neurons
from sformer.tasks import open_model

LEVELS = (4, 8, 16, 32, 63)
HEADS = ('source', 'N', 'top-1 of source [%]', 'top-1 [%]', 'agreement [%]', 'activity', 'unary spikes')


def row(result: dict[str, Any]) -> list[str]:
    """Cells of a table."""
    return [result['model'], str(result['levels']), f'{result["source_top1"]:.2f}', f'{result["top1"]:.2f}',
            f'{result["agreement"]:.2f}', f'{result["activity"]:.3f}', f'{result["spikes_per_neuron"]["unary"]:.2f}']


def main(
        sources: Annotated[list[str], typer.Argument(help='Sources or SFormers')],
        dataset: Annotated[str, typer.Option('--dataset', '--data', help='Labelled images')],
        split: Annotated[str | None, typer.Option(help='Split to evaluate on')] = None,
        num_images: Annotated[int | None, typer.Option(help='Random subset of it')] = None,
        calibration: Annotated[str | None, typer.Option(help='Images to calibrate with  [default: dataset]')] = None,
        calibration_split: Annotated[str | None, typer.Option(help='Split of these  [default: train]')] = None,
        num_calibration: Annotated[int, typer.Option(help='How many')] = 256,
        levels: Annotated[list[int] | None, typer.Option(help='N, may be repeated  [default: 4 8 16 32 63]')] = None,
        recipe: Annotated[str, typer.Option(help='Recipe whose N is changed')] = 'paper',
        batch_size: Annotated[int, typer.Option(help='Images per batch')] = 64,
        workers: Annotated[int, typer.Option(help='Processes that decode images')] = 0,
        seed: Annotated[int, typer.Option(help='Seed of the choices of images')] = 0,
        output: Annotated[Path | None, typer.Option('--output', '-o', help='JSON file of all results')] = None,
        format: TableFormat = Format.table,
) -> None:
    config = EvaluationConfig(
        dataset=dataset, split=split, num_images=num_images, batch_size=batch_size, workers=workers, seed=seed)
    command = shlex.join(['python', f'scripts/{Path(__file__).name}', *sys.argv[1:]])
    fitted = calibration or dataset
    results: list[dict[str, Any]] = []
    with Group().guard() as group:
        for name in sources:
            network = open_model(name)
            if any(True for _ in named_neurons(network)):
                network = sformer.source_of(network)
            models = [sformer.convert(
                network.eval(), fitted, recipe=recipe, config=dict(levels=n), num_images=num_calibration, seed=seed,
                split=None if fitted == 'dead-leaves' else calibration_split or 'train') for n in levels or LEVELS]
            found = evaluate_all(models, config, group=group)
            results += [dict(result, model=name, architecture=result['model'], levels=n, command=command)
                        for n, result in zip(levels or LEVELS, found, strict=True)]
            if output and group.is_main:
                write_results(output, results)
        if group.is_main:
            show_table(format, f'{results[0]["num_images"]} images of {results[0]["dataset"]}', HEADS,
                       [row(result) for result in results])


if __name__ == '__main__':
    try:
        typer.run(main)
    except SFormerError as e:
        raise SystemExit(f'error: {e}') from None
