"""Distillation: weights follow the source with fewer spikes; no labels, and a record that says so."""
import copy

import pytest
import torch
from layer_tools import build, pixels, relative_error

import sformer
from sformer import SFNConfig, SFormerError, UncalibratedError, convert
from sformer.conversion import distillation
from sformer.conversion.distillation import (
    DistillConfig,
    distill_,
    learn_from_spikes,
    outputs,
    squared_error,
    unary_spikes,
)
from sformer.evaluation.activity import Activity


def spikes_of(model, x):
    counts = Activity()
    with counts.observe(model), torch.no_grad():
        model(x)
    return counts.spikes_per_neuron()['unary']


@pytest.fixture(scope='module')
def trained():
    source, x = build(), pixels(64)
    model = convert(source, [x[:32]], SFNConfig(levels=4, silence=0.1))
    before, seen = copy.deepcopy(model), []
    batches = (x[:32] for _ in range(24))
    distill_(model, batches, 24, DistillConfig(learning_rate=1e-3, price=0.01), lambda *args: seen.append(args))
    return source, before, model, x, seen


def test_it_comes_closer_to_its_source(trained):
    source, before, model, x, seen = trained
    with torch.no_grad():
        errors = [relative_error(network(x[:32]), source(x[:32])) for network in (before, model)]
    assert errors[1] < 0.7 * errors[0] and [step for step, *_ in seen] == [*range(1, 25)]
    assert model.conversion.changed and not before.conversion.changed


def test_thresholds_stay(trained):
    _, before, model, *_ = trained
    assert all(torch.equal(b, dict(before.named_buffers())[name]) for name, b in model.named_buffers())
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before.blocks[0].mlp.fc1.weight)


def test_another_network_teaches(trained):
    _, before, _, x, _ = trained
    teacher = build(seed=1)
    model = distill_(copy.deepcopy(before), (x[:32] for _ in range(24)), 24, DistillConfig(learning_rate=1e-3),
                     teacher=teacher)
    with torch.no_grad():
        errors = [relative_error(network(x[:32]), teacher(x[:32])) for network in (before, model)]
    assert errors[1] < 0.9 * errors[0] and all(p.requires_grad for p in teacher.parameters())


def test_mixed_precision(trained):
    source, before, full, x, _ = trained
    model = distill_(copy.deepcopy(before), (x[:32] for _ in range(24)), 24,
                     DistillConfig(learning_rate=1e-3, price=0.01, amp=True))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        errors = [relative_error(network(x[:32]), source(x[:32])) for network in (before, model, full)]
    assert errors[1] < 0.75 * errors[0] and errors[1] != errors[2]


def test_tokens_of_blocks_are_followed(trained):
    source, before, _, x, _ = trained
    errors = []
    for weight in (0., 10.):
        model = copy.deepcopy(before)
        distill_(model, (x[:32] for _ in range(12)), 12, DistillConfig(learning_rate=1e-3, price=0., features=weight))
        with torch.no_grad():
            (logits, *expected), (_, *blocks) = outputs(source, x), outputs(model, x)
        errors.append(sum(map(squared_error, blocks, expected)).item())
    assert len(blocks) == len(source.blocks) and errors[1] < 0.9 * errors[0]
    torch.testing.assert_close(logits, source(x))


def test_the_price_is_no_reason_for_outliers():
    """A spike is relative to the largest of its token, which no gradient of the price moves."""
    model = convert(build(), [pixels(16)], SFNConfig(levels=8))
    layer = model.blocks[0].mlp.fc1
    h = pixels(2).flatten()[:4 * layer.in_features].view(4, -1).clone().requires_grad_()
    with unary_spikes(layer) as spikes:
        layer(h)
        spikes.mean().backward()
    assert ((h.grad * h.detach().sign()) >= 0).all() and h.grad.any()  # less of anything is fewer spikes


def test_gradients_pass_what_fires(trained):
    """And nothing else, or weights drift where all they do is without an effect; hooks are gone afterwards."""
    _, before, model, x, _ = trained
    layer = copy.deepcopy(before.blocks[0].mlp.fc2)
    layer.neuron.register_forward_hook(learn_from_spikes)
    h = pixels(2).flatten()[:4 * layer.in_features].view(4, -1).clone().requires_grad_()
    layer(h).sum().backward()
    fires = layer.neuron.encode(h).levels != 0
    assert fires.any() and not fires.all() and not h.grad[~fires].any() and h.grad[fires].any()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_a_price_takes_spikes(trained):
    _, before, _, x, _ = trained
    model = copy.deepcopy(before)
    distill_(model, (x[:32] for _ in range(25)), 25,
             DistillConfig(learning_rate=5e-3, price=1., features=0.))
    assert spikes_of(model, x[:32]) < 0.9 * spikes_of(before, x[:32])


@pytest.mark.parametrize('family', ['eva02', pytest.param('vit', marks=pytest.mark.slow)])
def test_spikes_that_are_paid_for_are_those_that_are_sent(family):
    model, x = convert(build(family), [pixels(32)], SFNConfig(levels=8, silence=0.01)), pixels(8)
    with torch.no_grad(), unary_spikes(model) as spikes:
        model(x)
        assert spikes.mean().item() == pytest.approx(spikes_of(model, x), rel=0.03)


def test_what_cannot_be_trained():
    model = sformer.spiking_(build(), SFNConfig())
    with pytest.raises(UncalibratedError, match=r'uncalibrated.*; fit it with sformer\.convert\(\) first\.$'):
        distill_(model, [pixels()], 1)
    model = convert(build(), [pixels()])
    with pytest.raises(SFormerError, match='2 steps need as many batches, got 1'):
        distill_(model, [pixels()], 2)
    with pytest.raises(SFormerError, match='not finite in step 1'):
        distill_(model, [pixels() * float('nan')], 1)


def test_errors_of_blocks_count_by_their_mean(monkeypatch):
    """Whatever the depth."""
    model = convert(build(depth=2), [pixels()])
    errors, losses, backward = iter([1., 2., 4.]), [], torch.Tensor.backward
    monkeypatch.setattr(distillation, 'squared_error', lambda actual, expected: 0 * actual.sum() + next(errors))
    monkeypatch.setattr(torch.Tensor, 'backward', lambda loss: losses.append(loss.item()) or backward(loss))
    distill_(model, [pixels()], 1, distillation.DistillConfig(features=0.5, price=0))
    assert losses == [1 + 0.5 * (2 + 4) / 2]
