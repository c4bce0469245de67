"""The one reader of pixels, of every task: from an image file to a picture of 8 bits per channel."""
import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..files import content_problem

__all__ = ['as_rgb', 'eight_bits', 'open_picture', 'orientation_of', 'turns']

_BITS_PER_SAMPLE = 258  # TIFF tag
# what turns a picture upright, by the EXIF orientation that its file has
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


def open_picture(origin: Path | bytes) -> Image.Image:
    """The picture in an image file, or in its bytes; the first one if there are several. Its pixels are not loaded yet.

    Raises:
        ValueError: If the file is empty, or stands for one that was not downloaded.
        Exception: About anything, as Pillow has it, if the file is missing, damaged or no image; loading may, too.
    """
    content = origin if isinstance(origin, bytes) else origin.read_bytes()
    problem = content_problem(content[:64])
    if problem:
        raise ValueError(f'it is {problem}')
    return Image.open(io.BytesIO(content))


def as_rgb(picture: Image.Image, upright: bool = False) -> Image.Image:
    """A picture of `open_picture` as RGB.

    Args:
        picture: The picture, whose pixels are loaded.
        upright: Turn it as its EXIF orientation says; else it is left as it is stored (but TIFF, which Pillow turns).

    Raises:
        ValueError: As `eight_bits` raises.
        Exception: About anything, as Pillow has it, if pixels cannot be loaded.
    """
    picture.load()
    turn = _UPRIGHT.get(orientation_of(picture)) if upright else None
    rgb = eight_bits(picture).convert('RGB')
    return rgb if turn is None else rgb.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of a picture, 1 to 8; 1, upright, where there is none. Of TIFF it is gone once pixels are
    loaded, since Pillow turns them."""
    orientation = None
    with contextlib.suppress(Exception):  # metadata that are damaged say nothing
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in _UPRIGHT else 1


def turns(orientation: int) -> bool:
    """Whether an EXIF orientation makes rows of columns."""
    return orientation >= 5


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale the levels of a 16-bit image to 0 to 255 (mode L); `Image.convert` would clip them. Other images pass.

    Raises:
        ValueError: The pixels are 32-bit integers or floats, and the file does not say which of them is white.
    """
    if image.mode not in ('I', 'F') and not image.mode.startswith('I;'):
        return image
    white = _white(image)
    if white is None:
        raise ValueError(f'pixels of mode {image.mode!r} have no known range: save them with 8 or 16 bits')
    levels = np.asarray(image, dtype=np.float64) * (255 / white)
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def _white(image: Image.Image) -> int | None:
    """The highest level of an integer image of more than 8 bits; None where it is not known."""
    if image.mode == 'I' and image.format in ('PNG', 'PPM'):  # 16 bits, widened by Pillow
        return 65535
    if not image.mode.startswith('I;16'):
        return None
    bits = getattr(image, 'tag_v2', {}).get(_BITS_PER_SAMPLE, 16)
    return 2 ** (bits if isinstance(bits, int) else bits[0]) - 1
