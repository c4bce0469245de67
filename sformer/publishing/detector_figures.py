"""What a card says of a detector: what it detects, of what it is built, and COCO's average precision."""
import re
from typing import Any, Dict, List, Tuple

__all__ = ['FIGURES', 'detector_kind', 'detector_rows', 'metric_rows', 'metrics', 'picture_title', 'task_of']

FIGURES = ('mAP', 'mAP50', 'mAP75')
LISTED = 20  # categories that are named; results have them all


def task_of(detector: Dict[str, Any]) -> Tuple[str, str]:
    """Identifier and name of a detector's task on the Hub."""
    return ('image-segmentation', 'Instance Segmentation') if detector['masks'] else \
        ('object-detection', 'Object Detection')


def detector_kind(detector: Dict[str, Any]) -> str:
    """What was converted, in words, but for its backbone."""
    return f'a {"Mask" if detector["masks"] else "Faster"} R-CNN with a simple feature pyramid'


def detector_rows(detector: Dict[str, Any]) -> List[Tuple[str, Any]]:
    """Rows of the recipe: what a detector detects, and of what it is built."""
    names = [*detector['categories'].values()]
    strides = ', '.join(f'{16 / scale:g}' for scale in detector['scales'])
    return [
        ('input', f'RGB in [0, 1], fitted into {" x ".join(map(str, detector["image_size"]))} pixels'),
        ('detects', ', '.join(names) if len(names) <= LISTED else f'{len(names)} categories'),
        ('backbone', f'`{detector["backbone"]}`'),
        ('pyramid', f'{detector["channels"]} channels at strides of {strides} pixels'),
        ('detections per image, at most', detector['max_detections'])]


def metrics(result: Dict[str, Any]) -> List[Tuple[str, float]]:
    """Names and values of what an index may list, the first is the one to compare by."""
    kinds = [kind for kind in ('masks', 'boxes') if kind in result]
    return [(f'{kind} {name} [%]', result[kind][name]) for kind in kinds for name in FIGURES
            if result[kind].get(name) is not None]


def metric_rows(result: Dict[str, Any]) -> Tuple[List[List[str]], bool]:
    """Rows of average precision, over all and by category, and whether the source's stand in their second column."""
    sides = 'source_boxes' in result
    rows: List[List[str]] = []

    def add(label: str, name: str, found: Dict[str, Any], source: Dict[str, Any]) -> None:
        values = [source.get(name), found.get(name)] if sides else [found.get(name)]
        if any(value is not None for value in values):
            rows.append([label, *('' if value is None else f'{value:.2f}' for value in values)])

    for kind in ('boxes', 'masks'):
        found, source = result.get(kind) or {}, result.get(f'source_{kind}') or {}
        for name in FIGURES if found else ():
            add(f'{kind}, {name} [%]', name, found, source)
        classes, others = found.get('per_class') or {}, source.get('per_class') or {}
        for category in classes if len(classes) <= LISTED else ():
            add(f'{kind}, {category}: mAP [%]', 'mAP', classes[category], others.get(category) or {})
    return rows, sides


def picture_title(picture: Dict[str, Any]) -> str:
    """What is to be seen."""
    what = 'Detections of the source, of the SFormer, and the share of neurons that fire at each patch' \
        if picture.get('side_by_side') else 'Detections'
    return re.sub(r'[\[\]\s]+', ' ', f'{what}: {picture["image"]}')  # what would end the text of a link
