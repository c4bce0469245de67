"""How a level is sent as spikes: the one table that activity and profile count by."""
import functools

import torch

from .base import Spikes

__all__ = ['CODINGS', 'count_all_spikes', 'count_levels', 'count_spikes', 'spikes_in']

CODINGS = ('unary', 'binary', 'graded')  # |k| spikes, one per set bit of |k|, one that carries k


@functools.cache
def _spikes_per_level(device: torch.device) -> torch.Tensor:
    """Spikes of levels 0 ... 2^15 - 1 in each of the codings, int64, (3, 2^15)."""
    unary = range(2 ** 15)
    binary = [k.bit_count() for k in unary]
    graded = [k > 0 for k in unary]
    return torch.tensor([unary, binary, graded], dtype=torch.int64, device=device)


def spikes_in(levels: torch.Tensor, coding: str) -> torch.Tensor:
    """Spikes that each level is sent as.

    Args:
        levels: Levels k, |k| < 2^15, any integer dtype and shape.
        coding: One of `CODINGS`.

    Returns:
        int64, the shape of levels.
    """
    return _spikes_per_level(levels.device)[CODINGS.index(coding)][levels.to(torch.int64).abs()]


def count_spikes(levels: torch.Tensor) -> dict[str, int]:
    """Spikes of all levels (int8 or int16, any shape) together in each coding, by a histogram of |k|: nothing is
    rounded."""
    k = levels.abs().flatten()  # |k| of int8 is uint8 as it stands, which bincount takes and reads fastest
    histogram = torch.bincount(k.view(torch.uint8) if k.dtype == torch.int8 else k)
    sums = (_spikes_per_level(k.device)[:, :len(histogram)] * histogram).sum(1).tolist()
    return dict(zip(CODINGS, sums, strict=True))


def count_all_spikes(spikes: Spikes) -> dict[str, int]:
    """Spikes that levels are sent as, and lateral spikes, together in each coding."""
    counts = count_spikes(spikes.levels)
    if spikes.lateral is not None:
        for coding, count in count_spikes(spikes.lateral).items():
            counts[coding] += count
    return counts


def count_levels(levels: torch.Tensor) -> dict[int, int]:
    """How often each level is fired: those that are, with their signs, in ascending order. Levels of any integer dtype
    and shape."""
    k = levels.flatten().to(torch.int64)
    lowest = int(k.min()) if len(k) else 0
    histogram = torch.bincount(k - lowest)
    return {lowest + i: int(histogram[i]) for i in histogram.nonzero().flatten().tolist()}
