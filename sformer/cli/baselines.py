"""`sformer baselines`."""
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SFormerError
from .arguments import command_line
from .options import MAX_BATCH_SIZE, MAX_IMAGES, MAX_SEED, Dataset, unfolded
from .tables import Format, TableFormat, said_beside, show_table

if TYPE_CHECKING:
    import torch.nn as nn

    from ..files import Json

__all__ = ['baselines']

LEVELS = (8, 32, 63)
TIMESTEPS = (1, 4, 8)


@unfolded
def baselines(
        model: Annotated[str, typer.Argument(
            help='SFormer (folder, hf-hub:ID, name of one with weights), whose source is taken, or model of timm')],
        dataset: Annotated[str, typer.Option('--dataset', '--data', help=f'Images to measure on: {Dataset}')],
        split: Annotated[str | None, typer.Option(help='Split of these images')] = None,
        num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Number of these images')] = 1000,
        calibration: Annotated[str, typer.Option(
            help=f'Images that all rows are fitted to: dead-leaves (generated), {Dataset}')] = 'dead-leaves',
        calibration_split: Annotated[str | None, typer.Option(help='Split of the calibration images')] = None,
        num_calibration: Annotated[int, typer.Option(
            min=1, max=MAX_IMAGES, help='Number of calibration images')] = 256,
        levels: Annotated[list[int] | None, typer.Option(
            min=1, max=127, help='Levels N of SFormers and of their quantised twins  [default: 8 32 63]')] = None,
        timesteps: Annotated[list[int] | None, typer.Option(
            min=1, max=127, help='Timesteps T of networks that have several  [default: 1 4 8]')] = None,
        only: Annotated[list[str] | None, typer.Option(help='Rows that begin so  [default: all]')] = None,
        batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images per batch')] = 32,
        seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of the choice of images')] = 0,
        pairs: Annotated[int, typer.Option(
            min=0, max=1000, help='Pairs of calls to time each row by, beside the source; keep the machine free')] = 0,
        results_file: Annotated[Path | None, typer.Option(
            help='JSON file for the rows, as they come; what it has is not measured again')] = None,
        format: TableFormat = Format.table,
) -> None:
    """Measure spiking networks of several timesteps and quantised networks of the same source beside SFormers."""
    if results_file:
        from ..files import holds, may_write
        may_write(results_file, 'baselines', holds('rows', 'settings'))
    from ..baselines import COMPARISON, Comparison, comparison_rows
    from ..data import ImageRequest
    from ..data.names import find_data
    from ..files import state_hash
    source = open_source(model)
    chosen = {name: build for name, build in comparison_rows(levels or LEVELS, timesteps or TIMESTEPS).items()
              if not only or name.startswith(tuple(only))}
    if not chosen:
        raise SFormerError(f'no row begins with {" or ".join(only or ())}.')
    settings: Json = dict(
        source_sha256=state_hash(source.state_dict()), dataset=find_data(dataset).name, split=split,
        num_images=num_images, calibration=find_data(calibration).name, calibration_split=calibration_split,
        num_calibration=num_calibration, seed=seed)
    rows = read_rows(results_file, settings)
    bench = Comparison(
        source, ImageRequest(dataset=calibration, split=calibration_split, num_images=num_calibration, seed=seed),
        ImageRequest(dataset=dataset, split=split, num_images=num_images, seed=seed), batch_size)
    beside = said_beside(format)
    for name, build in chosen.items():
        row = rows.get(name, {})
        if row and (not pairs or 'time' in row):
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):  # of toolkits that show their progress
                built = build(source, bench.calibration)
            row = row or bench.measure(name, built)
        except SFormerError as e:  # a toolkit that is missing
            print(f'{name} is left out: {e}', file=beside)
            continue
        if pairs:
            row |= bench.timed(built, batch_size, pairs)
        rows[name] = row
        print(f'{name}: relative error {row["error"]:.3f}', file=beside, flush=True)
        write_rows(results_file, model, settings, rows)
    found = [rows[name] for name in chosen if name in rows]
    heads, cells = COMPARISON.table(found)
    print(file=beside)
    show_table(format, f'{model}: {num_images} images of {dataset}', ['network', *heads],
               [[row['baseline'], *line] for row, line in zip(found, cells, strict=True)],
               COMPARISON.columns(), map(COMPARISON.row, found))
    if results_file:
        print(f'results in {results_file}', file=beside)


def open_source(name: str) -> 'nn.Module':
    """A model by its name; of an SFormer, its source."""
    from ..conversion import source_of
    from ..layers import named_neurons
    from ..tasks import open_model
    network = open_model(name, 'baselines')
    return (source_of(network) if any(True for _ in named_neurons(network)) else network).eval()


def read_rows(path: Path | None, settings: 'Json') -> dict[str, 'Json']:
    """Rows that were measured already.

    Raises:
        SFormerError: If they are of another source or of other images.
    """
    if path is None or not path.exists() or not path.stat().st_size:
        return {}
    record = json.loads(path.read_text(encoding='utf-8'))
    other = [key for key, value in settings.items() if record['settings'].get(key) != value]
    if other:
        raise SFormerError(f'{path} has rows with another {" and ".join(other)}. Name another file, or remove it.')
    return {row['baseline']: row for row in record['rows']}


def write_rows(path: Path | None, model: str, settings: 'Json', rows: dict[str, 'Json']) -> None:
    """Write rows, if they are wanted."""
    if path is None:
        return
    from ..conversion.record import library_versions
    from ..files import write_json
    write_json(path, dict(model=model, settings=settings, rows=[*rows.values()], command=command_line(),
                          versions=library_versions()))
