"""Networks of several timesteps: their neurons against loops over timesteps, their networks against one written out."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from layer_tools import build, pixels, relative_error, rng

from sformer import FitConfig, SFNConfig, calibrate_, named_neurons, spiking_
from sformer.baselines import (
    IntegrateAndFire,
    MultiStep,
    MultiThreshold,
    integrate_and_fire_network,
    multi_threshold_network,
)
from sformer.layers import shared_copy
from sformer.neurons import ScaleAndFire, integrate_and_fire, multi_threshold

UNIFORM = dict(fire='uniform', attention_fire='uniform', activation_fire='uniform', token_scale=False,
               neuron='separate_branches')


def one_step(threshold=(1., 1.), levels=1, center=None):
    """One-step neuron of one channel with these thresholds per branch, in quarters."""
    neuron = ScaleAndFire((1,), SFNConfig(levels, **UNIFORM), center_shape=None if center is None else (1,))
    multiplier = torch.tensor(threshold).mul(4).view(2, 1)
    neuron.set_state(torch.tensor([0.25]), multiplier, center=None if center is None else torch.tensor([center]))
    return neuron


def currents(steps, seed, size=64):
    """Currents (T, size) in [-1.5, 1.5] whose sums lie well off multiples of 1/64, so that rounding decides nothing."""
    return torch.randint(-96, 96, (steps, size), generator=rng(seed)) / 64 + 1 / 2048


def stepwise(neuron, x):
    """Feed currents of timesteps as their running means: means that were sent, and spikes of each timestep."""
    neuron.reset()
    sent, spikes = [], []
    for t in range(1, len(x) + 1):
        sent.append(neuron(x[:t].sum(0) / t))
        spikes.append([k.clone() for k in neuron.latest])
    return sent, spikes


@given(st.integers(1, 20), st.sampled_from([0.75, 1., 2.5]), st.integers(0, 1000))
def test_branches_are_integrate_and_fire_neurons(steps, threshold, seed):
    x = currents(steps, seed)
    sent, _ = stepwise(IntegrateAndFire(one_step((1., threshold))), x)
    for t in range(1, steps + 1):
        expected = integrate_and_fire(x[:t], 1., 0.5) - integrate_and_fire(-x[:t], threshold, threshold / 2)
        assert torch.allclose(sent[t - 1], expected, atol=1e-5)


@pytest.mark.parametrize('threshold', [0.75, 1., 1.5])
def test_spikes_are_those_of_spikingjelly(threshold):
    reason = "SpikingJelly 2.0 is missing: pip install --no-deps 'spikingjelly>=2.0' loguru"
    neuron = pytest.importorskip('spikingjelly.activation_based.neuron', reason=reason, exc_type=ImportError)
    x = currents(32, seed=3, size=500)
    _, ours = stepwise(IntegrateAndFire(one_step((threshold, threshold))), x)
    for sign in (1, -1):
        theirs = neuron.IFNode(v_threshold=threshold, v_reset=None, step_mode='s')
        theirs.v = torch.full((500,), threshold / 2)
        for t in range(len(x)):
            assert torch.equal(theirs(sign * x[t]), sign * ours[t][(1 - sign) // 2].float())
    assert sum(len(k.unique()) == 2 for spikes in ours for k in spikes) > 32  # some fire, some do not


@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 1000))
def test_multi_threshold_neurons_fire_what_is_nearest(steps, count, seed):
    neuron, x = MultiThreshold(one_step(), count=count), currents(steps, seed)
    sent, spikes = stepwise(neuron, x)
    levels, membrane, total = torch.tensor([0., *(2. ** i for i in range(count))]), torch.zeros(64), torch.zeros(64)
    for t in range(steps):
        membrane = membrane + x[t]
        nearest = levels[(membrane.abs()[:, None] - levels).abs().argmin(1)] * membrane.sign()
        membrane, total = membrane - nearest, total + nearest
        assert torch.equal(spikes[t][0].float(), nearest)
        assert torch.allclose(sent[t], total / (t + 1), atol=1e-5)


def test_only_one_membrane_takes_a_spike_back():
    x = torch.tensor([[1.], [-1.]])
    assert stepwise(IntegrateAndFire(one_step()), x)[0][-1] == 0.5
    assert stepwise(MultiThreshold(one_step(), count=1), x)[0][-1] == 0


def test_encode_gives_one_step_times_one_integer():
    neuron = IntegrateAndFire(one_step((1., 0.5)))
    spikes = neuron.encode(torch.tensor([1.2, -1.2, 0.1]))
    assert spikes.levels.tolist() == [4, -2, 0] and spikes.decode().tolist() == [1., -0.5, 0.]


def test_a_centre_is_taken_off_every_timestep():
    plain, centred = IntegrateAndFire(one_step()), IntegrateAndFire(one_step(center=0.25))
    x = currents(8, seed=1)
    for a, b in zip(stepwise(plain, x)[0], stepwise(centred, x + 0.25)[0], strict=True):
        assert torch.allclose(a + 0.25, b, atol=1e-5)


@given(st.integers(1, 24), st.sampled_from([0.75, 1.]), st.integers(0, 1000))
def test_synchronous_neurons_are_multi_threshold_neurons(steps, threshold, seed):
    x, one = currents(1, seed)[0], one_step((1., threshold), levels=steps)
    branches = [multi_threshold(sign * x, s, steps, s / 2) for sign, s in ((1, 1.), (-1, threshold))]
    neurons = [IntegrateAndFire(one, steps, steps)]
    if threshold == 1:  # else what one branch leaves in the only membrane can make the other one fire
        neurons.append(MultiThreshold(one, steps, steps, count=1))
    for neuron in neurons:
        assert torch.allclose(neuron(x), branches[0] - branches[1], atol=1e-5)


@pytest.mark.parametrize('family, steps', [('vit', 5), pytest.param('eva02', 4, marks=pytest.mark.slow)])
def test_synchronous_networks_are_multi_threshold_networks(family, steps):
    images = pixels(4)
    network, model = integrate_and_fire_network(build(family, depth=1), [images], steps, synchronous=True)
    with torch.no_grad():
        expected, fired = model(images), {}
    neurons = dict(named_neurons(model))
    for name, neuron in named_neurons(network.network):
        neuron.register_forward_hook(lambda neuron, args, out, name=name: fired.update({name: (args[0], out)}))
    assert torch.allclose(network(images), expected, atol=1e-5)
    with torch.no_grad():
        assert fired.keys() == neurons.keys()
        for name, (x, out) in fired.items():
            assert torch.allclose(neurons[name](x), out, atol=1e-5), name


def small(levels, seed=0):
    """Linear, GELU, Linear, calibrated, and inputs."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    x = torch.randn(32, 6, generator=rng(seed))
    spiking_(model, SFNConfig(levels, **UNIFORM))
    calibrate_(model, [x], FitConfig())
    return model, x


