"""Masks of objects as run-length codes, from polygons or codes as files have them.

They are checked before pycocotools reads them: what it is not made for makes it hang, or give pixels that nobody set.
"""
import reprlib
from types import ModuleType

import numpy as np

from ..errors import needed_packages
from ..files import Json

__all__ = ['ProblemError', 'encode', 'mask_code', 'mask_tools', 'share_inside']

MAX_OUTLINE = 10 ** 6  # pixels that the outline of a polygon may be long: what is beyond fills the memory

Code = Json  # run-length code as pycocotools has it: `size` [height, width], and `counts`


class ProblemError(ValueError):
    """What is wrong with an entry of a file, in words that follow its name."""


def mask_tools() -> ModuleType:
    """pycocotools' functions of run-length codes.

    Raises:
        SFormerError: If it is not installed.
    """
    with needed_packages('detection'):
        from pycocotools import mask
    return mask


def encode(mask: np.ndarray) -> Code:
    """The code of a mask (H, W) of 0 and 1."""
    return mask_tools().encode(np.asfortranarray(mask.astype(np.uint8)))


def mask_code(segmentation: object, height: int, width: int) -> Code:
    """The code of a mask that a file has as polygons or as a code, compressed or not.

    Raises:
        ProblemError: If it is neither, does not fit the image, or has no pixel.
    """
    if not segmentation:
        raise ProblemError('has no mask')
    if isinstance(segmentation, list):
        code = _of_polygons(segmentation, height, width)
    elif isinstance(segmentation, dict):
        code = _of_runs(segmentation, height, width)
    else:
        raise ProblemError(f'has a mask that is neither polygons nor a run-length code ({reprlib.repr(segmentation)})')
    if not mask_tools().area(code):
        raise ProblemError('has an empty mask')
    return code


def share_inside(code: Code, box: tuple[float, float, float, float]) -> float:
    """The share of a mask that lies in a box x, y, width, height, or beside it by one pixel."""
    tools = mask_tools()
    x, y, width, height = box
    around = tools.frPyObjects(np.array([[x - 1, y - 1, width + 2, height + 2]]), *code['size'])[0]
    return float(tools.area(tools.merge([code, around], intersect=True)) / tools.area(code))


def _of_polygons(polygons: list[object], height: int, width: int) -> Code:
    size = np.array([width, height])
    for polygon in polygons:
        if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
            raise ProblemError(f'has a mask that is no list of polygons, lists of numbers ({reprlib.repr(polygons)})')
        if len(polygon) < 6 or len(polygon) % 2:
            raise ProblemError(f'has a polygon of {len(polygon)} numbers, which are no x and y of three points or more')
        beyond = next((value for value in polygon if not abs(value) < 1e9), None)  # NaN, too, and what no float holds
        if beyond is not None:
            raise ProblemError(f'has a polygon with {reprlib.repr(beyond)}, which is nowhere in an image')
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if (points < -size).any() or (points > 2 * size).any():
            raise ProblemError(f'has a polygon far outside of its image ({reprlib.repr(polygon)})')
        if np.abs(points[1:] - points[:-1]).max(1).sum() > MAX_OUTLINE:
            raise ProblemError(f'has a polygon whose outline is longer than {MAX_OUTLINE:,} pixels')
    tools = mask_tools()
    return tools.merge(tools.frPyObjects(polygons, height, width))


def _of_runs(segmentation: Code, height: int, width: int) -> Code:
    if segmentation.get('size') != [height, width]:
        raise ProblemError(f'has a mask of {reprlib.repr(segmentation.get("size"))} pixels, not {[height, width]}')
    runs = segmentation.get('counts')
    if isinstance(runs, str):
        runs = _uncompressed(runs)
    if not isinstance(runs, list) or not {*map(type, runs)} <= {int} or min(runs, default=0) < 0:
        raise ProblemError(f'has a mask whose runs are no whole numbers from 0 ({reprlib.repr(runs)})')
    if sum(runs) != height * width:
        raise ProblemError(f'has a mask whose runs add up to {sum(runs)} pixels, not to {height} x {width}')
    tools = mask_tools()
    code = tools.frPyObjects(dict(size=[height, width], counts=runs), height, width)
    # runs of no pixel end pycocotools' intersections where two of them meet
    return encode(tools.decode(code)) if 0 in runs[1:] else code


def _uncompressed(counts: str) -> list[int]:
    """Runs of a compressed code: numbers of 5 bits per character, the third and later ones less the one before last.

    Raises:
        ProblemError: If a character is none of a code, or the last run is cut off.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise ProblemError(f'has a mask with the character {character!r}, which is none of a run-length code')
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:  # the number goes on
            continue
        if digit & 16:  # it is negative
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ProblemError('has a mask whose code ends in the middle of a run')
    return runs
