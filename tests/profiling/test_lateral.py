"""Lateral spikes are counted and charged: by hand, in a profile, in energy, and in activity."""
import dataclasses

import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, rng

from sformer import SFNConfig, calibrate_, convert, spiking_
from sformer.evaluation.activity import Activity
from sformer.neurons import CODINGS, spikes_in
from sformer.profiling import energy, profile_model
from sformer.profiling.operations import FEEDBACK


@pytest.fixture(scope='module')
def layer():
    layer = spiking_(nn.Sequential(nn.Linear(24, 8)), SFNConfig(4, lateral=3))
    calibrate_(layer, [torch.randn(64, 24, generator=rng())])
    return layer


def test_operations_of_feedback_by_hand(layer):
    x = torch.randn(5, 24, generator=rng(1))
    neuron = layer[0].neuron
    spikes = neuron.encode(x).lateral
    place = {int(channel): place for place, channel in enumerate(neuron.order)}
    listeners = [24 - 8 * (place[channel] // 8 + 1) for channel in range(24)]
    assert neuron.listeners.tolist() == listeners and sum(listeners) == neuron.feedback.numel() == 192
    profile = profile_model(layer, [x])
    product, feedback = profile.operations
    assert (feedback.kind, feedback.macs, feedback.weights) == (FEEDBACK, 0, 192)
    for coding in CODINGS:
        sent = spikes_in(spikes, coding)
        by_hand = sum(int(sent[i, c]) * listeners[c] for i in range(5) for c in range(24))
        assert feedback.synaptic_operations[coding] == by_hand / 5
    site, lateral = profile.sites
    assert lateral.lateral and not lateral.counted and not site.lateral and lateral.neurons == 24
    assert lateral.activity == pytest.approx((spikes != 0).float().mean().item())
    assert feedback.operands == (lateral.name,)
    assert product.macs == 24 * 8 and product.name == '0'


def test_energy_charges_the_sformer_and_not_its_twin(layer):
    profile = profile_model(layer, [torch.randn(5, 24, generator=rng(1))])
    whole = energy(*profile[:3])['account']
    without = energy([o for o in profile.operations if o.kind != FEEDBACK],
                     [s for s in profile.sites if not s.lateral], profile.floating)['account']
    assert whole['quantised'] == without['quantised']
    assert whole['quantised, skipping zeros'] == without['quantised, skipping zeros']
    for coding in CODINGS:
        for part in ('operations', 'comparisons', 'weights', 'activations', 'routing', 'total'):
            assert whole[coding][part] > without[coding][part], (coding, part)


def test_a_profile_names_feedback_once_and_nothing_as_floating():
    model = convert(build('vit'), [pixels(8)], SFNConfig(4, lateral=3))
    profile = profile_model(model, [pixels(3)])
    plain = profile_model(convert(build('vit'), [pixels(8)], SFNConfig(4)), [pixels(3)])
    names = [o.name for o in profile.operations]
    assert len({*names}) == len(names) and 'blocks.1.mlp.fc2 feedback' in names
    products = [(o.name, o.kind, o.macs) for o in profile.operations if o.kind != FEEDBACK]
    assert products == [(o.name, o.kind, o.macs) for o in plain.operations]
    assert not [site for site in plain.sites if site.lateral]
    assert [f.name for f in profile.floating] == [f.name for f in plain.floating]


def test_activity_counts_lateral_spikes_beside_levels():
    model = convert(build('vit'), [pixels(8)], SFNConfig(4, lateral=3))
    images, counts = pixels(3), Activity()
    with counts.observe(model), torch.no_grad():
        model(images)
    spikes, profile = counts.spikes_per_neuron(), profile_model(model, [images])
    neurons = sum(s.neurons for s in profile.sites if s.counted)
    for coding in CODINGS:
        sent = sum(s.neurons * s.spikes[coding] for s in profile.sites if s.counted or s.lateral)
        assert spikes[coding] == pytest.approx(sent / neurons)
    assert spikes['graded'] == pytest.approx(counts.mean() + spikes['lateral']) and spikes['lateral'] > 0.1
    total = Activity()
    total.add(Activity({name: dict(total=2, fired=1, unary=1, binary=1) for name in counts.counts}))  # of old journals
    assert 'lateral' not in total.spikes_per_neuron()


def test_figures_without_feedback_have_no_lateral_part(model, images):
    counts = Activity()
    with counts.observe(model), torch.no_grad():
        model(images)
    assert counts.spikes_per_neuron().keys() == {*CODINGS}
    profile = profile_model(model, [images])
    assert FEEDBACK not in {o.kind for o in profile.operations}
    assert not any(dataclasses.asdict(s)['lateral'] for s in profile.sites)