@pytest.mark.parametrize('steps', [1, 2, 7])
def test_a_network_step_by_step_is_one_written_out(steps):
    """Currents of each timestep through each layer, and expectation compensation around the GELU."""
    model, x = small(steps)
    out = MultiStep(model, steps, lambda old: IntegrateAndFire(old, steps))(x)

    def fire(neuron, h):  # what a pair of neurons sends at each timestep, (T, ...)
        thresholds = steps * neuron.threshold
        totals = [torch.stack([t * integrate_and_fire(sign * h[:t], theta, theta / 2) for t in range(1, steps + 1)])
                  for sign, theta in zip((1, -1), thresholds, strict=True)]
        return (totals[0] - totals[1]).diff(dim=0, prepend=torch.zeros_like(h[:1])) * neuron.gain

    with torch.no_grad():
        first = F.linear(fire(model[0].neuron, x.expand(steps, -1, -1)), model[0].weight, model[0].bias)
        t = torch.arange(1, steps + 1).view(-1, 1, 1)
        total = t * F.gelu(first.cumsum(0) / t)
        second = total.diff(dim=0, prepend=torch.zeros_like(total[:1]))
        expected = F.linear(fire(model[2].neuron, second), model[2].weight, model[2].bias).mean(0)
    assert torch.allclose(out, expected, atol=1e-4)
    assert steps == 1 or relative_error(out, model(x)) > 0.01  # no multi-threshold network


def test_networks_have_no_memory_of_other_images():
    network, _ = integrate_and_fire_network(build(depth=1), [pixels(4)], 3)
    first = network(pixels(2, seed=5))
    network(pixels(3, seed=6))
    assert torch.equal(network(pixels(2, seed=5)), first)


def test_one_timestep_of_a_multi_threshold_network_is_the_network_it_was_made_of():
    network, model = multi_threshold_network(build(depth=1), [pixels(4)], 1)
    with torch.no_grad():
        assert torch.allclose(network(pixels(4)), model(pixels(4)), atol=1e-5)


def test_more_timesteps_are_nearer_to_the_source():
    source, images = build(depth=1), pixels(8)
    with torch.no_grad():
        expected = source(images)
    for make in (multi_threshold_network, integrate_and_fire_network):
        few, many = (relative_error(make(source, [images], steps)[0](images), expected) for steps in (1, 12))
        assert many < few / 2


def test_models_are_left_as_they_are():
    source, images = build(depth=1), pixels(4)
    _, model = integrate_and_fire_network(source, [images], 2)
    with torch.no_grad():
        before = model(images)
        MultiStep(model, 2, lambda old: IntegrateAndFire(old, 2))(images)
        assert torch.equal(model(images), before)
        assert not list(named_neurons(source))
        assert all(a is b for a, b in zip(model.parameters(), shared_copy(model).parameters(), strict=True))


def test_no_timesteps_are_refused():
    with pytest.raises(ValueError, match='steps must be at least 1'):
        MultiStep(nn.Sequential(), 0, MultiThreshold)
