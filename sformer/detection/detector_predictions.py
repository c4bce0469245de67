"""What a detector finds in images that nobody has annotated, image by image."""
from collections.abc import Iterable, Iterator

import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN

from ..data.image_files import ImageSource, name_of_image, read_rgb
from ..errors import UnreadableImageError, enough_memory
from ..evaluation.predictions import Finding, Prediction
from .coco import pixels_of_picture
from .detector_evaluation import check_calibrated, detect

__all__ = ['predict_objects']


def predict_objects(
        detector: nn.Module,
        source: nn.Module | None,
        images: Iterable[ImageSource],
        topk: int = 5,
) -> Iterator[Prediction]:
    """The detections of each image with the highest scores, one image at a time.

    Args:
        detector: As of `load_detector`; it is not changed.
        source: Another detector of the same categories; None for nothing.
        images: As of `sformer.data.image_files.image_sources`.
        topk: Number of detections.

    Raises:
        UncalibratedError: If thresholds were never fitted.
    """
    check_calibrated(detector)
    for index, image in enumerate(images):
        name = name_of_image(image, index)
        try:
            pixels = pixels_of_picture(read_rgb(image))
        except UnreadableImageError as e:
            yield Prediction(image=name, error=str(e))
            continue
        with enough_memory('take smaller images.'):
            found = _objects(detector, pixels, topk)
            other = None if source is None else _objects(source, pixels, topk)
        yield Prediction(image=name, found=found, source=other)


def _objects(detector: FasterRCNN, pixels: torch.Tensor, topk: int) -> tuple[Finding, ...]:
    found = detect(detector, pixels)
    categories = detector.config.categories
    names = [categories[id] for id in sorted(categories)]
    best = found['scores'].argsort(descending=True, stable=True)[:topk].tolist()
    findings = []
    for i in best:
        x0, y0, x1, y1 = found['boxes'][i].tolist()
        index = int(found['labels'][i]) - 1
        findings.append(Finding(
            name=names[index], index=index, probability=found['scores'][i].item(), box=(x0, y0, x1, y1)))
    return tuple(findings)
