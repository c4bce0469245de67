"""Calibration: what is observed of the source does not depend on how images come, and the traps of real networks."""
import copy
import dataclasses
import math

import pytest
import torch
import torch.nn as nn
from layer_tools import (
    build,
    named_neurons,
    neuron_names,
    pixels,
    randomise_,
    relative_error,
    rng,
    same_state,
    state_of,
)
from timm import layers as tl

from sformer import FitConfig, SFNConfig, SFormerError, calibrate_, convert, is_calibrated, spiking_
from sformer.conversion import calibration, observe
from sformer.conversion.record import CalibrationRecord, library_versions
from sformer.models import spiking_model_
from sformer.neurons import CurrentStatistics, ScaleAndFire
from sformer.neurons.thresholds import MIN_STEP


def calibrated(source, batches, config=SFNConfig(), fit=FitConfig()):
    model = spiking_(copy.deepcopy(source), config)
    calibrate_(model, batches, fit)
    return model


def neuron_state(model):
    return {f'{name}.{key}': b.clone() for name, n in named_neurons(model) for key, b in n.named_buffers()}


# how images come

@pytest.mark.parametrize('family, estimator', [
    ('vit', 'mse'), ('vit', 'quantile'), ('eva02', 'max'), ('differential', 'mse'), ('gated attention', 'mse')])
def test_batch_size_does_not_matter_at_all(family, estimator):
    source, x = build(family), pixels(40)
    config, fit = SFNConfig(levels=16, attention_fire='density'), FitConfig(estimator)
    whole = neuron_state(calibrated(source, [x], config, fit))
    for size in (1, 7, 32):
        state = neuron_state(calibrated(source, x.split(size), config, fit))
        assert list(state) == list(whole)
        assert [name for name, value in state.items() if not torch.equal(value, whole[name])] == [], size


def test_batches_of_other_sizes_and_kinds_are_not_mixed():
    seen = []
    model = spiking_(nn.Sequential(nn.Conv2d(3, 4, 2)))
    batches = [torch.randn(n, 3, size, size, generator=rng(n)) for n, size in ((20, 4), (3, 8), (15, 8), (2, 4))]
    count = calibrate_(model, batches, forward_fn=lambda net, x: seen.append(tuple(x.shape)) or net(x))
    assert count == 40 and calibration.OBSERVED_IMAGES == 16
    again = [(16, 3, 4, 4)]  # the first ones, to see what spikes of the fitted neurons carry
    assert seen == [(16, 3, 4, 4), (4, 3, 4, 4), (16, 3, 8, 8), (2, 3, 8, 8), (2, 3, 4, 4), *again]


def test_permuted_images_give_nearly_the_same_model():
    # keys are centred on the mean of the first batch; all other statistics are the same
    source, x = build(), pixels(16)
    first, second = (calibrated(source, [batch], SFNConfig(levels=16)) for batch in (x, x.flip(0)))
    with torch.no_grad():
        assert relative_error(second(x), first(x)) < 1e-3


def test_batches_are_read_once():
    assert calibrate_(spiking_(build()), iter([pixels(5), pixels(3)])) == 8


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_images_take_the_dtype_of_the_model(dtype):
    model = calibrated(build().to(dtype), [pixels()])
    assert is_calibrated(model)
    with torch.no_grad():
        assert model(pixels().to(dtype)).dtype == dtype


# what is observed

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_layer_without_parameters_is_calibrated_where_its_neurons_are(dtype):
    pool = spiking_(tl.AttentionPoolPrr(16, num_heads=2, pre_norm=False, post_norm=False))
    assert not list(pool.parameters())
    seen = []
    calibrate_(pool, [torch.randn(4, 9, 16, generator=rng(0), dtype=torch.float64).to(dtype)],
               forward_fn=lambda net, x: seen.append((x.device, x.dtype)) or net(x))
    assert is_calibrated(pool) and set(seen) == {(torch.device('cpu'), torch.float32)}


