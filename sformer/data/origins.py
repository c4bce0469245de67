"""Where images come from.

They are read by index from an `Origin`; `TableStream` is read in order instead, shard by shard.
"""
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from ..files import Json
from .columns import Columns
from .generator import dead_leaves_image
from .pixels import open_picture
from .shards import check_archive

if TYPE_CHECKING:
    import datasets

__all__ = ['GENERATED', 'DeadLeaves', 'Digits', 'Files', 'Origin', 'Table', 'TableStream']

GENERATED = 'dead-leaves'  # name of the images that are generated

Row = tuple[Image.Image, int | None, str | None]  # image, label, key

DIGITS = Path(__file__).parent / 'digits.npz'


class Origin(Protocol):
    """Images by index.

    Attributes:
        kind: What it is, for fingerprints.
        class_names: By label, None where unknown.
        labelled: Whether its images have labels.
        columns: Columns of a table, None where there is none.
        num_images: How many there are.
    """
    kind: str
    labelled: bool
    num_images: int

    @property
    def class_names(self) -> list[str] | None: ...

    @property
    def columns(self) -> Columns | None: ...

    def read(self, index: int) -> Row:
        """An image, its label or None, and its key or None."""

    def describe(self, index: int) -> str:
        """What an image is called in errors."""

    def identity(self, indices: Sequence[int]) -> object:
        """What to hash."""


class DeadLeaves:
    kind = GENERATED
    class_names = columns = None
    labelled = False

    def __init__(self, num_images: int, size: tuple[int, int, int], seed: int):
        self.num_images = num_images
        self.size = size
        self.seed = seed

    def read(self, index: int) -> Row:
        image = dead_leaves_image(index, self.size, self.seed)
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), None, None

    def describe(self, index: int) -> str:
        return f'image {index}'

    def identity(self, indices: Sequence[int]) -> object:
        # The first pixels stand for the version of the generator.
        return self.size, self.seed, dead_leaves_image(0, (3, 16, 16), 0).tobytes()


class Digits:
    """The handwritten digits that scikit-learn has: 8x8, 17 levels of grey, 1,257 to train on and 540 to test with.

    `digits.npz` holds its copy of the test set of UCI's `Optical Recognition of Handwritten Digits` (E. Alpaydin, C.
    Kaynak, https://doi.org/10.24432/C50P49, CC BY 4.0) with levels of 0 to 255, split by its `train_test_split` with
    `test_size=540, stratify=labels, random_state=0`.
    """
    kind = 'digits'
    columns = None
    labelled = True

    def __init__(self, split: str):
        with np.load(DIGITS) as digits:
            self.images = digits[f'{split}_images']
            self.labels = digits[f'{split}_labels']
        self.class_names = [str(digit) for digit in range(10)]
        self.num_images = len(self.labels)

    def read(self, index: int) -> Row:
        return Image.fromarray(self.images[index]), int(self.labels[index]), None

    def describe(self, index: int) -> str:
        return f'image {index}'

    def identity(self, indices: Sequence[int]) -> object:
        return self.images.tobytes(), self.labels.tolist()


class Files:
    """Image files below a folder.

    Args:
        folder: The folder.
        paths: Relative to it.
        labels: One per path, or None.
        class_names: By label, or None.
    """
    kind = 'files'
    columns = None

    def __init__(self, folder: Path, paths: list[str], labels: list[int] | None, class_names: list[str] | None):
        self.folder = folder
        self.paths = paths
        self.labels = labels
        self.class_names = class_names
        self.labelled = labels is not None
        self.num_images = len(paths)

    def read(self, index: int) -> Row:
        path = self.paths[index]
        return open_picture(self.folder / path), self.labels[index] if self.labels is not None else None, path

    def describe(self, index: int) -> str:
        return f"image {index} ('{self.paths[index]}')"

    def identity(self, indices: Sequence[int]) -> object:
        paths = [self.paths[i] for i in indices]
        return [(Path(path).as_posix(), _size(self.folder / path)) for path in paths], self.class_names


