"""Energy: sums of what was counted, words that follow the figures, and the table of constants."""
import dataclasses
import json

import pytest

from sformer import SFormerError
from sformer.profiling import (
    Constants,
    Floating,
    Operation,
    Site,
    constants_table,
    energy,
    read_constants,
    traffic,
    verdicts,
)

PLAIN = Constants(**{field.name: 1. for field in dataclasses.fields(Constants)})


def network(activity, levels=7, unary=2.):
    spikes = dict(unary=unary * activity, binary=1.5 * activity, graded=activity)
    operations = [
        Operation('fc', 'linear', ('fc.neuron',), 1e6, {k: v * 1e6 for k, v in spikes.items()}, weights=1000),
        Operation('head', 'floating', (), 1e3, weights=10)]
    floating = [Floating('norm', 'native_layer_norm', 100), Floating('act', 'silu', 10)]
    return operations, [Site('fc.neuron', 1e4, activity, 0., spikes, levels, bits=4, top=7)], floating


def test_by_hand():
    c = Constants()
    figures = energy(*network(0.5))
    assert figures['proxy']['source'] == pytest.approx((1e6 + 1e3) * 4.6e-9)
    assert figures['proxy']['sformer'] == pytest.approx((1e6 * 0.9 + 1e3 * 4.6) * 1e-9)
    shared = dict(weights=(1000 * 8 + 10 * 32) * c.weight_bit * 1e-9,
                  floating=(1e3 + 500 + 10 * (2 + 4 + 9)) * c.float_mac * 1e-9)
    dense = dict(activations=2 * 4e4 * c.activation_bit * 1e-9, routing=4e4 * 0.25e-9)
    twin = dict(operations=1e6 * c.int8_mac * 1e-9, comparisons=1e4 * c.int8_mac * 1e-9, **dense, **shared)
    graded = dict(operations=5e5 * c.int8_mac * 1e-9, comparisons=4e4 * c.comparison * 1e-9, **dense, **shared)
    for name, parts in dict(quantised=twin, graded=graded).items():
        found = figures['account'][name]
        total, moved = sum(parts.values()), parts['weights'] + parts['activations'] + parts['routing']
        assert found == pytest.approx(dict(parts, total=total, low=total - moved / 2, high=total + moved / 2))
    unary = figures['account']['unary']
    assert unary['operations'] == pytest.approx(1e6 * c.accumulate * 1e-9)
    assert figures['account']['quantised, skipping zeros']['operations'] == pytest.approx(graded['operations'])
    assert figures['activity'] == 0.5
    assert figures['bytes'] == dict(weights=1000 + 10 * 4, quantised=5000, graded=5000, binary=5000, unary=11250)
    assert '1.04 kB of weights' in verdicts(figures)[-1] and '5 kB graded' in verdicts(figures)[-1]


def test_pixels_always_fire():
    """They count neither in the activity nor among what could be silent."""
    operations, sites, floating = network(0.5)
    pixels = dataclasses.replace(sites[0], name='p.neuron', activity=1., counted=False)
    first = dataclasses.replace(operations[0], name='p', operands=('p.neuron',))
    figures = energy([first, *operations], [pixels, *sites], floating, PLAIN)
    assert figures['activity'] == 0.5
    limit, budget = figures['break_even']['unary'], 0.95 * figures['account']['quantised']['total']
    assert 0 < limit < 0.5
    fewer = network(limit)
    account = energy([first, *fewer[0]], [pixels, *fewer[1]], floating, PLAIN)['account']
    assert account['unary']['total'] == pytest.approx(budget, rel=1e-6)


@pytest.mark.parametrize('coding, activity, bits, hop', [
    ('quantised', 0.01, 4, 4), ('quantised', 1, 4, 4),
    ('graded', 1, 4, 4),             # a dense stream
    ('graded', 0.1, 0.5, 0.5),       # events: an address and a level, of 1 + 4 bits
    ('binary', 1, 4, 4),             # three planes and a sign
    ('binary', 0.1, 0.6, 0.6),       # an address, a sign, two bits for one of three planes
    ('unary', 1, 4, 4),              # two spikes with a sign take less than 14 possible ones
    ('unary', 20, 14, 14)])
