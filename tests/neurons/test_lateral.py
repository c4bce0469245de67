"""Neurons that take one another into account: against a loop over channels, against the theorem, saved and refused."""
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from neuron_tools import prop, rng, seeds

from sformer.errors import ConfigError
from sformer.neurons import LateralScaleAndFire, ScaleAndFire, SFNConfig
from sformer.neurons.lateral import SPIKES_PER_LEVEL, group_sizes, num_feedback


def neuron_of(channels=24, groups=4, levels=4, seed=0, token=False, signed=True, **config):
    """A neuron with steps of its own per channel, and the weights (D, C) whose products its errors leave alone."""
    weight = torch.randn(channels // 4, channels, generator=rng(seed))
    neuron = LateralScaleAndFire((channels,), SFNConfig(levels, lateral=groups, **config), token=token, folds=True)
    multiplier = torch.randint(1, 3, (2, channels), generator=rng(seed + 1))
    neuron.set_state(0.2 + torch.rand(channels, generator=rng(seed + 2)), multiplier, gain=0.9)
    neuron.set_feedback(weight.T @ weight)
    return neuron, weight


def plain(neuron):
    """The same neuron without feedback."""
    alone = ScaleAndFire(tuple(neuron.step.shape), neuron.config, token=neuron.token, folds=True)
    alone.load_state_dict({name: neuron.state_dict()[name] for name in alone.state_dict()})
    return alone


def cost_of(weight, error):
    return (error.double() @ weight.double().T).square().sum(-1).mean().item()


@prop
@given(st.integers(2, 30), st.integers(2, 9))
def test_groups_cover_all_channels_and_feedback_leads_to_later_ones(channels, groups):
    sizes = group_sizes(channels, groups)
    assert sum(sizes) == channels and len(sizes) <= groups and min(sizes) > 0
    pairs = sum(a * b for i, a in enumerate(sizes) for b in sizes[i + 1:])
    assert num_feedback(channels, groups) == pairs
    neuron = LateralScaleAndFire((channels,), SFNConfig(4, lateral=groups))
    assert [part.shape[0] for _, part in neuron.groups()] == sizes and neuron.feedback.numel() == pairs


@prop
@given(seeds, st.booleans(), st.sampled_from([0., 0.3]), st.sampled_from([0., 0.4]))
def test_channels_fire_one_after_the_other_as_they_are_told(seed, token, zone, silence):
    neuron, _ = neuron_of(12, 3, seed=seed, token=token, lateral_zone=zone, silence=silence)
    if silence:
        neuron.set_quiet(torch.rand(12, generator=rng(seed)))
        neuron.center.copy_(torch.randn(12, generator=rng(seed + 9)))
    x = 3 * torch.randn(5, 12, generator=rng(seed + 3))
    spikes = neuron.encode(x)
    alone = plain(neuron)
    row = torch.ones(5, 1) if spikes.token_scale is None else spikes.token_scale
    v = neuron._potential(x) / row
    for group, feedback in neuron.groups():
        for i in range(group.start, group.stop):
            channel = int(neuron.order[i])
            h = torch.zeros(5, 12)
            h[:, channel] = v[:, channel]
            if silence:
                h[:, channel][(h[:, channel] * row[:, 0]).abs() < neuron.quiet[channel]] = 0
            levels = alone._levels_at(alone._divided(h, alone.threshold))
            k = alone._multiplied_(levels, neuron.multiplier)[:, channel]
            assert torch.equal(spikes.levels[:, channel].float(), k)
            left = (v[:, channel] - k * neuron.step[channel]) * SPIKES_PER_LEVEL / neuron.spacing[channel]
            told = torch.where(left.abs() < SPIKES_PER_LEVEL * zone, 0., left.round().clamp(-31, 31))
            if not feedback.numel():
                told = torch.zeros(5)
            assert torch.equal(spikes.lateral[:, channel].float(), told)
        moves = spikes.lateral[:, neuron.order[group]].double() @ feedback.double()
        later = neuron.order[group.stop:]
        v[:, later] += (moves * (neuron.feedback_step[group.stop:] * neuron.spacing[later] / SPIKES_PER_LEVEL)).float()


def test_heads_fire_each_by_itself():
    weights = [torch.randn(6, 24, generator=rng(seed)) for seed in (0, 1)]
    costs = [w.T @ w for w in weights]
    for cost in costs:  # of channels that cost alike, so that one order is that of both heads
        cost /= cost.diagonal().sqrt() * cost.diagonal().sqrt()[:, None]
        cost.fill_diagonal_(1.)
    shape, config = (2, 1, 24), SFNConfig(4, lateral=3)
    both = LateralScaleAndFire(shape, config, token=True, center_shape=shape)
    both.set_state(torch.full(shape, 0.3), center=torch.randn(shape, generator=rng(8)))
    both.set_feedback(torch.stack(costs))
    x = 3 * torch.randn(4, 2, 5, 24, generator=rng(3))
    spikes = both.encode(x)
    for i, cost in enumerate(costs):
        alone = LateralScaleAndFire((24,), config, token=True, center_shape=(24,))
        alone.set_state(torch.full((24,), 0.3), center=both.center[i, 0])
        alone.set_feedback(cost)
        assert torch.equal(alone.order, both.order)
        found = alone.encode(x[:, i])
        assert torch.equal(found.levels, spikes.levels[:, i]) and torch.equal(found.lateral, spikes.lateral[:, i])
    assert not torch.equal(*both.feedback.chunk(2)) and spikes.lateral.any()


def test_mixed_precision_rounds_no_sums():
    neuron, _ = neuron_of(token=True)
    x = 3 * torch.randn(9, 24, generator=rng(4))
    with torch.autocast('cpu', torch.bfloat16):
        mixed = neuron.encode(x)
    assert torch.equal(mixed.levels, neuron.encode(x).levels)


@pytest.mark.parametrize('groups', [2, 4, 8])
def test_what_is_fed_back_costs_schur_complements_instead_of_diagonal_blocks(groups):
    channels = 64
    neuron, weight = neuron_of(channels, groups, levels=63, lateral_zone=0.)
    x = (torch.rand(4000, channels, generator=rng(5)) - 0.5) * 40 * neuron.spacing
    found, before = (cost_of(weight, n(x) - x) for n in (neuron, plain(neuron)))
    h = neuron.spacing[:, None].double() * (weight.T @ weight).double() * neuron.spacing.double()
    h = h[neuron.order][:, neuron.order]
    start, complements = 0, 0.
    for size in neuron.sizes:
        g, r = slice(start, start + size), slice(start + size, channels)
        fed = h[g, r] @ torch.linalg.pinv(h[r, r], rtol=1e-9) @ h[r, g]
        complements += (h[g, g] - fed).trace().item()
        start += size
    best = complements / h.trace().item()
    assert best < found / before < best + 0.12  # quarters of a distance leave 1/16 of the noise, damping the rest


def test_more_groups_and_finer_spikes_leave_less():
    errors = []
    for groups, zone in ((2, 0.), (8, 0.4), (8, 0.)):
        neuron, weight = neuron_of(64, groups, lateral_zone=zone)
        x = torch.randn(2000, 64, generator=rng(5)) * 2 * neuron.spacing
        errors.append(cost_of(weight, neuron(x) - x) / cost_of(weight, plain(neuron)(x) - x))
    assert 1 > errors[0] > errors[2] and 1 > errors[1] > errors[2]


@pytest.mark.parametrize('token', [False, True])
def test_forward_is_the_decode_of_its_spikes(token):
    neuron, _ = neuron_of(token=token)
    x = 3 * torch.randn(2, 7, 24, generator=rng(4))
    torch.testing.assert_close(neuron(x), neuron.encode(x).decode(), rtol=1e-6, atol=0)
    low, high = neuron.level_range
    assert low <= neuron.encode(x).levels.min() and neuron.encode(x).levels.max() <= high


def test_gradients_pass_straight_through_within_the_firing_range():
    neuron, _ = neuron_of()
    x = (torch.randn(50, 24, generator=rng(4)) * 3).requires_grad_()
    neuron(x).sum().backward()
    top = neuron.step / neuron.gain * (neuron.top_levels + neuron.multiplier / 2)
    inside = (x <= top[0]) & (x >= -top[1])
    assert torch.equal(x.grad, inside.float()) and 0 < inside.float().mean() < 1


def test_before_there_is_feedback_channels_fire_by_themselves():
    neuron = LateralScaleAndFire((24,), SFNConfig(4, lateral=4), token=True)
    x = 3 * torch.randn(9, 24, generator=rng(4))
    alone = ScaleAndFire((24,), SFNConfig(4), token=True)
    assert torch.equal(neuron.encode(x).levels, alone.encode(x).levels)
    neuron.set_feedback(torch.zeros(24, 24))  # of what nothing reads
    assert torch.equal(neuron.encode(x).levels, alone.encode(x).levels)


def test_feedback_does_not_depend_on_the_unit_and_ties_go_by_number():
    neuron, weight = neuron_of()
    other = copy.deepcopy(neuron)
    other.set_feedback(1e6 * weight.T @ weight)
    for name in ('order', 'feedback'):
        assert torch.equal(getattr(neuron, name), getattr(other, name))
    torch.testing.assert_close(neuron.feedback_step, other.feedback_step)
    alike = LateralScaleAndFire((24,), SFNConfig(4, lateral=4))
    alike.set_feedback(torch.eye(24) + 0.1)
    assert torch.equal(alike.order, torch.arange(24))


def test_state_is_saved_checked_and_loaded():
    neuron, _ = neuron_of(token=True)
    state = neuron.state_dict()
    other = LateralScaleAndFire((24,), neuron.config, token=True, folds=True)
    other.load_state_dict(state)
    x = 3 * torch.randn(9, 24, generator=rng(4))
    assert torch.equal(other(x), neuron(x)) and not torch.equal(other(x), plain(neuron)(x))
    half = copy.deepcopy(neuron).half()
    assert torch.equal(half(x), neuron(x))
    for name, value, message in (
            ('order', torch.zeros(24, dtype=torch.int64), 'order does not name each channel once'),
            ('feedback_step', torch.zeros(24), 'feedback_step is not positive'),
            ('feedback', state['feedback'][1:], 'feedback has shape')):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match='NaN or infinite'):
        other.set_feedback(torch.full((24, 24), float('nan')))


def test_sums_of_lateral_spikes_are_exact_however_many_channels_there_are():
    for channels in (64, 4096, 20000):
        neuron = LateralScaleAndFire((channels,), SFNConfig(4, lateral=2), device='meta')
        assert 127 * neuron.largest_spike * channels <= 2 ** 24 and neuron.largest_spike >= 4


@pytest.mark.parametrize('value, message', [
    (dict(lateral=1), 'one group'), (dict(lateral=-1), 'lateral'), (dict(lateral=65), 'lateral'),
    (dict(lateral=2.5), 'lateral'), (dict(lateral_zone=-1), 'lateral_zone'), (dict(lateral_cost=-1), 'lateral_cost')])
def test_configs_that_make_no_groups_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        SFNConfig(4, **value)