class Table:
    """Rows of a `datasets.Dataset`, memory-mapped.

    Args:
        table: The rows.
        columns: Which of its columns to use.
        origin: What identifies the rows.
    """
    kind = 'table'

    def __init__(self, table: 'datasets.Dataset', columns: Columns, origin: object):
        self.table = _select(table, columns)
        self.columns = columns
        self.origin = origin
        self.class_names, self.labelled = columns.class_names, columns.label is not None
        self.num_images = len(table)

    def read(self, index: int) -> Row:
        return _read_row(self.table[index], self.columns)

    def describe(self, index: int) -> str:
        return f'image {index}'

    def identity(self, indices: Sequence[int] | None) -> object:
        return self.origin, self.columns.image, self.columns.label


class TableStream:
    """Rows of a `datasets.IterableDataset`, in shards.

    Args:
        table: The rows.
        columns: Which of its columns to use.
        origin: What identifies the rows.
        num_images: Number of rows, None where only the end will tell.
        files: Their files, if they are local; archives are checked to have been read to their ends.
    """
    kind = Table.kind  # of the same local files, the fingerprint is that of the same images in memory

    def __init__(
            self,
            table: 'datasets.IterableDataset',
            columns: Columns,
            origin: object,
            num_images: int | None,
            files: Sequence[Path] = (),
    ):
        self.table = _select(table, columns)
        self.columns = columns
        self.origin = origin
        self.class_names, self.labelled = columns.class_names, columns.label is not None
        self.num_images = num_images
        self.num_shards = table.num_shards
        self.limit: int | None = None
        self.files = files

    def take(self, limit: int) -> None:
        """Deliver the first `limit` rows only. They are not those of the shards: it becomes one."""
        self.limit, self.num_shards = limit, 1

    def shard(self, index: int) -> Iterator[Json]:
        """The rows of a shard, not decoded.

        Raises:
            SFormerError: Its archive is damaged.
        """
        table = self.table if self.limit is not None else self.table.shard(self.num_shards, index)
        # By `iter(batch_size)`, because `__iter__` divides the shards once more among the workers of a `DataLoader`,
        # and stops those that get none.
        batches = table.iter(batch_size=16)
        rows = (dict(zip(b, values, strict=True)) for b in batches for values in zip(*b.values(), strict=True))
        yield from itertools.islice(rows, self.limit)
        file = self._file(index)
        if self.limit is None and file is not None and file.suffix == '.tar':
            check_archive(file)

    def _file(self, index: int) -> Path | None:
        return self.files[index] if len(self.files) == self.num_shards else None

    def read(self, row: Json) -> Row:
        return _read_row(row, self.columns)

    def describe_shard(self, index: int) -> str:
        file = self._file(index)
        return f'shard {index}' + (f' ({file})' if file else '')

    def identity(self, indices: Sequence[int] | None) -> object:
        return self.origin, self.columns.image, self.columns.label


def _select(table, columns: Columns):
    """The columns in use, with images as they are encoded: they are decoded here, so that a damaged one can be named.
    """
    import datasets
    feature = table.features[columns.image]
    table = table.select_columns(columns.names)
    return table.cast_column(columns.image, datasets.Image(decode=False)) if isinstance(
        feature, datasets.Image) else table


def _read_row(row: Json, columns: Columns) -> Row:
    value = row[columns.image]
    key = value.get('path') if isinstance(value, dict) else None
    if key is None and columns.key:
        key = str(row[columns.key])
    return _decode(value), row[columns.label] if columns.label else None, key


def _decode(value: object) -> Image.Image:
    """Open what an image column holds: encoded bytes, {'bytes', 'path'}, or rows of pixel values 0 to 255."""
    if isinstance(value, dict):
        value = value.get('bytes') or value.get('path')
    if isinstance(value, (bytes, str)):
        return open_picture(Path(value) if isinstance(value, str) else value)
    if value is None:
        raise ValueError('it is empty')
    pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype.kind not in 'iu' or pixels.ndim not in (2, 3) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f'neither encoded bytes nor pixels 0 to 255 ({type(value).__name__} of {pixels.dtype})')
    return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))


def _size(path: Path) -> int | None:
    """Size in bytes; None where the file cannot be reached, which is an error when it is read."""
    try:
        return os.path.getsize(path)
    except OSError:
        return None
