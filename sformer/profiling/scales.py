"""Scales of pictures: on which differences are seen, and none is made of nothing."""
import math
from collections.abc import Iterable

__all__ = ['LEAST_SPAN', 'share_range', 'shown_range']

LEAST_SPAN = 0.25  # of the largest value: what differs by a few per cent is drawn as what differs by a few per cent


def shown_range(values: Iterable[float]) -> tuple[float, float]:
    """The values that the ends of a colour scale stand for: those of the data or, where these are closer together than
    `LEAST_SPAN` of the largest, that much around them; none below 0, as no value is."""
    known = list(values)
    return _ends(known, LEAST_SPAN * max(_numbers(known), default=0.), math.inf)


def share_range(values: Iterable[float]) -> tuple[float, float]:
    """The same of shares, whose scale ends at 1: at least `LEAST_SPAN` of it are shown."""
    return _ends(list(values), LEAST_SPAN, 1.)


def _numbers(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _ends(values: list[float], least: float, highest: float) -> tuple[float, float]:
    known = _numbers(values)
    low, high = min(known, default=0.), max(known, default=0.)
    missing = max(least - (high - low), 0.)
    end = min(max(low - missing / 2, 0.) + max(high - low, least), highest)
    end = max(end, high)
    start = max(min(low, end - least), 0.)
    return start, end if end > start else start + 1.
