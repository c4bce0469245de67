"""What a card says of a detector: what it detects, of what it is built, and COCO's average precision."""
import re
from typing import Any

from ..evaluation.figures import DETECTION, PRECISION
from ..evaluation.schema import SOURCE, Result

__all__ = ['category_rows', 'detector_kind', 'detector_rows', 'picture_title', 'task_of']

LISTED = 20  # categories that are named; results have them all


def task_of(detector: dict[str, Any]) -> tuple[str, str]:
    """Identifier and name of a detector's task on the Hub."""
    return ('image-segmentation', 'Instance Segmentation') if detector['masks'] else \
        ('object-detection', 'Object Detection')


def detector_kind(detector: dict[str, Any]) -> str:
    """What was converted, in words, but for its backbone."""
    return f'a {"Mask" if detector["masks"] else "Faster"} R-CNN with a simple feature pyramid'


def detector_rows(detector: dict[str, Any]) -> list[tuple[str, Any]]:
    """Rows of the recipe: what a detector detects, and of what it is built."""
    names = [*detector['categories'].values()]
    strides = ', '.join(f'{16 / scale:g}' for scale in detector['scales'])
    return [
        ('input', f'RGB in [0, 1], fitted into {" x ".join(map(str, detector["image_size"]))} pixels'),
        ('detects', ', '.join(names) if len(names) <= LISTED else f'{len(names)} categories'),
        ('backbone', f'`{detector["backbone"]}`'),
        ('pyramid', f'{detector["channels"]} channels at strides of {strides} pixels'),
        ('detections per image, at most', detector['max_detections'])]


def category_rows(result: Result) -> list[list[str]]:
    """Rows of the first average of precision by category, like those of the schema."""
    key, figure = next(iter(PRECISION.items()))
    sides = DETECTION.has_source(result)
    rows = []
    for kind in ('boxes', 'masks'):
        own, theirs = ((result.get(f'{side}{kind}') or {}).get('per_class') or {} for side in ('', SOURCE))
        for category in own if len(own) <= LISTED else ():
            values = [figures.get(category, {}).get(key) for figures in (theirs, own)][not sides:]
            if any(value is not None for value in values):
                cells = ['' if value is None else f'{value:.{figure.digits}f}' for value in values]
                rows.append([f'{kind}, {category}: {figure.label} [{figure.unit}]', *cells])
    return rows


def picture_title(picture: dict[str, Any]) -> str:
    """What is to be seen."""
    what = 'Detections of the source, of the SFormer, and the share of neurons that fire at each patch' \
        if picture.get('side_by_side') else 'Detections'
    return re.sub(r'[\[\]\s]+', ' ', f'{what}: {picture["image"]}')  # what would end the text of a link
