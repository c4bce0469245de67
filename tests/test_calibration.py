"""Calibration: streaming statistics, threshold estimators against brute force, and the traps of real networks."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm import layers as tl
from timm.models.vision_transformer import VisionTransformer

import sformer.calibration as calibration
from sformer import SFNConfig, SFormerError, convert, is_calibrated, named_neurons, spiking_
from sformer.calibration import (
    MAX_VALUES,
    MIN_THRESHOLD,
    NUM_BINS,
    SiteStatistics,
    bin_edges,
    error_integral,
    fit_density_levels,
    fit_thresholds_,
    mse_threshold,
    observe,
    quantile_threshold,
)
from sformer.models import spiking_model_
from sformer.neurons import FIRE_FUNCTIONS, MAX_LEVEL, ScaleAndFire, fire, firing_boundaries, level_values

prop = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2 ** 31 - 1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # timm initialises from the global generator


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randomise_(model, seed=0):
    """Weights as a trained model has them: timm starts with zero biases, and norms that do nothing."""
    generator = rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(**kwargs):
    args = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7)
    return randomise_(VisionTransformer(**dict(args, **kwargs)))


def images(n=8, seed=1):
    """Normalised 8-bit pixels."""
    return torch.randint(0, 256, (n, 3, 32, 32), generator=rng(seed)) / 127.5 - 1


def site(x, shape=(1,), signed=True):
    statistics = SiteStatistics(shape, signed)
    statistics.update(x)
    return statistics


def relative_error(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


def samples(name, n=50_000):
    """Positive currents as they occur at the sites of a ViT."""
    x = torch.randn(n, generator=rng(0), dtype=torch.float64)
    y = torch.rand(n, generator=rng(1), dtype=torch.float64)
    chi2 = torch.randn(4, n, generator=rng(2), dtype=torch.float64).square().sum(0)
    return {
        'normal': x.abs(),
        'laplace': -y.log(),
        'gelu': F.gelu(2 * x).clamp_min(0),
        'gelu negative': (-F.gelu(2 * x)).clamp_min(0),
        'heavy tail': x.abs() / (chi2 / 4).sqrt(),  # Student's t with four degrees of freedom
        'two scales': torch.where(y < 0.01, 100 * x.abs(), x.abs()),
        'uniform': 3 * y,
    }[name].float()


DISTRIBUTIONS = ('normal', 'laplace', 'gelu', 'gelu negative', 'heavy tail', 'two scales', 'uniform')


# Streaming statistics

GROUPS = {'tensor': (1,), 'head': (2, 1, 1), 'channel': (5,), 'head and channel': (2, 1, 5)}


@prop
@given(st.sampled_from(sorted(GROUPS)), st.booleans(), st.lists(st.integers(1, 4), min_size=1, max_size=5), seeds)
def test_statistics_do_not_depend_on_batch_size_or_order(granularity, signed, sizes, seed):
    shape = GROUPS[granularity]
    x = torch.randn(sum(sizes), 2, 3, 5, generator=rng(seed)) * 10. ** torch.arange(-2, 3)
    whole, parts = site(x, shape, signed), SiteStatistics(shape, signed)
    for part in x[torch.randperm(len(x), generator=rng(seed))].split(sizes):
        parts.update(part)
    assert torch.equal(parts.counts, whole.counts) and torch.equal(parts.peak, whole.peak)


def naive_counts(x, groups):
    """(2, groups, NUM_BINS) by comparing every current with every edge."""
    edges = bin_edges()
    counts = torch.zeros(2, groups, NUM_BINS, dtype=torch.int32)
    for row in x.reshape(-1, groups):
        for g, v in enumerate(row.tolist()):
            j = min(int((edges <= abs(v)).sum()) - 1, NUM_BINS - 1)
            counts[int(v < 0), g, j] += 1
    return counts


def test_histogram_counts_what_lies_between_its_edges():
    x = torch.randn(40, 3, generator=rng(0)) * 10. ** torch.linspace(-12, 8, 40)[:, None]
    x[0] = torch.tensor([0., 2. ** -28, 2. ** 19])
    x[1] = torch.tensor([1., -1., 1.125])  # edges themselves
    assert torch.equal(site(x, (3,)).counts, naive_counts(x, 3))
    peak = site(x, (3,)).peak
    assert torch.equal(peak[0], x.amax(0)) and torch.equal(peak[1], -x.amin(0))


@prop
@given(st.sampled_from(sorted(GROUPS)), seeds)
def test_histogram_loses_no_current(granularity, seed):
    x = torch.randn(3, 2, 4, 5, generator=rng(seed)) * 10. ** torch.randint(-12, 9, (5,), generator=rng(seed))
    counts = site(x, GROUPS[granularity]).counts
    assert counts.sum() == x.numel()
    assert (counts.sum(dim=(0, 2)) == x.numel() // counts.shape[1]).all()


def test_bins_are_narrow_and_cover_all_currents():
    edges = bin_edges()
    assert edges.shape == (NUM_BINS + 1,) and edges[0] == 0 and (edges.diff() > 0).all()
    assert (edges[2:] / edges[1:-1]).max() <= 1.125 + 1e-12
    assert edges[1] < 1e-8 and edges[-1] > 1e6


def memory(statistics):
    return sum(v.numel() * v.element_size() for v in vars(statistics).values() if isinstance(v, torch.Tensor))


def test_memory_does_not_grow_with_the_number_of_images():
    model = spiking_(build())
    one, many = (observe(model, [images(2, seed) for seed in range(n)])[0] for n in (1, 6))
    assert [memory(s) for s in one.values()] == [memory(s) for s in many.values()]
    assert all((many[name].counts.sum() == 6 * one[name].counts.sum()) for name in one)
    held = [v for s in many.values() for v in vars(s).values() if not isinstance(v, torch.Tensor)]
    assert all(isinstance(v, (int, tuple, type(None))) for v in held)  # nor is anything kept in a list


def test_large_currents_are_thinned_but_every_position_has_its_turn():
    statistics = SiteStatistics((1,), True)
    x = torch.zeros(1, 8, MAX_VALUES // 4)
    x[0, 3] = 1.  # one position in eight; every second token is observed at a time
    for _ in range(2):
        statistics.update(x)
    observed = statistics.counts[0, 0]
    assert observed.sum() == x.numel() and observed[1:].sum() == x.numel() // 8
    assert statistics.peak[0] == 1


def test_keys_are_observed_around_their_mean():
    x = torch.randn(16, 2, 7, 3, generator=rng(0)) + torch.tensor([100., -50., 0.])
    statistics = SiteStatistics((2, 1, 1), True, center_shape=(2, 1, 3))
    statistics.update(x)
    torch.testing.assert_close(statistics.center, x.mean(dim=(0, 2), keepdim=True)[0])
    assert statistics.peak.max() < 6


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_currents_of_any_dtype_are_observed(dtype):
    x = torch.rand(64, 3, 32, 32, generator=rng(0)).to(dtype)  # their sum is beyond float16
    assert torch.equal(site(x, (3, 1, 1)).counts, site(x.float(), (3, 1, 1)).counts)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_statistics_refuse_broken_currents(value):
    x = torch.randn(4, 5, generator=rng(0))
    x[2, 3] = value
    with pytest.raises(SFormerError, match='NaN or infinite'):
        site(x)


# Error integral: exact, as squared errors are quadratic between boundaries

@st.composite
def branches(draw):
    """(level values, boundaries) of one branch in float64"""
    name = draw(st.sampled_from(FIRE_FUNCTIONS))
    if name == 'density':
        values = torch.tensor(sorted(draw(st.sets(st.integers(1, MAX_LEVEL), min_size=1))), dtype=torch.float32)
    else:
        values = level_values(name, draw(st.integers(1, 7 if name == 'power2' else MAX_LEVEL)))
    firing, dead_zone = draw(st.sampled_from(['round', 'floor'])), draw(st.sampled_from([0., 0.5, 1.25, 3., 200.]))
    return values.double(), firing_boundaries(name, values, firing, dead_zone).double()


def simpson(u, values, boundaries):
    """Integral of (t - k(t))^2 over [0, u], piece by piece; Simpson's rule is exact for parabolas."""
    y, knots = [0.] + values.tolist(), [0.] + [b for b in boundaries.tolist() if b < u] + [u]
    total = 0.
    for a, b in zip(knots, knots[1:], strict=False):
        k = y[sum((a + b) / 2 >= v for v in boundaries.tolist())]
        total += (b - a) / 6 * ((a - k) ** 2 + 4 * ((a + b) / 2 - k) ** 2 + (b - k) ** 2)
    return total


