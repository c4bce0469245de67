"""Linear layers, convolutions and patch embeddings on spikes."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_tools import randomise_, relative_error, rng, same_state, spiking, state_of, tokens
from timm import layers as tl

from sformer import SFNConfig, calibrate_, spiking_
from sformer.layers import SpikingConv2d, SpikingLinear, SpikingPatchEmbed
from sformer.neurons import GradedCoding, ScaleAndFire


@pytest.mark.parametrize('bias', [True, False])
def test_linear_multiplies_spikes_with_weights(bias):
    layer = spiking(randomise_(nn.Linear(6, 5, bias=bias)), tokens(dim=6), SFNConfig(levels=4))
    x = tokens(dim=6, seed=3)
    expected = layer.neuron.encode(x).decode() @ layer.weight.T
    torch.testing.assert_close(layer(x), expected if layer.bias is None else expected + layer.bias)
    assert not torch.allclose(layer(x), nn.Linear.forward(layer, x))


@pytest.mark.parametrize('kwargs', [
    dict(stride=2, padding=1), dict(groups=3), dict(padding=1, padding_mode='circular')])
def test_convolution_multiplies_spikes_with_weights(kwargs):
    conv = randomise_(nn.Conv2d(3, 6, 3, **kwargs))
    x = torch.randn(2, 3, 8, 8, generator=rng(3))
    layer = spiking(conv, x, SFNConfig(levels=4))
    assert type(layer) is SpikingConv2d and type(layer.neuron) is ScaleAndFire
    assert torch.equal(layer(x), conv(layer.neuron(x))) and not torch.allclose(layer(x), conv(x))


def test_zeros_around_an_image_stay_zeros():
    # a convolution pads what its neuron fired: nothing, for a neuron without a centre
    layer = spiking(randomise_(nn.Conv2d(1, 1, 3, padding=1)), torch.randn(2, 1, 4, 4, generator=rng()))
    torch.testing.assert_close(layer(torch.zeros(1, 1, 4, 4)), layer.bias.view(1, 1, 1, 1).expand(1, 1, 4, 4))


def test_patch_embedding_reads_8_bit_pixels_without_loss():
    embed = randomise_(tl.PatchEmbed(16, 4, 3, 8))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=rng(0))
    x = (pixels / 255 - 0.5) / 0.5
    expected = embed(x)
    assert type(spiking_(embed)) is SpikingPatchEmbed and type(embed.proj.neuron) is GradedCoding
    torch.testing.assert_close(embed(x), expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_that_timm_puts_in_anew_is_converted_by_a_second_call():
    embed = spiking_(tl.PatchEmbed(16, 4, 3, 8))
    embed.proj = nn.Conv2d(1, 8, 4, 4)
    spiking_(embed)
    assert type(embed.proj) is SpikingConv2d and embed.proj.neuron.step.shape == (1, 1, 1)
    coding = embed.proj.neuron
    assert spiking_(embed).proj.neuron is coding


def test_a_spiking_layer_can_be_built_by_itself():
    layer = SpikingLinear(6, 5, config=SFNConfig(levels=127))
    source = nn.Linear(6, 5)
    source.load_state_dict(layer.state_dict(), strict=False)
    x = tokens(n=500, dim=6)
    calibrate_(layer, [x])
    assert relative_error(layer(x), source(x)) < 0.02
    converted = spiking_(copy.deepcopy(source), SFNConfig(levels=127))
    converted.load_state_dict(state_of(layer))
    assert same_state(converted, state_of(layer)) and torch.equal(converted(x), layer(x))


def test_gradients_of_weights_are_the_spikes():
    layer = spiking(randomise_(nn.Linear(6, 5)), tokens(dim=6))
    x, upstream = tokens(dim=6).requires_grad_(), tokens(dim=5, seed=8)
    layer(x).backward(upstream)
    spikes = layer.neuron.encode(x).decode()
    torch.testing.assert_close(layer.weight.grad, torch.einsum('blo,bli->oi', upstream, spikes))
    inside = layer.neuron(x.detach().requires_grad_()).requires_grad
    assert inside and torch.isfinite(x.grad).all() and x.grad.any()


def test_one_channel_is_not_spread_over_all():
    layer = spiking(nn.Sequential(randomise_(nn.Linear(6, 5))), tokens(dim=6))
    for channels in (1, 5):
        with pytest.raises(AssertionError, match='another number of channels'):
            layer(tokens(dim=channels))
