"""The report of `sformer profile`: JSON, tables as CSV, pictures, and one HTML page that holds all of it."""
import base64
import contextlib
import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..conversion.record import library_versions
from ..errors import SFormerError
from ..files import Json, holds, write_aside
from ..profiling import Operation, Profile, Site
from .plots import need_pages, plot_activity
from .profile_plots import CurvePoint, plot_energy, plot_levels, plot_maps, plot_trade_off

__all__ = [
    'OTHER', 'PARTS', 'REPORT', 'by_kind', 'by_site', 'energy_rows', 'is_report', 'kind_of', 'read_curve',
    'write_profile',
]

# parts of the account, and what a reader finds them called
PARTS = dict(operations='products', comparisons='firing', weights='weights', activations='spikes', routing='routing',
             floating='floating')
OTHER = dict(total='total', low='data - 50 %', high='data + 50 %')
POINT_RANGES = dict(levels=(1, math.inf), top1=(0, 100), energy=(0, math.inf), source_top1=(0, 100),
                    num_images=(1, math.inf))
TABLES = ('operations', 'sites', 'floating', 'energy')
REPORT = ('profile.json', 'index.html', *(f'{name}.csv' for name in TABLES), 'activity.png', 'levels.png', 'energy.png',
          'accuracy.png', 'maps.png')


Of = TypeVar('Of', Operation, Site)


def kind_of(name: str) -> str:
    """`blocks.3.mlp.fc2.neuron` -> `mlp.fc2`."""
    parts = [part for part in name.split('.') if not part.isdigit() and part not in ('blocks', 'neuron', 'products')]
    return '.'.join(parts)


def is_report(path: Path) -> bool:
    """Whether a file lies beside the JSON of a profile, as part of its report."""
    return holds('operations', 'sites', 'energy')(path.with_name(REPORT[0]))


def _grouped(items: Sequence[Of]) -> dict[str, list[Of]]:
    kinds: dict[str, list[Of]] = {}
    for item in items:
        kinds.setdefault(kind_of(item.name), []).append(item)
    return kinds


def by_kind(operations: Sequence[Operation]) -> list[tuple[str, ...]]:
    """Kind, MACs and synaptic operations in unary, binary and graded coding [M]: sums over blocks, and over all."""
    return [(kind, f'{sum(o.macs for o in group) / 1e6:.2f}', *(
        f'{sum(o.synaptic_operations.get(coding, 0) for o in group) / 1e6:.2f}'
        for coding in ('unary', 'binary', 'graded')))
        for kind, group in {**_grouped(operations), 'all': [*operations]}.items()]


def by_site(sites: Sequence[Site]) -> list[tuple[str, ...]]:
    """Kind, neurons [k], activity, dead, top level, unary and binary spikes per neuron: means over blocks."""
    rows = []
    for kind, group in _grouped(sites).items():
        neurons = sum(s.neurons for s in group)
        values = [(s.activity, float('nan') if s.dead is None else s.dead, s.saturation,
                   s.spikes['unary'], s.spikes['binary']) for s in group]
        mean = [sum(s.neurons * value for s, value in zip(group, column, strict=True)) / neurons
                for column in zip(*values, strict=True)]
        rows.append((kind, f'{neurons / 1e3:.1f}', *(f'{value:.3f}' for value in mean)))
    return rows


def energy_rows(account: Mapping[str, Mapping[str, float]]) -> list[dict[str, str | float]]:
    """The account of `profiling.energy` [mJ] as rows, a part each, with a column per way of computing."""
    return [{'part': part, **{name: parts[part] for name, parts in account.items()}} for part in (*PARTS, *OTHER)]