@prop
@given(branches(), st.lists(st.floats(0, 300), min_size=1, max_size=8))
def test_error_integral_equals_numerical_integration(branch, currents):
    values, boundaries = branch
    u = torch.tensor(currents + boundaries[:3].tolist(), dtype=torch.float64)
    expected = torch.tensor([simpson(v, values, boundaries) for v in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(error_integral(u, values, boundaries), expected, rtol=1e-9, atol=1e-9)


# Threshold estimators

def mean_squared_error(x, threshold, name, values, firing='round', dead_zone=0.):
    k = fire(x / threshold, name, values, firing, dead_zone)
    return (x - k * threshold).double().square().mean().item()


@pytest.mark.parametrize('firing, dead_zone', [('round', 0.), ('floor', 0.), ('round', 1.5)])
@pytest.mark.parametrize('name, levels', [
    ('uniform', 1), ('uniform', 4), ('uniform', 32), ('uniform', 127), ('quadratic', 8), ('quadratic', 32),
    ('power2', 6),
])
@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_mse_threshold_is_close_to_brute_force(distribution, name, levels, firing, dead_zone):
    x = samples(distribution)
    values = level_values(name, levels)
    case = name, values, firing, dead_zone
    threshold = mse_threshold(site(x[:, None]).counts[0], values, firing_boundaries(*case)).item()
    candidates = torch.logspace(-1.7, 0.1, 120) * x.max() / values[-1]
    best = min(mean_squared_error(x, t, *case) for t in candidates)
    # currents count as uniform within a bin, but a third of GELU's negative ones lie in the upper end of theirs
    assert mean_squared_error(x, threshold, *case) <= (1.1 if distribution == 'gelu negative' else 1.05) * best


@pytest.mark.parametrize('value', [0.7, 1., 1.06, 1e-3, 300.])
@pytest.mark.parametrize('name, levels', [('uniform', 1), ('uniform', 32), ('quadratic', 8), ('power2', 6)])
def test_mse_threshold_of_a_constant_is_right_to_half_a_bin(name, levels, value):
    x, values = torch.full((100,), value), level_values(name, levels)
    threshold = mse_threshold(site(x[:, None]).counts[0], values, firing_boundaries(name, values)).item()
    assert mean_squared_error(x, threshold, name, values) ** 0.5 <= value / 16


def test_mse_threshold_of_each_group_is_its_own():
    x = torch.stack([samples(name) for name in ('normal', 'heavy tail', 'uniform')], dim=1)
    values = level_values('uniform', 16)
    boundaries = firing_boundaries('uniform', values)
    together = mse_threshold(site(x, (3,)).counts[0], values, boundaries)
    alone = [mse_threshold(site(column[:, None]).counts[0], values, boundaries) for column in x.T]
    assert torch.equal(together, torch.cat(alone))


def test_mse_threshold_scales_with_the_current():
    # bins are octaves cut in equal parts, so a power of two moves the whole problem by whole bins
    x, values = samples('laplace')[:, None], level_values('uniform', 16)
    boundaries = firing_boundaries('uniform', values)
    one, scaled = (mse_threshold(site(x * s).counts[0], values, boundaries) for s in (1., 2. ** 10))
    assert torch.equal(scaled, one * 2 ** 10)


def test_mse_threshold_of_silence_is_nan():
    values = level_values('uniform', 4)
    counts = site(torch.tensor([[0., 1., -1.], [0., 2., 0.]]), (3,)).counts
    assert mse_threshold(counts[0], values, values - 0.5).isnan().tolist() == [True, False, True]
    assert quantile_threshold(counts[1], values, 0.9).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize('p', [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize('distribution', ['normal', 'laplace', 'gelu', 'heavy tail', 'uniform'])
def test_quantile_threshold_covers_the_share(distribution, p):
    x = samples(distribution)
    values = level_values('uniform', 32)
    # currents of the other branch and silence do not count
    currents = torch.cat([x, -x, torch.zeros(1000)])[:, None]
    top = quantile_threshold(site(currents).counts[0], values, p).item() * 32
    expected = torch.quantile(x[x > 0], p).item()
    assert top == pytest.approx(expected, rel=0.03)  # bins are 9-13 % wide; within them it interpolates


@prop
@given(st.lists(st.integers(0, 1000), min_size=NUM_BINS, max_size=NUM_BINS), st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_quantile_threshold_is_monotone(histogram, p, q):
    counts = torch.tensor([histogram], dtype=torch.int32)
    values = level_values('uniform', 8)
    low, high = (quantile_threshold(counts, values, v) for v in sorted((p, q)))
    assert low.isnan() and high.isnan() or low <= high


def fitted_linear(x, **recipe):
    """Spiking linear layer that was calibrated on x."""
    config = SFNConfig(**recipe)
    layer = spiking_(nn.Linear(x.shape[-1], 4), config)
    fit_thresholds_(layer, observe(layer, [x])[0], config)
    return layer.neuron


def test_max_estimator_covers_every_current():
    x = torch.randn(500, 6, generator=rng(0)) * 10. ** torch.arange(-3, 3)
    neuron = fitted_linear(x, levels=16, estimator='max')
    top = neuron.threshold * 16
    torch.testing.assert_close(top, torch.stack([x.amax(0), -x.amin(0)]), rtol=1e-6, atol=0)


def test_quantile_estimator_reaches_the_neuron():
    x = torch.randn(5000, 6, generator=rng(0))
    top = {p: fitted_linear(x, levels=16, estimator='quantile', quantile=p).threshold * 16 for p in (0.5, 0.99)}
    torch.testing.assert_close(top[0.5], torch.full((2, 6), 0.674), rtol=0.1, atol=0)  # of a half-normal
    torch.testing.assert_close(top[0.99], torch.full((2, 6), 2.576), rtol=0.1, atol=0)


def test_mse_is_the_best_estimator_by_its_own_measure():
    x = samples('heavy tail')[:, None] * torch.tensor([1., -1.])
    errors = {}
    for estimator in ('mse', 'quantile', 'max'):
        neuron = fitted_linear(x, levels=8, estimator=estimator)
        with torch.no_grad():
            errors[estimator] = (neuron(x) - x).square().mean().item()
    assert errors['mse'] < errors['quantile'] and errors['mse'] < errors['max'], errors


def test_scale_comes_on_top_of_what_was_fitted():
    x = torch.randn(500, 6, generator=rng(0))
    plain, scaled = fitted_linear(x, levels=8), fitted_linear(x, levels=8, scale=1.5)
    assert torch.equal(scaled.threshold, plain.threshold) and scaled.scale == 1.5


# Density levels

histograms = st.lists(st.tuples(st.integers(0, NUM_BINS - 1), st.integers(1, 10 ** 6)), max_size=40)


@prop
@given(histograms, histograms, st.integers(1, MAX_LEVEL), st.sampled_from(['round', 'floor']))
def test_density_levels_are_strictly_increasing_int8(positive, negative, levels, firing):
    statistics = SiteStatistics((1,), True)
    for branch, histogram in enumerate((positive, negative)):
        for j, count in histogram:
            statistics.counts[branch, 0, j] += count
    y = fit_density_levels(statistics, levels, firing)
    assert y.shape == (levels,) and torch.equal(y, y.round())
    assert y[0] >= 1 and y[-1] <= MAX_LEVEL and (y.diff() > 0).all(), y.tolist()


@pytest.mark.parametrize('firing', ['round', 'floor'])
@pytest.mark.parametrize('levels', [1, 4, 8, 32, 100, 127])
@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_density_levels_are_strictly_increasing_int8_on_currents(distribution, levels, firing):
    y = fit_density_levels(site(samples(distribution)[:, None]), levels, firing)
    assert y.shape == (levels,) and torch.equal(y, y.round())
    assert y[0] >= 1 and y[-1] <= MAX_LEVEL and (y.diff() > 0).all(), y.tolist()


@pytest.mark.parametrize('levels', [4, 8, 16, 32])
@pytest.mark.parametrize('distribution, gain', [
    ('normal', 0.9), ('laplace', 0.75), ('gelu', 0.9), ('heavy tail', 0.7), ('gelu negative', 1.05), ('uniform', 1.05),
])
def test_density_levels_are_no_worse_than_uniform_ones(distribution, gain, levels):
    x = samples(distribution)
    statistics = site(x[:, None])
    errors = {}
    for name in ('uniform', 'density'):
        values = fit_density_levels(statistics, levels) if name == 'density' else level_values(name, levels)
        threshold = mse_threshold(statistics.counts[0], values, firing_boundaries(name, values)).item()
        errors[name] = mean_squared_error(x, threshold, name, values)
    assert errors['density'] < (gain if levels > 4 else 1.05) * errors['uniform'], errors


@pytest.mark.parametrize('levels', [4, 32, 127])
def test_density_recipe_converts(levels):
    source, x = build(), images()
    model = convert(source, [x], SFNConfig(levels=levels, fire='density', attention_fire='density'))
    with torch.no_grad():
        assert relative_error(model(x), source(x)) < {4: 0.6, 32: 0.1, 127: 0.05}[levels]


# Traps

def test_one_heavy_channel_leaves_the_others_alone():
    x = torch.randn(2000, 8, generator=rng(0))
    heavy = x.clone()
    heavy[:, 3] *= 100
    plain, fitted = fitted_linear(x).threshold, fitted_linear(heavy).threshold
    others = torch.arange(8) != 3
    assert torch.equal(fitted[:, others], plain[:, others])
    torch.testing.assert_close(fitted[:, 3], 100 * plain[:, 3], rtol=0.15, atol=0)  # the optimum is flat


def test_heavy_tail_is_clipped():
    x = torch.cat([samples('heavy tail'), -samples('heavy tail')])[:, None]
    top = fitted_linear(x, levels=8).threshold * 8
    assert (top < 0.5 * x.max()).all()
    assert (top > torch.quantile(x.abs(), 0.95)).all()


def test_lopsided_gelu_has_two_thresholds():
    source = randomise_(tl.Mlp(16, 32))
    x = 3 * torch.randn(500, 16, generator=rng(0))
    mlp, config = spiking_(copy.deepcopy(source)), SFNConfig()
    fit_thresholds_(mlp, observe(mlp, [x])[0], config)
    top = mlp.fc2.neuron.threshold * 32
    assert (top[1] < 0.2).all() and (top[0] > 2 * top[1]).all()
    with torch.no_grad():
        error = relative_error(mlp(x), source(x))
        mlp.fc2.neuron.threshold[1] = mlp.fc2.neuron.threshold[0]
        assert relative_error(mlp(x), source(x)) > error


def assert_alive(model):
    for name, neuron in named_neurons(model):
        assert torch.isfinite(neuron.threshold).all() and (neuron.threshold >= MIN_THRESHOLD).all(), name
    assert is_calibrated(model)


@pytest.mark.parametrize('estimator', ['mse', 'quantile', 'max'])
@pytest.mark.parametrize('fire_function', ['uniform', 'density'])
def test_dead_channels_and_branches_get_usable_thresholds(estimator, fire_function):
    x = torch.randn(200, 5, generator=rng(0))
    x[:, 1] = 0
    x[:, 2].abs_()
    x[:, 3].abs_().neg_()
    x[:, 4] = 1e-30
    neuron = fitted_linear(x, levels=8, estimator=estimator, fire=fire_function)
    assert_alive(neuron)
    assert neuron.threshold[1, 2] == neuron.threshold[0, 2] and neuron.threshold[0, 3] == neuron.threshold[1, 3]
    assert neuron.threshold[0, 1] == pytest.approx(neuron.threshold[0, 0], rel=1)  # of the size of the living ones


@pytest.mark.parametrize('estimator', ['mse', 'quantile', 'max'])
def test_a_site_that_is_silent_altogether_gets_usable_thresholds(estimator):
    neuron = fitted_linear(torch.zeros(10, 4), estimator=estimator)
    assert_alive(neuron)
    assert torch.equal(neuron(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize('value', [0., -1., 1., 0.3])
def test_constant_images_calibrate(value):
    model = convert(build(), [torch.full((4, 3, 32, 32), value)], SFNConfig(levels=8))
    assert_alive(model)
    with torch.no_grad():
        assert torch.isfinite(model(images())).all()


def test_dead_weights_calibrate():
    source = build()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if 'blocks.1.mlp.fc1' in name or 'blocks.0.attn.qkv' in name:
                parameter.zero_()
    model, x = convert(source, [images()], SFNConfig(levels=64)), images(seed=2)
    assert_alive(model)
    with torch.no_grad():
        assert relative_error(model(x), source(x)) < 0.1


def test_nan_image_names_the_site():
    x = images()
    x[3, 1, 5, 5] = math.nan
    with pytest.raises(SFormerError, match=r'patch_embed\.proj\.neuron'):
        convert(build(), [images(), x])


@pytest.mark.parametrize('parameter, first', [
    ('blocks.0.mlp.fc1.weight', r'blocks\.0\.mlp\.fc2\.neuron'),
    ('blocks.1.attn.qkv.bias', r'blocks\.1\.attn\.[qkv]_neuron'),
    ('pos_embed', r'blocks\.0\.attn\.qkv\.neuron'),
    ('head.weight', 'output of the source'),
])
def test_infinite_weight_names_the_first_site(parameter, first):
    model = spiking_model_(build())
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = math.inf
    with pytest.raises(SFormerError, match=first):
        observe(model, [images()])
    assert not any('forward' in neuron.__dict__ for _, neuron in named_neurons(model))  # and the bypass has ended


def test_convert_names_the_broken_parameter():
    source = build()
    with torch.no_grad():
        source.blocks[1].mlp.fc1.weight[0, 0] = math.inf
    with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.weight'):
        convert(source, [images()])


def test_no_images_is_an_error():
    with pytest.raises(SFormerError, match='at least one image'):
        observe(spiking_(build()), [])


def test_observation_leaves_the_model_as_it_was():
    model = spiking_(build(drop_rate=0.1)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    statistics, count = observe(model, [images(3), images(2)])
    fitted = {name for name, neuron in named_neurons(model) if getattr(neuron, 'signed', True)}
    assert count == 5 and set(statistics) == fitted, 'softmax numerators have nothing to fit'
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_default_device_does_not_matter():
    model, batch = spiking_model_(build()), images()
    with torch.device('meta'):  # any that is not the CPU, where histograms are
        fit_thresholds_(model, observe(model, [batch])[0], SFNConfig())
    assert is_calibrated(model) and torch.isfinite(model(batch)).all()


def test_single_tokens_of_many_images_are_observed():
    """More currents than a batch may count, and no tokens to choose from."""
    statistics = SiteStatistics((2048,), signed=True)
    for _ in range(3):
        statistics.update(torch.ones(2048, 1, 2048))
    assert (statistics.counts.sum((0, 2)) == 3 * 512).all()


def test_images_of_another_normalisation_widen_the_pixel_code():
    model, wide = spiking_model_(build()), 3 * images()
    fit_thresholds_(model, observe(model, [wide])[0], SFNConfig())
    coding = model.patch_embed.proj.neuron
    assert ((coding(wide) - wide).abs() <= 0.51 * coding.threshold).all()
    model = spiking_model_(build())
    before = model.patch_embed.proj.neuron.threshold.clone()
    fit_thresholds_(model, observe(model, [images() * 0.1])[0], SFNConfig())  # dark images: the code stays lossless
    torch.testing.assert_close(model.patch_embed.proj.neuron.threshold, before, rtol=1e-5, atol=0)


# Reparametrisations that leave the source as it is

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
    source, x, config = build(), images(), SFNConfig(levels=127)
    rescaled = rescale_norm_(copy.deepcopy(source), factor)
    with torch.no_grad():
        torch.testing.assert_close(rescaled(x), source(x), rtol=1e-4, atol=1e-4)
        out = convert(source, [x], config)(x)
        assert relative_error(convert(rescaled, [x], config)(x), out) < tolerance
        # which thresholds that were fitted before would not survive
        assert relative_error(rescale_norm_(convert(source, [x], config), factor)(x), out) > 3 * tolerance


def test_permuted_images_give_the_same_model():
    source, x = build(), images(16)
    first, second = (convert(source, [batch], SFNConfig(levels=16)) for batch in (x, x.flip(0)))
    with torch.no_grad():
        assert relative_error(second(x), first(x)) < 1e-3


def test_batch_size_hardly_matters():
    # keys are centred on the mean of the first batch, all other statistics are the same
    source, x, test = build(), images(32), images(16, seed=9)
    with torch.no_grad():
        errors = [relative_error(convert(source, x.split(size))(test), source(test)) for size in (1, 32)]
    assert max(errors) < 1.2 * min(errors) < 0.15, errors


def test_granularity_matters():
    # the trap that thresholds per channel avoid: with one for the tensor, one heavy channel silences the rest
    x = torch.randn(2000, 8, generator=rng(0)) * torch.tensor([100.] + [1.] * 7)
    tensor = ScaleAndFire((1,), SFNConfig(levels=16))
    fit_thresholds_(nn.ModuleDict({'n': tensor}), {'n': site(x)}, SFNConfig(levels=16))
    with torch.no_grad():
        assert relative_error(fitted_linear(x, levels=16)(x)[:, 1:], x[:, 1:]) < 0.1
        assert relative_error(tensor(x)[:, 1:], x[:, 1:]) > 0.5


def test_error_matrix_is_computed_once_per_fire_function():
    values = level_values('uniform', 21)
    counts = site(samples('normal')[:, None]).counts[0]
    for _ in range(3):
        mse_threshold(counts, values, firing_boundaries('uniform', values))
    assert calibration._error_matrix.cache_info().hits >= 2
