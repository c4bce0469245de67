"""What several timesteps cost: against counting by hand."""
import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, rng

from sformer import SFNConfig, calibrate_, named_neurons, spiking_
from sformer.baselines import IntegrateAndFire, MultiStep, multi_threshold_network, profile_steps
from sformer.neurons import CODINGS, integrate_and_fire
from sformer.profiling import energy, profile_model


def test_spikes_and_operations_of_a_layer_are_those_of_a_loop():
    steps, model, x = 5, nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(10, 4, generator=rng())
    spiking_(model, SFNConfig(steps, fire='uniform', activation_fire='uniform', token_scale=False,
                               neuron='separate_branches'))
    calibrate_(model, [x])
    one_step = profile_model(model, [x])
    network = MultiStep(model, steps, lambda old: IntegrateAndFire(old, steps))
    counted, neurons, _, images = profile_steps(network, x.split(4), one_step)
    thresholds = steps * model[0].neuron.threshold
    spikes = sum((integrate_and_fire((sign * x).expand(steps, -1, -1), theta, theta / 2) * steps / theta).round().sum()
                 for sign, theta in zip((1, -1), thresholds, strict=True)).item()
    assert images == 10 and spikes > 10
    for coding in CODINGS:  # a spike of one threshold is one spike in all of them
        assert counted[0].synaptic_operations[coding] == pytest.approx(3 * spikes / 10)
        assert neurons[0].spikes[coding] * neurons[0].neurons == pytest.approx(spikes / 10)
    assert neurons[0].neurons == 4 * steps and counted[0].weights == 12 * steps and counted[0].macs == 12


def test_every_operation_of_a_network_is_counted():
    images = pixels(3)
    network, model = multi_threshold_network(build('eva02', depth=1), [images], 3)
    operations, sites, floating, _ = one_step = profile_model(model, [images])
    counted, neurons, functions, _ = profile_steps(network, [images], one_step)
    assert [o.name for o in counted] == [o.name for o in operations] and [s.name for s in neurons] == [
        s.name for s in sites]
    spikes = {s.name: s.spikes['graded'] * s.neurons for s in neurons}
    product = next(o for o in counted if o.kind == 'QK^T')
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    assert product.synaptic_operations['graded'] == pytest.approx(sum(spikes[n] for n in product.operands) * tokens)
    assert product.synaptic_operations['unary'] > product.synaptic_operations['binary']
    assert product.synaptic_operations['binary'] == product.synaptic_operations['graded']  # powers of two
    pixel, before = (next(s for s in found if s.name == 'patch_embed.proj.neuron') for found in (neurons, sites))
    assert pixel == before  # coded once
    before, after = (energy(*parts)['account']['binary'] for parts in (
        (operations, sites, floating), (counted, neurons, functions)))
    assert after['floating'] == pytest.approx(3 * before['floating']) and after['total'] > before['total']
    assert not any(neuron._forward_hooks for _, neuron in named_neurons(network.network))
