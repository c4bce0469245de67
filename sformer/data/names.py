"""What names of data sets stand for: one rule for whatever reads images.

A name is, in this order, a folder; `NAME=FOLDER`, the data set NAME of which FOLDER is a copy; a folder of that name
below the one that the environment variable `SFORMER_DATA` names; or a data set of the Hugging Face Hub, some of which
have short names.
"""
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import SFormerError

__all__ = ['SHORT_NAMES', 'Known', 'Located', 'find_data', 'known_data']

SHELF = 'SFORMER_DATA'  # names the folder of all copies
BUILT_IN = ('dead-leaves', 'digits')


@dataclass(frozen=True)
class Known:
    """A data set that is called by a short name.

    Args:
        repository: Where it is on the Hub; None where only copies are read.
        split: What is evaluated on, where the names of its splits leave a choice.
        benchmark: How it is scored, if not by its own labels.
        large: Whether it is read from the Hub as a stream unless that is refused, since `datasets` would copy all
            splits for the sake of one.
    """
    repository: str | None = None
    split: str | None = None
    benchmark: str | None = None
    large: bool = False


SHORT_NAMES = {
    'cifar10': Known('uoft-cs/cifar10'),
    'cifar100': Known('uoft-cs/cifar100'),
    'fashion-mnist': Known('zalando-datasets/fashion_mnist'),
    'food101': Known('ethz/food101'),
    'mnist': Known('ylecun/mnist'),
    'imagenet-1k': Known('ILSVRC/imagenet-1k', 'validation', large=True),
    'imagenet-real': Known('ILSVRC/imagenet-1k', 'validation', 'imagenet-real', large=True),
    'imagenet-v2': Known(benchmark='imagenet-v2'),
    'imagenet-a': Known(benchmark='imagenet-a'),
    'imagenet-r': Known(benchmark='imagenet-r'),
}


@dataclass(frozen=True)
class Located:
    """What a name stands for.

    Args:
        name: What results call it.
        folder: Where it lies; None where it is built in, or looked for on the Hub.
    """
    name: str
    folder: Path | None = None

    @property
    def repository(self) -> str:
        """Id of a data set on the Hub."""
        known = known_data(self.name)
        return known.repository if known and known.repository else self.name

    @property
    def hint(self) -> str:
        """How to read a copy."""
        return (f'name the folder of a copy as {self.name}=FOLDER, or set {SHELF} to the folder that has '
                f'{self.name}/ in it')


def known_data(name: str) -> Known | None:
    """What is known of a data set by a short name, by the repository of one, or by one of them and `=FOLDER`."""
    called = name.partition('=')[0]
    entries = SHORT_NAMES.values()
    return SHORT_NAMES.get(called) or next((known for known in entries if called == known.repository), None)


def find_data(name: str) -> Located:
    """Where a data set lies.

    Raises:
        SFormerError: If a name that says where it lies, or `SFORMER_DATA`, names no folder.
    """
    if name in BUILT_IN:
        return Located(name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return Located(name, folder)
    called, equals, path = name.partition('=')
    if not equals:
        return Located(name, _on_shelf(name))
    folder = Path(path).expanduser()
    if not called or not path or not folder.is_dir():
        raise SFormerError(f'{name!r} reads as NAME=FOLDER, and {path!r} is no folder')
    if called in BUILT_IN:
        raise SFormerError(f'{called!r} is the name of images that are built in: call those of {path!r} otherwise')
    return Located(called, folder)


def _on_shelf(name: str) -> Path | None:
    """The folder of a data set below `SFORMER_DATA`, by any name of its repository."""
    shelf = os.environ.get(SHELF)
    if not shelf:
        return None
    root = Path(shelf).expanduser()
    if not root.is_dir():
        raise SFormerError(f'{SHELF} is {shelf!r}, which is no folder')
    names, known = [name], known_data(name)
    if known and known.repository:
        names += [known.repository]
        names += [other for other, entry in SHORT_NAMES.items() if entry.repository == known.repository]
    plain = [Path(n) for n in names if n and not Path(n).is_absolute() and '..' not in Path(n).parts]
    return next((root / n for n in plain if (root / n).is_dir()), None)
