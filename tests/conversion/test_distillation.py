"""Distillation: weights follow the source with fewer spikes; no labels, and a record that says so."""
import copy
import itertools
import re
import signal

import pytest
import torch
from layer_tools import build, pixels, relative_error, same_state, state_of

import sformer
from sformer import FitConfig, SFNConfig, SFormerError, UncalibratedError, convert
from sformer.conversion import changed, distillation
from sformer.conversion.distillation import (
    DistillConfig,
    distill_,
    learn_from_spikes,
    outputs,
    shuffled,
    squared_error,
    unary_spikes,
)
from sformer.conversion.training_state import TrainingState
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


SENT = [('vit', SFNConfig(levels=4), FitConfig()), ('eva02', SFNConfig(levels=8, silence=0.01), FitConfig()),
        ('vit', SFNConfig(levels=4, initial_potential=0.), FitConfig()),
        ('vit', SFNConfig(levels=6, token_scale=False), FitConfig(estimator='max'))]


@pytest.mark.parametrize('family, config, fit', SENT)
def test_spikes_that_are_paid_for_are_those_that_are_sent(family, config, fit):
    """By factors per token the largest was taken for the top level: 27.06 unary spikes for 33.11 (N = 63)."""
    model, x = convert(build(family), [pixels(32)], config, fit), pixels(8)
    with torch.no_grad(), unary_spikes(model) as spikes:
        model(x)
        assert spikes.mean().item() == pytest.approx(spikes_of(model, x), rel=1e-6)
    with unary_spikes(model) as spikes:  # in mixed precision, too, by what fires there
        with torch.autocast('cpu', torch.bfloat16):
            model(x)
        counts = Activity()
        with counts.observe(model), torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            model(x)
        assert spikes.mean().item() == pytest.approx(counts.spikes_per_neuron()['unary'], rel=1e-6)


def test_what_it_reports_is_what_an_evaluation_finds(trained):
    """Before the first step, on the images of that step; and a price charges that figure."""
    source, before, _, x, _ = trained
    losses, seen, backward = [], [], torch.Tensor.backward
    for price in (0., 3.):
        model = copy.deepcopy(before)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, 'backward', lambda loss: losses.append(loss.item()) or backward(loss))
            distill_(model, [x[:32]], 1, DistillConfig(price=price), lambda *args: seen.append(args))
    with torch.no_grad():
        error = relative_error(before(x[:32]), source(x[:32]))
    assert seen[0] == seen[1] == (1, pytest.approx(error ** 2, rel=1e-4), pytest.approx(spikes_of(before, x[:32])))
    assert losses[1] - losses[0] == pytest.approx(3 * seen[0][2], rel=1e-5)


# ends before the last step --------------------------------------------------------------------------------------------

HOW = DistillConfig(learning_rate=1e-3, price=0.01)


def steps_of(x, steps=9):
    return itertools.islice(shuffled([x], 16, seed=3), steps)


def distilled(before, x, state=None, report=lambda *args: None, config=HOW, steps=9, **how):
    return distill_(copy.deepcopy(before), steps_of(x, steps), steps, config, report, state=state, **how)


@pytest.fixture(scope='module')
def whole(trained):
    _, before, _, x, _ = trained
    seen = []
    return distilled(before, x, report=lambda *args: seen.append(args)), seen


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_it_goes_on_where_it_was_interrupted(trained, whole, tmp_path, number):
    """After the step at hand, in the first, in the middle and in the one before the last; the end is the same."""
    _, before, _, x, _ = trained
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def interrupted_in(steps):
        def report(step, *values):
            seen.append((step, *values))
            if step in steps:
                signal.raise_signal(number)
        return report
    for end in (1, 4, 8):
        state = TrainingState(tmp_path / 'new' / 'state')
        with pytest.raises(KeyboardInterrupt):
            distilled(before, x, state, interrupted_in([end]))
        assert state.done == end and len(state.history) == end
    state = TrainingState(tmp_path / 'new' / 'state')
    model = distilled(before, x, state, interrupted_in([]))
    assert same_state(model, state_of(whole[0])) and seen == whole[1]
    assert state.history == [[*values] for _, *values in whole[1]] and state.seconds > 0
    assert model.conversion == whole[0].conversion and model.conversion.changed == ('distilled',)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    state.remove()
    assert not [*(tmp_path / 'new').iterdir()]


