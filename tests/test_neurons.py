"""Neurons: theorems as properties, and closed forms against references that loop."""
import copy
import math

import pytest
import torch
import torch.nn as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sformer.neurons import (
    FIRE_FUNCTIONS,
    MAX_LEVEL,
    DirectCoding,
    ScaleAndFire,
    SFNConfig,
    fire,
    firing_boundaries,
    integrate_and_fire,
    level_values,
    multi_threshold,
)

prop = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2 ** 31 - 1)
LOW_DTYPES = (torch.bfloat16, torch.float16)


def rng(seed):
    return torch.Generator().manual_seed(seed)


# Temporal-to-spatial equivalence. Everything lies on a grid of UNIT, thresholds and currents on multiples of T units,
# so that sums, means and theta / T are exact in float64 and equality is equality.

UNIT = 2. ** -10
timesteps = st.integers(1, 16)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def grid(low, high, shape, seed, unit):
    """Random multiples of `unit` from low * unit to high * unit, both inclusive."""
    return torch.randint(low, high + 1, shape, generator=rng(seed)).to(torch.float64) * unit


def mean(x):
    return x.sum(0) / len(x)


def one_step(x, theta, v):
    """The multi-threshold neuron that the theorem promises for a train x (T, ...)."""
    return multi_threshold(mean(x), theta / len(x), levels=len(x), initial_potential=v / len(x))


@prop
@given(timesteps, shapes, st.integers(1, 64), seeds)
def test_if_equals_multi_threshold(T, shape, m, seed):  # noqa: N803
    theta = m * T * UNIT
    x = grid(0, m, (T, *shape), seed, T * UNIT)
    v = grid(0, m - 1, shape, seed + 1, T * UNIT)
    assert torch.equal(integrate_and_fire(x, theta, v), one_step(x, theta, v))


@prop
@given(timesteps, st.integers(1, 5), st.integers(1, 64), seeds)
def test_if_equals_multi_threshold_with_a_threshold_per_channel(T, channels, m, seed):  # noqa: N803
    theta = grid(m, 2 * m, (channels,), seed, T * UNIT)
    x = grid(0, m, (T, 3, channels), seed + 1, T * UNIT)
    v = grid(0, m - 1, (channels,), seed + 2, T * UNIT)
    assert torch.equal(integrate_and_fire(x, theta, v), one_step(x, theta, v))


@prop
@given(timesteps, shapes, st.integers(1, 64), seeds)
def test_equivalence_does_not_depend_on_when_the_current_comes(T, shape, m, seed):  # noqa: N803
    theta = m * T * UNIT
    x = grid(0, m, (T, *shape), seed, T * UNIT)
    shuffled = x[torch.randperm(T, generator=rng(seed))]
    assert torch.equal(integrate_and_fire(x, theta), integrate_and_fire(shuffled, theta))


def spike_train(x, theta):
    """The spikes themselves, (T, ...), recovered from the means of ever longer prefixes."""
    sums = [integrate_and_fire(x[:t], theta) * t for t in range(1, len(x) + 1)]
    return torch.stack([sums[0]] + [b - a for a, b in zip(sums, sums[1:], strict=False)]).round()


def linear_layer(T, width, m, signed, seed):  # noqa: N803
    """Integer weights and a second threshold that no sum of first-layer spikes exceeds."""
    weight = grid(-3 if signed else 0, 3, (width, 4), seed, 1.)
    return weight, weight.abs().sum(1).clamp_min(1) * m * T


@prop
@given(timesteps, st.integers(1, 4), st.integers(1, 16), seeds)
def test_equivalence_carries_through_nonnegative_weights_spike_by_spike(T, width, m, seed):  # noqa: N803
    # every single step of the second layer's current must lie in [0, theta], not only its mean: weights >= 0 do that
    x = grid(0, m, (T, 4), seed, T)
    weight, theta2 = linear_layer(T, width, m, False, seed + 1)
    theta1 = m * T
    train = spike_train(x, theta1)
    currents = train @ weight.T
    assert (currents >= 0).all() and (currents <= theta2).all()
    spatial = one_step(x, theta1, 0.)
    assert torch.equal(mean(train), spatial)
    assert torch.equal(integrate_and_fire(currents, theta2), multi_threshold(weight @ spatial, theta2 / T, levels=T))


