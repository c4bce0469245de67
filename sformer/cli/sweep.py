"""`sformer sweep` and `sformer search`: SFormers of one source with other neurons, beside it."""
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..errors import RunInterruptedError, SFormerError
from ..neurons import SFNConfig
from .arguments import command_line
from .options import MAX_BATCH_SIZE, MAX_IMAGES, MAX_SEED, Dataset, unfolded
from .tables import Format, TableFormat, append_csv, said_beside, show_table

if TYPE_CHECKING:
    from ..conversion.search import Bench, Point
    from ..files import Json
    from ..models import SFormerMixin

__all__ = ['search', 'sweep']


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Which images SFormers are fitted to and compared on; no labels are read."""
    dataset: Annotated[str, typer.Option(help=f'Images: dead-leaves (generated), {Dataset}')] = 'dead-leaves'
    split: Annotated[str | None, typer.Option(help='Split of the data set')] = None
    num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Images to compare on')] = 512
    num_calibration: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Other images to calibrate with')] = 128
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images per batch that is read')] = 32
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of the choice of images')] = 0
    results_file: Annotated[Path | None, typer.Option(
        help='JSON file for the results, or CSV file for the points')] = None

    def check_results_file(self, model: str) -> None:
        """Raise SFormerError if results cannot be written, or would take the place of others."""
        if self.results_file:
            from ..files import may_write
            if self.results_file.suffix.lower() not in ('', '.json', '.csv'):
                raise SFormerError(f'{self.results_file}: points are written to a file that ends in .json or .csv.')
            found = may_write(self.results_file, 'points of a sweep or search', are_points)
            if found.exists() and found.suffix.lower() != '.csv' and found.stat().st_size:
                owner = json.loads(found.read_text(encoding='utf-8')).get('model', model)
                if owner != model:
                    raise SFormerError(f'{self.results_file} has results of {owner}, which would be lost. Name another '
                                       f'file, or remove it.')

    def open(self, model: str, verb: str) -> tuple['Bench', 'SFormerMixin', 'Json']:
        """What measures, the SFormer that is varied, and what a record says of images."""
        from ..conversion.search import Bench
        from ..data import ImageRequest
        from ..tasks import open_model
        network = open_model(model, verb)
        wanted = ImageRequest(
            dataset=self.dataset, split=self.split, num_images=self.num_images + self.num_calibration, seed=self.seed)
        bench, used = Bench.open(network, wanted, self.num_calibration, self.batch_size)
        return bench, cast('SFormerMixin', network), used

    def write(
            self,
            model: str,
            used: 'Json',
            bench: 'Bench',
            points: Sequence['Point'],
            format: Format,
            **more: object,
    ) -> None:
        """Write results, if they are wanted: all as JSON, or a row per point as CSV."""
        from ..conversion.record import library_versions
        from ..files import write_json
        if not self.results_file:
            return
        if self.results_file.suffix.lower() == '.csv':
            append_csv(self.results_file, POINT_COLUMNS, records(model, used, points))
        else:
            write_json(self.results_file, dict(
                model=model, images=used, fit=dataclasses.asdict(bench.fit),
                points=[dataclasses.asdict(point) for point in points], seconds=bench.seconds,
                forward_passes=bench.forward_passes, **more, command=command_line(), versions=library_versions()))
        print(f'written to {self.results_file}', file=said_beside(format))


# of a CSV file of points
POINT_COLUMNS = (
    'model', 'dataset', 'split', 'num_images', 'origin', *(field.name for field in dataclasses.fields(SFNConfig)),
    'error', 'agreement', 'activity', 'unary', 'binary')


def records(model: str, used: 'Json', points: Sequence['Point']) -> list[dict[str, object]]:
    """Rows of CSV."""
    images = dict(model=model, dataset=used['name'], split=used['split'], num_images=used['num_images'])
    found = []
    for point in points:
        row = dataclasses.asdict(point)
        found.append(dict(row.pop('config'), **images, **row))
    return found


def are_points(path: Path) -> bool:
    """Whether a file is one of points, or empty."""
    from ..files import holds
    if path.suffix.lower() != '.csv':
        return holds('points', 'forward_passes')(path)
    try:
        return path.read_text(encoding='utf-8').partition('\n')[0] in ('', ','.join(POINT_COLUMNS))
    except (OSError, UnicodeDecodeError):
        return False


POINT_HEADS = ('N', 'silence', 'lambda', 'agreement [%]', 'relative error', 'activity', 'unary', 'binary')


def cells(point: 'Point') -> tuple[str, ...]:
    """A row of a table."""
    config = point.config
    agreement = '' if point.agreement is None else f'{100 * point.agreement:.2f}'
    return (str(config.levels), f'{config.silence:.3g}', f'{config.scale:.3g}', agreement, f'{point.error:.4f}',
            f'{point.activity:.3f}', f'{point.unary:.2f}', f'{point.binary:.2f}')


def cost(bench: 'Bench') -> str:
    return f'{bench.seconds:.0f} s, {bench.forward_passes} images through a network'


@unfolded
def sweep(
        model: Annotated[str, typer.Argument(help='Folder of an SFormer, hf-hub:ID, or name of one with weights')],
        bench: BenchOptions,
        levels: Annotated[list[int] | None, typer.Option(
            help='Numbers of levels N  [default: 2 4 8 16 32 63]')] = None,
        silence: Annotated[float | None, typer.Option(help="Price of activity, if not the model's own")] = None,
        format: TableFormat = Format.table,
) -> None:
    """Convert the source of an SFormer with several numbers of levels, and compare each with it."""
    for count in levels or ():
        SFNConfig(levels=count)
    if silence is not None:
        SFNConfig(silence=silence)
    bench.check_results_file(model)
    from ..conversion.search import SWEPT_LEVELS, sweep
    bench_, network, used = bench.open(model, 'sweep')
    base = network.sfn_config if silence is None else dataclasses.replace(network.sfn_config, silence=silence)
    points = list(sweep(bench_, base, levels or SWEPT_LEVELS))
    show_table(format, f'{model}: {used["num_images"]} images of {used["name"]}, beside the source', POINT_HEADS,
               [cells(point) for point in points], POINT_COLUMNS, records(model, used, points))
    print(f'\n{cost(bench_)}', file=said_beside(format))
    bench.write(model, used, bench_, points, format)


@unfolded
def search(
        model: Annotated[str, typer.Argument(help='Folder of an SFormer, hf-hub:ID, or name of one with weights')],
        bench: BenchOptions,
        budget: Annotated[int, typer.Option(min=5, max=10 ** 4, help='Trials, conversions with other neurons')] = 40,
        spikes: Annotated[str, typer.Option(help='What is to be few: activity, unary or binary')] = 'activity',
        max_error: Annotated[float, typer.Option(
            min=0, help='Relative error of the logits that the recommended point may have')] = 0.1,
        storage: Annotated[Path | None, typer.Option(
            help='Journal of the trials; a search that was ended continues from it')] = None,
        format: TableFormat = Format.table,
) -> None:
    """Search for neurons that fire little and stay close to the source (an extra: pip install '.[search]')."""
    if spikes not in ('activity', 'unary', 'binary'):
        raise SFormerError(f'--spikes is activity, unary or binary, not {spikes!r}.')
    bench.check_results_file(model)
    from ..conversion.search import is_search_journal, need_optuna, pareto_front, recommended, search
    from ..files import may_write, written_to
    if storage and bench.results_file and \
            written_to(bench.results_file).resolve() == written_to(storage).resolve():
        raise SFormerError(f'{storage} cannot be both --storage and --results-file, which would replace the journal.')
    need_optuna()
    if storage:
        may_write(storage, 'journal of a search', is_search_journal)
        storage.parent.mkdir(parents=True, exist_ok=True)
    bench_, network, used = bench.open(model, 'search')
    try:
        points = search(bench_, network.sfn_config, budget, storage, spikes, bench.seed)
    except KeyboardInterrupt:
        if storage:
            raise RunInterruptedError('interrupted. The same command continues.') from None
        raise
    front, best = pareto_front(points, spikes), recommended(points, max_error, spikes)
    closed = [point for point in points if point.origin == 'closed form']
    lambdas = [point for point in points if point.origin == 'lambda']
    rows = [('front', point) for point in front] + [('closed form', point) for point in closed]
    rows += [('lambda alone', min(lambdas, key=lambda p: p.error))] if lambdas else []
    rows += [('recommended', best)]
    shown = [point for _, point in rows]
    show_table(format, f'{model}: {used["num_images"]} images of {used["name"]}, beside the source', ('', *POINT_HEADS),
               [(name, *cells(point)) for name, point in rows], ('row', *POINT_COLUMNS),
               [dict(record, row=name) for (name, _), record in zip(rows, records(model, used, shown), strict=True)])
    print(f'\n{len(points)} trials, {cost(bench_)}', file=said_beside(format))
    bench.write(model, used, bench_, points, format, spikes=spikes, budget=budget, max_error=max_error,
                front=[dataclasses.asdict(point) for point in front], recommended=dataclasses.asdict(best))