def test_it_is_kept_every_some_steps(trained, whole, tmp_path, monkeypatch):
    """What kills it asks nobody: it goes on from the last state on disk."""
    _, before, _, x, _ = trained
    monkeypatch.setattr(distillation, 'KEPT', 3)

    def killed(step, *values):
        if step == 8:
            raise MemoryError
    model = copy.deepcopy(before)
    with pytest.raises(MemoryError):
        distill_(model, steps_of(x), 9, HOW, killed, state=TrainingState(tmp_path / 'state'))
    assert not same_state(model, state_of(before)) and changed(model) == model.conversion.changed == ('distilled',)
    seen = []
    model = distilled(before, x, TrainingState(tmp_path / 'state'), lambda step, *values: seen.append(step))
    assert seen == [7, 8, 9] and same_state(model, state_of(whole[0]))


def test_a_second_interrupt_does_not_wait(trained, tmp_path):
    _, before, _, x, _ = trained

    def twice(step, *values):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    model = copy.deepcopy(before)
    with pytest.raises(KeyboardInterrupt):
        distill_(model, steps_of(x), 9, HOW, twice, state=TrainingState(tmp_path / 'state'))
    assert not (tmp_path / 'state').exists() and model.conversion.changed == ('distilled',)


def test_state_of_another_training_is_refused(trained, tmp_path):
    source, before, _, x, _ = trained

    def interrupt(step, *values):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        distilled(before, x, TrainingState(tmp_path / 'state'), interrupt)
    moved = copy.deepcopy(before)
    moved.head.bias.data += 1
    for args in (dict(before=moved), dict(x=x.flip(0)), dict(config=DistillConfig(1e-3, 0.02)), dict(steps=8),
                 dict(teacher=build(seed=1))):
        model = args.setdefault('before', before)
        kept = state_of(model)
        with pytest.raises(SFormerError, match='state of a training with other data or options'):
            distilled(**{'x': x, **args}, state=TrainingState(tmp_path / 'state'))
        assert same_state(model, kept)
    (tmp_path / 'state').write_bytes((tmp_path / 'state').read_bytes()[:-9])
    with pytest.raises(SFormerError, match='state is truncated or corrupted .*: remove it to start over'):
        distilled(before, x, TrainingState(tmp_path / 'state'))


def test_a_training_that_diverged_says_so(trained, whole, caplog):
    _, before, _, x, _ = trained
    assert not caplog.text
    distilled(before, x, config=DistillConfig(learning_rate=1., max_norm=1e9))
    assert re.search(r'has diverged: the relative error of the output is [\d.e+]+ in its last steps, and was '
                     r'0\.\d+ before the first. Start over with a smaller learning rate', caplog.text)


def test_what_cannot_be_trained():
    model = sformer.spiking_(build(), SFNConfig())
    with pytest.raises(UncalibratedError, match=r'uncalibrated.*; fit it with sformer\.convert\(\) first\.$'):
        distill_(model, [pixels()], 1)
    model = convert(build(), [pixels()])
    with pytest.raises(SFormerError, match='2 steps need as many batches, got 1'):
        distill_(model, [pixels()], 2)
    with pytest.raises(SFormerError, match='2 steps need as many batches, got 0'):
        distill_(model, [], 2)
    with pytest.raises(SFormerError, match='images of step 1 have NaN or infinity in them'):
        distill_(model, [pixels() * float('nan')], 1)


@pytest.mark.parametrize('other, message', [
    (dict(num_classes=1), 'teacher has 1 classes, the model has 7'),  # which a difference of logits would broadcast
    (dict(num_classes=5), 'teacher has 5 classes'), (dict(num_classes=0), 'teacher has 0 classes'),
    (dict(img_size=64), r'images of \(64, 64\) pixels, the model of \(32, 32\)'),
    (dict(depth=3), 'teacher has other blocks'), (dict(embed_dim=64), 'teacher has other blocks')])
def test_a_teacher_of_something_else(other, message):
    model = convert(build(), [pixels()])
    kept = state_of(model)
    with pytest.raises(SFormerError, match=message):
        distill_(model, [pixels()], 1, teacher=build(**other))
    assert same_state(model, kept)


def test_errors_of_blocks_count_by_their_mean(monkeypatch):
    """Whatever the depth."""
    model = convert(build(depth=2), [pixels()])
    errors, losses, backward = iter([1., 2., 4.]), [], torch.Tensor.backward
    monkeypatch.setattr(distillation, 'squared_error', lambda actual, expected: 0 * actual.sum() + next(errors))
    monkeypatch.setattr(torch.Tensor, 'backward', lambda loss: losses.append(loss.item()) or backward(loss))
    distill_(model, [pixels()], 1, distillation.DistillConfig(features=0.5, price=0))
    assert losses == [1 + 0.5 * (2 + 4) / 2]