@prop
@given(timesteps, st.integers(1, 4), st.integers(1, 16), seeds)
def test_equivalence_carries_through_any_weights_layer_by_layer(T, width, m, seed):  # noqa: N803
    # a layer that is given the mean of its input at every step needs only that mean in [0, theta]
    x = grid(0, m, (T, 4), seed, T)
    weight, theta2 = linear_layer(T, width, m, True, seed + 1)
    current = (weight @ one_step(x, m * T, 0.)).clamp_min(0)
    temporal = integrate_and_fire((T * current).expand(T, -1), T * theta2)  # times T: what is added up stays exact
    assert torch.equal(temporal, multi_threshold(T * current, theta2, levels=T))


def test_equivalence_does_not_carry_through_signed_weights_spike_by_spike():
    # the mean current of the second layer is 0, but its first step sends a spike that the second can't take back
    x, theta = torch.tensor([[1., 0.], [0., 1.]]), 1.
    train = spike_train(x, theta)
    weight = torch.tensor([[1., -1.]])
    assert mean(train @ weight.T).item() == 0
    assert integrate_and_fire(train @ weight.T, theta).item() == 0.5
    assert multi_threshold(weight @ one_step(x, theta, 0.), theta / 2, levels=2).item() == 0


def test_negative_current_breaks_equivalence():
    x = torch.tensor([1., -1.])
    assert integrate_and_fire(x, 1.).item() == 0.5
    assert one_step(x, 1., 0.).item() == 0


def test_current_above_the_threshold_breaks_equivalence():
    x = torch.tensor([0., 2.])
    assert integrate_and_fire(x, 1.).item() == 0.5  # a second spike is left in the membrane
    assert one_step(x, 1., 0.).item() == 1


@prop
@given(st.integers(2, 16), st.integers(1, 64), st.sampled_from(['negative', 'above']), seeds)
def test_equivalence_is_violated_outside_of_its_conditions(T, m, how, seed):  # noqa: N803
    # any train inside of the conditions leaves them, and the equivalence, by one change at its end
    theta = m * T * UNIT
    x = grid(0, m, (T,), seed, T * UNIT)
    x[0] = theta
    spikes = int(integrate_and_fire(x[:-1], theta).item() * (T - 1) / theta + 0.5)
    if how == 'negative':
        x[-1] = -x[:-1].sum()
        assert integrate_and_fire(x, theta).item() == spikes * theta / T > 0 == one_step(x, theta, 0.).item()
    else:
        assume(spikes < T - 1)
        x[-1] = T * theta
        assert integrate_and_fire(x, theta).item() == (spikes + 1) * theta / T < one_step(x, theta, 0.).item() == theta


@prop
@given(timesteps, shapes, st.integers(1, 64), seeds)
def test_signed_pair_is_equivalent_up_to_one_step(T, shape, m, seed):  # noqa: N803
    theta = m * T * UNIT
    x = grid(-m, m, (T, *shape), seed, T * UNIT)
    pair = integrate_and_fire(x.clamp_min(0), theta) - integrate_and_fire((-x).clamp_min(0), theta)
    spatial = one_step(x, theta, 0.) - one_step(-x, theta, 0.)
    assert ((pair - spatial).abs() <= theta / T).all()


def test_signed_pair_is_not_equivalent():
    x = torch.tensor([1., -0.5])
    pair = integrate_and_fire(x.clamp_min(0), 1.) - integrate_and_fire((-x).clamp_min(0), 1.)
    spatial = one_step(x, 1., 0.) - one_step(-x, 1., 0.)
    assert pair.item() == 0.5 and spatial.item() == 0  # the bound of one step is reached


