"""Energy: sums of what was counted, and words that follow the figures."""
import pytest

from sformer.profiling import Constants, Operation, Site, energy, verdicts


def network(activity, levels=7, unary=2.):
    spikes = dict(unary=unary * activity, binary=1.5 * activity, graded=activity)
    operations = [
        Operation('fc', 'linear', ('fc.neuron',), 1e6, {k: v * 1e6 for k, v in spikes.items()}, weights=1000),
        Operation('norm', 'floating', (), 1e3)]
    return operations, [Site('fc.neuron', 1e4, activity, 0., spikes, levels)]


def test_by_hand():
    figures = energy(*network(0.5), Constants())
    assert figures['proxy']['source'] == pytest.approx((1e6 + 1e3) * 4.6e-9)
    assert figures['proxy']['sformer'] == pytest.approx((1e6 * 0.9 + 1e3 * 4.6) * 1e-9)
    graded = figures['account']['graded']
    assert graded == pytest.approx(dict(
        operations=5e5 * 0.3e-9, comparisons=1e4 * 4 * 0.1e-9, weights=1000 * 12.5e-9, spikes=5e3 * 12.5e-9,
        total=(1.5e5 + 4e3 + 12500 + 62500) * 1e-9))
    twin = figures['account']['quantised']
    assert twin['operations'] == pytest.approx(1e6 * 0.3e-9) and twin['spikes'] == pytest.approx(1e4 * 12.5e-9)
    unary = figures['account']['unary']
    assert unary['operations'] == pytest.approx(1e6 * 0.1e-9) and unary['spikes'] == pytest.approx(1e4 * 12.5e-9)
    for parts in figures['account'].values():
        assert parts['total'] == pytest.approx(sum(v for k, v in parts.items() if k != 'total'))
    assert 'ISSCC' in figures['constants']['source']


def test_a_level_of_two_bytes_takes_two_multiplications():
    operations, sites = network(0.5)
    narrow = energy(operations, sites)['account']
    sites[0].planes = 2
    wide = energy(operations, sites)['account']
    for part in ('operations', 'spikes'):
        assert wide['graded'][part] == pytest.approx(2 * narrow['graded'][part])
    assert wide['unary'] == narrow['unary'] and wide['quantised'] == narrow['quantised']


def test_constants_can_be_others():
    one, other = (energy(*network(0.5), Constants(int8_mac=v)) for v in (0.3, 0.6))
    assert other['account']['graded']['operations'] == pytest.approx(2 * one['account']['graded']['operations'])
    assert other['constants']['int8_mac'] == 0.6


@pytest.mark.parametrize('activity, unary, words', [
    (1., 40., 'In unary coding it takes '), (1., 40., 'no less than that'), (0.1, 2., ': less than that')])
def test_words_follow_the_figures(activity, unary, words):
    figures = energy(*network(activity, unary=unary))
    lines = verdicts(figures)
    assert any(words in line for line in lines)
    for coding, line in zip(('graded', 'binary', 'unary'), lines[1:], strict=True):
        less = figures['account'][coding]['total'] < figures['account']['quantised']['total']
        assert ('no less' in line) == (not less)
