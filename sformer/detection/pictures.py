"""Pictures of what a detector finds, which carry of whom and of what they are."""
import io
from pathlib import Path

import torch.nn as nn
from PIL import Image

from ..errors import SFormerError
from ..files import Json, file_hash, may_write, png_bytes, png_values, state_hash, write_file

__all__ = ['check_picture', 'read_picture', 'save_picture']


def check_picture(path: Path, image: Path, overwrite: bool = False) -> None:
    """Make sure that a picture may be written, before there is one.

    Args:
        path: PNG or JPEG file; there may be one already.
        image: What will be drawn over, which is never replaced.
        overwrite: Replace whatever is there; a PNG that `save_picture` wrote is replaced anyway.

    Raises:
        SFormerError: If the file is neither by its name, is the image, or is there and is not to be replaced.
    """
    if path.suffix.lower() not in ('.png', '.jpg', '.jpeg'):
        raise SFormerError(f'{path} is neither a PNG nor a JPEG file by its name.')
    if path.exists() and image.exists() and path.samefile(image):
        raise SFormerError(f'{path} is the image itself, which a picture would replace. Name another file.')
    may_write(path, 'PNG that detect show wrote', is_picture, overwrite=overwrite)


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that `save_picture` wrote."""
    return 'weights_sha256' in (png_values(path) or {})


def save_picture(drawn: Image.Image, path: Path, detector: nn.Module, image: Path, **how: object) -> None:
    """Write what was drawn; a PNG carries the hash of the detector's weights, the image's name and hash, and `how` it
    was drawn."""
    if path.suffix.lower() == '.png':
        values = dict(
            how, weights_sha256=state_hash(detector.state_dict()), image=image.name, image_sha256=file_hash(image))
        write_file(path, png_bytes(drawn, values))
    else:
        out = io.BytesIO()
        drawn.save(out, 'JPEG')
        write_file(path, out.getvalue())


def read_picture(path: Path, weights_sha256: str) -> Json | None:
    """What a PNG of these weights says of itself; None if it is none that `save_picture` wrote."""
    values = png_values(path)
    if values is None or values.get('weights_sha256') != weights_sha256 or not isinstance(values.get('image'), str):
        return None
    return values
