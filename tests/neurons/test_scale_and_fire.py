"""The scale-and-fire neuron: one step times one signed integer, and gradients that pass inside of its range."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron_tools import CENTER, SHAPES, naive_boundaries, naive_neuron, neurons, prop, rng, seeds

from sformer.neurons import (
    FIRE_FUNCTIONS,
    MAX_LEVEL,
    MAX_WIDE_LEVEL,
    FitConfig,
    ScaleAndFire,
    SFNConfig,
    max_levels,
)

LOW_DTYPES = (torch.bfloat16, torch.float16)


def levels_of(fire_function):
    return [n for n in (1, 4, 7, 8, 20, 32, 63, 127) if n <= max_levels(fire_function)]


# spikes

@prop
@given(neurons())
def test_output_is_a_step_times_a_signed_integer(case):
    neuron, x = case
    expected, _ = naive_neuron(neuron, x)
    levels, step, token_scale, center, _ = neuron.encode(x)
    assert levels.dtype == (torch.int8 if neuron.signed else torch.int16)
    assert torch.equal(levels.double(), expected.double())
    assert levels.abs().max() <= (MAX_LEVEL if neuron.signed else MAX_WIDE_LEVEL)
    assert step is neuron.step and token_scale is None and center is neuron.center
    out = levels.double() * step.double()  # exact: 17 bits times 7; wide levels have 14
    out = out.float() if center is None else out.float() + center
    assert torch.equal(neuron(x), out)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize('name, n', [(name, n) for name in FIRE_FUNCTIONS for n in levels_of(name)])
def test_output_is_the_decoded_spikes_bit_for_bit(name, n, signed, centered):
    config = SFNConfig(n, name, name)
    neuron = ScaleAndFire((5,), config, signed, (5,) if centered else None)
    room = MAX_LEVEL // int(neuron.levels[-1]) if signed else 1
    boundaries = torch.tensor(naive_boundaries(neuron.levels, 0.5)).float()
    fine = torch.finfo(torch.float32)

    @settings(max_examples=5, deadline=None)
    @given(st.lists(st.floats(2. ** -30, 2. ** 30, width=32), min_size=5, max_size=5),
           st.lists(st.integers(1, room), min_size=10, max_size=10),
           st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
           st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=10), seeds)
    def check(step, multiplier, center, currents, seed):
        multiplier = torch.tensor(multiplier).view(2, 5)[:1 + signed]
        neuron.set_state(torch.tensor(step), multiplier, center=torch.tensor(center) if centered else None)
        threshold = neuron.threshold[:, None]
        on = torch.cat([boundaries[:, None] * threshold[0], -boundaries[:, None] * threshold[-1]])  # ties
        random = torch.randn(20, 5, generator=rng(seed)) * neuron.step * neuron.levels[-1]
        given = torch.tensor(currents + [0., -0., fine.tiny / 4, -fine.tiny / 4, fine.max, fine.min])[:, None]
        x = torch.cat([random, given.expand(-1, 5), on, torch.nextafter(on, on * 2), torch.nextafter(on, on / 2)])
        x = (x if neuron.center is None else x + neuron.center).clamp(fine.min, fine.max)
        with torch.no_grad():
            assert torch.equal(neuron(x), neuron.encode(x).decode())

    check()


@prop
@given(neurons(signed=False))
def test_unsigned_neuron_is_silent_below_zero(case):
    neuron, x = case
    levels = neuron.encode(x).levels
    h = x if neuron.center is None else x - neuron.center
    assert (levels >= 0).all() and not levels[h < 0].any()


@prop
@given(neurons(signed=True, center=False))
def test_equal_multipliers_are_odd(case):
    neuron, x = case
    neuron.multiplier[1] = neuron.multiplier[0]
    assert torch.equal(neuron(-x), -neuron(x))
    assert torch.equal(neuron.encode(-x).levels, -neuron.encode(x).levels)


@prop
@given(neurons(signed=True, center=False))
def test_branches_change_places_with_their_multipliers(case):
    neuron, x = case
    out = neuron(x)
    neuron.set_state(neuron.step, neuron.multiplier.flip(0), neuron.levels)
    assert torch.equal(neuron(-x), -out)


@prop
@given(neurons(signed=True, center=False))
def test_firing_an_output_again_gives_the_same_level(case):
    neuron, x = case
    neuron.config = SFNConfig(len(neuron.levels), neuron.config.fire, initial_potential=0.25)
    assert torch.equal(neuron.encode(neuron(x)).levels, neuron.encode(x).levels)


@prop
@given(neurons(center=True))
def test_center_is_taken_off_and_added_back(case):
    neuron, x = case
    h, out, center = x - neuron.center, neuron(x), neuron.center.clone()
    neuron.center.zero_()
    assert torch.equal(neuron(h) + center, out)


@pytest.mark.parametrize('granularity', sorted(SHAPES))
def test_a_step_serves_what_its_shape_says(granularity):
    shape = SHAPES[granularity]
    neuron = ScaleAndFire(shape, SFNConfig(levels=8))
    neuron.set_state(torch.rand(shape, generator=rng(0)) + 0.1, torch.randint(1, 4, (2, *shape), generator=rng(2)))
    x = 10 * torch.randn(2, 3, 4, 5, generator=rng(1))
    step = neuron.step.expand(x.shape).reshape(-1)
    multiplier = torch.stack([m.expand(x.shape).reshape(-1) for m in neuron.multiplier])
    expected = torch.empty_like(x)
    for i in range(x.numel()):
        single = ScaleAndFire((1,), SFNConfig(levels=8))
        single.set_state(step[i:i + 1], multiplier[:, i:i + 1])
        expected.view(-1)[i] = single(x.view(-1)[i:i + 1])
    assert torch.equal(neuron(x), expected)


# gradients

@prop
@given(neurons(), seeds)
def test_backward_is_straight_through_inside_of_the_firing_range(case, seed):
    neuron, x = case
    inside = naive_neuron(neuron, x)[1]
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=rng(seed))
    neuron(x).backward(upstream)
    assert torch.equal(x.grad, upstream * inside)


@pytest.mark.parametrize('signed', [True, False])
def test_the_top_of_the_firing_range_has_a_gradient(signed):
    """All of it, not the half that clamp gives to a tie: a row's strongest key lies exactly there."""
    neuron = ScaleAndFire((1,), SFNConfig(levels=4), signed=signed)
    top = (neuron.threshold[0] * neuron.levels[-1]).item()
    x = torch.tensor([-2 * top, -top if signed else 0., 0., top, 2 * top], requires_grad=True)
    neuron(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@prop
@given(neurons(), st.sampled_from([torch.float32, torch.float64, *LOW_DTYPES]))
def test_values_do_not_depend_on_the_grad_mode(case, dtype):
    neuron, x = case
    x = x.to(dtype)
    with torch.no_grad():
        without = neuron(x)
    with torch.inference_mode():
        inference = neuron(x).clone()
    within = neuron(x.requires_grad_()).detach()
    for out in (within, inference):
        assert out.dtype == dtype
        assert torch.equal(out.view(torch.uint8), without.view(torch.uint8))  # bits, the sign of zero among them


# dtypes

@prop
@given(neurons(), st.sampled_from(LOW_DTYPES))
def test_low_precision_fires_where_float32_does(case, dtype):
    neuron, x = case
    neuron.to(dtype)
    low = x.clamp(-6e4, 6e4).to(dtype)
    full = low.float()  # the same currents, in float32
    assert torch.equal(neuron.encode(low).levels, neuron.encode(full).levels)
    assert torch.equal(neuron(low), neuron(full).to(dtype))


# state

def test_neurons_take_their_config():
    config = SFNConfig(levels=6, fire='power2', initial_potential=0., dead_zone=1.5, scale=0.5)
    neuron = ScaleAndFire((5,), config)
    assert neuron.config is config and neuron.levels.tolist() == [1, 2, 4, 8, 16, 32]
    assert neuron.step[0] * 32 == pytest.approx(4 * 0.5, rel=1e-4)
    x = torch.tensor([1., 1.49, 1.5, 1.99, 2.]).view(-1, 1) * neuron.step
    assert neuron.encode(x).levels[:, 0].tolist() == [0, 0, 1, 1, 2]
    unsigned = ScaleAndFire((5,), config, signed=False)
    assert unsigned.levels.tolist() == [1, 16, 81, 256, 625, 1296] and unsigned.multiplier.shape == (1, 5)


@pytest.mark.parametrize('name, n', [('byte', 8), *((name, n) for name in FIRE_FUNCTIONS for n in levels_of(name))])
def test_a_current_of_one_fires_the_top_level_of_softmax_neurons(name, n):
    # the strongest key of a row is exactly 1
    neuron = ScaleAndFire((3, 1, 1), SFNConfig(levels=n, attention_fire=name, initial_potential=0.), signed=False)
    assert (neuron.encode(torch.ones(1, 3, 2, 2)).levels == neuron.levels[-1]).all()
    assert neuron(torch.ones(1, 3, 2, 2)).amin() > 1 - 1e-4


def test_softmax_neurons_of_a_byte_round_to_multiples_of_a_255th():
    neuron = ScaleAndFire((1,), SFNConfig(8, attention_fire='byte'), signed=False)
    numerators = torch.linspace(0, 1, 10001)[:, None]
    spikes = neuron.encode(numerators)
    assert spikes.levels.min() == 0 and spikes.levels.max() == 255 and len(spikes.levels.unique()) == 256
    assert (spikes.decode() - numerators).abs().max() < 0.501 / 255


@pytest.mark.parametrize('scale', [0.5, 1.3])
def test_the_scale_is_folded_into_what_is_fitted(scale):
    x = torch.randn(500, 6, generator=rng(0))
    fitted = []
    for config in (SFNConfig(levels=8), SFNConfig(levels=8, scale=scale)):
        neuron = ScaleAndFire((6,), config)
        statistics = neuron.statistics()
        statistics.update(x)
        neuron.fit(statistics)
        fitted.append(neuron)
    plain, scaled = fitted
    torch.testing.assert_close(scaled.threshold, plain.threshold * scale, rtol=2e-5, atol=0)  # steps are short
    assert torch.equal(scaled.multiplier, plain.multiplier)


def test_thresholds_are_step_times_multiplier():
    neuron = ScaleAndFire((4,), SFNConfig(levels=32))
    neuron.set_state(torch.tensor([1., 2., 3., 4.]), torch.tensor([[1, 2, 3, 1], [3, 2, 1, 1]]))
    assert neuron.threshold.tolist() == [[1, 4, 9, 4], [3, 4, 3, 4]]
    assert neuron.encode(torch.tensor([[1e3, 1e3, 1e3, -1e3]])).levels.tolist() == [[32, 64, 96, -32]]


@prop
@given(st.floats(2. ** -28, 2. ** 20, width=32))
def test_steps_are_short_enough_for_exact_products(step):
    neuron = ScaleAndFire((1,), SFNConfig(levels=127))
    neuron.set_state(torch.tensor([step]))
    kept = neuron.step.double()
    assert 0 <= step - kept.item() <= step * 2. ** -16
    k = torch.arange(-127, 128)
    assert torch.equal((k * neuron.step).double(), k * kept)


def test_set_state_calibrates():
    neuron = ScaleAndFire((4,), SFNConfig(levels=8))
    assert not neuron.calibrated and 'uncalibrated' in repr(neuron)
    neuron.set_state(torch.full((4,), 0.1))
    assert neuron.calibrated and 'uncalibrated' not in repr(neuron)


ONES = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize('name, value', [
    ('step', torch.zeros(4)), ('step', -torch.ones(4)), ('step', torch.full((4,), math.nan)),
    ('step', torch.full((4,), math.inf)), ('step', torch.ones(1, 4)), ('step', torch.ones(3)),
    ('multiplier', ONES * 0), ('multiplier', ONES * 16), ('multiplier', ONES * 257), ('multiplier', ONES[:1]),
    ('multiplier', ONES * 1.5), ('levels', torch.arange(8)), ('levels', torch.arange(2, 10)),
    ('levels', torch.arange(1, 5)), ('center', torch.full((4,), math.nan)), ('center', torch.zeros(1)),
])
def test_set_state_refuses_and_changes_nothing(name, value):
    neuron = ScaleAndFire((4,), SFNConfig(levels=8), center_shape=(4,))
    before = {k: v.clone() for k, v in neuron.state_dict().items()}
    good = dict(step=torch.full((4,), 0.5), multiplier=2 * ONES, center=torch.ones(4))
    with pytest.raises(ValueError, match=f'^{name} '):
        neuron.set_state(**{**good, name: value})
    assert all(torch.equal(v, before[k]) for k, v in neuron.state_dict().items())


def test_softmax_numerators_have_nothing_to_observe_unless_levels_follow_their_distribution():
    assert ScaleAndFire((2, 1, 1), SFNConfig(), signed=False).statistics() is None
    neuron = ScaleAndFire((2, 1, 1), SFNConfig(attention_fire='density'), signed=False)
    statistics = neuron.statistics()
    statistics.update(torch.rand(4, 2, 8, 8, generator=rng(0)) ** 8)
    neuron.fit(statistics)
    assert neuron.levels[-1] == MAX_WIDE_LEVEL and neuron.levels.float().median() < 0.4 * MAX_WIDE_LEVEL
    assert (neuron.encode(torch.ones(1, 2, 1, 1)).levels == MAX_WIDE_LEVEL).all()


def test_fit_takes_the_centre_that_was_observed():
    neuron = ScaleAndFire((3, 1, 1), SFNConfig(), center_shape=CENTER)
    x = torch.randn(8, 3, 4, 5, generator=rng(0)) + 50
    statistics = neuron.statistics()
    statistics.update(x)
    neuron.fit(statistics, FitConfig('max'))
    assert torch.equal(neuron.center, statistics.center) and neuron.threshold.max() * 32 < 6


# what a spike carries

@pytest.mark.parametrize('token', [False, True])
@pytest.mark.parametrize('levels', [2, 3, 4])
def test_corrected_neurons_carry_the_whole_signal(levels, token):
    x = torch.randn(400, 64, generator=rng(0)) * torch.linspace(0.5, 3, 64)
    neuron = ScaleAndFire((64,), SFNConfig(levels), token=token)
    statistics = neuron.statistics()
    statistics.update(x)
    neuron.fit(statistics)
    before, threshold, weight = neuron(x), neuron.threshold, neuron.step ** -2
    carried = (before * x * weight).sum() / (x.square() * weight).sum()
    assert carried < 1
    neuron.correct(neuron.moments(x))
    now = (neuron(x) * x * weight).sum() / (x.square() * weight).sum()
    assert torch.allclose(now, torch.ones(()), atol=1e-4)
    assert torch.allclose(neuron.gain, 1 / carried, rtol=1e-4)
    assert torch.allclose(neuron.threshold, threshold, rtol=1e-4)  # it fires where it did
    assert (neuron.encode(x).levels != 0).equal(before != 0)
    assert neuron.calibrated and torch.equal(neuron(x), neuron.encode(x).decode())


def test_silent_and_unsigned_neurons_are_not_corrected():
    neuron = ScaleAndFire((4,))
    neuron.correct(neuron.moments(torch.zeros(3, 4)))
    assert neuron.gain == 1
    assert ScaleAndFire((1,), signed=False).moments(torch.rand(3, 4)) is None


@pytest.mark.parametrize('fire_function', ['uniform', 'quarter_square', 'power2'])
def test_the_floor_of_the_largest_potential_of_a_token_is_the_top_level(fire_function):
    """Which lies on the top boundary, where it would be for float rounding to decide."""
    neuron = ScaleAndFire((1,), SFNConfig(7, fire=fire_function, initial_potential=0.), token=True)
    neuron.set_state(torch.tensor([0.37]))
    x = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0)) * 100
    assert (neuron.encode(x).levels == neuron.levels[-1]).all()
    assert (neuron.encode(-x).levels == -neuron.levels[-1]).all()


def test_the_factor_of_a_token_is_that_of_its_strongest_current():
    """Whichever branch it is on."""
    neuron = ScaleAndFire((4,), SFNConfig(8), token=True)
    x = torch.tensor([[0., 4., 1., -2.], [0., 2., 1., -4.], [0., 0.4, 0.1, -0.2]])
    spikes, mirrored = neuron.encode(x), neuron.encode(-x)
    assert torch.equal(spikes.token_scale, mirrored.token_scale) and torch.equal(spikes.levels, -mirrored.levels)
    torch.testing.assert_close(spikes.token_scale[0], spikes.token_scale[1])
    torch.testing.assert_close(spikes.token_scale[0], 10 * spikes.token_scale[2])
    assert torch.equal(spikes.levels[0], spikes.levels[2])
