"""Which images are wanted: one request, that whatever reads images hands on."""
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import SFormerError, check, check_flag, check_integer, check_text
from .image_folders import EVALUATION_SPLITS
from .names import known_data

__all__ = ['ImageRequest', 'requested']

Ready = TypeVar('Ready')


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Which images are wanted, and where in the data they are.

    Args:
        dataset: What `open_images` finds images by: `dead-leaves`, `digits`, a folder of parquet files, of WebDataset
            archives or of images, `NAME=FOLDER`, or a data set of the Hugging Face Hub by its id or a short name.
        split: Split of the data set. None takes the only one; else `train`, or where labels are needed the split for
            evaluation.
        num_images: Size of a random subset, in the order of the data; None takes all (256 of `dead-leaves`). Of a
            stream, the first ones.
        seed: Seed of the subset, or of the generated images.
        image_column: Column of the images; None finds it: by a usual name, or as the only one of images.
        label_column: Column of the labels; None finds it: by a usual name, or as the only one of class labels.
        needs_labels: Insist on labels. They are delivered anyway where they are known.
        streaming: Read shards as they are needed instead of downloading or converting all splits first; for parquet
            folders, WebDataset folders and the Hub. None does so with what is known to be large there (ImageNet).

    Raises:
        ConfigError: If a value is not usable; names it.
    """
    dataset: str
    split: str | None = None
    num_images: int | None = None
    seed: int = 0
    image_column: str | None = None
    label_column: str | None = None
    needs_labels: bool = False
    streaming: bool | None = None

    def __post_init__(self) -> None:
        check(isinstance(self.dataset, (str, os.PathLike)), f'dataset must be a name or a path, got {self.dataset!r}.')
        object.__setattr__(self, 'dataset', os.fspath(self.dataset))
        if self.num_images is not None:
            check_integer(self, 'num_images', 1)
        check_integer(self, 'seed', 0, 2 ** 63 - 1)
        for name in ('split', 'image_column', 'label_column'):
            if getattr(self, name) is not None:
                check_text(self, name)
        check_flag(self, 'needs_labels')
        if self.streaming is not None:
            check_flag(self, 'streaming')

    def choose(self, available: int, title: str = '') -> np.ndarray:
        """Sorted indices of the images that are wanted.

        Args:
            available: How many there are.
            title: What they are called in errors; the name of the data set if not given.

        Raises:
            SFormerError: If there are none, or fewer than are asked for.
        """
        title = title or repr(self.dataset)
        if not available:
            raise SFormerError(f'{title} has no images')
        if self.num_images is not None and self.num_images > available:
            raise SFormerError(f'{self.num_images} images asked for, but {title} has only {available}')
        if self.num_images in (None, available):
            return np.arange(available)
        # Sorted, because neighbours are fast to read.
        return np.sort(np.random.default_rng(self.seed).choice(available, self.num_images, replace=False))

    def choose_split(self, splits: Sequence[str]) -> str:
        """The split that is wanted, of those that there are."""
        if self.split is not None:
            if self.split not in splits:
                raise SFormerError(f'{self.dataset!r} has no split {self.split!r}, but: {", ".join(splits)}')
            return self.split
        if len(splits) == 1:
            return splits[0]
        # Calibration never looks at evaluation images, unless told to.
        fitting = [s for s in splits if s in (EVALUATION_SPLITS if self.needs_labels else ('train', 'training'))]
        known = known_data(self.dataset)
        if self.needs_labels and known and known.split in fitting:
            return known.split
        if len(fitting) != 1:
            raise SFormerError(f'choose a split of {self.dataset!r}: {", ".join(splits)}')
        return fitting[0]

    def refuse_table_options(self) -> None:
        """Raise SFormerError for what images say nothing to that are no rows of a table."""
        column = self.image_column or self.label_column
        if column:
            raise SFormerError(f'{self.dataset!r} has no columns, so {column!r} cannot be one of them')
        if self.streaming:
            raise SFormerError(f'{self.dataset!r} is read image by image anyway: it cannot and need not be streamed')


def requested(
        images: str | Path | Iterable[Ready],
        *,
        split: str | None = None,
        num_images: int | None = None,
        seed: int = 0,
        image_column: str | None = None,
) -> ImageRequest | Iterable[Ready]:
    """Images by name as a request with options; batches as they are given.

    Raises:
        SFormerError: If an option is not usable, or of no batches.
    """
    if isinstance(images, (str, Path)):
        return ImageRequest(
            dataset=str(images), split=split, num_images=num_images, seed=seed, image_column=image_column)
    if image_column:
        raise SFormerError(f'image_column={image_column!r} is of a named data set, and batches were given.')
    return images
