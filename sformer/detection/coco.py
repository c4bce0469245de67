"""Images with annotations in COCO format, checked before anything is made of them."""
import collections
import json
import logging
import math
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import SFormerError
from ..files import file_hash

__all__ = ['CocoData', 'mask_tools', 'open_coco', 'read_image']

_logger = logging.getLogger(__name__)

SLACK = 1.  # pixels that a box may reach beyond its image: annotations are rounded
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises
NAMED = 5  # problems in a message

Target = Dict[str, Any]


class CocoData:
    """Images of a split in the order of their ids, with their annotations.

    Args:
        images: Folder of the images.
        annotations: JSON file in COCO format.
        masks: Whether annotations need masks.
        skip_bad: Leave out images and annotations that are not usable, with a warning, instead of an error.

    Attributes:
        categories: Names of categories by their ids.
        images: Entries of the images by their ids, in the order of these.
        annotations: Annotations by the ids of their images.
        problems: What is not usable, a line each.

    Raises:
        SFormerError: If the file is none in COCO format; or an id is there twice, an annotation is of an unknown image
            or category, has a box of no size or outside of its image or an empty mask, or an image is missing or
            unreadable or of another size than its entry says; names them by their ids.
    """

    def __init__(self, images: Path, annotations: Path, masks: bool = False, skip_bad: bool = False):
        self.folder, self.file, self.masks = images, annotations, masks
        self.problems: List[str] = []
        data = _read(annotations)
        self.categories: Dict[int, str] = {
            int(entry['id']): str(entry['name']) for entry in self._unique(data['categories'], 'category')}
        self.images: Dict[int, Dict[str, Any]] = {
            entry['id']: entry for entry in sorted(self._unique(data['images'], 'image'), key=lambda e: e['id'])
            if self._usable('image', entry, self._image_problem(entry))}
        known = {entry['id'] for entry in data['images']}
        self.annotations: Dict[int, List[Dict[str, Any]]] = collections.defaultdict(list)
        for entry in self._unique(data['annotations'], 'annotation'):
            if entry.get('image_id') in known - self.images.keys():
                continue  # of an image that has been named
            if self._usable('annotation', entry, self._annotation_problem(entry)):
                self.annotations[entry['image_id']].append(entry)
        if self.problems:
            more = f' and {len(self.problems) - NAMED} more' if len(self.problems) > NAMED else ''
            message = f'{annotations}: {"; ".join(self.problems[:NAMED])}{more}.'
            if not skip_bad:
                raise SFormerError(f'{message} --skip-bad (skip_bad=True) leaves them out.')
            _logger.warning(f'{message} They are left out.')
        if not self.images:
            raise SFormerError(f'{annotations}: not one image is usable.')

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the annotations, which name the images."""
        return file_hash(self.file)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, id: int) -> torch.Tensor:
        """An image as RGB in [0, 1], (3, H, W)."""
        return read_image(self.folder / self.images[id]['file_name'])

    def target(self, id: int) -> Target:
        """Boxes (N, 4) in pixels x0, y0, x1, y1, labels (N) from 1 in the order of category ids, masks (N, H, W) if
        there are to be any; without crowds, which are no single objects."""
        entry = self.images[id]
        size = entry['height'], entry['width']
        found = [a for a in self.annotations[id] if not a.get('iscrowd')]
        labels = {category: i for i, category in enumerate(sorted(self.categories), start=1)}
        x, y, w, h = torch.tensor([a['bbox'] for a in found], dtype=torch.float32).reshape(-1, 4).unbind(1)
        boxes = F.clamp_bounding_boxes(tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
            torch.stack([x, y, x + w, y + h], dim=1), format='XYXY', canvas_size=size))
        target = dict(boxes=boxes, labels=torch.tensor([labels[a['category_id']] for a in found], dtype=torch.int64))
        if self.masks:
            masks = [torch.from_numpy(mask_tools().decode(rle(a['segmentation'], *size))) for a in found]
            target['masks'] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        return target

    def _usable(self, kind: str, entry: Dict[str, Any], problem: Optional[str]) -> bool:
        if problem is not None:
            self.problems.append(f'{kind} {entry["id"]} {problem}')
        return problem is None

    def _unique(self, entries: List[Dict[str, Any]], kind: str) -> Iterator[Dict[str, Any]]:
        """Entries whose id is an integer and not there before."""
        seen = set()
        for i, entry in enumerate(entries):
            id = entry.get('id') if isinstance(entry, dict) else None
            if not isinstance(id, int) or isinstance(id, bool):
                self.problems.append(f'{kind} number {i} has no integer id')
            elif id in seen:
                self.problems.append(f'{kind} {id} is there twice')
            else:
                seen.add(id)
                yield entry

    def _image_problem(self, entry: Dict[str, Any]) -> Optional[str]:
        name, size = entry.get('file_name'), (entry.get('width'), entry.get('height'))
        if not isinstance(name, str) or not (self.folder / name).is_file():
            return f'is missing ({name})'
        if not (self.folder / name).resolve().is_relative_to(self.folder.resolve()):
            return f'is not in the folder of the images ({name})'
        try:
            with Image.open(self.folder / name) as image:
                image.load()
        except UNREADABLE as e:
            return f'is unreadable ({name}: {e})'
        return None if image.size == size else f'is of {image.size} pixels, not {size} ({name})'

    def _annotation_problem(self, entry: Dict[str, Any]) -> Optional[str]:
        image = self.images.get(entry.get('image_id', -1))
        if image is None:
            return f'is of the unknown image {entry.get("image_id")}'
        if entry.get('category_id') not in self.categories:
            return f'is of the unknown category {entry.get("category_id")}'
        box = entry.get('bbox')
        if not isinstance(box, list) or len(box) != 4 or not all(
                isinstance(v, (int, float)) and math.isfinite(v) for v in box):
            return f'has no box of four numbers ({box})'
        x, y, w, h = box
        if w <= 0 or h <= 0:
            return f'has a box of no size ({box})'
        if min(x, y) < -SLACK or x + w > image['width'] + SLACK or y + h > image['height'] + SLACK:
            return f'has a box outside of its image ({box})'
        return self._mask_problem(entry.get('segmentation'), image) if self.masks else None

    def _mask_problem(self, segmentation: Any, image: Dict[str, Any]) -> Optional[str]:
        if not segmentation:
            return 'has no mask'
        size = image['height'], image['width']
        if isinstance(segmentation, dict) and tuple(segmentation.get('size', ())) != size:
            return f'has a mask of {segmentation.get("size")} pixels, not {list(size)}'
        try:
            area = int(mask_tools().area(rle(segmentation, *size)))
        except (TypeError, ValueError, KeyError, IndexError) as e:
            return f'has no valid mask ({e})'
        return None if area else 'has an empty mask'


def read_image(path: Path) -> torch.Tensor:
    """An image file as RGB in [0, 1], (3, H, W).

    Raises:
        SFormerError: If it is missing or unreadable.
    """
    try:
        with Image.open(path) as image:
            return F.to_dtype(F.to_image(image.convert('RGB')), torch.float32, scale=True).as_subclass(torch.Tensor)
    except UNREADABLE as e:
        raise SFormerError(f'{path} cannot be read as an image: {e}') from e


def rle(segmentation: Any, height: int, width: int) -> Dict[str, Any]:
    """Run-length code of a mask, of polygons, or of a code that is compressed or not."""
    tools = mask_tools()
    if isinstance(segmentation, list):
        return tools.merge(tools.frPyObjects(segmentation, height, width))
    if isinstance(segmentation['counts'], list):
        return tools.frPyObjects(segmentation, height, width)
    return segmentation


def mask_tools() -> Any:
    """pycocotools' functions of run-length codes.

    Raises:
        SFormerError: If it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as e:
        raise SFormerError('masks and COCO metrics need pycocotools: pip install "sformer[detection]".') from e
    return mask


def _read(file: Path) -> Dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise SFormerError(f'{file} cannot be read as JSON: {e}') from e
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise SFormerError(f'{file} is not in COCO format: it has no list of {key}.')
    return data


def open_coco(
        root: Union[str, Path],
        split: str,
        masks: bool = False,
        skip_bad: bool = False,
) -> CocoData:
    """A split of a folder in COCO format: SPLIT.json or annotations/instances_SPLIT.json, and images in SPLIT/.

    Args:
        root: The folder.
        split: Its split.
        masks: As of `CocoData`.
        skip_bad: As of `CocoData`.

    Raises:
        SFormerError: If there is no such split, or as `CocoData` raises.
    """
    root = Path(root)
    found = [file for file in _annotation_files(root, split) if file.is_file()]
    if not found or not (root / split).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise SFormerError(
            f'{root} has no split {split!r} in COCO format: {split}.json, or annotations/instances_{split}.json, and '
            f'images in {split}/. Folders that are there: {", ".join(there) or "none"}.')
    return CocoData(root / split, found[0], masks, skip_bad)


def _annotation_files(root: Path, split: str) -> Tuple[Path, Path]:
    return root / f'{split}.json', root / 'annotations' / f'instances_{split}.json'
