"""Streaming statistics: every current counts once, whatever batches it comes in, and memory does not grow."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from neuron_tools import prop, rng, seeds, site

from sformer.errors import SFormerError
from sformer.neurons import CurrentStatistics
from sformer.neurons.statistics import NUM_BINS, bin_edges

GROUPS = {'tensor': (1,), 'head': (2, 1, 1), 'channel': (5,), 'head and channel': (2, 1, 5)}


@prop
@given(st.sampled_from(sorted(GROUPS)), st.booleans(), st.lists(st.integers(1, 4), min_size=1, max_size=5), seeds)
def test_statistics_do_not_depend_on_batch_size_or_order(granularity, signed, sizes, seed):
    shape = GROUPS[granularity]
    x = torch.randn(sum(sizes), 2, 3, 5, generator=rng(seed)) * 10. ** torch.arange(-2, 3)
    whole, parts = site(x, shape, signed), CurrentStatistics(shape, signed)
    for part in x[torch.randperm(len(x), generator=rng(seed))].split(sizes):
        parts.update(part)
    assert torch.equal(parts.counts, whole.counts) and torch.equal(parts.peak, whole.peak)


def naive_counts(x, groups):
    """(2, groups, NUM_BINS) by comparing every current with every edge."""
    edges = bin_edges()
    counts = torch.zeros(2, groups, NUM_BINS, dtype=torch.int32)
    for row in x.reshape(-1, groups):
        for g, v in enumerate(row.tolist()):
            j = min(int((edges <= abs(v)).sum()) - 1, NUM_BINS - 1)
            counts[int(v < 0), g, j] += 1
    return counts


def test_histogram_counts_what_lies_between_its_edges():
    x = torch.randn(40, 3, generator=rng(0)) * 10. ** torch.linspace(-12, 8, 40)[:, None]
    x[0] = torch.tensor([0., 2. ** -28, 2. ** 19])
    x[1] = torch.tensor([1., -1., 1.125])  # edges themselves
    assert torch.equal(site(x, (3,)).counts, naive_counts(x, 3))
    peak = site(x, (3,)).peak
    assert torch.equal(peak[0], x.amax(0)) and torch.equal(peak[1], -x.amin(0))


@prop
@given(st.sampled_from(sorted(GROUPS)), seeds)
def test_histogram_loses_no_current(granularity, seed):
    x = torch.randn(3, 2, 4, 5, generator=rng(seed)) * 10. ** torch.randint(-12, 9, (5,), generator=rng(seed))
    counts = site(x, GROUPS[granularity]).counts
    assert counts.sum() == x.numel()
    assert (counts.sum(dim=(0, 2)) == x.numel() // counts.shape[1]).all()


def test_large_currents_are_counted_in_parts_and_none_is_left_out():
    x = torch.zeros(3, 8, 2 ** 19)  # more than the indices of one part
    x[:, 5, ::1000] = 7.
    statistics = site(x)
    assert statistics.counts.sum() == x.numel() and statistics.counts[0, 0, 1:].sum() == (x != 0).sum()


def test_single_tokens_of_many_images_are_observed():
    statistics = CurrentStatistics((2048,), signed=True)
    for _ in range(3):
        statistics.update(torch.ones(2049, 1, 2048))
    assert (statistics.counts.sum((0, 2)) == 3 * 2049).all()


def test_a_rare_token_is_seen():
    x = torch.randn(5000, 4, generator=rng(0))
    x[3217] *= 100
    statistics = site(x, (4,))
    assert torch.equal(torch.maximum(*statistics.peak), x.abs().amax(0))
    assert (statistics.counts[..., bin_edges()[1:] > 10].sum((0, 2)) == (x.abs() > 10).sum(0)).all()


def test_histograms_are_complete_before_a_bin_could_overflow():
    x = torch.ones(4, 1)
    statistics = site(x)
    statistics.counted = 2 ** 31 - 4  # as many more would be the first to overflow
    before = statistics.counts.clone()
    statistics.update(10 * x)
    assert torch.equal(statistics.counts, before) and statistics.peak[0] == 10  # the range goes on


def test_bins_are_narrow_and_cover_all_currents():
    edges = bin_edges()
    assert edges.shape == (NUM_BINS + 1,) and edges[0] == 0 and (edges.diff() > 0).all()
    assert (edges[2:] / edges[1:-1]).max() <= 1.125 + 1e-12
    assert edges[1] < 1e-8 and edges[-1] > 1e6


def test_memory_does_not_grow_with_the_number_of_images():
    def held(statistics):
        assert all(isinstance(v, (int, tuple, torch.Tensor, type(None))) for v in vars(statistics).values())
        return sum(v.numel() * v.element_size() for v in vars(statistics).values() if isinstance(v, torch.Tensor))

    statistics = CurrentStatistics((5,), True, center_shape=(5,))
    sizes = set()
    for seed in range(5):
        statistics.update(torch.randn(8, 3, 5, generator=rng(seed)))
        sizes.add(held(statistics))
    assert len(sizes) == 1


def test_keys_are_observed_around_their_mean():
    x = torch.randn(16, 2, 7, 3, generator=rng(0)) + torch.tensor([100., -50., 0.])
    statistics = CurrentStatistics((2, 1, 1), True, center_shape=(2, 1, 3))
    statistics.update(x)
    torch.testing.assert_close(statistics.center, x.mean(dim=(0, 2), keepdim=True)[0])
    assert statistics.peak.max() < 6
    statistics.update(x + 1)  # the centre is that of the first batch
    torch.testing.assert_close(statistics.center, x.mean(dim=(0, 2), keepdim=True)[0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_currents_of_any_dtype_are_observed(dtype):
    x = torch.rand(64, 3, 32, 32, generator=rng(0)).to(dtype)  # their sum is beyond float16
    assert torch.equal(site(x, (3, 1, 1)).counts, site(x.float(), (3, 1, 1)).counts)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_statistics_refuse_broken_currents(value):
    x = torch.randn(4, 5, generator=rng(0))
    x[2, 3] = value
    with pytest.raises(SFormerError, match='NaN or infinite'):
        site(x)


def test_both_infinities_are_refused_together():
    with pytest.raises(SFormerError, match='NaN or infinite'):
        site(torch.tensor([[math.inf, -math.inf]]), (2,))
