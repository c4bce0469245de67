"""Integer execution in torch: int8 weights are those of the layer, sums are exact, and nothing else changes."""
import copy

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_tools import FAMILIES, build, pixels, relative_error, rng, spiking, tokens

from sformer import (
    SFNConfig,
    SFormerError,
    UncalibratedError,
    calibrate_,
    convert,
    named_neurons,
    save_model,
    source_of,
    source_view,
    spiking_,
    to_integer_,
)
from sformer.execution import integer
from sformer.execution.integer import IntegerConv2d, IntegerLinear
from sformer.execution.rounding import MAX_SPLIT, TARGET_ERROR, integer_weights
from sformer.layers import SpikingConv2d, SpikingLinear


def rebuilt(weights, channels):
    """Float weights (D, C) that int8 columns stand for."""
    columns = torch.arange(channels) if weights.columns is None else weights.columns
    summed = torch.zeros(len(weights.weight), channels).index_add_(1, columns, weights.weight.float())
    return summed * weights.step[:, None]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(1, 40), st.integers(1, 80), st.floats(1, 300), st.integers(0, 3))
def test_int8_weights_stand_for_the_weights(seed, rows, channels, outlier, count):
    weight = torch.randn(rows, channels, generator=rng(seed))
    weight[:, :count] *= outlier
    weights = integer_weights(weight)
    assert weights.weight.dtype == torch.int8 and weights.weight.min() >= -127
    difference = rebuilt(weights, channels) - weight
    assert (difference.abs() <= weights.step[:, None] * 0.5001).all()
    assert weights.error == pytest.approx((difference.norm() / weight.norm()).item(), abs=1e-6)
    assert weights.weight.shape[1] <= MAX_SPLIT * channels


@pytest.mark.parametrize('outlier', [1, 8, 60])
def test_a_few_outliers_are_split_where_that_pays(outlier):
    weight = torch.randn(64, 256, generator=rng(0))
    weight[:, 7] *= outlier
    weights = integer_weights(weight)
    assert (weights.columns is None) == (outlier == 1)
    assert weights.error <= TARGET_ERROR
    if weights.columns is not None:
        assert (weights.columns == 7).sum() > 1 and weights.weight.shape[1] < 1.125 * 256


@pytest.mark.parametrize('rank', [4, 200])
@pytest.mark.parametrize('outlier', [1, 60])
def test_errors_cancel_in_products_with_correlated_levels(rank, outlier):
    weight = torch.randn(24, 256, generator=rng(0))
    weight[:, 7] *= outlier
    mixing = torch.randn(rank, 256, generator=rng(1))
    levels, unseen = ((torch.randn(2000, rank, generator=rng(s)) @ mixing).round() for s in (2, 3))
    nearest, fed = integer_weights(weight), integer_weights(weight, levels.T @ levels)
    assert fed.weight.dtype == torch.int8 and torch.equal(fed.step, nearest.step)
    error = relative_error(unseen @ rebuilt(fed, 256).T, unseen @ weight.T)
    assert error < (0.5 if rank == 4 else 1) * relative_error(unseen @ rebuilt(nearest, 256).T, unseen @ weight.T)
    assert fed.error == pytest.approx(relative_error(levels @ rebuilt(fed, 256).T, levels @ weight.T), rel=0.05)


def test_moments_of_silent_channels():
    levels = torch.randn(50, 8, generator=rng(0)).round()
    levels[:, 3:] = 0
    for moments in (levels.T @ levels, torch.zeros(8, 8)):
        weights = integer_weights(torch.randn(5, 8, generator=rng(1)), moments)
        assert torch.isfinite(weights.step).all() and weights.weight.abs().max() == 127


