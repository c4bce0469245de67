"""What lies in a folder: images, their splits and their classes."""
import os
from pathlib import Path

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from ..errors import SFormerError

__all__ = ['EVALUATION_SPLITS', 'SPLIT_FOLDERS', 'class_folders', 'find_images', 'split_folders', 'subfolders']

EVALUATION_SPLITS = ('test', 'validation', 'valid', 'val', 'dev', 'eval')
SPLIT_FOLDERS = ('train', 'training') + EVALUATION_SPLITS
# beside classes, but none: what macOS packs into archives, and what file systems and servers keep for themselves
_SYSTEM_FOLDERS = ('__MACOSX', '@eaDir', 'lost+found', '$RECYCLE.BIN', 'System Volume Information')
_NO_PICTURES = ('BUFR', 'GRIB', 'HDF5', 'MPEG')  # formats that Pillow names, but does not decode


def find_images(folder: Path) -> tuple[list[str], list[str]]:
    """Walk a folder once, through symbolic links, too. Images are what has the extension of a format that Pillow reads,
    and what has no extension, but is one.

    A folder that links lead to again is read once, nearest to the top. Images that are links are not followed: the same
    pixels may well be two images of a data set. A broken link with the name of an image is listed like any unreadable
    image.

    Returns:
        Paths of the images, relative to the folder, in natural order; and those of everything else, sorted.

    Raises:
        SFormerError: A folder cannot be read, or a link that may be one is broken.
    """
    extensions = _image_extensions()
    images: list[str] = []
    passed_over: list[str] = []
    seen = {os.path.realpath(folder)}
    level = ['']
    while level:
        links_last = []
        for parent in level:
            for entry in _entries(folder / parent):
                path = os.path.join(parent, entry.name)
                kind = _kind(entry)
                if _is_hidden(entry.name):
                    passed_over.append(path)
                elif kind == 'folder':
                    links_last.append((entry.is_symlink(), path))
                elif kind in ('file', 'broken link') and _is_image(entry, kind, extensions):
                    images.append(path)
                elif kind == 'broken link':
                    raise SFormerError(f'{entry.path!r} is a broken link')
                else:
                    passed_over.append(path)
        level = []
        for _, path in sorted(links_last):
            target = os.path.realpath(folder / path)
            (passed_over if target in seen else level).append(path)
            seen.add(target)
    return sorted(images, key=natural_key), sorted(passed_over)


def split_folders(folder: Path, split: str | None) -> list[str]:
    """Names of the folders of splits in a folder, sorted; none if it has none.

    Args:
        folder: Where they are looked for.
        split: The split that is asked for, if any.
    """
    names = subfolders(folder)
    splits = [s for s in names if s.lower() in SPLIT_FOLDERS]
    others = [s for s in names if s not in splits]
    if others and split not in splits and not any(subfolders(folder / s) for s in splits) \
            and all(_holds_images(folder / s) for s in others):
        splits = []  # classes, one of which is called so: CIFAR-100 has trains
    if split is not None and split not in splits and subfolders(folder / split):
        splits.append(split)  # any folder of class folders will do when it is asked for
    return splits


def class_folders(folder: Path, splits: list[str], split: str | None) -> list[str]:
    """Names of the classes of a split in natural order; none if its images have no class folders. They are those of all
    splits, so that a class missing from one of them does not shift the labels of the rest."""
    if not subfolders(folder / split if split else folder):
        return []
    roots = [folder / s for s in splits] or [folder]
    return sorted({name for root in roots for name in subfolders(root)}, key=natural_key)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder that are neither hidden nor the system's, sorted; none if it does not exist."""
    if not folder.is_dir():
        return []
    return [entry.name for entry in _entries(folder) if _kind(entry) == 'folder' and not _is_hidden(entry.name)]


def _holds_images(folder: Path) -> bool:
    """Whether there are images in a folder itself."""
    extensions = _image_extensions()
    return any(_kind(entry) == 'file' and not _is_hidden(entry.name) and _is_image(entry, 'file', extensions)
               for entry in _entries(folder))


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as e:
        raise SFormerError(f'cannot read folder {str(folder)!r}: {e.strerror or e}') from e


def _kind(entry: os.DirEntry) -> str:
    """'folder', 'file', 'broken link' or 'other'; asks the file system about links alone."""
    try:
        if entry.is_dir():
            return 'folder'
        if entry.is_file():
            return 'file'
        return 'broken link' if entry.is_symlink() and not os.path.exists(entry.path) else 'other'
    except OSError:  # a link to itself, or into a folder that must not be entered
        return 'broken link'


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name in _SYSTEM_FOLDERS


def _is_image(entry: os.DirEntry, kind: str, extensions: set[str]) -> bool:
    extension = os.path.splitext(entry.name)[1].lower()
    if extension or kind != 'file':
        return extension in extensions
    try:
        with Image.open(entry.path, formats=('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')):
            return True
    except Exception:
        return False


def _image_extensions() -> set[str]:
    known = {extension for extension, name in Image.registered_extensions().items()
             if name in Image.OPEN and name not in _NO_PICTURES}
    return known | get_img_extensions(as_set=True)  # the user may have added some to timm's