def test_signed_pair_on_the_whole_current_is_off_by_any_number_of_steps():
    # fed the signed current itself, both membranes remember what the other one sent
    x = torch.tensor([1.] * 8 + [-1.] * 8)
    assert (integrate_and_fire(x, 1.) - integrate_and_fire(-x, 1.)).item() == 0.5
    assert (one_step(x, 1., 0.) - one_step(-x, 1., 0.)).item() == 0


# fire() against a loop over thresholds

@st.composite
def firings(draw, functions=FIRE_FUNCTIONS):
    """(fire function, level values, firing, dead zone)"""
    name = draw(st.sampled_from(functions))
    if name == 'density':
        values = torch.tensor(sorted(draw(st.sets(st.integers(1, MAX_LEVEL), min_size=1))), dtype=torch.float32)
    else:
        values = level_values(name, draw(st.integers(1, 7 if name == 'power2' else MAX_LEVEL)))
    dead_zone = draw(st.sampled_from([0., 0.25, 0.5, 1., 1.75, 3.3, 130.]))
    return name, values, draw(st.sampled_from(['round', 'floor'])), dead_zone


def naive_boundaries(name, values, firing, dead_zone):
    y = [0.] + values.tolist()
    n = len(values)
    if name == 'quadratic' and firing == 'round':
        y = [i * i * min(n * n, 127) / (n * n) for i in range(n + 1)]  # the parabola before it is rounded
    b = y[1:] if firing == 'floor' else [(low + high) / 2 for low, high in zip(y, y[1:], strict=False)]
    if name == 'quadratic' and firing == 'round':
        b = [max(v, j + 0.5) for j, v in enumerate(b)]
    return [max(v, torch.tensor(dead_zone).item()) for v in b]


def naive_fire(u, values, boundaries):
    y = [0.] + values.tolist()
    return torch.tensor([y[sum(v >= b for b in boundaries)] for v in u.tolist()])


def currents_around(boundaries, seed):
    """Random currents, and every boundary with its neighbours in float32."""
    b = torch.tensor(boundaries, dtype=torch.float32)
    random = torch.cat([torch.rand(40, generator=rng(seed)) * 140 - 5, torch.randn(40, generator=rng(seed))])
    extreme = torch.tensor([0., -0., 1e-30, 1e9, -1e9, math.inf, -math.inf])
    return torch.cat([random, extreme, -b, b, torch.nextafter(b, b - 1), torch.nextafter(b, b + 1)])


@prop
@given(firings(('uniform', 'power2', 'density')), seeds)
def test_fire_equals_a_loop_over_thresholds(case, seed):
    name, values, firing, dead_zone = case
    boundaries = naive_boundaries(*case)
    assert firing_boundaries(*case).tolist() == boundaries
    u = currents_around(boundaries, seed)
    k = fire(u, name, values, firing, dead_zone)
    expected = naive_fire(u, values, boundaries)
    assert torch.equal(k, expected), [(u[i].item(), k[i].item()) for i in (k != expected).nonzero().flatten()]


@prop
@given(firings(('quadratic',)), seeds)
def test_fire_quadratic_equals_a_loop_over_thresholds(case, seed):
    # its boundaries are not float32 numbers, so on one of them a current may round to either side
    name, values, firing, dead_zone = case
    boundaries = naive_boundaries(*case)
    torch.testing.assert_close(firing_boundaries(*case), torch.tensor(boundaries), rtol=1e-6, atol=0)
    u = currents_around(boundaries, seed)
    k = fire(u, name, values, firing, dead_zone)
    below, above = (naive_fire(u.double() * (1 + e * u.sign()), values, boundaries) for e in (-1e-6, 1e-6))
    on_dead_zone = u == torch.tensor(dead_zone)
    below = torch.where(on_dead_zone, naive_fire(u, values, boundaries), below)
    assert ((below <= k) & (k <= above)).all()
    assert (below == above).float().mean() > 0.1  # most of the comparison is sharp


