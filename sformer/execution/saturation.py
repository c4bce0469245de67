"""Products of bytes that every processor sums exactly.

x86 without VNNI (AMD before Zen 4, Intel before Cascade Lake and Ice Lake) multiplies bytes by `vpmaddubsw`: it adds
two products of an unsigned and a signed byte in 16 bits, which saturate. An engine that is given signed bytes adds 128
to those of one operand first. So a sum is exact everywhere if no two products leave 16 bits.
"""
from typing import NamedTuple

import torch

__all__ = ['MAX_WEIGHT', 'Range', 'Upright', 'zero_point', 'weight_limit', 'upright', 'fits']

LARGEST_PAIR = 2 ** 15 - 1
MAX_WEIGHT = 127
SHIFT = 128  # what an engine adds to signed bytes

Range = tuple[int, int]  # the lowest and the highest level


def zero_point(levels: Range) -> int:
    """What is added to levels so that they are unsigned bytes from 0 on.

    Raises:
        ValueError: If they have more values than a byte.
    """
    low, high = levels
    if high - low > 255:
        raise ValueError(f'levels from {low} to {high} are no byte.')
    return -min(low, 0)


def weight_limit(levels: Range) -> int:
    """Largest magnitude of int8 weights whose products with levels, as unsigned bytes with `zero_point`, are summed
    exactly by every processor: 127 for levels from -64 to 64, 64 for a whole byte."""
    return min(MAX_WEIGHT, LARGEST_PAIR // (2 * max(max(levels[1], 0) + zero_point(levels), 1)))


class Upright(NamedTuple):
    """Levels of a layer's input as unsigned bytes, those of channels whose negative branch reaches further with the
    other sign, as their weights then have, too: so all together have the fewest values.

    Args:
        flipped: Channels whose sign changes, bool (C,).
        levels: Lowest and highest level then.
        limits: Largest magnitude of the int8 weights of each channel that every processor sums exactly, (C,).
    """
    flipped: torch.Tensor
    levels: Range
    limits: torch.Tensor


def upright(tops: torch.Tensor) -> Upright:
    """How levels become bytes, of which the positive and the negative branch of each channel fire at most `tops`
    (2, C)."""
    short, long = tops.amin(0), tops.amax(0)
    low = int(short.max())
    return Upright(tops[1] > tops[0], (-low, int(long.max())),
                   (LARGEST_PAIR // (2 * (low + long))).clamp(max=MAX_WEIGHT))


def fits(a: Range, b: Range) -> bool:
    """Whether products of levels with levels, as signed bytes or, where none is negative, unsigned ones, are summed
    exactly by every processor, whichever of both an engine shifts."""
    def pair(shifted: Range, other: Range) -> int:
        largest = shifted[1] if shifted[0] >= 0 else max(shifted[1], 0) + SHIFT
        return 2 * largest * max(abs(other[0]), abs(other[1]))
    ways = [(a, b)] if a[0] >= 0 else [(b, a)] if b[0] >= 0 else [(a, b), (b, a)]
    return all(pair(*way) <= LARGEST_PAIR for way in ways)
