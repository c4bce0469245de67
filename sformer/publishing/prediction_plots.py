"""A picture of predictions: each image, where it spikes, and the most probable classes."""
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import SFormerError
from ..evaluation.predictions import Prediction
from ..tasks import Look
from .plots import new_figure, overlay, png
from .prediction_files import MARK, as_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['MOST_DRAWN', 'check_room', 'plot_predictions']

MOST_DRAWN = 16
SIDE = 2.6  # inches of an image
NETWORK_COLOURS = {'model': '#4c78a8', 'source': '#bab0ac'}
LONGEST = 24  # letters of a name


def check_room(number: int) -> None:
    """Raise SFormerError if images are more than can be looked at in one picture."""
    if number > MOST_DRAWN:
        raise SFormerError(f'a picture has room for {MOST_DRAWN} images: --output takes .csv and .json for more.')


def plot_predictions(rows: Sequence[tuple[Prediction, Look | None]], title: str) -> bytes:
    """Draw predictions, a row per image.

    Args:
        rows: Predictions, and what there is to see of each; None where an image cannot be read.
        title: What predicted.

    Returns:
        PNG that carries the predictions, as of `plots.plot_accuracy`.

    Raises:
        SFormerError: If there are more images than can be read in one picture, or matplotlib is missing.
    """
    check_room(len(rows))
    looks = [look for _, look in rows if look is not None]
    panels = max((len(look.drawn) + (look.spikes is not None) for look in looks), default=0)
    figure = new_figure(SIDE * 1.25 * panels + 3.2, SIDE * len(rows) + 0.4)
    figure.suptitle(title, fontsize=10)
    grid = figure.add_gridspec(len(rows), panels + 1, width_ratios=[*[1.25] * panels, 1.2])
    for i, (prediction, look) in enumerate(rows):
        column = 0
        for name, pixels in look.drawn.items() if look else ():
            axes = figure.add_subplot(grid[i, column])
            axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation='nearest')
            axes.set_axis_off()
            axes.set_title(name, fontsize=8)
            column += 1
        if look and look.spikes is not None:
            axes = figure.add_subplot(grid[i, column])
            overlay(figure, axes, look.pixels, look.spikes, look.limits, look.unit)
            axes.set_title(f'where it spikes: {look.spikes.min():.2f} to {look.spikes.max():.2f}', fontsize=8)
        axes = figure.add_subplot(grid[i, -1])
        axes.set_title(_end_of(prediction.image), fontsize=8)
        _bars(axes, prediction)
    return png(figure, {MARK: [as_json(prediction) for prediction, _ in rows]})


def _bars(axes: 'Axes', prediction: Prediction) -> None:
    """Classes of the model and, below them, of its source as bars."""
    networks = {'model': prediction.found, 'source': prediction.source or ()}
    rows = [(network, finding) for network, found in networks.items() for finding in found]
    if not rows:
        axes.set_axis_off()
        axes.text(0.5, 0.5, prediction.error or 'nothing found', ha='center', va='center', fontsize=8, wrap=True)
        return
    for network, found in networks.items():
        places = [i for i, (of, _) in enumerate(rows) if of == network]
        values = [finding.probability for finding in found]
        if places:
            axes.barh(places, values, height=0.7, color=NETWORK_COLOURS[network], label=network)
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.02, place, f'{value:.3f}', va='center', fontsize=7)
    axes.set_yticks(range(len(rows)), [_end_of(finding.name) for _, finding in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2)
    axes.set_xticks([0, 0.5, 1])
    axes.tick_params(axis='x', labelsize=7)
    axes.set_xlabel('probability' if rows[0][1].box is None else 'score', fontsize=8)
    if prediction.source is not None:
        axes.legend(fontsize=7, loc='lower right')


def _end_of(text: str) -> str:
    return text if len(text) <= LONGEST else f'…{text[1 - LONGEST:]}'