@prop
@given(firings(), seeds)
def test_fire_is_monotone_and_returns_levels(case, seed):
    name, values, firing, dead_zone = case
    u = currents_around(naive_boundaries(*case), seed).sort().values
    k = fire(u, name, values, firing, dead_zone)
    assert (k.diff() >= 0).all()
    assert set(k.tolist()) <= {0., *values.tolist()}
    assert k[-1] == values[-1] and k[0] == 0


@prop
@given(firings(), seeds)
def test_fire_keeps_its_input(case, seed):
    name, values, firing, dead_zone = case
    u = torch.randn(20, generator=rng(seed))
    before = u.clone()
    fire(u, name, values, firing, dead_zone)
    assert torch.equal(u, before)


@pytest.mark.parametrize('name', FIRE_FUNCTIONS)
def test_level_values_are_strictly_increasing_int8(name):
    for n in range(1, 8 if name == 'power2' else MAX_LEVEL + 1):
        values = level_values(name, n)
        assert values.shape == (n,) and values[0] >= 1 and values[-1] <= MAX_LEVEL
        assert torch.equal(values, values.round()) and (values.diff() > 0).all()


def test_level_values_of_each_function():
    assert level_values('uniform', 4).tolist() == [1, 2, 3, 4]
    assert level_values('power2', 7).tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert level_values('quadratic', 11).tolist() == [i * i for i in range(1, 12)]
    assert level_values('quadratic', 32)[-1] == MAX_LEVEL


class Costs(TorchDispatchMode):
    """Counts operations and the elements of their largest result."""

    def __init__(self):
        super().__init__()
        self.ops, self.elements = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize('name, levels', [
    ('uniform', (1, 8, 32, 127)), ('quadratic', (12, 32, 127)), ('power2', (1, 4, 7)), ('density', (1, 8, 32, 127)),
])
def test_cost_of_firing_does_not_depend_on_the_number_of_thresholds(name, levels):
    x = torch.randn(64, 64, generator=rng(0))
    costs = {}
    for n in levels:
        neuron = ScaleAndFire((64,), SFNConfig(levels=n, fire=name))
        with torch.no_grad(), Costs() as cost:
            neuron(x)
        costs[n] = cost.ops
        assert cost.elements == x.numel()  # nor is there a dimension of thresholds
    assert len(set(costs.values())) == 1, costs


# ScaleAndFire

SHAPES = {'tensor': (1,), 'head': (3, 1, 1), 'channel': (5,), 'head and channel': (3, 1, 5)}


@st.composite
def neurons(draw, signed=None, center=None, functions=FIRE_FUNCTIONS):
    """A neuron with random thresholds, and currents (2, 3, 4, 5) that reach beyond its firing range."""
    name, values, firing, dead_zone = draw(firings(functions))
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    signed = draw(st.booleans()) if signed is None else signed
    center = draw(st.booleans()) if center is None else center
    config = SFNConfig(levels=len(values), fire=name, firing=firing)
    neuron = ScaleAndFire(shape, config, signed=signed, center_shape=(3, 1, 5) if center else None)
    neuron.dead_zone = dead_zone
    neuron.scale.fill_(draw(st.sampled_from([1., 0.75, 1.3])))
    generator = rng(draw(seeds))
    top = torch.rand(neuron.threshold.shape, generator=generator) + 0.5
    neuron.set_threshold(top / values[-1], values, torch.randn(3, 1, 5, generator=generator) if center else None)
    return neuron, torch.randn(2, 3, 4, 5, generator=generator)


def naive_neuron(neuron, x):
    """Output, levels and firing range of one neuron, from its definition."""
    h = x - neuron.center if neuron.centered else x
    step = neuron.threshold * neuron.scale
    args = neuron.fire_function, neuron.levels.float(), neuron.firing, neuron.dead_zone
    k = fire(h / step[0], *args)
    end = step * (neuron.levels[-1] + 0.5)  # beyond it the top level is more than half a step away
    out, inside = step[0] * k, h <= end[0]
    if not neuron.signed:
        return out, k, inside & (h >= 0)
    negative = fire(-h / step[1], *args)
    return out - step[1] * negative, k - negative, inside & (h >= -end[1])


