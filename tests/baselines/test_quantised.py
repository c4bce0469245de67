"""Plain quantisation: against rounding written out, and what reaches products."""
import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, relative_error, rng, same_state, state_of

from sformer import SFNConfig, calibrate_, is_calibrated, named_neurons, spiking_
from sformer.baselines import Quantiser, quantised, quantised_twin, twin_bits
from sformer.baselines.quantised import quantise_weights_
from sformer.layers import SpikingLinear
from sformer.neurons import ScaleAndFire


def fitted(x, bits, fine=False, **kwargs):
    quantiser = Quantiser(ScaleAndFire((x.shape[-1],), SFNConfig(), **kwargs), bits, fine)
    statistics = quantiser.statistics()
    statistics.update(x)
    quantiser.fit(statistics)
    return quantiser


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('fine', [False, True])
def test_the_step_has_the_least_squared_error(bits, fine):
    x = torch.randn(4000, 3, generator=rng(1)) * torch.tensor([1., 3., 0.2])
    quantiser = fitted(x, bits, fine)
    top = 2 ** (bits - 1) - 1

    def error(step):
        return ((x / step).round().clamp(-top, top) * step - x).square().mean(0)
    steps = 2. ** torch.arange(-9, 4, 1 / 16)
    errors = torch.stack([error(step) for step in steps])  # (steps, channels)
    least = errors.amin(0) if fine else errors.mean(1).amin()
    achieved = error(quantiser.step) if fine else error(quantiser.step).mean()
    assert quantiser.step.shape == ((3,) if fine else (1,))
    assert (achieved <= 1.05 * least).all()
    assert torch.equal(quantiser(x), (x / quantiser.step).round().clamp(-top, top) * quantiser.step)
    assert quantiser.encode(x).levels.abs().max() == top


def test_softmax_numerators_need_no_sign():
    quantiser = Quantiser(ScaleAndFire((2, 1, 1), SFNConfig(), signed=False), 4)
    assert quantiser.statistics() is None
    levels = quantiser.encode(torch.linspace(0, 1, 100).view(1, 1, 1, 100)).levels
    assert levels.unique().tolist() == list(range(16))


@pytest.mark.parametrize('levels, bits', [(1, 2), (3, 3), (4, 4), (7, 4), (8, 5), (32, 7), (63, 7), (127, 8)])
def test_twins_have_the_bits_of_their_levels(levels, bits):
    assert twin_bits(levels) == bits


@pytest.mark.parametrize('bits', [4, 8])
def test_weights_are_integers_times_a_step_per_output(bits):
    layer = SpikingLinear(32, 8)
    before = layer.weight.detach().clone()
    quantise_weights_(nn.Sequential(layer, nn.LayerNorm(8)), bits)
    top = 2 ** (bits - 1) - 1
    for row, old in zip(layer.weight.detach(), before, strict=True):
        step = min((row.abs().max() / k for k in range(1, top + 1)),
                   key=lambda step: float((row / step - (row / step).round()).abs().max() > 1e-3))
        assert ((row / step).round().abs() <= top).all()
        assert torch.allclose((row / step).round() * step, row, atol=1e-6)
        nearest = old.abs().max() / top  # without clipping
        assert (row - old).square().sum() <= ((old / nearest).round() * nearest - old).square().sum() + 1e-9


@pytest.mark.parametrize('family', ['vit', pytest.param('eva02', marks=pytest.mark.slow)])
def test_more_bits_are_nearer_to_the_source(family):
    source, images = build(family, depth=1), pixels(8)
    state = state_of(source)
    with torch.no_grad():
        expected = source(images)
        errors = [relative_error(quantised(source, [images], bits, bits)(images), expected) for bits in (3, 5, 8)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.1
        assert relative_error(quantised(source, [images], 8)(images), expected) < errors[2]
    assert same_state(source, state)


def test_a_twin_has_a_quantiser_at_each_site():
    source, images = build(depth=1), pixels(8)
    twin, sformer = quantised_twin(source, [images], 8), spiking_(build(depth=1), SFNConfig(levels=8))
    calibrate_(sformer, [images])
    assert is_calibrated(twin)
    sites = dict(named_neurons(twin))
    for name, neuron in named_neurons(sformer):
        if isinstance(neuron, ScaleAndFire):
            assert isinstance(sites[name], Quantiser) and sites[name].top in (15, 31)
            if neuron.signed:
                assert sites[name].step.shape == neuron.step.shape
    attention = twin.blocks[0].attn.products[0]
    product = attention.q_neuron.step * attention.k_neuron.step
    assert torch.allclose(product, product[..., :1].expand_as(product))  # QK^T sums over channels
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), source.parameters(), strict=True))
