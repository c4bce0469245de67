"""Activity and spikes per neuron, against spikes that are counted one by one."""
import copy

import numpy as np
import pytest
import torch

from sformer import SFNConfig, activity, convert, evaluate, to_integer_, to_spikes_
from sformer.evaluation import Activity
from sformer.evaluation.activity import firing_counts
from sformer.layers import named_neurons
from sformer.neurons import ScaleAndFire, Spikes
from sformer.saving import open_classifier


def count_by_hand(model, images):
    """Per site neurons, neurons that fire, unary and binary spikes, from the levels that the neurons say they fire."""
    counts = {}

    def hook(name):
        def count(neuron, args):
            levels = np.abs(neuron.encode(args[0]).levels.flatten().numpy().astype(int))
            bits = np.unpackbits(levels.astype(np.uint16).view(np.uint8))
            found = levels.size, int((levels > 0).sum()), int(levels.sum()), int(bits.sum())
            counts[name] = [a + b for a, b in zip(counts.get(name, (0, 0, 0, 0)), found, strict=True)]
        return count
    handles = [n.register_forward_pre_hook(hook(name)) for name, n in named_neurons(model)
               if isinstance(n, ScaleAndFire)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return counts


def mean(counts, figure):
    return sum(c[figure] for c in counts.values()) / sum(c[0] for c in counts.values())


def test_activity_of_an_evaluation(coarse, digits, result):
    counts = count_by_hand(coarse, digits[0])
    assert result['activity_images'] == 540
    assert result['activity_per_site'].keys() == counts.keys(), 'pixels are coded directly and do not count'
    for name, value in result['activity_per_site'].items():
        assert value == pytest.approx(counts[name][1] / counts[name][0], abs=1e-4), name
    assert result['activity'] == pytest.approx(mean(counts, 1), abs=1e-4)
    assert 0.1 < result['activity'] < 0.9


def test_spikes_per_neuron(model, digits):
    counts = count_by_hand(model, digits[0][:64])
    spikes = evaluate(model, 'digits', 'test', source=False, activity_images=64)['spikes_per_neuron']
    assert spikes == dict(unary=mean(counts, 2), binary=mean(counts, 3), graded=mean(counts, 1)), 'integers are exact'
    assert spikes['unary'] > 2 * spikes['binary'] > 2 * spikes['graded'] > 1


@pytest.mark.parametrize('dtype', [torch.int8, torch.int16])
def test_every_level_is_counted_exactly(dtype):
    limit = torch.iinfo(dtype).max
    levels = torch.arange(-limit, limit + 1).to(dtype)
    expected = [abs(k) for k in range(-limit, limit + 1)]
    found = firing_counts(Spikes(levels, torch.ones(())))
    assert found == dict(total=2 * limit + 1, fired=2 * limit, unary=sum(expected), lateral=0,
                         binary=sum(bin(k).count('1') for k in expected))


def test_counts_add_up(model, images):
    """Parts of a batch are the whole, and what was counted can be taken up again."""
    whole, parts = Activity(), Activity()
    with torch.inference_mode():
        with whole.observe(model):
            model(images)
        for part in images.split(20):
            again = Activity(parts.counts)
            with again.observe(model):
                model(part)
            parts = again
    assert {name: site['total'] for name, site in parts.counts.items()} == {
        name: site['total'] for name, site in whole.counts.items()}
    assert parts.mean() == pytest.approx(whole.mean(), rel=1e-3)


def test_activity_of_a_batch(coarse, images):
    counts = count_by_hand(coarse, images)
    assert activity(coarse, images) == {name: c[1] / c[0] for name, c in counts.items()}


def test_activity_leaves_no_hooks(model, images):
    counts = Activity()
    assert counts.mean() is None and counts.spikes_per_neuron() is None
    with pytest.raises(AssertionError), counts.observe(model):
        model(images[:, :, :3])
    with pytest.raises(AssertionError):
        activity(model, images[:, :, :3])
    assert not any(n._forward_pre_hooks or n._forward_hooks for _, n in named_neurons(model))


def test_fewer_levels_and_dead_zones_fire_less(source, images):
    results = [evaluate(convert(source, [images], SFNConfig(**kwargs)), 'digits', source=False, num_images=64)
               for kwargs in (dict(levels=32), dict(levels=32, dead_zone=3.), dict(levels=2))]
    rates = [r['activity'] for r in results]
    assert rates[0] > rates[1] > 0 and rates[0] > rates[2] > 0


def test_spikes_are_counted_on_as_many_images_as_said(coarse, digits):
    result = evaluate(coarse, 'digits', 'test', batch_size=50, activity_images=120)
    assert result['activity_images'] == 150, 'whole batches'
    assert result['activity'] == pytest.approx(mean(count_by_hand(coarse, digits[0][:150]), 1), abs=1e-4)
    nothing = evaluate(coarse, 'digits', 'test', activity_images=0)
    assert nothing['activity'] is None and nothing['spikes_per_neuron'] is None and nothing['activity_images'] == 0


@pytest.mark.parametrize('executed', [
    lambda m: to_integer_(m), lambda m: to_spikes_(m), lambda m: (to_integer_(m), to_spikes_(m, 'graded'))],
    ids=['integer', 'binary', 'integer graded'])
def test_activity_is_the_same_in_every_execution(model, images, executed):
    """Layers in integers ask their neurons for spikes, not for a current: half of the sites were not counted."""
    other = copy.deepcopy(model)
    executed(other)
    expected, counts = Activity(), Activity()
    with torch.inference_mode():
        for network, found in ((model, expected), (other, counts)):
            with found.observe(network):
                network(images)
                network(images)
    assert counts.counts.keys() == expected.counts.keys()
    for name, site in counts.counts.items():
        assert site['total'] == expected.counts[name]['total'], name
        assert site['unary'] == pytest.approx(expected.counts[name]['unary'], rel=0.02), name
    assert counts.mean() == pytest.approx(expected.mean(), abs=0.003)
    assert not any('encode' in vars(n) or n._forward_pre_hooks or n._forward_hooks for _, n in named_neurons(other))


def test_activity_of_integers_that_is_evaluated():
    """The digits in the package: 0.609 and 64.6 unary spikes were counted for 0.509 and 32.5."""
    model = open_classifier('sformer_nano.digits')
    expected = evaluate(model, 'digits', 'test', num_images=128, source=False)
    to_integer_(model)
    found = evaluate(model, 'digits', 'test', num_images=128, source=False)
    assert found['activity'] == pytest.approx(expected['activity'], abs=0.005)
    assert found['spikes_per_neuron']['unary'] == pytest.approx(expected['spikes_per_neuron']['unary'], rel=0.01)
    assert found['activity_per_site'].keys() == expected['activity_per_site'].keys()


def test_spikes_of_a_stream_are_counted_on_the_first_images_of_each_shard(coarse, digit_files):
    """As many of each as make up the number, as nobody knows which of them come first."""
    folder = digit_files(4)
    for wanted, counted in ((40, 40), (41, 60), (0, 0)):  # whole batches
        result = evaluate(coarse, folder, streaming=True, batch_size=5, activity_images=wanted, source=False)
        assert (result['num_images'], result['activity_images']) == (200, counted)