def test_images_make_rounding_better():
    model, images = convert(build(embed_dim=64, mlp_ratio=4), [pixels(64)], SFNConfig(127)), pixels(64)
    nearest, fed, grouped = (copy.deepcopy(model) for _ in range(3))
    plain = to_integer_(nearest)
    reports = to_integer_(fed, batches=images.split(16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sformer.execution.integer.MOMENTS_MEMORY', 1)  # one layer at a time
        assert to_integer_(grouped, batches=iter(images.split(16))) == reports
    x = pixels(32, seed=9)
    assert sum(r.error for r in reports) < 0.9 * sum(r.error for r in plain)
    with torch.no_grad():
        assert torch.equal(grouped(x), fed(x))
    assert not any(module._forward_pre_hooks for module in fed.modules())


def test_weights_of_zero():
    weights = integer_weights(torch.zeros(3, 4))
    assert not weights.weight.any() and weights.error == 0 and torch.isfinite(weights.step).all()


@pytest.mark.parametrize('outlier', [1., 100.])
@pytest.mark.parametrize('token_scale', [True, False])
@pytest.mark.parametrize('length', [1, 7])
def test_a_layer_is_its_simulation_with_weights_of_int8(outlier, token_scale, length):
    x = tokens(5, length, 48)
    x[..., 3] *= outlier
    layer = spiking(nn.Sequential(nn.Linear(48, 20)), x, SFNConfig(32, token_scale=token_scale))
    whole = copy.deepcopy(layer)
    report, = to_integer_(whole)
    assert type(whole[0]) is IntegerLinear and report.name == '0' and report.integer and report.error < 0.02
    assert report.columns == 1 or outlier > 1
    with torch.no_grad():
        spikes = layer[0].neuron.encode(x)
        levels = spikes.levels.long() if whole[0].columns is None else spikes.levels.long()[..., whole[0].columns]
        sums = (levels @ whole[0].weight.long().t()).double()  # exact
        token_scale = 1 if spikes.token_scale is None else spikes.token_scale
        expected = sums * whole[0].weight_step * token_scale + layer[0].bias
        torch.testing.assert_close(whole(x), expected.float(), rtol=1e-6, atol=1e-6)
        assert relative_error(whole(x), layer(x)) < 2 * report.error + 1e-3


@pytest.mark.parametrize('family', [
    name if name in ('vit', 'beit v2', 'eva02', 'differential', 'glu mlp', 'map pooling', 'gated attention')
    else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_every_family_computes_in_integers(family):
    model = convert(build(family), [pixels(8)], SFNConfig(levels=127))
    whole = copy.deepcopy(model)
    reports = to_integer_(whole)
    assert all(report.integer for report in reports)
    assert not [name for name, layer in whole.named_modules() if isinstance(layer, (SpikingLinear, SpikingConv2d))]
    assert [name for name, _ in named_neurons(whole)] == [name for name, _ in named_neurons(model)]
    with torch.no_grad():
        assert relative_error(whole(pixels(4)), model(pixels(4))) < 0.08
        assert relative_error(whole(pixels(1)), whole(pixels(4))[:1]) < 1e-4


@pytest.mark.parametrize('conv', [
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding='same', dilation=2),
    nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 6, 3, bias=False),
    nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False)], ids=str)
def test_convolutions(conv):
    # channels of very different steps, which have to fold into the weights that read them
    x = torch.randn(4, 4, 9, 9, generator=rng(0)) * torch.tensor([1., 8., 0.1, 30.]).view(-1, 1, 1)
    layer = spiking(nn.Sequential(conv), x, SFNConfig(127))
    whole = copy.deepcopy(layer)
    report, = to_integer_(whole)
    assert type(whole[0]) is IntegerConv2d and report.integer and whole[0].weight.dtype == torch.int8
    assert whole[0].weight.shape == conv.weight.shape
    with torch.no_grad():
        assert relative_error(whole(x), layer(x)) < 0.02
        # exact but for the steps: the same with sums of integers
        exact, levels = copy.deepcopy(conv).double(), layer[0].neuron.encode(x).levels.double()
        exact.weight.copy_(whole[0].weight)
        sums = exact(levels) - (0 if conv.bias is None else exact.bias.view(-1, 1, 1))
        expected = sums.float() * whole[0].weight_step + (0 if conv.bias is None else conv.bias.view(-1, 1, 1))
        assert torch.equal(whole(x), expected)


def test_sums_that_float32_would_round_are_exact():
    x = torch.randn(2, 2048, 3, 3, generator=rng(0)).sign()
    conv = nn.Conv2d(2048, 1, 3, bias=False)
    nn.init.ones_(conv.weight)
    layer = spiking(nn.Sequential(conv), x, SFNConfig(127))
    to_integer_(layer)
    assert layer[0].exact == torch.float64
    sums = layer[0].neuron.encode(x).levels.sum((1, 2, 3), dtype=torch.int64) * int(layer[0].weight.max())
    with torch.no_grad():
        torch.testing.assert_close(layer(x).flatten(), sums.float() * layer[0].weight_step.item())


def test_a_convolution_whose_padding_is_no_zero_is_listed():
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'))
    layer = spiking(conv, torch.randn(4, 4, 9, 9, generator=rng(0)))
    report, = to_integer_(layer)
    assert not report.integer and 'pads' in report.reason and type(layer[0]) is SpikingConv2d


def test_layers_that_would_lose_too_much_stay_as_they_are():
    model = convert(build(), [pixels()])
    whole = copy.deepcopy(model)
    reports = to_integer_(whole, max_error=1e-9)
    assert not any(report.integer for report in reports) and all('error of' in report.reason for report in reports)
    with torch.no_grad():
        assert torch.equal(whole(pixels()), model(pixels()))


@pytest.mark.parametrize('int8', [True, False])
def test_memory_is_a_quarter_where_int8_is_multiplied(int8, monkeypatch):
    monkeypatch.setattr(integer, 'multiplies_int8', lambda: int8)
    model = convert(build(embed_dim=128, depth=2), [pixels()])
    def size(m):
        return sum(t.numel() * t.element_size() for t in [*m.parameters(), *m.buffers()])
    before = size(source_of(model))
    to_integer_(model)
    # neurons and embeddings weigh as much in a network as small as this
    assert size(model) < (0.4 if int8 else 1.3) * before


def test_steps_stay_float32():
    model = convert(build(), [pixels()])
    to_integer_(model)
    half = copy.deepcopy(model).bfloat16()
    layer = half.blocks[0].mlp.fc1
    assert layer.weight_step.dtype == layer.bias.dtype == torch.float32 and layer.weight.dtype == torch.int8
    with torch.no_grad():
        out = half(pixels().bfloat16())
        assert out.dtype == torch.bfloat16 and relative_error(out.float(), model(pixels())) < 0.1


@pytest.mark.slow
def test_compiles():
    model = convert(build(depth=1), [pixels()])
    to_integer_(model)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(pixels()), model(pixels())) < 1e-2


def test_an_uncalibrated_model_is_refused():
    with pytest.raises(UncalibratedError, match=r'uncalibrated.*; fit it with sformer\.convert\(\) or calibrate_\(\)'):
        to_integer_(spiking_(build()))


def test_there_is_no_way_back(tmp_path):
    model = convert(build(), [pixels()])
    to_integer_(model)
    for what in (source_of, source_view):
        with pytest.raises(SFormerError, match='int8, so its source is gone'):
            what(model)
    with pytest.raises(SFormerError, match='is an IntegerConv2d, .* save the model that it was made of'):
        save_model(model, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_layer_is_not_replaced_in_itself():
    layer = spiking_(nn.Linear(4, 3))
    calibrate_(layer, [torch.randn(8, 4, generator=rng(0))])
    with pytest.raises(SFormerError, match='a module that it is part of'):
        to_integer_(layer)


def test_adapters_have_to_be_merged():
    peft = pytest.importorskip('peft')
    model = convert(build(), [pixels()])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=['qkv'], r=2))
    with pytest.raises(SFormerError, match='merge'):
        to_integer_(adapted)