def test_spikes_are_sent_as_takes_less(coding, activity, bits, hop):
    site = network(activity)[1][0]
    assert traffic(site, coding, PLAIN) == pytest.approx((1e4 * bits, 1e4 * hop))


def test_a_level_of_two_bytes_takes_two_multiplications():
    operations, sites, _ = network(0.5)
    narrow = energy(operations, sites)['account']
    sites[0].planes = 2
    wide = energy(operations, sites)['account']
    assert wide['graded']['operations'] == pytest.approx(2 * narrow['graded']['operations'])
    assert wide['unary'] == narrow['unary'] and wide['quantised'] == narrow['quantised']


@pytest.mark.parametrize('activity, unary, coding, wins', [
    (1., 1., 'graded', False), (1., 40., 'unary', False), (0.1, 2., 'graded', True), (0.1, 2., 'unary', True)])
def test_words_follow_the_figures(activity, unary, coding, wins):
    figures = energy(*network(activity, unary=unary))
    ratio = figures['account'][coding]['total'] / figures['account']['quantised']['total']
    line, = (line for line in verdicts(figures) if f'In {coding} coding' in line)
    assert f'takes {ratio:.2f} ' in line and line.endswith('less than that.') is wins is (ratio < 0.95)
    limit = figures['break_even'][coding]
    if not wins:
        assert f'below {limit:.2f}' in line


@pytest.mark.parametrize('ratio, words', [
    (0.94, ', less than that.'), (0.97, ': that is as much, within 5%, at an activity of 1.00. It would take '),
    (1.04, ': that is as much, within 5%, at'), (1.06, ': it does not win, at an activity of 1.00. It would take ')])
def test_what_is_alike_neither_wins_nor_loses(ratio, words):
    """It said "it does not win" beside 0.97."""
    figures = energy(*network(1.))
    for edge in ('total', 'low', 'high'):
        figures['account']['graded'][edge] = ratio * figures['account']['quantised'][edge]
    line = verdicts(figures)[1]
    assert f'takes {ratio:.2f} ' in line and words in line
    assert ('does not win' in line) == (ratio > 1.05)


@pytest.mark.parametrize('coding', ['graded', 'binary', 'unary'])
def test_at_the_break_even_it_takes_a_little_less(coding):
    constants = Constants(accumulate=0.2)
    limit = energy(*network(0.9, unary=20.), constants)['break_even'][coding]
    assert 0 < limit < 1
    there = energy(*network(limit, unary=20.), constants)['account']
    assert there[coding]['total'] == pytest.approx(0.95 * there['quantised']['total'])


def test_where_nothing_would_help():
    figures = energy(*network(0.9), Constants(comparison=1e3))
    assert figures['break_even'] == dict(unary=None, binary=None, graded=None)
    assert sum('it does not win, and would not take less at any' in line for line in verdicts(figures)) == 3


def test_constants_are_named_sourced_and_open(tmp_path):
    assert all(row['source'] and row['meaning'] for row in constants_table())
    path = tmp_path / 'mine.json'
    path.write_text(json.dumps({'hops': 4, 'int8_mac': 0.6}))
    changed = read_constants(path, ['hops=2'])
    assert (changed.hops, changed.int8_mac, changed.accumulate) == (2, 0.6, 0.05448)
    rows = {row['name']: row for row in constants_table(changed)}
    assert rows['hops']['source'].startswith('given') and 'ISSCC' in rows['fp32_mac']['source']
    one, other = (energy(*network(0.5), c)['account'] for c in (Constants(), changed))
    assert other['graded']['routing'] == pytest.approx(2 * one['graded']['routing'])


@pytest.mark.parametrize('content, pairs, message', [
    ('[]', (), 'object'), ('{', (), 'JSON'), ('{"hop": 1}', (), "'hop'"), ('{"hops": -1}', (), 'hops'),
    ('{"hops": "1"}', (), 'hops'), (None, (), 'mine.json'), ('{}', ('hops',), 'hops'), ('{}', ('hops=nan',), 'nan')])
def test_bad_constants(tmp_path, content, pairs, message):
    path = tmp_path / 'mine.json'
    if content is not None:
        path.write_text(content)
    with pytest.raises(SFormerError, match=message):
        read_constants(path, pairs)
