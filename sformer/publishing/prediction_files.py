"""Predictions as files: CSV and JSON, written as they are made, and pictures."""
import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image

from ..data.image_files import ImageSource, image_sources
from ..errors import SFormerError
from ..evaluation.predictions import Finding, Prediction
from ..files import Json, holds, may_write, png_values, write_aside, written_to

__all__ = ['COLUMNS', 'SUFFIXES', 'as_json', 'check_predictions_file', 'writing_predictions']

SUFFIXES = ('.csv', '.json', '.png')
# of a CSV file: a row per image and class, or one with an error
COLUMNS = ('image', 'network', 'rank', 'index', 'name', 'probability', 'x0', 'y0', 'x1', 'y1', 'error')
NETWORKS = ('model', 'source')
MARK = 'predictions'  # key of what a PNG carries

Write = Callable[[Prediction], None]


def check_predictions_file(path: Path, overwrite: bool = False, images: Iterable[ImageSource] = ()) -> Path:
    """Where predictions will be written: what a link points to.

    Args:
        path: The file; there may be one already.
        overwrite: Replace whatever is there.
        images: What will be predicted, as of `image_sources`, which is never replaced.

    Raises:
        SFormerError: If the name ends in none of `SUFFIXES`, or what is there is not to be replaced or is an image.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise SFormerError(f'{path}: predictions are written as .csv, .json or, drawn, as .png.')
    found = may_write(path, 'predictions', _is_own, overwrite=overwrite)
    for image in image_sources(images) if found.exists() else ():
        if not isinstance(image, Image.Image) and os.path.exists(image) and found.samefile(image):
            raise SFormerError(f'{path} is among the images, which predictions would replace. Name another file.')
    return found


def _is_own(path: Path) -> bool:
    if path.suffix.lower() == '.png':
        return MARK in (png_values(path) or {})
    if path.suffix.lower() == '.json':
        return holds('model', 'topk', 'images')(path)
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.readline().strip() in ('', ','.join(COLUMNS))


def as_json(prediction: Prediction) -> Json:
    """A prediction as an object of JSON: `image`, and `found` and perhaps `source` with lists of `name`, `index`,
    `probability` and, of detections, `box`; or `error`."""
    if prediction.error is not None:
        return dict(image=prediction.image, error=prediction.error)
    found = dict(image=prediction.image, found=[_finding(finding) for finding in prediction.found])
    if prediction.source is not None:
        found['source'] = [_finding(finding) for finding in prediction.source]
    return found


def _finding(finding: Finding) -> Json:
    values: Json = dict(name=finding.name, index=finding.index, probability=finding.probability)
    return values if finding.box is None else dict(values, box=list(finding.box))


def _rows(prediction: Prediction) -> Iterator[list[object]]:
    if prediction.error is not None:
        yield [prediction.image, *[''] * (len(COLUMNS) - 2), prediction.error]
    for network, found in zip(NETWORKS, (prediction.found, prediction.source or ()), strict=True):
        for rank, finding in enumerate(found, 1):
            yield [prediction.image, network, rank, finding.index, finding.name, finding.probability,
                   *(finding.box or [''] * 4), '']


@contextlib.contextmanager
def writing_predictions(path: Path, model: str, topk: int) -> Iterator[Write]:
    """Write CSV or JSON aside, prediction by prediction; the file is there when the block ends without an error.

    Args:
        path: File of `check_predictions_file`.
        model: Name of the model, for JSON.
        topk: Number of classes that are asked for, for JSON.
    """
    path = written_to(path)
    with write_aside(path.parent) as aside, open(
            aside / path.name, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        if path.suffix.lower() == '.csv':
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(COLUMNS)
            yield lambda prediction: writer.writerows(_rows(prediction))
            return
        separator = ''
        file.write(f'{{"model": {json.dumps(model)}, "topk": {topk}, "images": [')

        def write(prediction: Prediction) -> None:
            nonlocal separator
            file.write(f'{separator}\n{json.dumps(as_json(prediction))}')
            separator = ','
        yield write
        file.write('\n]}\n')