def read_curve(path: Path) -> list[CurvePoint]:
    """Points `levels`, `top1` and perhaps `energy` [mJ], `source_top1` and `num_images` of a JSON file: a list of them,
    or an object with such a list as its `curve`.

    Raises:
        SFormerError: If it is not that.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        points = content['curve'] if isinstance(content, dict) else content
        found = [{key: float(point[key]) for key in POINT_RANGES if key in point or key in ('levels', 'top1')}
                 for point in points]
    except OSError as e:
        raise SFormerError(f'{path}: {e.strerror or e}') from e
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as e:
        raise SFormerError(f'{path} must hold a list of points with levels and top1: {e!r}.') from e
    for number, point in enumerate(found):
        for key, value in point.items():
            if not POINT_RANGES[key][0] <= value <= POINT_RANGES[key][1] or value == math.inf:  # NaN, too
                raise SFormerError(f'{path}: {key} of point number {number} is {value}, which it cannot be.')
    return found


def without_folders(name: str) -> str:
    """A name for a page that others read: of what lies on this computer, the last part of its path."""
    path = Path(name.removeprefix('local-dir:'))
    with contextlib.suppress(OSError):  # a name that is too long, say
        if path.exists() or path.is_absolute():
            return path.resolve().name or name
    return name


def _command_for_others(command: str) -> str:
    """A command line whose paths say nothing of whose computer it was."""
    with contextlib.suppress(ValueError):  # no command line, so nothing that the shell splits
        arguments = [argument.rpartition('=') for argument in shlex.split(command)]
        return shlex.join(f'{option}{equals}{without_folders(value) if _is_far(value) else value}'
                          for option, equals, value in arguments)
    return command


def _is_far(argument: str) -> bool:
    """Whether an argument names folders above the one that a command was called in."""
    return argument.removeprefix('local-dir:').startswith(('/', '~', '..')) or Path(argument).is_absolute()


def write_profile(
        folder: Path,
        result: Json,
        profile: Profile,
        image: torch.Tensor | None = None,
        maps: Mapping[str, torch.Tensor] | None = None,
        curve: Sequence[CurvePoint] = (),
) -> list[str]:
    """Write `profile.json`, CSVs, PNGs and `index.html`, which needs none of the others, aside and renamed.

    Args:
        folder: Where to; made if it is not there.
        result: What goes into the JSON, with `energy` as of `profiling.energy`, `verdicts`, `model` and `images`.
        profile: What was counted.
        image: An image (C, H, W), values in [0, 1], for the maps.
        maps: As of `profiling.spike_maps`.
        curve: As of `read_curve`.

    Returns:
        Names of the files.

    Raises:
        SFormerError: If a package is missing.
    """
    need_pages()
    import jinja2
    pictures = _drawings(result, profile, image, dict(maps or {}), curve)
    result = dict(result, versions=library_versions())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('sformer.publishing'), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    constants = result['energy']['constants']
    page = environment.get_template('profile.html').render(
        result=result, model=without_folders(result['model']), images=without_folders(result['images']['name']),
        command=_command_for_others(result['command']), profile=profile,
        kinds=by_kind(profile.operations), sites=by_site(profile.sites),
        parts={**PARTS, **OTHER}, sources=list(dict.fromkeys(row['source'] for row in constants)),
        # a map of many blocks would be too small to read on a phone, so it scrolls
        pictures=[(title, base64.b64encode(data).decode(), name == 'activity.png')
                  for name, (title, data) in pictures.items()])
    with write_aside(folder) as aside:
        (aside / 'index.html').write_text(page, encoding='utf-8')
        (aside / 'profile.json').write_text(json.dumps(result, indent=2, allow_nan=False) + '\n', encoding='utf-8')
        for name in TABLES:
            rows = energy_rows(result['energy']['account']) if name == 'energy' else result[name]
            _write_csv(aside / f'{name}.csv', rows)
        for name, (_, data) in pictures.items():
            (aside / name).write_bytes(data)
        return sorted(path.name for path in aside.iterdir())


def _drawings(
        result: Json,
        profile: Profile,
        image: torch.Tensor | None,
        maps: dict[str, torch.Tensor],
        curve: Sequence[CurvePoint],
) -> dict[str, tuple[str, bytes]]:
    """File name -> title and PNG."""
    levels = {site.levels for site in profile.sites if site.levels}
    pictures = {'activity.png': ('Activity per block and site', plot_activity(
        {site.name: site.activity for site in profile.sites}, levels.pop() if len(levels) == 1 else None))}
    histograms: dict[str, dict[int, int]] = {}
    for kind, group in _grouped(profile.sites).items():
        found = sorted({level for site in group for level in site.histogram})
        histograms[kind] = {level: sum(site.histogram.get(level, 0) for site in group) for level in found}
    pictures['levels.png'] = 'How often each level is fired', plot_levels(histograms)
    pictures['energy.png'] = 'Where energy would go', plot_energy(result['energy']['account'], PARTS)
    if curve:
        source = next((point['source_top1'] for point in curve if 'source_top1' in point), None)
        pictures['accuracy.png'] = 'Accuracy against levels and energy', plot_trade_off(curve, source)
    if image is not None and maps:
        pictures['maps.png'] = ('Spikes per neuron over an image: which patches spike most, block by block, unary',
                                plot_maps(image, maps))
    return pictures


def _write_csv(path: Path, rows: Sequence[Json]) -> None:
    """Rows as CSV, spikes by coding in columns of their own; histograms are in the JSON."""
    flat = [{column: cell for key, value in row.items() if key != 'histogram' for column, cell in (
        [(f'{key}_{coding}', n) for coding, n in value.items()] if isinstance(value, dict) else
        [(key, ' '.join(value) if isinstance(value, tuple) else value)])} for row in rows]
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)), restval='',
                                lineterminator='\n')
        writer.writeheader()
        writer.writerows(flat)
