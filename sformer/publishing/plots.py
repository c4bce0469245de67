"""Plots of what was measured, as PNGs that carry their numbers."""
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..errors import needed_packages
from ..files import Json, png_bytes, png_values
from ..profiling.scales import share_range
from .model_record import ModelRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    'plot_accuracy', 'plot_activity', 'need_pages', 'new_figure', 'overlay', 'png', 'render_plots', 'standard_error',
    'is_own_plot',
]


def standard_error(top1: float, num_images: float | None) -> float:
    """Standard error of an accuracy in percent; 0 where it is not known of how many images it is."""
    return math.sqrt(top1 * (100 - top1) / num_images) if num_images else 0.


def plot_accuracy(accuracy: dict[int, float], source: float, num_images: int | None = None) -> bytes:
    """Draw top-1 accuracy against the number of levels N, with a standard error.

    Args:
        accuracy: Top-1 in percent per N.
        source: Top-1 of the source in percent.
        num_images: Number of images that both are of; None, if it is not known, draws no errors.

    Returns:
        PNG that carries its numbers as JSON in the text chunk `sformer`, and nothing that changes from one drawing to
        the next.
    """
    figure = new_figure(6, 4)
    axes = figure.add_subplot(
        xscale='log', xlabel='levels N per branch', ylabel='top-1 [%]', title='Accuracy of the single-timestep SFormer')
    axes.axhline(source, color='grey', linestyle='--', label=f'source, {source:.1f} %')
    errors = [standard_error(top1, num_images) for top1 in accuracy.values()]
    of = f' ± standard error of {num_images:,} images' if num_images else ''
    axes.errorbar(list(accuracy), list(accuracy.values()), errors, marker='o', capsize=3, label=f'SFormer{of}')
    # at least five points, or a curve within the noise of a few images would look like a cliff
    low = min(source, *(top1 - error for top1, error in zip(accuracy.values(), errors, strict=True)))
    high = max(source, *(top1 + error for top1, error in zip(accuracy.values(), errors, strict=True)))
    margin = max(0.05 * (high - low), (5 - (high - low)) / 2)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xticks(list(accuracy), [str(n) for n in accuracy])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    return png(figure, dict(top1=accuracy, source_top1=source, num_images=num_images))


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
    low, high = share_range(activity.values())
    image = axes.imshow(grid, vmin=low, vmax=high, cmap='viridis', aspect='auto')
    for y, row in enumerate(grid):
        for x, share in enumerate(row):
            if share == share:
                axes.text(x, y, f'{share:.2f}', ha='center', va='center', fontsize=8,
                          color='black' if share > low + 0.6 * (high - low) else 'white')
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(cells)), list(cells), fontsize=8)
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
        counts = {r.get('num_images') for r in record.curve}
        plots['accuracy.png'] = 'Accuracy against N', plot_accuracy(
            top1, record.curve[0]['source_top1'], counts.pop() if len(counts) == 1 else None)
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


def overlay(
        figure: 'Figure',
        axes: 'Axes',
        pixels: torch.Tensor,
        values: torch.Tensor,
        limits: tuple[float, float],
        unit: str = '',
) -> None:
    """Draw how much each patch of an image has of something, over the image in grey, with a scale.

    Args:
        figure: Of the axes.
        axes: Where to.
        pixels: (C, H, W), values in [0, 1].
        values: (rows, columns) of patches.
        limits: What the ends of the scale stand for, as of `profiling.scales`.
        unit: What they are, beside the scale.
    """
    with needed_packages('pages'):
        import matplotlib.ticker
    low, high = limits
    extent = (0, pixels.shape[2], pixels.shape[1], 0)
    grey = pixels.clamp(0, 1).mean(0)
    axes.imshow(grey.numpy(), extent=extent, cmap='gray', vmin=-1, vmax=2)  # pale, or it would change the colours
    heat = axes.imshow(values.numpy(), extent=extent, cmap='inferno', alpha=0.65, vmin=low, vmax=high)
    axes.set_axis_off()
    bar = figure.colorbar(heat, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label(unit, fontsize=7)
    bar.ax.tick_params(labelsize=6)
    bar.locator = matplotlib.ticker.MaxNLocator(4)
    bar.update_ticks()


def png(figure: 'Figure', values: Json) -> bytes:
    """A figure of matplotlib as a PNG that carries its numbers."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    with Image.open(drawn) as image:  # matplotlib's own chunks name its version
        return png_bytes(image, values)
