"""Image files as users name them: paths, folders, patterns."""
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from timm.utils.misc import natural_key

from ..errors import SFormerError, UnreadableImageError
from .image_folders import find_images
from .pixels import as_rgb, open_picture
from .preprocessing import unreadable

__all__ = ['ImageSource', 'image_sources', 'name_of_image', 'read_rgb']

ImageSource = str | Path | Image.Image  # a file, or a picture that was opened already


def image_sources(images: ImageSource | Iterable[ImageSource]) -> Iterator[ImageSource]:
    """Pictures as they are, and files, those of a folder or a pattern in natural order.

    Args:
        images: One or several: a file; a folder, of which all images below it are meant; a pattern (`photos/*.jpg`,
            with `**` for folders of any depth); or a picture. What is no file is handed on: whoever reads it says so.

    Raises:
        SFormerError: If a folder or a pattern has no image.
    """
    for image in [images] if isinstance(images, (str, Path, Image.Image)) else images:
        if isinstance(image, Image.Image):
            yield image
        elif os.path.isdir(image):
            found, _ = find_images(Path(image))
            if not found:
                raise SFormerError(f'{image} has no images.')
            yield from (Path(image, name) for name in found)
        elif os.path.lexists(image) or not glob.has_magic(str(image)):
            yield Path(image)
        else:
            found = [path for path in glob.iglob(str(image), recursive=True) if not os.path.isdir(path)]
            matches = sorted(found, key=natural_key)
            if not matches:
                raise SFormerError(f'no file matches {str(image)!r}.')
            yield from map(Path, matches)


def name_of_image(image: ImageSource, index: int) -> str:
    """What an image is called: its path, or its number among those that were given."""
    if isinstance(image, Image.Image):
        return str(getattr(image, 'filename', '') or f'image {index}')
    return str(image)


def read_rgb(image: ImageSource, upright: bool = True) -> Image.Image:
    """An image as RGB.

    Args:
        image: A file or a picture.
        upright: Turn it as its EXIF orientation says.

    Raises:
        UnreadableImageError: If it is missing, damaged, or no image.
    """
    try:
        return as_rgb(image if isinstance(image, Image.Image) else open_picture(Path(image)), upright)
    except OSError as e:
        raise UnreadableImageError(e.strerror or unreadable(e)) from e
    except Exception as e:  # damaged files raise about anything
        raise UnreadableImageError(unreadable(e)) from e
