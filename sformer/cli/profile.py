"""`sformer profile`."""
import csv
import dataclasses
from pathlib import Path
from typing import Annotated, Any, Dict, List, Optional

import typer

from ..errors import SFormerError
from .arguments import check_folder, command_line
from .detect import detector_batches
from .options import MAX_BATCH_SIZE, MAX_IMAGES, MAX_SEED, Dataset, unfolded
from .tables import print_table

__all__ = ['profile']


@unfolded
def profile(
        model: Annotated[str, typer.Argument(help='Folder of an SFormer, hf-hub:ID, or name of one with weights')],
        dataset: Annotated[str, typer.Option(help=f'Images: dead-leaves (generated), {Dataset}')] = 'dead-leaves',
        split: Annotated[Optional[str], typer.Option(help='Split of the data set')] = None,
        num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Number of images')] = 64,
        batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images per batch')] = 8,
        seed: Annotated[int, typer.Option(max=MAX_SEED, help='Seed of the choice of images')] = 0,
        what_is_spiking: Annotated[bool, typer.Option(
            '--what-is-spiking', help='List every product and what enters it')] = False,
        output: Annotated[Optional[Path], typer.Option(
            '--output', '-o', help='Folder for profile.json and CSV')] = None,
) -> None:
    """Count what an SFormer computes and fires, product by product, and what that would cost."""
    if output:
        check_folder(output)
        if output.exists() and not output.is_dir():
            raise SFormerError(f'{output} is a file, not a folder.')
    from ..conversion import calibration_batches
    from ..detection import is_detector
    from ..profiling import energy, profile_operations, verdicts
    from ..saving import open_model
    network: Any
    batches: Any
    if is_detector(model):
        network, batches, images = detector_batches(model, dataset, split, num_images, seed)
    else:
        network = open_model(model)
        batches, images = calibration_batches(network, dataset, split, num_images, batch_size, seed, 'Counting')
    operations, sites, count = profile_operations(network, batches)
    figures = energy(operations, sites)
    if what_is_spiking:
        print_table('every product', ('product', 'kind', 'MACs [M]', 'spikes enter'), [
            (o.name, o.kind, f'{o.macs / 1e6:.2f}', 'yes' if o.operands else 'NO') for o in operations])
        print()
    print_table(f'{model}: {count} images of {images["name"]}, per image', (
        'products', 'MACs [M]', 'unary [M]', 'binary [M]', 'graded [M]'), by_kind(operations))
    print()
    print_table('neurons', ('site', 'neurons [k]', 'activity', 'top level', 'unary', 'binary'), by_site(sites))
    print()
    print_table('energy per image [mJ], estimated', ('', 'operations', 'comparisons', 'weights', 'spikes', 'total'), [
        (name, *(f'{value:.4f}' for value in parts.values())) for name, parts in figures['account'].items()])
    print()
    for line in verdicts(figures):
        print(line)
    print(f'Constants: {figures["constants"]["source"]}.')
    if output:
        write(output, dict(
            model=model, images=dict(images, num_images=count),
            operations=[dataclasses.asdict(o) for o in operations], sites=[dataclasses.asdict(s) for s in sites],
            energy=figures, verdicts=verdicts(figures), command=command_line()))
        print(f'written to {output}/profile.json, operations.csv and sites.csv')


def kind_of(name: str) -> str:
    """`blocks.3.mlp.fc2.neuron` -> `mlp.fc2`."""
    parts = [part for part in name.split('.') if not part.isdigit() and part not in ('blocks', 'neuron', 'products')]
    return '.'.join(parts)


def by_kind(operations: Any) -> List[tuple]:
    """Sums over blocks, and over all."""
    kinds: Dict[str, List[Any]] = {}
    for operation in operations:
        kinds.setdefault(kind_of(operation.name), []).append(operation)
    kinds['all'] = list(operations)
    return [(kind, f'{sum(o.macs for o in group) / 1e6:.2f}', *(
        f'{sum(o.synaptic_operations.get(coding, 0) for o in group) / 1e6:.2f}'
        for coding in ('unary', 'binary', 'graded'))) for kind, group in kinds.items()]


def by_site(sites: Any) -> List[tuple]:
    """Means over blocks."""
    kinds: Dict[str, List[Any]] = {}
    for site in sites:
        kinds.setdefault(kind_of(site.name), []).append(site)
    rows = []
    for kind, group in kinds.items():
        neurons = sum(s.neurons for s in group)
        mean = [sum(s.neurons * value(s) for s in group) / neurons for value in (
            lambda s: s.activity, lambda s: s.saturation, lambda s: s.spikes['unary'], lambda s: s.spikes['binary'])]
        rows.append((kind, f'{neurons / 1e3:.1f}', *(f'{value:.3f}' for value in mean)))
    return rows


def write(folder: Path, result: Dict[str, Any]) -> None:
    """Write JSON, and tables as CSV, aside and renamed."""
    from ..checkpoints import write_aside, write_json
    from ..utils import library_versions
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'profile.json', dict(result, versions=library_versions()))
    with write_aside(folder) as aside:
        for name in ('operations', 'sites'):
            rows = [{key: v for key, value in row.items() for key, v in (
                [(f'{key}_{coding}', n) for coding, n in value.items()] if isinstance(value, dict) else
                [(key, ' '.join(value) if isinstance(value, tuple) else value)])} for row in result[name]]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            with open(aside / f'{name}.csv', 'w', newline='', encoding='utf-8') as file:
                writer = csv.DictWriter(file, columns, restval='', lineterminator='\n')
                writer.writeheader()
                writer.writerows(rows)
