"""`sformer profile`."""
import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import command_line
from .options import MAX_BATCH_SIZE, MAX_IMAGES, MAX_SEED, ColumnOptions, Dataset, Given, unfolded
from .tables import Format, print_table, said_beside, show_table

if TYPE_CHECKING:
    from ..files import Json
    from ..profiling import Constants, Profile
    from ..profiling.energy import EnergyFigures
    from ..profiling.executed import CodingsCompared

__all__ = ['profile']


@unfolded
def profile(
        model: Annotated[str, typer.Argument(help='Folder of an SFormer, hf-hub:ID, or name of one with weights')],
        columns: ColumnOptions,
        given: Given,
        dataset: Annotated[str, typer.Option(help=f'Images: dead-leaves (generated), {Dataset}')] = 'dead-leaves',
        split: Annotated[str | None, typer.Option(help='Split of the data set')] = None,
        num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Number of images')] = 64,
        batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images per batch')] = 8,
        seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of the choice of images')] = 0,
        what_is_spiking: Annotated[bool, typer.Option(
            '--what-is-spiking', help='List every product and what enters it, and every function on currents')] = False,
        execute: Annotated[int, typer.Option(
            min=0, max=MAX_BATCH_SIZE, help='Images of the first batch to run through bit planes')] = 1,
        constants: Annotated[Path | None, typer.Option(
            help='JSON file with energies by name, in the place of the defaults')] = None,
        constant: Annotated[list[str] | None, typer.Option(help='One of them, name=value; may be repeated')] = None,
        curve: Annotated[Path | None, typer.Option(
            help='JSON with points (levels, top1, perhaps energy) to draw in the page')] = None,
        output: Annotated[Path | None, typer.Option(
            '--output', '-o', help='Folder for index.html, profile.json, CSV and PNG')] = None,
        format: Annotated[Format, typer.Option(
            help='All tables to read; or that of energies alone as Markdown, LaTeX or CSV')] = Format.table,
) -> None:
    """Count what an SFormer computes and fires, product by product, and what that would cost."""
    if output:
        from ..files import may_write
        from ..publishing.plots import need_pages
        from ..publishing.profile_page import REPORT, is_report
        need_pages()
        may_write(output, 'profile', is_report, files=REPORT)
    from ..data import ImageRequest
    from ..profiling import energy, profile_model, read_constants
    from ..publishing.profile_page import read_curve, write_profile
    from ..tasks import task_of
    energies, points = read_constants(constants, constant or ()), read_curve(curve) if curve else []
    task = task_of(model)
    task.check_options('profile', model, given)
    network = task.open(model)
    wanted = ImageRequest(
        dataset=dataset, split=split, num_images=num_images, seed=seed, image_column=columns.image_column)
    found, images = task.batches(network, wanted, batch_size)
    batches = iter(found)
    first = next(batches)  # there is one: a source without images is refused
    counted = profile_model(network, itertools.chain([first], batches))
    figures = energy(*counted[:3], energies)
    executed = task.executed(network, first[:execute]) if execute else None
    result = report(counted, figures, energies, model=model, images=dict(images, num_images=counted.images),
                    executed=executed, executed_line=executed_line(executed), command=command_line())
    if format == Format.table:
        print_profile(result, counted, what_is_spiking)
    else:
        show_energy(result, format)
    if output:
        names = write_profile(output, result, counted, *task.maps(network, first[0]), points)
        print(f'written to {output}: {", ".join(names)}', file=said_beside(format))


def report(counted: 'Profile', figures: 'EnergyFigures', energies: 'Constants', **rest: object) -> 'Json':
    """What goes into `profile.json`: every product, neuron and function, and what they cost."""
    from ..neurons import CODINGS
    from ..profiling import traffic, verdicts
    return dict(
        energy=figures, verdicts=verdicts(figures), operations=[dataclasses.asdict(o) for o in counted.operations],
        sites=[dict(dataclasses.asdict(s), bytes={c: traffic(s, c, energies)[0] / 8 for c in ('quantised', *CODINGS)})
               for s in counted.sites],
        floating=[dataclasses.asdict(f) for f in counted.floating], **rest)


def executed_line(executed: 'CodingsCompared | None') -> str:
    """What a run through bit planes showed."""
    if executed is None:
        return ''
    same = ('equal to those of graded spikes bit for bit' if executed['equal'] else
            f'which differ from those of graded spikes by {executed["difference"]:.3g}')
    return (f'Binary spikes, executed at T = 1 (images: {executed["images"]}): what meets weights and other spikes is '
            f'0 or 1, in one plane per power of two and sign. Logits are {same}. The simulation rounds its sums, which '
            f'takes a potential over a boundary now and then: its logits differ by up to {executed["simulation"]:.1g} '
            f'of the largest.')


def show_energy(result: 'Json', format: Format) -> None:
    """Print the table of energies, as CSV with all digits."""
    from ..publishing.profile_page import OTHER, PARTS, energy_rows
    account = result['energy']['account']
    records = energy_rows(account)
    heads = ('', *(name.replace('quantised, ', '') for name in account))
    rows = [(label, *(f'{parts[part]:.4g}' for parts in account.values()))
            for part, label in {**PARTS, **OTHER}.items()]
    show_table(format, 'energy per image [mJ], estimated', heads, rows, [*records[0]], records)


def print_profile(result: 'Json', counted: 'Profile', what_is_spiking: bool) -> None:
    """Print tables and what they say."""
    from ..publishing.profile_page import by_kind, by_site
    figures = result['energy']
    if what_is_spiking:
        print_table('every product', ('product', 'kind', 'MACs [M]', 'spikes enter'), [
            (o.name, o.kind, f'{o.macs / 1e6:.2f}', 'yes' if o.operands else 'NO') for o in counted.operations])
        print()
        print_table('every function on currents, in floating point', ('module', 'function', 'elements [k]'), [
            (f.name or '(root)', f.function, f'{f.elements / 1e3:.1f}') for f in counted.floating])
        print()
    print_table(f'{result["model"]}: {counted.images} images of {result["images"]["name"]}, per image', (
        'products', 'MACs [M]', 'unary [M]', 'binary [M]', 'graded [M]'), by_kind(counted.operations))
    print()
    print_table('neurons', (
        'site', 'neurons [k]', 'activity', 'dead', 'top level', 'unary', 'binary'), by_site(counted.sites))
    print()
    show_energy(result, Format.table)
    print()
    for line in [*result['verdicts'], *filter(None, [result['executed_line']])]:
        print(line)
    print('Constants (see --constants), from:')
    for source in dict.fromkeys(row['source'] for row in figures['constants']):
        print(f'- {source}: ' + ', '.join(r['name'] for r in figures['constants'] if r['source'] == source))
