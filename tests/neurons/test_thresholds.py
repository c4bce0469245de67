"""From histograms to steps, multipliers and levels: against numerical integration and brute force."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from neuron_tools import DISTRIBUTIONS, dead_zones, level_sets, potentials, prop, rng, samples, site

from sformer.neurons import (
    MAX_LEVEL,
    MAX_WIDE_LEVEL,
    CurrentStatistics,
    FitConfig,
    ScaleAndFire,
    SFNConfig,
    fire,
    firing_boundaries,
    level_values,
    thresholds,
)
from sformer.neurons.statistics import NUM_BINS
from sformer.neurons.thresholds import (
    MIN_STEP,
    PER_OCTAVE,
    branch_error,
    candidate_tops,
    error_integral,
    exact_step,
    fit_density_levels,
    fit_steps,
    multiplier_pairs,
    quantile_top,
)

ESTIMATORS = ('mse', 'quantile', 'max')


def fitted(x, estimator='mse', quantile=0.999, signed=True, **config):
    """Neuron with a step per channel of x (..., C) that was fitted to it; uniform levels if `config` says nothing."""
    neuron = ScaleAndFire(x.shape[-1:], SFNConfig(**{'fire': 'uniform', **config}), signed=signed)
    statistics = neuron.statistics()
    statistics.update(x)
    neuron.fit(statistics, FitConfig(estimator, quantile))
    return neuron


def squared_error(x, threshold, name, values, initial_potential=0.5, dead_zone=0.):
    k = fire(x / threshold, name, values, initial_potential, dead_zone)
    return (x - k * threshold).double().square().mean().item()


def output_error(neuron, x):
    with torch.no_grad():
        return (neuron(x) - x).double().square().mean().item()


# the error integral is exact, as squared errors are quadratic between boundaries

def simpson(u, values, boundaries):
    """Integral of (t - k(t))^2 over [0, u], piece by piece; Simpson's rule is exact for parabolas."""
    y, knots = [0.] + values.tolist(), [0.] + [b for b in boundaries.tolist() if b < u] + [u]
    total = 0.
    for a, b in zip(knots, knots[1:], strict=False):
        k = y[sum((a + b) / 2 >= v for v in boundaries.tolist())]
        total += (b - a) / 6 * ((a - k) ** 2 + 4 * ((a + b) / 2 - k) ** 2 + (b - k) ** 2)
    return total