@prop
@given(neurons())
def test_output_is_a_step_times_a_signed_integer(case):
    neuron, x = case
    out, levels, _ = naive_neuron(neuron, x)
    k = neuron.spikes(x)
    assert k.dtype == torch.int8 and torch.equal(k.float(), levels)
    assert torch.equal(neuron(x), out)
    step = neuron.threshold * neuron.scale
    assert torch.equal(neuron(x), torch.where(k > 0, step[0], step[-1]) * k)


@prop
@given(neurons(signed=False))
def test_unsigned_neuron_is_silent_below_zero(case):
    neuron, x = case
    out = neuron(x)
    h = x - neuron.center if neuron.centered else x
    assert (out >= 0).all() and (neuron.spikes(x) >= 0).all() and not out[h < 0].any()


@prop
@given(neurons(signed=True, center=False))
def test_equal_thresholds_are_odd(case):
    neuron, x = case
    neuron.threshold[1] = neuron.threshold[0]
    assert torch.equal(neuron(-x), -neuron(x))
    assert torch.equal(neuron.spikes(-x), -neuron.spikes(x))


@prop
@given(neurons(signed=True, center=False, functions=('uniform',)), st.integers(-8, 4))
def test_firing_an_output_again_gives_the_same_level(case, exponent):
    neuron, x = case
    neuron.dead_zone = 0.
    neuron.scale.fill_(1)
    neuron.threshold.fill_(2. ** exponent)  # exact multiples, exact quotients
    assert torch.equal(neuron.spikes(neuron(x)), neuron.spikes(x))
    assert torch.equal(neuron(neuron(x)), neuron(x))


@prop
@given(neurons(signed=True))
def test_scale_multiplies_every_threshold(case):
    neuron, x = case
    out = neuron(x)
    neuron.threshold.mul_(neuron.scale)
    neuron.scale.fill_(1)
    assert torch.equal(neuron(x), out)


def test_neurons_take_their_config():
    config = SFNConfig(levels=6, fire='power2', firing='floor', dead_zone=1.5, scale=0.5)
    neuron = ScaleAndFire((5,), config)
    assert (neuron.fire_function, neuron.firing, neuron.dead_zone, neuron.scale.item()) == ('power2', 'floor', 1.5, 0.5)
    assert neuron.levels.tolist() == [1, 2, 4, 8, 16, 32]
    assert ScaleAndFire((5,), config, 'uniform').levels.tolist() == [1, 2, 3, 4, 5, 6]


@prop
@given(neurons(center=True))
def test_center_is_subtracted_and_not_added_back(case):
    neuron, x = case
    out = neuron(x)
    h = x - neuron.center
    neuron.center.zero_()
    assert torch.equal(neuron(h), out)


@pytest.mark.parametrize('granularity', sorted(SHAPES))
def test_a_threshold_serves_what_its_shape_says(granularity):
    shape = SHAPES[granularity]
    neuron = ScaleAndFire(shape, SFNConfig(levels=8))
    threshold = torch.rand(2, *shape, generator=rng(0)) + 0.1
    neuron.set_threshold(threshold)
    x = torch.randn(2, 3, 4, 5, generator=rng(1))
    per_element = [theta.expand(x.shape) for theta in threshold]
    expected = torch.empty_like(x)
    for i in range(x.numel()):
        single = ScaleAndFire((1,), SFNConfig(levels=8))
        single.set_threshold(torch.stack([theta.reshape(-1)[i:i + 1] for theta in per_element]))
        expected.view(-1)[i] = single(x.view(-1)[i:i + 1])
    assert torch.equal(neuron(x), expected)


@prop
@given(neurons(), seeds)
def test_backward_is_straight_through_inside_of_the_firing_range(case, seed):
    neuron, x = case
    inside = naive_neuron(neuron, x)[2]
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=rng(seed))
    neuron(x).backward(upstream)
    assert torch.equal(x.grad, upstream * inside)


