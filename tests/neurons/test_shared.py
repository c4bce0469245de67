"""Neurons whose branches share their thresholds: against a loop over them, against brute force, and what is
refused."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from neuron_tools import prop, rng, seeds

from sformer.neurons import CurrentStatistics, FitConfig, ScaleAndFire, SFNConfig, SharedScaleAndFire

FAST = SFNConfig.recipe('fast')


def neuron_of(levels, negative, step=0.5, gain=1., **config):
    """A neuron of one channel per number of negative thresholds."""
    negative = torch.tensor(negative)
    neuron = SharedScaleAndFire(negative.shape, SFNConfig(levels, token_scale=False, **config))
    neuron.set_state(torch.full(negative.shape, step), gain=gain, counts=torch.stack([2 * levels - negative, negative]))
    return neuron


def observed(x, neuron):
    statistics = neuron.statistics()
    statistics.update(x)
    return statistics


@st.composite
def shared_neurons(draw):
    levels = draw(st.integers(12, 63))
    negative = draw(st.lists(st.integers(1, 2 * levels - 1), min_size=3, max_size=3))
    return neuron_of(levels, negative, draw(st.sampled_from([0.25, 0.5, 3.])),
                     initial_potential=draw(st.sampled_from([0., 0.25, 0.5])),
                     dead_zone=draw(st.sampled_from([0., 0.75, 2.])))


@prop
@given(shared_neurons(), seeds)
def test_a_branch_fires_once_per_threshold_that_a_current_reaches(neuron, seed):
    x = neuron.step * (300 * torch.rand(40, 3, generator=rng(seed)) - 150)
    config = neuron.config
    expected = torch.zeros_like(x)
    for sign, counts in zip((1, -1), neuron.counts, strict=True):
        for j in range(1, 2 * config.levels):
            boundary = neuron.step * max(j - config.initial_potential, config.dead_zone)
            expected += sign * ((sign * x >= boundary) & (j <= counts))
    spikes = neuron.encode(x)
    assert torch.equal(spikes.levels.float(), expected) and spikes.token_scale is None
    assert torch.equal(neuron(x), expected * neuron.step)


@prop
@given(shared_neurons(), seeds)
def test_equal_counts_are_a_plain_neuron(neuron, seed):
    plain = ScaleAndFire((3,), neuron.config)
    plain.set_state(neuron.step)
    neuron.set_state(neuron.step)
    x = neuron.step * (200 * torch.rand(20, 3, generator=rng(seed)) - 100)
    assert torch.equal(plain(x), neuron(x)) and torch.equal(plain.top_levels, neuron.top_levels)


def test_uncalibrated_neurons_fire_as_far_as_plain_ones():
    x = torch.linspace(-5, 5, 1000)[:, None]
    assert (SharedScaleAndFire((1,), FAST)(x) - ScaleAndFire((1,), FAST)(x)).abs().max() < 1e-4


@pytest.mark.parametrize('fit', [
    FitConfig('max'), FitConfig('quantile', quantile=0.999), FitConfig('mse')], ids=lambda fit: fit.estimator)
@pytest.mark.parametrize('initial_potential', [0., 0.5])
def test_counts_follow_the_reach_of_the_branches(fit, initial_potential):
    """The error is near to that of the best of all steps and counts, and below that of a plain neuron."""
    config = SFNConfig(16, token_scale=False, initial_potential=initial_potential)
    x = torch.nn.functional.gelu(torch.randn(20000, 1, generator=rng(0)) * 2)
    neuron, plain = SharedScaleAndFire((1,), config), ScaleAndFire((1,), config)
    for fitted in (neuron, plain):
        fitted.fit(observed(x, fitted), fit)
    error, other = ((fitted(x) - x).square().mean().item() for fitted in (neuron, plain))
    assert neuron.counts.sum() == 32 and neuron.counts[0] > 24
    assert error < 0.7 * other
    if fit.estimator == 'mse':
        tried = neuron_of(16, [16], initial_potential=initial_potential)
        best = float('inf')
        for negative in range(1, 12):
            for step in torch.linspace(0.1, 0.4, 61):
                tried.set_state(step[None], counts=torch.tensor([[32 - negative], [negative]]))
                best = min(best, (tried(x) - x).square().mean().item())
        assert error < 1.25 * best
    elif fit.estimator == 'max':
        assert neuron.counts[0] * neuron.step >= 0.999 * x.max() and neuron.counts[1] * neuron.step >= -0.999 * x.min()


def test_silent_branches_and_channels():
    neuron = SharedScaleAndFire((4,), FAST)
    x = torch.randn(500, 4, generator=rng(0)).abs() * torch.tensor([1., -1, 1, 0])
    x[:, 2] *= torch.randn(500, generator=rng(1)).sign()
    neuron.fit(observed(x, neuron), FitConfig('max'))
    assert neuron.counts[:, [0, 1, 3]].tolist() == [[125, 1, 63], [1, 125, 63]]
    assert neuron.counts[0, 2] in range(50, 76) and torch.isfinite(neuron.step).all() and (neuron.step > 0).all()
    silent = SharedScaleAndFire((4,), FAST)
    silent.fit(observed(torch.zeros(9, 4), silent), FitConfig('max'))
    assert silent.counts.unique().tolist() == [63] and silent.calibrated


def test_room_and_gain_leave_counts():
    neuron = neuron_of(63, [3, 60, 125])
    before = neuron.counts.clone(), neuron.step.clone()
    neuron.widen(torch.tensor([1., 1., 1e-3]), 0.5, 2.)
    assert torch.equal(neuron.counts, before[0]) and (neuron.step >= 1.99 * before[1]).all()
    neuron.correct(torch.tensor([1.1, 1.], dtype=torch.float64))
    assert torch.equal(neuron.counts, before[0]) and abs(neuron.gain - 1.1) < 1e-6


def test_state_is_saved_and_refused():
    neuron, other = neuron_of(63, [3, 60]), SharedScaleAndFire((2,), FAST)
    state = neuron.state_dict()
    assert state['counts'].dtype == torch.uint8 and state['counts'].tolist() == [[123, 66], [3, 60]]
    other.load_state_dict(state)
    x = 40 * torch.randn(30, 2, generator=rng(0))
    assert torch.equal(other(x), neuron(x))
    for name, value, message in (
            ('counts', [[123, 66], [3, 61]], '126 in all'), ('counts', [[126, 66], [0, 60]], 'at least 1'),
            ('counts', [[122.5, 66], [3.5, 60]], 'not an integer'),
            ('multiplier', [[2, 1], [1, 1]], r'must lie in \[1, 1\]')):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict({**state, name: torch.tensor(value)})
    with pytest.raises(RuntimeError, match='counts missing'):
        other.load_state_dict({key: value for key, value in state.items() if key != 'counts'})
    with pytest.raises(ValueError, match='126 in all'):
        other.set_state(other.step * 2, counts=torch.full((2, 2), 62))
    assert torch.equal(other.step, neuron.step)


def test_backward_passes_inside_of_the_firing_range():
    neuron = neuron_of(63, [2])
    x = torch.tensor([-1.3, -1.2, 0.1, 62.2, 62.3], requires_grad=True)
    neuron(x[:, None]).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize('changes', [
    dict(token_scale=True), dict(silence=0.01), dict(levels=64), dict(levels=11), dict(fire='quadratic', levels=11)])
def test_neurons_that_would_not_gain_do_not_share(changes):
    config = SFNConfig.recipe('fast', **changes)
    assert not SharedScaleAndFire.suits(config, config.signed_fire)
    assert SharedScaleAndFire.suits(FAST, FAST.signed_fire)
    with pytest.raises(ValueError, match='fitted to currents'):
        SharedScaleAndFire((3,), FAST).fit(CurrentStatistics((3,), True), octaves=torch.zeros(3))
