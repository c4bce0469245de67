"""Images with annotations in COCO format, as detectors are trained and evaluated on them."""
import hashlib
import logging
from pathlib import Path

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..data.image_files import read_rgb
from ..data.names import find_data
from ..errors import SFormerError, UnreadableImageError
from .annotations import read_annotations
from .masks import mask_tools

__all__ = ['CocoData', 'open_coco', 'pixels_of_picture', 'read_image']

_logger = logging.getLogger(__name__)

NAMED = 5  # problems in a message

Target = dict[str, torch.Tensor]


class CocoData:
    """Images of a split in the order of their ids, with their annotations.

    Args:
        images: Folder of the images.
        annotations: JSON file in COCO format.
        masks: Whether annotations need masks.
        skip_bad: Leave out images and annotations that are not usable, with a warning, instead of an error.
        objects: Whether categories and annotations are read; else there are none.

    Attributes:
        categories: Names of categories by their ids.
        images: Entries of the images by their ids, in the order of these.
        annotations: Annotations by the ids of their images.
        problems: What is not usable, a line each.
        fingerprint: SHA-256 of the annotations and of the images that are usable.

    Raises:
        SFormerError: As `read_annotations` raises; or if an image or an annotation is not usable, or no image is. Names
            them by their ids.
    """

    def __init__(
            self,
            images: Path,
            annotations: Path,
            masks: bool = False,
            skip_bad: bool = False,
            objects: bool = True,
    ):
        self.folder = images
        self.file = annotations
        self.masks = masks
        found = read_annotations(annotations, images, masks, objects)
        self.categories = found.categories
        self.images = found.images
        self.annotations = found.of_image
        self.problems = found.problems
        content = [found.sha256, [(image.id, image.sha256) for image in self.images.values()]]
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()
        if self.problems:
            more = f' and {len(self.problems) - NAMED} more' if len(self.problems) > NAMED else ''
            message = f'{annotations}: {"; ".join(self.problems[:NAMED])}{more}.'
            if not skip_bad:
                raise SFormerError(f'{message} --skip-bad (skip_bad=True) leaves them out.')
            _logger.warning(f'{message} They are left out.')
        if found.repeated:
            some = ', '.join(map(str, found.repeated[:NAMED]))
            _logger.warning(f'{annotations}: {len(found.repeated)} annotations repeat another in all but their ids '
                            f'({some}{" ..." if len(found.repeated) > NAMED else ""}), and are left out.')
        if not self.images:
            raise SFormerError(f'{annotations}: not one image is usable.')

    def __len__(self) -> int:
        return len(self.images)

    def image(self, id: int) -> torch.Tensor:
        """An image as RGB in [0, 1], (3, H, W)."""
        entry = self.images[id]
        return read_image(self.folder / entry.file_name, entry.upright)

    def target(self, id: int) -> Target:
        """Boxes (N, 4) in pixels x0, y0, x1, y1, labels (N) from 1 in the order of category ids, masks (N, H, W) if
        there are to be any; without crowds, which are no single objects."""
        entry = self.images[id]
        size = entry.height, entry.width
        found = [annotation for annotation in self.annotations[id] if not annotation.crowd]
        labels = {category: i for i, category in enumerate(sorted(self.categories), start=1)}
        corners = torch.tensor([annotation.corners for annotation in found], dtype=torch.float32).reshape(-1, 4)
        boxes = tv_tensors.BoundingBoxes(corners, format='XYXY', canvas_size=size)  # type: ignore[call-overload]
        target = dict(boxes=boxes, labels=torch.tensor([labels[a.category_id] for a in found], dtype=torch.int64))
        if self.masks:
            masks = [torch.from_numpy(mask_tools().decode(annotation.mask)) for annotation in found]
            target['masks'] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        return target


def read_image(path: Path, upright: bool = True) -> torch.Tensor:
    """An image file as RGB in [0, 1], (3, H, W).

    Args:
        path: The file.
        upright: Turn it as its EXIF orientation says.

    Raises:
        UnreadableImageError: If it is missing or unreadable, or its pixels have no known range.
    """
    try:
        return pixels_of_picture(read_rgb(path, upright))
    except UnreadableImageError as e:
        raise UnreadableImageError(f'{path} cannot be read as an image: {e}') from e


def pixels_of_picture(picture: Image.Image) -> torch.Tensor:
    """A picture in RGB as detectors read it, (3, H, W) in [0, 1]."""
    return F.to_dtype(F.to_image(picture), torch.float32, scale=True).as_subclass(torch.Tensor)


def open_coco(
        root: str | Path,
        split: str,
        masks: bool = False,
        skip_bad: bool = False,
        objects: bool = True,
) -> CocoData:
    """A split of a folder in COCO format: SPLIT.json or annotations/instances_SPLIT.json, and images in SPLIT/.

    Args:
        root: The folder, or what else `sformer.data.names.find_data` finds it by.
        split: Its split.
        masks: As of `CocoData`.
        skip_bad: As of `CocoData`.
        objects: As of `CocoData`.

    Raises:
        SFormerError: If there is no such split, or as `CocoData` raises.
    """
    place = find_data(str(root))
    if place.folder is None:
        raise SFormerError(f'{place.name!r} is not a folder: {place.hint}.')
    root = place.folder
    found = [file for file in _annotation_files(root, split) if file.is_file()]
    if not found or not (root / split).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise SFormerError(
            f'{root} has no split {split!r} in COCO format: {split}.json, or annotations/instances_{split}.json, and '
            f'images in {split}/. Folders that are there: {", ".join(there) or "none"}.')
    return CocoData(root / split, found[0], masks, skip_bad, objects)


def _annotation_files(root: Path, split: str) -> tuple[Path, Path]:
    return root / f'{split}.json', root / 'annotations' / f'instances_{split}.json'
