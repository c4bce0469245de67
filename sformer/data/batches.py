"""Batches as a loop sees them: how many images they have, and how far it is."""
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from tqdm import tqdm

__all__ = ['num_images', 'progress']

Item = TypeVar('Item')


def num_images(batch: object) -> int:
    """Images of a batch: a tensor (B, ...), or a list of images as detectors read them; anything else is one."""
    return len(batch) if isinstance(batch, (torch.Tensor, list)) else 1


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar on stderr; without one where stderr is no terminal.

    Args:
        items: An iterable; batches count by their length along dim 0, other items as one.
        description: What is going on.
        total: Number of images or items, if known.
    """
    with tqdm(desc=description, total=total, disable=None, leave=False) as bar:
        for item in items:
            yield item
            batch = item[0] if isinstance(item, (tuple, list)) else item
            bar.update(len(batch) if isinstance(batch, torch.Tensor) else 1)
