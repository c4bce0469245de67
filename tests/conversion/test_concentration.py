"""A residual stream of which few channels carry most: the same function, fewer spikes, and a record that says so."""
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_tools import FAMILIES, build, pixels, relative_error, rng, same_state, state_of
from neuron_tools import prop

from sformer import (
    FitConfig,
    SFNConfig,
    SFormerError,
    calibrate_,
    convert,
    load_model,
    save_model,
    source_of,
    source_view,
    spiking_,
)
from sformer.conversion import changed, transforms
from sformer.conversion.balance import balanced
from sformer.conversion.concentration import components
from sformer.conversion.distillation import distill_
from sformer.errors import ConfigError
from sformer.evaluation.activity import Activity
from sformer.layers.stream import stream_of

QUIET = SFNConfig(16, silence=0.02)
CONCENTRATE = FitConfig(concentrate=True)


def of_layer_norm(seed, size):
    """What LayerNorm gives of currents most of which lie in few directions, (n, C), float64."""
    x = torch.randn(400, size, generator=rng(seed)).double() * torch.logspace(0, -2, size).double()
    return torch.nn.functional.layer_norm(x @ torch.linalg.qr(torch.randn(size, size, generator=rng(1)).double()).Q,
                                          (size,))


@prop
@given(st.integers(0, 999), st.integers(1, 48))
def test_a_turn_is_one_that_layer_norm_does_not_see(seed, size):
    x = of_layer_norm(seed, size)
    q = components(torch.cov(x.T).view(size, size))
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-9, rtol=0)
    y = torch.randn(5, size, generator=rng(seed)).double()
    layer_norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(layer_norm(y @ q.T, (size,)), layer_norm(y, (size,)) @ q.T, atol=1e-6, rtol=1e-6)


def test_few_channels_carry_most():
    x = of_layer_norm(0, 48)
    turned = x @ components(torch.cov(x.T)).T
    before, after = (currents.var(0).sort(descending=True).values for currents in (x, turned))
    assert before[:12].sum() < 0.4 * before.sum() and after[:12].sum() > 0.8 * after.sum()


def test_of_attention_few_channels_carry_most_where_activity_has_a_price():
    x, g = (of_layer_norm(seed, 16) + 0.1 * torch.randn(400, 16, generator=rng(5)).double() for seed in (0, 3))
    power, cost = x.T @ x, g.T @ g
    a, few = balanced(power, cost), balanced(power, cost, few=True)
    for turn in (a, few):
        inverse = torch.linalg.inv(turn)
        torch.testing.assert_close((turn @ power @ turn.T).diagonal(), (inverse.T @ cost @ inverse).diagonal())
    carried = few @ power @ few.T
    torch.testing.assert_close(carried, carried.diagonal().diag(), atol=1e-6, rtol=0)
    assert carried.diagonal().max() > 4 * (a @ power @ a.T).diagonal().max()


CONCENTRATED = ('vit', 'deit distilled', 'glu mlp', 'swiglu', 'qk norm', 'inner norms')


@pytest.mark.parametrize('family', [
    name if name in ('vit', 'deit distilled', 'swiglu') else pytest.param(name, marks=pytest.mark.slow)
    for name in CONCENTRATED])
@torch.no_grad()
def test_every_family_says_what_it_did(family):
    kwargs = dict(init_values=0.5, global_pool='avg') if family == 'glu mlp' else {}
    source = build(family, **kwargs)
    spiking = spiking_(copy.deepcopy(source), QUIET)
    calibrate_(spiking, [pixels(8)], CONCENTRATE)
    assert changed(spiking) == ('concentrated',)
    images = pixels(4, seed=3)
    assert relative_error(source_view(spiking)(images), source(images)) < 2e-5
    assert not same_state(source_view(spiking), state_of(source))


def test_others_are_refused_and_stay():
    for family in sorted(FAMILIES.keys() - {*CONCENTRATED}):
        assert stream_of(spiking_(build(family), QUIET)) is None, family
    for kwargs in (dict(num_classes=0), dict(global_pool='max'), dict(pre_norm=True), dict(qkv_bias=False)):
        assert stream_of(spiking_(build(**kwargs), QUIET)) is None, kwargs
    tied = build()
    tied.blocks[1].attn.qkv.weight = tied.blocks[0].attn.qkv.weight
    assert stream_of(spiking_(tied, QUIET)) is None
    source = build(num_classes=0)
    before = state_of(source)
    with pytest.raises(SFormerError, match='cannot be concentrated'):
        convert(source, [pixels(8)], QUIET, CONCENTRATE, inplace=True)
    assert same_state(source, before)
    with pytest.raises(ConfigError, match='concentrate is for neurons that may be silent'):
        convert(source, [pixels(8)], SFNConfig(16), CONCENTRATE)


def test_who_reads_features_is_refused():
    source = build()
    before = state_of(source)
    spiking = spiking_(source, QUIET)
    with pytest.raises(SFormerError, match='cannot be concentrated'):
        calibrate_(spiking, [pixels(8)], CONCENTRATE, lambda network, x: network.forward_features(x))
    assert same_state(source_view(spiking), before) and changed(spiking) == ()


def test_weights_stay_where_calibration_fails(monkeypatch):
    source = build()
    before = state_of(source)
    with pytest.raises(SFormerError):
        convert(source, [pixels(8), torch.full((8, 3, 32, 32), float('nan'))] * 9, QUIET,
                FitConfig(balance=True, concentrate=True), inplace=True)
    assert same_state(source, before)
    monkeypatch.setattr(transforms, 'SAME', 0.)  # as if another function had come out
    with pytest.raises(SFormerError, match='cannot be concentrated'):
        convert(source, [pixels(8)], QUIET, CONCENTRATE, inplace=True)
    assert same_state(source, before)


def test_the_record_says_so_and_the_network_inside_is_taken(tmp_path, caplog):
    source = build()
    model = convert(source, [pixels(8)], QUIET, FitConfig(balance=True, concentrate=True))
    loaded = load_model(save_model(model, tmp_path / 'm'))
    for network in (model, loaded):
        assert changed(network) == ('balanced', 'concentrated') and network.conversion.fit.concentrate
        with pytest.raises(SFormerError, match='residual stream'):
            source_of(network)
    caplog.clear()
    again = convert(loaded, [pixels(8)], SFNConfig(8))
    assert changed(again) == ('balanced', 'concentrated') and not caplog.records


def test_no_other_teacher_has_its_basis():
    source = build()
    model = convert(source, [pixels(8)], QUIET, CONCENTRATE)
    with pytest.raises(SFormerError, match='blocks of this SFormer are in a basis of its own'):
        distill_(model, [pixels(4)], 1, teacher=source)
    errors = []
    distill_(model, [pixels(4)], 1, report=lambda step, error, spikes: errors.append(error))
    assert 0 < errors[0] < 0.1


@torch.no_grad()
def test_fewer_neurons_fire_at_less_error(source, digits):
    images = digits[0][:128]
    errors, activities = [], []
    for price, fit in ((0.04, FitConfig()), (0.02, FitConfig(balance=True, concentrate=True))):
        model = convert(source, 'digits', SFNConfig(63, silence=price), fit, split='train')
        counts = Activity()
        with counts.observe(model):
            errors.append(relative_error(model(images), source(images)))
        activities.append(counts.mean())
    assert errors[1] < errors[0] and activities[1] < 0.9 * activities[0]
