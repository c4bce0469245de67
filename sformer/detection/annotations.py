"""A file in COCO format, read and checked once and whole, before anything is made of it."""
import dataclasses
import hashlib
import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..data.pixels import as_rgb, open_picture, orientation_of, turns
from ..data.preprocessing import unreadable
from ..errors import SFormerError
from ..files import Json
from .masks import Code, ProblemError, mask_code, share_inside

__all__ = ['Annotation', 'Annotations', 'ImageEntry', 'read_annotations']

SLACK = 1.  # pixels that a box may reach beyond its image: annotations are rounded
MIN_SIDE = 0.01  # pixels of a box within its image; below, float32 may round it away
MIN_INSIDE = 0.5  # share of a mask that lies in its box

Box = tuple[float, float, float, float]
Entry = TypeVar('Entry')


@dataclasses.dataclass(frozen=True)
class ImageEntry:
    """An image as a file has it.

    Args:
        id: Its id.
        file_name: Its file, below the folder of the images.
        height: In pixels, as annotated.
        width: In pixels, as annotated.
        upright: Whether annotations are of the picture turned as its EXIF orientation says, not as it is stored.
        sha256: Of its file.
    """
    id: int
    file_name: str
    height: int
    width: int
    upright: bool
    sha256: str


@dataclasses.dataclass(frozen=True)
class Annotation:
    """An object, or a crowd of them, in an image.

    Args:
        id: Its id.
        image_id: Id of its image.
        category_id: Id of what it is.
        box: x, y, width and height in pixels, as the file has them.
        corners: x0, y0, x1, y1 of the box within the image.
        crowd: Whether it stands for many objects: it is not trained on, and what is found in it is not counted.
        mask: Run-length code of its mask; None where masks were not asked for.
    """
    id: int
    image_id: int
    category_id: int
    box: Box
    corners: Box
    crowd: bool
    mask: Code | None


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What a file in COCO format has that is usable.

    Args:
        categories: Names by their ids, in the order of the file.
        images: By their ids, in the order of these.
        of_image: Annotations by the ids of their images.
        problems: What is not usable, a line each.
        repeated: Ids of annotations that are the same as another but for their id, which count once.
        sha256: Of the file.
    """
    categories: dict[int, str]
    images: dict[int, ImageEntry]
    of_image: dict[int, list[Annotation]]
    problems: list[str]
    repeated: list[int]
    sha256: str


def read_annotations(file: Path, folder: Path, masks: bool = False, objects: bool = True) -> Annotations:
    """Read a file in COCO format, and decode each of its images once.

    What is usable is as it should be: an entry has an id of its own; a category has a name of its own; an image has
    a file of its own, which is there, readable and of the size that its entry says; an annotation is of a known image
    and category, its box lies in the image, and at least half of its mask in the box. `area` is not read.

    Args:
        file: The file, JSON.
        folder: Folder of the images.
        masks: Whether annotations need masks.
        objects: Whether categories and annotations are read; else there are none.

    Raises:
        SFormerError: If the file is none in COCO format, or its categories are not usable.
    """
    try:
        content = file.read_bytes()
        data = json.loads(content)
    except (OSError, ValueError) as e:
        raise SFormerError(f'{file} cannot be read as JSON: {e}') from e
    except RecursionError:
        raise SFormerError(f'{file} cannot be read as JSON: lists in lists in lists, without end.') from None
    for key in ('images', 'annotations', 'categories') if objects else ('images',):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise SFormerError(f'{file} is not in COCO format: it has no list of {key}.')

    problems: list[str] = []
    categories = _each(data['categories'] if objects else [], 'category', _category, problems)
    problems += _same_names(categories)
    if problems:  # a detector is made of all of them, so none is left out
        raise SFormerError(f'{file}: {"; ".join(problems)}. Mend the categories of this file.')
    of_file: dict[str, int] = {}

    def image(id: int, entry: Json) -> ImageEntry:
        made = _image(id, entry, folder)
        first = of_file.setdefault(os.path.normpath(made.file_name), id)
        if first != id:  # what is found in it would count as wrong where the objects are of the other one
            raise ProblemError(f'is the file of image {first}, too ({made.file_name})')
        return made

    images = _each(data['images'], 'image', image, problems)
    left_out = {_whole(entry.get('id')) for entry in data['images'] if isinstance(entry, dict)} - {None, *images}

    repeated: list[int] = []
    outlines: dict[tuple[object, ...], list[object]] = {}

    def annotation(id: int, entry: Json) -> Annotation | None:
        if _whole(entry.get('image_id')) in left_out:
            return None  # of an image that has been named
        made = _annotation(id, entry, images, categories, masks)
        alike = outlines.setdefault((made.image_id, made.category_id, made.box, made.crowd), [])
        if entry.get('segmentation') in alike:
            repeated.append(id)
            return None
        alike.append(entry.get('segmentation'))
        return made

    of_image: dict[int, list[Annotation]] = {id: [] for id in sorted(images)}
    for found in _each(data['annotations'] if objects else [], 'annotation', annotation, problems).values():
        of_image[found.image_id].append(found)
    return Annotations(
        categories, {id: images[id] for id in of_image}, of_image, problems, repeated, _sha256(content))


def _each(
        entries: list[object],
        kind: str,
        parse: Callable[[int, Json], Entry | None],
        problems: list[str],
) -> dict[int, Entry]:
    """What is made of entries that have an id of their own, by these; problems of the others are added to those that
    are known."""
    found: dict[int, Entry] = {}
    seen = set()
    for number, entry in enumerate(entries):
        id = _whole(entry.get('id')) if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or id is None:
            problems.append(f'{kind} number {number} has no integer id')
            continue
        if id in seen:
            problems.append(f'{kind} {id} is there twice')
            continue
        seen.add(id)
        try:
            made = parse(id, entry)
        except ProblemError as e:
            problems.append(f'{kind} {id} {e}')
            continue
        if made is not None:
            found[id] = made
    return found


def _category(id: int, entry: Json) -> str:
    name = entry.get('name')
    if type(name) not in (str, int) or not str(name).strip():
        raise ProblemError(f'has no name ({reprlib.repr(name)})')
    return str(name)


def _same_names(categories: dict[int, str]) -> list[str]:
    """Categories that figures by category would not tell apart, a line each."""
    first: dict[str, int] = {}
    same = []
    for id, name in categories.items():
        if name in first:
            same.append(f'categories {first[name]} and {id} have the same name, {name!r}')
        else:
            first[name] = id
    return same


def _image(id: int, entry: Json, folder: Path) -> ImageEntry:
    name = entry.get('file_name')
    size = entry.get('width'), entry.get('height')
    if not isinstance(name, str) or not _is_file(folder / name):
        raise ProblemError(f'is missing ({name if isinstance(name, str) else reprlib.repr(name)})')
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ProblemError(f'is not in the folder of the images ({name})')
    try:
        content = (folder / name).read_bytes()
        picture = open_picture(content)
        orientation = orientation_of(picture)
        stored = as_rgb(picture).size
    except Exception as e:  # damaged files raise about anything
        raise ProblemError(f'is unreadable ({name}: {unreadable(e)})') from e
    upright = stored[::-1] if turns(orientation_of(picture)) else stored
    if size not in (stored, upright):
        raise ProblemError(f'is of {stored} pixels, not {reprlib.repr(size)} ({name})')
    if orientation != 1 and not (turns(orientation) and stored[0] != stored[1]):
        raise ProblemError(f'has the EXIF orientation {orientation}, and its size does not say whether annotations are '
                           f'of the turned picture: save it turned, without the orientation ({name})')
    width, height = stored if size == stored else upright
    return ImageEntry(id, name, height, width, size != stored, _sha256(content))


def _annotation(
        id: int,
        entry: Json,
        images: dict[int, ImageEntry],
        categories: dict[int, str],
        masks: bool,
) -> Annotation:
    image_id = _whole(entry.get('image_id'))
    image = None if image_id is None else images.get(image_id)
    category = _whole(entry.get('category_id'))
    crowd = entry.get('iscrowd', 0)
    if image is None:
        raise ProblemError(f'is of the unknown image {reprlib.repr(entry.get("image_id"))}')
    if category not in categories:
        raise ProblemError(f'is of the unknown category {reprlib.repr(entry.get("category_id"))}')
    if crowd not in (0, 1):
        raise ProblemError(f'has an iscrowd of {reprlib.repr(crowd)}, which is 0 or 1')
    box = _box(entry.get('bbox'), image)
    x, y, width, height = box
    corners = max(x, 0.), max(y, 0.), min(x + width, image.width), min(y + height, image.height)
    if min(corners[2] - corners[0], corners[3] - corners[1]) < MIN_SIDE:
        raise ProblemError(f'has a box of no size within its image ({[*box]})')
    mask = None
    if masks:
        mask = mask_code(entry.get('segmentation'), image.height, image.width)
        inside = share_inside(mask, box)
        if inside < MIN_INSIDE:
            raise ProblemError(f'has a mask of which {inside:.0%} lies in its box ({[*box]})')
    return Annotation(id, image.id, category, box, corners, bool(crowd), mask)


def _box(box: object, image: ImageEntry) -> Box:
    if not isinstance(box, list) or len(box) != 4 or not all(
            type(value) in (int, float) and abs(value) < 1e9 for value in box):  # nor NaN
        raise ProblemError(f'has no box of four numbers ({reprlib.repr(box)})')
    x, y, width, height = map(float, box)
    if width <= 0 or height <= 0:
        raise ProblemError(f'has a box of no size ({box})')
    if min(x, y) < -SLACK or x + width > image.width + SLACK or y + height > image.height + SLACK:
        raise ProblemError(f'has a box outside of its image ({box})')
    return x, y, width, height


def _whole(value: object) -> int | None:
    """A whole number, which some programs write as 3.0; None if it is none."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
