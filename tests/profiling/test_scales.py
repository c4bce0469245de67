"""What the ends of a colour scale stand for."""
from math import nan

import pytest

from sformer.profiling.scales import share_range, shown_range


def test_what_is_alike_looks_alike():
    """3 % between the patches are no more than an eighth of the colours."""
    low, high = shown_range([10., 10.3])
    assert low < 10 and high > 10.3 and high - low == pytest.approx(0.25 * 10.3)


def test_what_differs_is_shown_whole():
    assert shown_range([2., nan, 8., 5.]) == (2., 8.)
    assert share_range([0.1, 0.9]) == (0.1, 0.9)


@pytest.mark.parametrize('values', [[0.98, 1.], [0., 0.01], [0.5], [nan], []])
def test_shares_lie_between_zero_and_one(values):
    low, high = share_range(values)
    assert 0 <= low < high <= 1 and high - low == pytest.approx(0.25)
    assert all(low <= value <= high for value in values if value == value)


def test_nothing_spikes():
    assert shown_range([0., 0.]) == (0., 1.) and shown_range([]) == (0., 1.)
