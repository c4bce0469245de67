"""Plots of what was measured, as PNGs that carry their numbers."""
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import needed_packages
from ..files import Json, png_bytes, png_values
from .model_record import ModelRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['plot_accuracy', 'plot_activity', 'need_pages', 'new_figure', 'png', 'render_plots', 'is_own_plot']


def plot_accuracy(accuracy: dict[int, float], source: float) -> bytes:
    """Draw top-1 accuracy against the number of levels N.

    Args:
        accuracy: Top-1 in percent per N.
        source: Top-1 of the source in percent.

    Returns:
        PNG that carries its numbers as JSON in the text chunk `sformer`, and nothing that changes from one drawing to
        the next.
    """
    figure = new_figure(6, 4)
    axes = figure.add_subplot(
        xscale='log', xlabel='levels N per branch', ylabel='top-1 [%]', title='Accuracy of the single-timestep SFormer')
    axes.axhline(source, color='grey', linestyle='--', label=f'source, {source:.1f} %')
    axes.plot(list(accuracy), list(accuracy.values()), marker='o', label='SFormer')
    # at least five points, or a curve within the noise of a few images would look like a cliff
    low, high = min([source, *accuracy.values()]), max([source, *accuracy.values()])
    margin = max(0.05 * (high - low), (5 - (high - low)) / 2)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xticks(list(accuracy), [str(n) for n in accuracy])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    return png(figure, dict(top1=accuracy, source_top1=source))


def plot_activity(activity: dict[str, float], levels: int | None = None) -> bytes:
    """Draw activity, the share of neurons that fire, as a map of sites and blocks.

    Args:
        activity: Share in [0, 1] per neuron path, `activity_per_site` of `sformer.evaluate`.
        levels: Number of levels N, for the title, if it is one.

    Returns:
        PNG as of `plot_accuracy`.
    """
    cells: dict[str, dict[str, float]] = {}
    for name, share in activity.items():
        block = re.match(r'(?:.*\.)?blocks\.(\d+)\.(.*)', name)
        part = name.removeprefix('backbone.').removeprefix('vit.').partition('.')[0]  # of a detector's
        column, site = (block[1], block[2]) if block else (part, name)
        cells.setdefault(site.replace('.neuron', '').replace('_neuron', ''), {})[column] = share
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    figure = new_figure(1.6 + 0.75 * len(columns), 1.2 + 0.42 * len(cells))
    axes = figure.add_subplot(title='Activity' + (f', N = {levels}' if levels else ''), xlabel='block')
    grid = [[row.get(column, float('nan')) for column in columns] for row in cells.values()]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap='viridis', aspect='auto')
    for y, row in enumerate(grid):
        for x, share in enumerate(row):
            if share == share:
                axes.text(x, y, f'{share:.2f}', ha='center', va='center', fontsize=8,
                          color='black' if share > 0.6 else 'white')
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(cells)), list(cells))
    figure.colorbar(image, label='share of neurons that fire')
    return png(figure, dict(levels=levels, activity_per_site=activity))


def render_plots(record: ModelRecord) -> dict[str, tuple[str, bytes]]:
    """Plots of what a record has numbers for, and pictures of what a model finds.

    Returns:
        File name -> title and PNG.
    """
    plots: dict[str, tuple[str, bytes]] = {}
    result = next((r for r in record.evaluations.values() if r.get('activity_per_site')), None)
    levels = record.sfn.get('levels')
    if result and levels:
        plots['activity.png'] = 'Share of neurons that fire', plot_activity(result['activity_per_site'], levels)
    if record.curve and 'source_top1' in record.curve[0]:
        top1 = {r['levels']: r['top1'] for r in record.curve}
        plots['accuracy.png'] = 'Accuracy against N', plot_accuracy(top1, record.curve[0]['source_top1'])
    for file, picture in record.pictures.items():
        # what would end the text of a link is left out
        title = re.sub(r'[\[\]\s]+', ' ', record.of_task.picture_title(picture))
        plots[file] = title, (Path(picture['folder']) / file).read_bytes()
    return plots


def is_own_plot(path: Path) -> bool:
    """Whether a file is a plot that this package drew."""
    return png_values(path) is not None


def need_pages() -> None:
    """Raise SFormerError if a package is missing that draws plots or fills in templates."""
    with needed_packages('pages'):
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401


def new_figure(width: float, height: float) -> 'Figure':
    """A figure of matplotlib of a size in inches.

    Raises:
        SFormerError: If matplotlib is missing.
    """
    with needed_packages('pages'):
        from matplotlib.figure import Figure  # the object interface needs no display and no global state
    return Figure(figsize=(width, height), layout='constrained')


def png(figure: 'Figure', values: Json) -> bytes:
    """A figure of matplotlib as a PNG that carries its numbers."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    with Image.open(drawn) as image:  # matplotlib's own chunks name its version
        return png_bytes(image, values)
