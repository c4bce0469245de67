"""Linear layers, convolutions and patch embeddings on spikes."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_tools import randomise_, relative_error, rng, same_state, spiking, state_of, tokens
from timm import layers as tl

from sformer import SFNConfig, calibrate_, spiking_
from sformer.layers import SpikingConv2d, SpikingConvTranspose2d, SpikingLinear, SpikingPatchEmbed
from sformer.neurons import GradedCoding, ScaleAndFire


@pytest.mark.parametrize('bias', [True, False])
def test_linear_multiplies_spikes_with_weights(bias):
    layer = spiking(randomise_(nn.Linear(6, 5, bias=bias)), tokens(dim=6), SFNConfig(levels=4))
    x = tokens(dim=6, seed=3)
    expected = layer.neuron.encode(x).decode() @ layer.weight.T
    torch.testing.assert_close(layer(x), expected if layer.bias is None else expected + layer.bias)
    assert not torch.allclose(layer(x), nn.Linear.forward(layer, x))


@pytest.mark.parametrize('kind, plain, size', [(SpikingLinear, nn.Linear, ()), (SpikingConv2d, nn.Conv2d, (1,))])
@pytest.mark.parametrize('options', [{}, dict(bias=False), dict(bias=False, dtype=torch.float64), dict(device='meta')])
def test_layers_that_are_built_by_hand(kind, plain, size, options):
    layer, plain = kind(4, 6, *size, **options), plain(4, 6, *size, **options)
    assert state_of(plain).keys() <= state_of(layer).keys() and (layer.bias is None) == (plain.bias is None)
    assert (layer.weight.shape, layer.weight.dtype) == (plain.weight.shape, plain.weight.dtype)
    assert layer.weight.device == plain.weight.device


CONVOLUTIONS = {
    'strided': nn.Conv2d(4, 6, 3, stride=2, padding=1),
    'grouped': nn.Conv2d(4, 6, 3, groups=2),
    'depthwise': nn.Conv2d(4, 8, 3, groups=4, padding='same'),
    'circular': nn.Conv2d(4, 6, 3, padding=1, padding_mode='circular'),
    'transposed': nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    'transposed grouped': nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False),
}


@pytest.mark.parametrize('kind', CONVOLUTIONS)
def test_convolution_multiplies_spikes_with_weights(kind):
    conv = randomise_(copy.deepcopy(CONVOLUTIONS[kind]))
    x = torch.randn(2, 4, 8, 8, generator=rng(3))
    layer = spiking(conv, x, SFNConfig(levels=4))
    assert type(layer) in (SpikingConv2d, SpikingConvTranspose2d) and isinstance(layer, type(conv))
    assert type(layer.neuron) is ScaleAndFire and layer.neuron.step.shape == (4, 1, 1)
    decoded = layer.neuron.encode(x).decode()
    assert torch.equal(layer(x), conv(decoded)) and not torch.allclose(layer(x), conv(x))
    # a step per channel folds into the weights, whatever the groups: levels are all that the product has to read
    folded, levels = copy.deepcopy(conv), layer.neuron.encode(x).levels.float()
    weight = folded.weight.data
    if isinstance(conv, nn.ConvTranspose2d):
        weight.mul_(layer.neuron.step[..., None])
    else:
        steps = layer.neuron.step.view(conv.groups, -1, 1, 1)
        weight.mul_(steps.repeat_interleave(conv.out_channels // conv.groups, 0))
    torch.testing.assert_close(folded(levels), layer(x))


def test_transposed_convolution_takes_an_output_size():
    conv = randomise_(nn.ConvTranspose2d(4, 6, 3, stride=2))
    x = torch.randn(2, 4, 5, 5, generator=rng(3))
    layer = spiking(conv, x)
    assert layer(x, output_size=(12, 12)).shape == conv(x, output_size=(12, 12)).shape == (2, 6, 12, 12)


def test_channels_of_a_convolution_have_steps_of_their_own():
    # a channel that is a hundred times the others costs them nothing
    conv = randomise_(nn.Conv2d(4, 6, 3))
    x = torch.randn(8, 4, 8, 8, generator=rng(3)) * torch.tensor([100., 1., 1., 1.]).view(-1, 1, 1)
    conv.weight.data[:, 0] /= 100
    assert relative_error(spiking(conv, x, SFNConfig(levels=32))(x), conv(x)) < 0.03


@pytest.mark.parametrize('levels', [4, 32, 127])
def test_a_site_after_a_relu_wastes_no_level_on_the_branch_that_never_fires(levels):
    x = torch.randn(16, 3, 16, 16, generator=rng()).relu() * torch.tensor([1., 5., 0.]).view(-1, 1, 1)
    conv, config = randomise_(nn.Conv2d(3, 2, 1)), SFNConfig(levels=levels)
    one, both = (spiking(conv, currents, config).neuron for currents in (x, torch.cat([x, -x])))
    top = one.encode(x).levels.amax((0, 2, 3))
    # all levels lie between 0 and the largest current, as those of an unsigned neuron would, but for the width of a bin
    assert (one.multiplier == 1).all() and top[2] == 0 and (top[:2] > 0.9 * levels).all()
    # and as many as a site has per branch whose currents reach equally far on both
    torch.testing.assert_close(one.threshold[:, :2], both.threshold[:, :2], rtol=1e-4, atol=0)


def test_zeros_around_an_image_stay_zeros():
    # a convolution pads what its neuron fired: nothing, for a neuron without a centre
    layer = spiking(randomise_(nn.Conv2d(1, 1, 3, padding=1)), torch.randn(2, 1, 4, 4, generator=rng()))
    torch.testing.assert_close(layer(torch.zeros(1, 1, 4, 4)), layer.bias.view(1, 1, 1, 1).expand(1, 1, 4, 4))


@pytest.mark.parametrize('kind', [
    tl.Conv2dSame, tl.StdConv2d, tl.StdConv2dSame, tl.ScaledStdConv2d, tl.ScaledStdConv2dSame])
def test_convolutions_of_timm_that_standardise_or_pad_by_size(kind):
    source, x = randomise_(kind(4, 6, 3, stride=2)), torch.randn(8, 4, 9, 9, generator=rng())
    layer = spiking(source, x, SFNConfig(levels=127))
    assert relative_error(layer(x), source(x)) < 0.02
    product, = layer.multiplies()
    torch.testing.assert_close(product.compute(layer.neuron(x), product.weights, product.bias), layer(x))


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


@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_one_channel_of_an_image_is_not_spread_over_all(kind):
    layer = spiking(nn.Sequential(kind(4, 2, 3)), torch.randn(2, 4, 8, 8))
    with pytest.raises(AssertionError, match='another number of channels'):
        layer(torch.randn(2, 1, 8, 8))


def test_one_channel_is_not_spread_over_all():
    layer = spiking(nn.Sequential(randomise_(nn.Linear(6, 5))), tokens(dim=6))
    for channels in (1, 5):
        with pytest.raises(AssertionError, match='another number of channels'):
            layer(tokens(dim=channels))
