"""How levels are sent as spikes."""
import pytest
import torch

from sformer.neurons import CODINGS, count_levels, count_spikes, spikes_in


def test_spikes_of_levels():
    k = torch.tensor([[0, 1, -5], [127, -128, 16129]])
    assert spikes_in(k, 'unary').tolist() == [[0, 1, 5], [127, 128, 16129]]
    assert spikes_in(k, 'binary').tolist() == [[0, 1, 2], [7, 1, bin(16129).count('1')]]
    assert spikes_in(k, 'graded').tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize('dtype, top', [(torch.int8, 128), (torch.int16, 16130)])
def test_sums_are_those_of_each_level(dtype, top):
    k = torch.randint(-top, top if dtype == torch.int8 else top + 1, (40, 50), dtype=dtype)
    assert count_spikes(k) == {coding: int(spikes_in(k, coding).sum()) for coding in CODINGS}
    assert spikes_in(torch.tensor([-128], dtype=torch.int8), 'unary').item() == 128


@pytest.mark.parametrize('dtype', [torch.int8, torch.int16, torch.int64])
def test_how_often_each_level_fires(dtype):
    assert count_levels(torch.tensor([[3, -2, 0], [-2, 3, 127]], dtype=dtype)) == {-2: 2, 0: 1, 3: 2, 127: 1}
    assert count_levels(torch.tensor([5, 7], dtype=dtype)) == {5: 1, 7: 1}
    assert count_levels(torch.zeros(0, 4, dtype=dtype)) == {}
