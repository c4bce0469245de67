"""Firing: theorems as properties, and closed forms against references that loop."""
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from neuron_tools import around, dead_zones, level_sets, naive_boundaries, naive_fire, potentials, prop, rng, seeds
from torch.utils._python_dispatch import TorchDispatchMode

from sformer.neurons import (
    FIRE_FUNCTIONS,
    MAX_LEVEL,
    MAX_WIDE_LEVEL,
    ScaleAndFire,
    SFNConfig,
    fire,
    firing_boundaries,
    integrate_and_fire,
    level_values,
    max_levels,
    multi_threshold,
)
from sformer.neurons.functional import token_reach

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
    # the mean current of the second layer is 0, but its first step sends a spike that the second cannot take back
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

# closed forms that take a square root; their boundaries are exact to an ulp
ROOTS = ('quadratic', 'quarter_square', 'widening')
LOOK_UPS = ('uniform', 'power2', 'density')


@prop
@given(level_sets(LOOK_UPS), potentials, dead_zones, seeds)
def test_fire_equals_a_loop_over_thresholds(case, initial_potential, dead_zone, seed):
    name, values = case
    boundaries = naive_boundaries(values, initial_potential, dead_zone)
    assert firing_boundaries(values, initial_potential, dead_zone).tolist() == boundaries
    u = around(boundaries, seed)
    k = fire(u, name, values, initial_potential, dead_zone)
    expected = naive_fire(u, values, boundaries)
    assert torch.equal(k, expected), [(u[i].item(), k[i].item()) for i in (k != expected).nonzero().flatten()]


@prop
@given(level_sets(), st.floats(0, 0.999), dead_zones, seeds, st.booleans())
def test_fire_equals_a_loop_within_rounding(case, initial_potential, dead_zone, seed, wide):
    # a square root, or a membrane potential that is no short binary number: within rounding either side is right
    name, values = case
    top = MAX_WIDE_LEVEL if wide else MAX_LEVEL
    if name in ROOTS:
        values = level_values(name, len(values), top)
    boundaries = naive_boundaries(values, initial_potential, dead_zone)
    slack = 1e-6 * values[-1].item()  # boundaries are differences of numbers of this size
    torch.testing.assert_close(
        firing_boundaries(values, initial_potential, dead_zone), torch.tensor(boundaries), rtol=1e-6, atol=slack)
    u = around(boundaries, seed)
    k = fire(u, name, values, initial_potential, dead_zone, top)
    below, above = (naive_fire(u.double() * (1 + 1e-6 * e) + slack * e * u.sign(), values, boundaries) for e in (-1, 1))
    low, high = torch.minimum(below, above), torch.maximum(below, above)
    assert ((low <= k) & (k <= high)).all()
    assert (low == high).float().mean() > 0.1  # most of the comparison is sharp


@pytest.mark.parametrize('levels', [1, 4, 11])
def test_quadratic_levels_round_to_the_nearest_one(levels):
    values = level_values('quadratic', levels)
    u = torch.linspace(-1.2, 1.2, 4001) * values[-1]
    k = fire(u, 'quadratic', values)
    all_levels = torch.cat([-values, values, torch.zeros(1)])
    nearest = (u[:, None] - all_levels).abs().amin(1)
    torch.testing.assert_close((u - k).abs(), nearest, rtol=0, atol=1e-4)


@prop
@given(level_sets(), potentials, dead_zones, seeds)
def test_fire_is_odd_monotone_and_returns_levels(case, initial_potential, dead_zone, seed):
    name, values = case
    u = around(naive_boundaries(values, initial_potential, dead_zone), seed).sort().values
    k = fire(u, name, values, initial_potential, dead_zone)
    assert (k.diff() >= 0).all()
    assert set(k.abs().tolist()) <= {0., *values.tolist()}
    assert k[-1] == values[-1] and k[0] == -values[-1]
    assert torch.equal(fire(-u, name, values, initial_potential, dead_zone), -k)


@prop
@given(level_sets(), potentials, dead_zones, seeds)
def test_fire_keeps_its_input(case, initial_potential, dead_zone, seed):
    name, values = case
    u = torch.randn(20, generator=rng(seed))
    before = u.clone()
    fire(u, name, values, initial_potential, dead_zone)
    assert torch.equal(u, before)


@prop
@given(level_sets(), st.floats(0, 0.9375), st.floats(0, 0.9375))
def test_a_higher_initial_potential_never_fires_less(case, one, other):
    name, values = case
    u = torch.linspace(0, 1.1, 200) * values[-1]
    low, high = (fire(u, name, values, p) for p in sorted((one, other)))
    if name in ROOTS and 0.5 in (one, other):  # to within an ulp of a boundary
        assert (low <= high).float().mean() > 0.95
    else:
        assert (low <= high).all()


@pytest.mark.parametrize('name', FIRE_FUNCTIONS)
@pytest.mark.parametrize('top', [MAX_LEVEL, MAX_WIDE_LEVEL])
def test_level_values_are_strictly_increasing_integers(name, top):
    for n in range(1, max_levels(name) + 1):
        values = level_values(name, n, top)
        assert values.shape == (n,) and values[0] >= 1 and values[-1] <= top
        assert torch.equal(values, values.round()) and (values.diff() > 0).all()


def test_level_values_of_each_function():
    assert level_values('uniform', 4).tolist() == [1, 2, 3, 4]
    assert level_values('power2', 7).tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert level_values('quarter_square', 8).tolist() == [1, 3, 5, 8, 11, 15, 19, 24]
    assert level_values('widening', 8).tolist() == [2, 5, 8, 12, 16, 21, 26, 32]
    assert level_values('quadratic', 11).tolist() == [i * i for i in range(1, 12)]
    assert level_values('quadratic', 32)[-1] == MAX_LEVEL
    assert level_values('quadratic', 32, MAX_WIDE_LEVEL).tolist() == [i * i for i in range(1, 33)]
    assert level_values('quadratic', 127, MAX_WIDE_LEVEL)[-1] == 127 ** 2
    assert level_values('byte', 4, MAX_WIDE_LEVEL).tolist() == [*range(1, 256)]


@pytest.mark.parametrize('name', FIRE_FUNCTIONS)
def test_nan_currents_stay_nan(name):
    k = fire(torch.tensor([float('nan'), 3.]), name, level_values(name, 4))
    assert k[0].isnan() and k[1] > 0


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
    ('uniform', (1, 8, 32, 127)), ('quadratic', (12, 32, 127)), ('quarter_square', (1, 8, 20)),
    ('widening', (1, 8, 18)),
    ('power2', (1, 4, 7)), ('density', (1, 8, 32, 127)),
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


@pytest.mark.parametrize('width', [48, 384, 10 ** 6])
@pytest.mark.parametrize('levels, step', [(1, 1.224), (2, 0.8430), (3, 0.6508), (4, 0.5338)])
def test_few_levels_reach_as_far_as_normal_potentials_have_the_least_error(levels, step, width):
    """Steps of uniform quantisers of 2N + 1 outputs: Max, 'Quantizing for minimum distortion' (1960), table II."""
    largest = 2 ** 0.5 * torch.erfinv(torch.tensor(0.5, dtype=torch.float64) ** (1 / width)).item()
    assert token_reach('uniform', levels, width) == pytest.approx(min(1, levels * step / largest) ** 0.8, rel=0.008)


def test_many_levels_reach_the_largest_potential():
    assert token_reach('uniform', 127, 384) == 1. and token_reach('uniform', 127, 384, 0.) == 1 - 2 ** -16
    assert token_reach('uniform', 4, 384, 0.) < 1 - 2 ** -16