def test_observation_leaves_the_model_as_it_was():
    model = spiking_(build(drop_rate=0.1)).train()
    before = state_of(model)
    statistics, count = observe(model, [pixels(3), pixels(2)])
    assert count == 5 and list(statistics) == neuron_names(model)
    nothing = [name for name, s in statistics.items() if s is None]
    assert nothing == [n for n in statistics if n.endswith('attn_neuron')], 'softmax numerators have nothing to fit'
    assert model.training and same_state(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_source_is_observed_not_the_spiking_network():
    source, x = build(), pixels()
    fine, coarse = (observe(spiking_(copy.deepcopy(source), SFNConfig(n)), [x])[0] for n in (1, 127))
    currents = []
    source.head.register_forward_pre_hook(lambda module, args: currents.append(args[0]))
    with torch.no_grad():
        source(x)
    expected = CurrentStatistics((32,), True)
    expected.update(currents[0])
    assert list(fine) == list(coarse)
    for name, statistics in fine.items():
        assert statistics is None or torch.equal(statistics.counts, coarse[name].counts), name
    torch.testing.assert_close(fine['head.neuron'].peak, expected.peak, rtol=1e-5, atol=1e-6)
    assert (fine['head.neuron'].counts - expected.counts).abs().sum() <= 2  # attention is summed in another order


def test_dropout_is_off_while_the_source_is_observed():
    # in training as in evaluation, and the model stays in its mode
    source = build(drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5)
    states = [neuron_state(calibrated(source.train(mode), [pixels()])) for mode in (True, False)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_memory_does_not_grow_with_the_number_of_images():
    def held(statistics):
        return [sum(v.numel() * v.element_size() for v in vars(s).values() if isinstance(v, torch.Tensor))
                for s in statistics.values() if s is not None]

    model = spiking_(build())
    one, many = (observe(model, [pixels(2, seed) for seed in range(n)])[0] for n in (1, 6))
    assert held(one) == held(many)
    assert all(many[name].counts.sum() == 6 * s.counts.sum() for name, s in one.items() if s is not None)


def test_a_rare_token_counts():
    source = randomise_(nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(20, 250, 8, generator=rng(0))  # 5,000 tokens
    rare = x.clone()
    rare[13, 117] = 100 * x[13, 117].sign() * x.abs().amax((0, 1))
    plain, raised = (calibrated(source, [v], fit=FitConfig('max'))[0].neuron.threshold.amax(0) for v in (x, rare))
    torch.testing.assert_close(raised, 100 * plain, rtol=1e-3, atol=0)


def test_default_device_does_not_matter():
    model, batch = spiking_model_(build()), pixels()
    with torch.device('meta'):  # any that is not the CPU, where histograms are
        calibrate_(model, [batch])
    assert is_calibrated(model) and torch.isfinite(model(batch)).all()
    assert all(torch.equal(v, neuron_state(model)[k])
               for k, v in neuron_state(spiking_model_calibrated(batch)).items())


def spiking_model_calibrated(batch):
    model = spiking_model_(build())
    calibrate_(model, [batch])
    return model


# traps

def assert_alive(model):
    for name, neuron in named_neurons(model):
        threshold = neuron.threshold if isinstance(neuron, ScaleAndFire) else neuron.step
        assert torch.isfinite(threshold).all() and (threshold >= MIN_STEP).all(), name
    assert is_calibrated(model)


@pytest.mark.parametrize('value', [0., -1., 1., 0.3])
def test_constant_images_calibrate(value):
    model = convert(build(), [torch.full((4, 3, 32, 32), value)], SFNConfig(levels=8))
    assert_alive(model)
    with torch.no_grad():
        assert torch.isfinite(model(pixels())).all()


def test_dead_weights_calibrate():
    source = build()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if 'blocks.1.mlp.fc1' in name or 'blocks.0.attn.qkv' in name:
                parameter.zero_()
    model, x = convert(source, [pixels()], SFNConfig(levels=64)), pixels(seed=2)
    assert_alive(model)
    with torch.no_grad():
        assert relative_error(model(x), source(x)) < 0.1


def test_lopsided_gelu_has_two_thresholds():
    source = randomise_(tl.Mlp(16, 32))
    x = 3 * torch.randn(500, 16, generator=rng(0))
    mlp = calibrated(source, [x], SFNConfig(32))
    top = mlp.fc2.neuron.threshold * 32
    assert (top[0] > 2 * top[1]).all() and (mlp.fc2.neuron.multiplier[0] > mlp.fc2.neuron.multiplier[1]).all()
    with torch.no_grad():
        error = relative_error(mlp(x), source(x))
        mlp.fc2.neuron.multiplier[1] = mlp.fc2.neuron.multiplier[0]
        assert relative_error(mlp(x), source(x)) > error


@pytest.mark.parametrize('levels', [4, 8, 32])
def test_commensurate_branches_are_no_worse_than_one_shared_threshold(levels, source, digits, monkeypatch):
    # at every site of a trained network, and in its logits
    errors = {}
    for name in ('multipliers', 'shared'):
        if name == 'shared':
            monkeypatch.setattr('sformer.neurons.thresholds.multiplier_pairs', lambda top: [(1, 1)])
        model = calibrated(source, [digits[0][:256]], SFNConfig(levels))
        x, at_sites = digits[0][256:], []
        for _, neuron in named_neurons(model):
            neuron.register_forward_hook(lambda n, args, out, to=at_sites: to.append(relative_error(out, args[0])))
        with torch.no_grad():
            error = relative_error(model(x), source(x))
        errors[name] = error, torch.tensor(at_sites).square().mean().sqrt().item()
    assert errors['multipliers'][0] <= errors['shared'][0] and errors['multipliers'][1] <= errors['shared'][1], errors


def test_fitted_neurons_carry_the_whole_signal(source, digits):
    lost = {}
    for unbiased in (False, True):
        model = calibrated(source, [digits[0][:256]], SFNConfig(4), FitConfig(unbiased=unbiased))
        moments = []
        for _, neuron in named_neurons(model):
            neuron.register_forward_pre_hook(lambda n, args, to=moments: to.append(n.moments(args[0])))
        with torch.no_grad():
            model(digits[0][:16])  # spiking inputs, so only nearly what was corrected for
        lost[unbiased] = [1 - (m[1] / m[0]).item() for m in moments if m is not None]
    assert sum(map(abs, lost[True])) < 0.4 * sum(map(abs, lost[False])), lost


def test_images_of_another_normalisation_widen_the_pixel_code():
    wide, dark = 3 * pixels(), 0.1 * pixels()
    coding = calibrated(spiking_model_(build()), [wide]).patch_embed.proj.neuron
    assert ((coding(wide) - wide).abs() <= 0.51 * coding.step).all()
    model = spiking_model_(build())
    before = model.patch_embed.proj.neuron.step.clone()
    calibrate_(model, [dark])  # the code stays lossless
    torch.testing.assert_close(model.patch_embed.proj.neuron.step, before, rtol=1e-5, atol=0)


# reparametrisations that leave the source as it is

def rescale_norm_(model, factor, channel=5):
    """Multiply one channel of every LayerNorm, and divide the weights that read it."""
    with torch.no_grad():
        for block in model.blocks:
            for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[channel] *= factor
                norm.bias[channel] *= factor
                reader.weight[:, channel] /= factor
    return model


@pytest.mark.parametrize('factor, tolerance', [(128., 1e-5), (1 / 128, 1e-5), (100., 0.02)])
def test_rescaled_norm_channel_changes_nothing(factor, tolerance):
    # a power of two moves the histogram by whole bins; else thresholds may move by a fraction of one
    source, x, config = build(), pixels(), SFNConfig(levels=127)
    rescaled = rescale_norm_(copy.deepcopy(source), factor)
    with torch.no_grad():
        torch.testing.assert_close(rescaled(x), source(x), rtol=1e-4, atol=1e-4)
        out = calibrated(source, [x], config)(x)
        assert relative_error(calibrated(rescaled, [x], config)(x), out) < tolerance
        # which thresholds that were fitted before would not survive
        assert relative_error(rescale_norm_(calibrated(source, [x], config), factor)(x), out) > 3 * tolerance


# a recipe for every fire function

@pytest.mark.parametrize('levels', [4, 32, 127])
def test_density_recipe_converts(levels):
    source, x = build(), pixels()
    model = convert(source, [x], SFNConfig(levels=levels, fire='density', attention_fire='density'))
    with torch.no_grad():
        assert relative_error(model(x), source(x)) < {4: 0.6, 32: 0.1, 127: 0.05}[levels]


# errors

def test_nan_image_names_the_site():
    x = pixels()
    x[3, 1, 5, 5] = math.nan
    with pytest.raises(SFormerError, match=r'patch_embed\.proj\.neuron'):
        convert(build(), [pixels(), x])


@pytest.mark.parametrize('parameter, first', [
    ('blocks.0.mlp.fc1.weight', r'blocks\.0\.mlp\.fc2\.neuron'),
    ('blocks.1.attn.qkv.bias', r'blocks\.1\.attn\.products\.0\.[qkv]_neuron'),
    ('pos_embed', r'blocks\.0\.attn\.qkv\.neuron'),
    ('head.weight', 'output of the source'),
])
def test_infinite_weight_names_the_first_site(parameter, first):
    model = spiking_model_(build())
    before = neuron_state(model)
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = math.inf
    with pytest.raises(SFormerError, match=first):
        calibrate_(model, [pixels()])
    assert all(torch.equal(v, before[k]) for k, v in neuron_state(model).items())


def test_a_site_that_is_not_fitted_is_watched_too(monkeypatch):
    # numerators of the softmax have no statistics
    monkeypatch.setattr('sformer.layers.products.softmax_numerators', lambda scores, *args: scores * math.nan)
    model = spiking_(nn.Sequential(tl.Attention(16, 2)))
    message = (r'NaN or infinite currents at 0\.products\.0\.attn_neuron: '
               r'the weights or the images of the source are broken')
    with pytest.raises(SFormerError, match=message):
        observe(model, [torch.randn(2, 3, 16, generator=rng(0))])


def test_convert_names_the_broken_parameter():
    source = build()
    with torch.no_grad():
        source.blocks[1].mlp.fc1.weight[0, 0] = math.inf
    with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.weight'):
        convert(source, [pixels()])


@pytest.mark.parametrize('batches', [[], [torch.empty(0, 3, 32, 32)]])
def test_no_images_is_an_error(batches):
    with pytest.raises(SFormerError, match='at least one image'):
        observe(spiking_(build()), batches)


def test_images_that_do_not_fit_are_an_error():
    with pytest.raises(SFormerError, match=r'calibration images \(4, 3, 16, 16\) do not fit the model'):
        observe(spiking_(build()), [torch.zeros(4, 3, 16, 16)])


def test_a_second_calibration_is_recorded_as_what_it_was():
    model = convert(build(), [pixels()], command='sformer convert x')
    model.conversion = dataclasses.replace(model.conversion, versions=dict(torch='0.1'))
    before = model.conversion
    calibrate_(model, [pixels(3, seed=2)], FitConfig('max'))
    record = model.conversion
    assert (record.fit, record.calibration, record.command) == (FitConfig('max'), CalibrationRecord(num_images=3), None)
    assert record.versions == library_versions() and record.source_sha256 == before.source_sha256
    assert record.source == before.source and record.recipe is None