@pytest.mark.parametrize('signed', [True, False])
def test_the_top_of_the_firing_range_has_a_gradient(signed):
    """All of it, not the half that clamp gives to a tie: a row's strongest key lies exactly there, white pixels too."""
    neuron = ScaleAndFire((1,), SFNConfig(levels=4), signed=signed)
    top = (neuron.threshold[0] * 4).item()
    x = torch.tensor([-2 * top, -top if signed else 0., 0., top, 2 * top], requires_grad=True)
    neuron(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_every_pixel_value_has_a_gradient():
    coding = DirectCoding(1)
    x = ((torch.arange(256) / 255 - 0.5) / 0.5).view(1, 1, 16, 16).requires_grad_()
    coding(x).sum().backward()
    assert (x.grad == 1).all()


def test_thresholds_are_float32_whatever_the_default_dtype_is():
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            for neuron in (ScaleAndFire((3,), SFNConfig(), center_shape=(3,)), DirectCoding(3)):
                assert {b.dtype for b in neuron.buffers() if b.is_floating_point()} == {torch.float32}
    finally:
        torch.set_default_dtype(before)


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


@pytest.mark.parametrize('dtype', [torch.float64, *LOW_DTYPES])
def test_thresholds_stay_float32(dtype):
    neuron = ScaleAndFire((5,), SFNConfig(levels=16), center_shape=(5,))
    neuron.set_threshold(torch.rand(2, 5, generator=rng(0)) + 1.9, center=torch.randn(5, generator=rng(1)))
    coding = DirectCoding(3)
    coding.set_range(torch.tensor([-2.1, -2., -1.8]), torch.tensor([2.2, 2.4, 2.6]))
    model = nn.Sequential(nn.Linear(5, 5), neuron, coding)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('0.')}
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    for key, value in before.items():
        now = model.state_dict()[key]
        assert now.dtype == value.dtype and torch.equal(now, value), key


@prop
@given(neurons(center=False), st.sampled_from(LOW_DTYPES))
def test_low_precision_fires_where_float32_does(case, dtype):
    assert_fires_alike(*case, dtype)


@prop
@given(neurons(center=True), st.sampled_from(LOW_DTYPES))
def test_low_precision_fires_where_float32_does_around_a_center(case, dtype):
    assert_fires_alike(*case, dtype)


def assert_fires_alike(neuron, x, dtype):
    neuron.to(dtype)
    low = x.to(dtype)
    full = low.float()  # the same currents, in float32
    assert torch.equal(neuron.spikes(low), neuron.spikes(full))
    assert torch.equal(neuron(low), neuron(full).to(dtype))


def test_set_threshold_calibrates():
    neuron = ScaleAndFire((4,), SFNConfig(levels=8))
    assert not neuron.calibrated and 'uncalibrated' in repr(neuron)
    neuron.set_threshold(torch.full((2, 4), 0.1))
    assert neuron.calibrated and 'uncalibrated' not in repr(neuron)


@pytest.mark.parametrize('threshold', [
    torch.zeros(2, 4), -torch.ones(2, 4), torch.full((2, 4), math.nan), torch.full((2, 4), math.inf),
    torch.ones(1, 4), torch.ones(2, 3),
])
def test_set_threshold_refuses(threshold):
    neuron = ScaleAndFire((4,), SFNConfig(levels=8))
    before = neuron.threshold.clone()
    with pytest.raises(ValueError, match='threshold'):
        neuron.set_threshold(threshold)
    assert torch.equal(neuron.threshold, before) and not neuron.calibrated


# State dicts

def stateful(fire_function='uniform'):
    """A calibrated neuron with every kind of buffer, as part of a model."""
    neuron = ScaleAndFire((4,), SFNConfig(levels=3, fire=fire_function), center_shape=(4,))
    neuron.set_threshold(torch.rand(2, 4, generator=rng(0)) + 0.1, center=torch.randn(4, generator=rng(1)))
    return nn.ModuleDict({'layer': neuron})