@prop
@given(level_sets(), potentials, dead_zones, st.lists(st.floats(0, 300), min_size=1, max_size=8))
def test_error_integral_equals_numerical_integration(case, initial_potential, dead_zone, currents):
    values = case[1].double()
    boundaries = firing_boundaries(values, initial_potential, dead_zone).double()
    u = torch.tensor(currents + boundaries[:3].tolist(), dtype=torch.float64)
    expected = torch.tensor([simpson(v, values, boundaries) for v in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(error_integral(u, values, boundaries), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_branch_error_is_the_error_of_the_currents(distribution):
    x, values = samples(distribution), level_values('uniform', 16)
    errors = branch_error(site(x[:, None]).counts[0], values, firing_boundaries(values))[0]
    for j in range(750, 1100, 50):
        top = candidate_tops()[j].item()
        expected = squared_error(x, top / 16, 'uniform', values) * len(x)
        assert errors[j].item() == pytest.approx(expected, rel=0.15), top  # currents count as uniform within a bin


def test_error_matrix_is_computed_once_per_fire_function():
    values = level_values('uniform', 21)
    counts = site(samples('normal')[:, None]).counts[0]
    before = thresholds.error_matrix.cache_info().hits
    for _ in range(3):
        branch_error(counts, values, firing_boundaries(values))
    assert thresholds.error_matrix.cache_info().hits - before >= 2


# estimators, one branch

@pytest.mark.parametrize('name, levels, initial_potential, dead_zone', [
    *((name, levels, 0.5, 0.) for name, levels in (
        ('uniform', 1), ('uniform', 4), ('uniform', 32), ('uniform', 127), ('quadratic', 8), ('quadratic', 32),
        ('power2', 6))),
    *((name, levels, *zone) for name, levels in (('uniform', 4), ('quadratic', 32)) for zone in ((0., 0.), (0.5, 1.)))])
@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_mse_is_close_to_brute_force(distribution, name, levels, initial_potential, dead_zone):
    x = samples(distribution, 25_000)
    values = level_values(name, levels)
    case = name, values, initial_potential, dead_zone
    step, multiplier = fit_steps(site(x[:, None]), values, firing_boundaries(values, initial_potential, dead_zone))
    threshold = (step * multiplier[0]).item()
    candidates = torch.logspace(-1.7, 0.1, 120) * x.max() / values[-1]
    best = min(squared_error(x, t, *case) for t in candidates)
    # currents count as uniform within a bin, but a third of GELU's negative ones lie in the upper end of theirs
    assert squared_error(x, threshold, *case) <= (1.1 if distribution == 'gelu negative' else 1.05) * best


@pytest.mark.parametrize('value', [0.7, 1., 1.06, 1e-3, 300.])
@pytest.mark.parametrize('name, levels', [('uniform', 1), ('uniform', 32), ('quadratic', 8), ('power2', 6)])
def test_mse_of_a_constant_is_right_to_half_a_bin(name, levels, value):
    x = torch.full((100, 1), value)
    neuron = fitted(x, levels=levels, fire=name)
    half_a_candidate = 2 ** (0.5 / PER_OCTAVE) - 1
    assert output_error(neuron, x) ** 0.5 <= value * (1 / 16 + half_a_candidate)


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_each_group_is_fitted_by_itself(estimator):
    x = torch.stack([samples(name) * sign for name, sign in (('normal', 1), ('heavy tail', -1), ('uniform', 1))], 1)
    x[::3] *= -0.3
    together = fitted(x, estimator, levels=16)
    alone = [fitted(column[:, None], estimator, levels=16) for column in x.T]
    assert torch.equal(together.step, torch.cat([n.step for n in alone]))
    assert torch.equal(together.multiplier, torch.cat([n.multiplier for n in alone], 1))


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_steps_scale_with_the_current(estimator):
    # bins are octaves cut in equal parts, so a power of two moves the whole problem by whole bins
    x = samples('laplace')[:, None] * torch.where(torch.rand(50_000, 1, generator=rng(3)) < 0.5, 1., -0.2)
    one, scaled = fitted(x, estimator, levels=16), fitted(x * 2. ** 10, estimator, levels=16)
    assert torch.equal(scaled.step, one.step * 2 ** 10) and torch.equal(scaled.multiplier, one.multiplier)


@pytest.mark.parametrize('p', [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize('distribution', ['normal', 'laplace', 'gelu', 'heavy tail', 'uniform'])
def test_quantile_covers_the_share(distribution, p):
    x = samples(distribution)
    # currents of the other branch and silence do not count
    currents = torch.cat([x, -x, torch.zeros(1000)])[:, None]
    top = quantile_top(site(currents).counts[0], p).item()
    expected = torch.quantile(x[x > 0], p).item()
    assert top == pytest.approx(expected, rel=0.03)  # bins are 9-13 % wide; within them it interpolates
    reached = fitted(currents, 'quantile', p, levels=32).threshold * 32
    torch.testing.assert_close(reached, torch.full((2, 1), top), rtol=1e-4, atol=0)


def test_quantile_of_silence_is_nan():
    counts = site(torch.tensor([[0., 1., -1.], [0., 2., 0.]]), (3,)).counts
    assert quantile_top(counts[0], 0.9).isnan().tolist() == [True, False, True]
    assert quantile_top(counts[1], 0.9).isnan().tolist() == [True, True, False]


@prop
@given(st.lists(st.integers(0, 1000), min_size=NUM_BINS, max_size=NUM_BINS), st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_quantile_is_monotone(histogram, p, q):
    counts = torch.tensor([histogram], dtype=torch.int32)
    low, high = (quantile_top(counts, v) for v in sorted((p, q)))
    assert low.isnan() and high.isnan() or low <= high


@pytest.mark.parametrize('levels', [1, 8, 16, 127])
def test_max_covers_every_current(levels):
    x = torch.randn(500, 6, generator=rng(0)) * 10. ** torch.arange(-3, 3)
    x = torch.where(x < 0, x * torch.linspace(0.05, 1, 6), x)
    neuron = fitted(x, 'max', levels=levels)
    top = neuron.threshold * levels
    peak = torch.stack([x.amax(0), -x.amin(0)])
    assert (top >= peak * (1 - 1e-4)).all()
    torch.testing.assert_close((top / peak).amin(0), torch.ones(6), rtol=1e-4, atol=0)  # one of both exactly


def test_one_rare_token_raises_max_and_hardly_moves_a_quantile():
    x = torch.randn(5000, 4, generator=rng(0))
    rare = x.clone()
    rare[3217] = 100 * rare[3217].sign()
    plain, raised = (fitted(v, 'max', levels=32).threshold * 32 for v in (x, rare))
    assert (raised.amax(0) > 3 * plain.amax(0)).all()
    torch.testing.assert_close(raised.amax(0), rare.abs().amax(0), rtol=1e-4, atol=0)
    plain, raised = (fitted(v, 'quantile', 0.99, levels=32).threshold for v in (x, rare))
    torch.testing.assert_close(raised, plain, rtol=0.1, atol=0)


def test_mse_is_the_best_estimator_by_its_own_measure():
    x = samples('heavy tail')[:, None] * torch.tensor([1., -1.])
    errors = {estimator: output_error(fitted(x, estimator, levels=8), x) for estimator in ESTIMATORS}
    assert errors['mse'] < errors['quantile'] and errors['mse'] < errors['max'], errors


# two branches: one step, two multipliers

def lopsided(ratio, distribution='normal', n=50_000):
    """Currents whose negative branch is `ratio` times as wide, (n, 1)."""
    sign = torch.where(torch.rand(n, generator=rng(5)) < 0.5, 1., -ratio)
    return (samples(distribution, n) * sign)[:, None]


def gelu(n=50_000):
    return torch.nn.functional.gelu(2 * torch.randn(n, 1, generator=rng(0)))


@pytest.mark.parametrize('levels, room', [(4, 31), (8, 15), (32, 3), (63, 2), (127, 1)])
def test_pairs_of_multipliers(levels, room):
    pairs = multiplier_pairs(MAX_LEVEL // levels)
    assert pairs[0] == (1, 1) and len(set(pairs)) == len(pairs)
    assert max(map(max, pairs)) == room and min(map(min, pairs)) == 1
    assert all(math.gcd(*pair) == 1 and pair[::-1] in pairs for pair in pairs)
    ratios = torch.tensor(sorted(a / b for a, b in pairs))
    assert (ratios[1:] / ratios[:-1] <= (1.5 if room > 2 else 2) + 1e-6).all()  # no gaps


@prop
@given(level_sets(), st.floats(0.001, 1000.), st.sampled_from(DISTRIBUTIONS), st.sampled_from(ESTIMATORS))
def test_multipliers_are_integers_that_fit_into_a_level(case, ratio, distribution, estimator):
    name, values = case
    x = lopsided(ratio, distribution, 2000)
    step, multiplier = fit_steps(site(x), values, firing_boundaries(values), FitConfig(estimator))
    assert multiplier.dtype == torch.uint8 and multiplier.shape == (2, 1) and step.shape == (1,)
    assert multiplier.min() >= 1 and multiplier.max() * values[-1] <= MAX_LEVEL
    assert torch.isfinite(step).all() and (step >= MIN_STEP).all()


@pytest.mark.parametrize('levels', [1, 4, 8, 16, 32])
def test_a_lopsided_site_has_a_larger_multiplier_on_its_wide_branch(levels):
    x = gelu()
    positive, negative = fitted(x, levels=levels).multiplier.flatten().tolist()
    assert positive > negative
    negative, positive = fitted(-x, levels=levels).multiplier.flatten().tolist()
    assert positive > negative
    one, other = fitted(lopsided(1.), levels=levels).multiplier.flatten().tolist()
    assert 0.9 < one / other < 1.1


@pytest.mark.parametrize('ratio, expected', [
    (1 / 3, (3, 1)), (1 / 2, (2, 1)), (2 / 3, (3, 2)), (1., (1, 1)), (2., (1, 2))])
def test_multipliers_follow_the_ratio_of_the_branches(ratio, expected):
    assert tuple(fitted(lopsided(ratio), levels=32).multiplier.flatten().tolist()) == expected


@pytest.mark.parametrize('levels', [4, 32, 127])
@pytest.mark.parametrize('ratio', [0.2, 0.8, 4.])
@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_multipliers_are_no_worse_than_one_shared_threshold(distribution, ratio, levels):
    x = lopsided(ratio, distribution, 20_000)
    statistics, values = site(x), level_values('uniform', levels)
    errors = sum(branch_error(counts, values, firing_boundaries(values)) for counts in statistics.counts)[0]
    shared = ScaleAndFire((1,), SFNConfig(levels))
    shared.set_state((candidate_tops()[errors.argmin()] / levels).float().view(1))
    # candidates are 2 % apart, bins 9-13 % wide, and GELU's negative currents crowd at the end of one
    tolerance = 1.04 if distribution == 'gelu negative' else 1.02
    assert output_error(fitted(x, levels=levels), x) <= tolerance * output_error(shared, x)


@pytest.mark.parametrize('levels, gain', [(4, 0.95), (8, 0.85), (32, 0.9)])
def test_multipliers_serve_gelu_better_than_one_shared_threshold(levels, gain, monkeypatch):
    x = gelu()
    error = output_error(fitted(x, levels=levels), x)
    monkeypatch.setattr(thresholds, 'multiplier_pairs', lambda top: [(1, 1)])
    assert error < gain * output_error(fitted(x, levels=levels), x)


@pytest.mark.parametrize('levels', [4, 8, 32])
def test_commensurate_thresholds_are_nearly_as_good_as_two_that_are_free(levels):
    x = lopsided(0.37, 'laplace')
    values = level_values('uniform', levels)
    branches = x[x > 0][:, None], -x[x < 0][:, None]
    free = [fitted(branch, levels=levels).threshold[0].item() for branch in branches]
    error = sum(squared_error(branch, threshold, 'uniform', values) * len(branch)
                for branch, threshold in zip(branches, free, strict=True)) / len(x)
    assert output_error(fitted(x, levels=levels), x) < 1.1 * error


@pytest.mark.parametrize('estimator', ['quantile', 'max'])
def test_both_branches_are_reached(estimator):
    x = lopsided(0.3)
    neuron = fitted(x, estimator, 0.99, levels=8)
    goal = torch.stack([quantile_top(c, 0.99) for c in site(x).counts]) if estimator == 'quantile' else site(x).peak
    assert (neuron.threshold * 8 >= goal * (1 - 1e-4)).all()
    assert (neuron.threshold * 8 <= goal * 1.05).all()  # and not by far: with 8 levels many ratios are at hand


@pytest.mark.parametrize('p', [0.5, 0.9])
def test_a_quantile_is_not_exceeded_although_that_would_lower_the_error(p):
    x = lopsided(1.)
    goal = torch.stack([quantile_top(c, p) for c in site(x).counts]).float()
    torch.testing.assert_close(fitted(x, 'quantile', p, levels=32).threshold * 32, goal, rtol=0.03, atol=0)


# dead branches and groups

@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize('fire_function', ['uniform', 'density'])
def test_silent_branches_and_groups_are_revived(estimator, fire_function):
    x = torch.randn(200, 5, generator=rng(0))
    x[:, 1] = 0
    x[:, 2].abs_()
    x[:, 3].abs_().neg_()
    x[:, 4] = 1e-30
    neuron = fitted(x, estimator, levels=8, fire=fire_function)
    threshold = neuron.threshold
    assert torch.isfinite(threshold).all() and (threshold >= MIN_STEP).all() and neuron.calibrated
    assert threshold[1, 2] == threshold[0, 2] and threshold[0, 3] == threshold[1, 3]  # goes along with the other
    assert neuron.multiplier[:, [1, 4]].tolist() == [[1, 1], [1, 1]]
    for silent in (1, 4):  # of the size of the living ones
        assert threshold[0, silent] == pytest.approx(threshold[0, 0], rel=1)
    loud = torch.full((1, 5), 1.)
    assert (neuron.encode(loud).levels > 0).all() and (neuron.encode(-loud).levels < 0).all()


@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize('fire_function', ['uniform', 'density'])
def test_a_site_that_is_silent_altogether_gets_usable_thresholds(estimator, fire_function):
    neuron = fitted(torch.zeros(10, 4), estimator, fire=fire_function)
    assert torch.isfinite(neuron.threshold).all() and (neuron.threshold >= MIN_STEP).all()
    assert torch.equal(neuron(torch.zeros(2, 4)), torch.zeros(2, 4))
    assert (neuron.encode(torch.full((1, 4), 100.)).levels > 0).all()


def test_one_heavy_channel_leaves_the_others_alone():
    x = torch.randn(2000, 8, generator=rng(0))
    heavy = x.clone()
    heavy[:, 3] *= 100
    plain, others = fitted(x).threshold, torch.arange(8) != 3
    assert torch.equal(fitted(heavy).threshold[:, others], plain[:, others])
    torch.testing.assert_close(fitted(heavy).threshold[:, 3], 100 * plain[:, 3], rtol=0.15, atol=0)  # a flat optimum


def test_heavy_tail_is_clipped():
    x = torch.cat([samples('heavy tail'), -samples('heavy tail')])[:, None]
    top = fitted(x, levels=8).threshold * 8
    assert (top < 0.5 * x.max()).all()
    assert (top > torch.quantile(x.abs(), 0.95)).all()


def test_granularity_matters():
    # the trap that steps per channel avoid: with one for the tensor, one heavy channel silences the rest
    x = torch.randn(2000, 8, generator=rng(0)) * torch.tensor([100.] + [1.] * 7)
    tensor = ScaleAndFire((1,), SFNConfig(levels=16))
    tensor.fit(site(x))
    with torch.no_grad():
        errors = [((n(x) - x)[:, 1:].norm() / x[:, 1:].norm()).item() for n in (fitted(x, levels=16), tensor)]
    assert errors[0] < 0.1 and errors[1] > 0.5


def test_exact_steps_keep_17_bits():
    step = torch.rand(1000, generator=rng(0)) * 10. ** torch.randint(-8, 6, (1000,), generator=rng(1))
    kept = exact_step(step)
    assert (kept <= step).all() and ((step - kept) / step < 2. ** -16).all()
    assert torch.equal(exact_step(kept), kept)


# density levels

histograms = st.lists(st.tuples(st.integers(0, NUM_BINS - 1), st.integers(1, 10 ** 6)), max_size=40)


def assert_levels(y, levels, top=MAX_LEVEL):
    assert y.shape == (levels,) and torch.equal(y, y.round())
    assert y[0] >= 1 and y[-1] <= top and (y.diff() > 0).all(), y.tolist()


@prop
@given(histograms, histograms, st.integers(1, 127), potentials, st.sampled_from([MAX_LEVEL, MAX_WIDE_LEVEL]))
def test_density_levels_are_strictly_increasing_integers(positive, negative, levels, initial_potential, top):
    statistics = CurrentStatistics((1,), True)
    for branch, histogram in enumerate((positive, negative)):
        for j, count in histogram:
            statistics.counts[branch, 0, j] += count
    assert_levels(fit_density_levels(statistics, levels, initial_potential, top), levels, top)


@pytest.mark.parametrize('initial_potential', [0.5, 0.])
@pytest.mark.parametrize('levels', [1, 4, 8, 32, 100, 127])
@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_density_levels_are_strictly_increasing_integers_on_currents(distribution, levels, initial_potential):
    assert_levels(fit_density_levels(site(samples(distribution)[:, None]), levels, initial_potential), levels)


@pytest.mark.parametrize('levels', [4, 8, 16, 32])
@pytest.mark.parametrize('distribution, gain', [
    ('normal', 0.9), ('laplace', 0.75), ('gelu', 0.9), ('heavy tail', 0.7), ('gelu negative', 1.05), ('uniform', 1.05),
])
def test_density_levels_are_no_worse_than_uniform_ones(distribution, gain, levels):
    x = samples(distribution)[:, None]
    errors = {name: output_error(fitted(x, levels=levels, fire=name), x) for name in ('uniform', 'density')}
    assert errors['density'] < (gain if levels > 4 else 1.05) * errors['uniform'], errors