def test_state_dict_round_trip():
    model, other = stateful(), nn.ModuleDict({'layer': ScaleAndFire((4,), SFNConfig(levels=3), center_shape=(4,))})
    other.load_state_dict(model.state_dict())
    x = torch.randn(6, 4, generator=rng(2))
    assert other.layer.calibrated and torch.equal(other.layer(x), model.layer(x))


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('key', ['calibrated', 'threshold', 'levels', 'scale', 'center'])
def test_incomplete_state_names_what_is_missing(key, strict):
    model = stateful()
    state = model.state_dict()
    del state[f'layer.{key}']
    with pytest.raises(RuntimeError, match=rf'incomplete.*layer\.{key}'):
        model.load_state_dict(state, strict=strict)


BROKEN_STATE = [
    ('threshold', math.nan), ('threshold', math.inf), ('threshold', 0.), ('threshold', -0.1),
    ('scale', math.nan), ('scale', 0.), ('scale', -1.), ('center', math.nan), ('center', math.inf),
]


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('key, value', BROKEN_STATE)
def test_broken_state_names_the_key(key, value, strict):
    model = stateful()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state[f'layer.{key}'].view(-1)[-1] = value
    with pytest.raises(RuntimeError, match=rf'layer\.{key} is '):
        model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize('key, shape', [
    ('threshold', (2, 5)), ('threshold', (1, 4)), ('levels', (4,)), ('center', (1,)),
])
def test_state_of_another_shape_names_the_key(key, shape):
    model = stateful()
    state = model.state_dict()
    state[f'layer.{key}'] = torch.ones(shape, dtype=state[f'layer.{key}'].dtype)
    with pytest.raises(RuntimeError, match=rf'layer\.{key} has shape'):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize('fire_function, levels, message', [
    ('uniform', [1, 2, 4], 'not the levels of uniform'),
    ('quadratic', [1, 2, 3], 'not the levels of quadratic'),
    ('density', [1, 3, 3], 'increase'),
    ('density', [3, 2, 4], 'increase'),
    ('density', [0, 1, 2], 'increase'),
    ('density', [1, 2, 128], 'increase'),
])
def test_wrong_levels_name_the_key(fire_function, levels, message):
    model = stateful(fire_function)
    state = model.state_dict()
    state['layer.levels'] = torch.tensor(levels, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=rf'layer\.levels.*{message}'):
        model.load_state_dict(state, strict=False)


def test_density_loads_levels_of_its_own():
    model = stateful('density')
    state = model.state_dict()
    state['layer.levels'] = torch.tensor([2, 9, 127], dtype=torch.uint8)
    model.load_state_dict(state)
    assert model.layer.spikes(torch.full((1, 4), 1e3)).tolist() == [[127] * 4]


# Direct coding

means = st.floats(0, 1)
deviations = st.floats(0.05, 2)


@prop
@given(st.lists(st.tuples(means, deviations), min_size=1, max_size=4))
def test_direct_coding_is_lossless_on_every_8_bit_value(channels):
    mean_, std = (torch.tensor(v, dtype=torch.float64) for v in zip(*channels, strict=True))
    coding = DirectCoding(len(channels))
    coding.set_range((-mean_ / std).float(), ((1 - mean_) / std).float())
    pixels = torch.arange(256, dtype=torch.float64).view(1, 1, 16, 16).expand(1, len(channels), 16, 16)
    x = ((pixels / 255 - mean_[:, None, None]) / std[:, None, None]).float()
    assert torch.equal(coding.spikes(x).double() + 128, pixels)
    torch.testing.assert_close(coding(x), x, rtol=1e-5, atol=1e-5)


def test_direct_coding_saturates_at_its_range():
    coding = DirectCoding(1)
    coding.set_range(torch.tensor([-2.]), torch.tensor([3.]))
    x = torch.tensor([-100., -2., 3., 100.]).view(1, 1, 1, 4).requires_grad_()
    assert coding.spikes(x).flatten().tolist() == [-128, -128, 127, 127]
    out = coding(x)
    torch.testing.assert_close(out.flatten(), torch.tensor([-2., -2., 3., 3.]))
    out.sum().backward()
    assert x.grad.flatten().tolist()[::3] == [0, 0]
    assert coding.calibrated


def test_direct_coding_is_straight_through_inside_of_its_range():
    coding = DirectCoding(3)
    x = (torch.rand(2, 3, 4, 4, generator=rng(0)) * 1.9 - 0.95).requires_grad_()
    upstream = torch.randn(x.shape, generator=rng(1))
    out = coding(x)
    out.backward(upstream)
    assert torch.equal(x.grad, upstream)
    with torch.no_grad():
        assert torch.equal(coding(x), out)


def test_direct_coding_covers_unit_std_by_default():
    pixels = torch.arange(256).view(1, 1, 16, 16)
    assert torch.equal(DirectCoding(1).spikes((pixels / 255 - 0.5) / 0.5) + 128., pixels.float())


@pytest.mark.parametrize('low, high', [(1., 1.), (1., 0.), (math.nan, 1.), (0., math.inf)])
def test_direct_coding_refuses_an_empty_range(low, high):
    coding = DirectCoding(1)
    with pytest.raises(ValueError, match='threshold'):
        coding.set_range(torch.tensor([low]), torch.tensor([high]))
    assert not coding.calibrated


# Config

@pytest.mark.parametrize('field, value', [
    ('levels', 0), ('levels', 128), ('levels', -1), ('levels', 8.), ('levels', '8'), ('levels', None),
    ('fire', 'linear'), ('attention_fire', 'softmax'), ('firing', 'ceil'), ('estimator', 'kl'),
    ('dead_zone', -0.5), ('dead_zone', math.nan), ('dead_zone', math.inf),
    ('scale', 0.), ('scale', -1.), ('scale', math.nan), ('scale', math.inf),
    ('quantile', 0.), ('quantile', 1.01), ('quantile', math.nan),
])
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=rf'^{field}\b'):
        SFNConfig(**{field: value})


@pytest.mark.parametrize('field', ['fire', 'attention_fire'])
def test_config_power2_has_seven_levels(field):
    SFNConfig(levels=7, **{field: 'power2'})
    with pytest.raises(ValueError, match=f'{field}=power2'):
        SFNConfig(levels=8, **{field: 'power2'})


def test_config_is_frozen_and_its_limits_are_valid():
    for levels in (1, MAX_LEVEL):
        config = SFNConfig(levels=levels, quantile=1., dead_zone=0.)
        with pytest.raises(AttributeError):
            config.levels = 3


@pytest.mark.parametrize('name', FIRE_FUNCTIONS)
def test_nan_currents_stay_nan(name):
    k = fire(torch.tensor([float('nan'), 3.]), name, level_values(name, 4))
    assert k[0].isnan() and k[1] > 0


def test_assigned_state_is_float32_too():
    neuron, other = ScaleAndFire((4,)), ScaleAndFire((4,))
    other.set_threshold(torch.full((2, 4), 0.3))
    neuron.load_state_dict({k: v.bfloat16() if v.is_floating_point() else v for k, v in other.state_dict().items()},
                           assign=True)
    assert neuron.threshold.dtype == torch.float32 and neuron.calibrated


def test_refused_state_changes_nothing():
    neuron = ScaleAndFire((4,))
    before = copy.deepcopy(neuron.state_dict())
    state = dict(before, threshold=torch.zeros(2, 4), calibrated=torch.tensor(True))
    with pytest.raises(RuntimeError, match='dead'):
        neuron.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in neuron.state_dict().items())


@pytest.mark.parametrize('field', ['dead_zone', 'scale', 'quantile'])
@pytest.mark.parametrize('value', ['1', None])
def test_config_refuses_what_is_no_number(field, value):
    with pytest.raises(ValueError, match=f'{field} must be a number'):
        SFNConfig(**{field: value})
