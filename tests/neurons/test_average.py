"""Averages of models: weights are averaged, thresholds are what they were."""
import copy

import pytest
import torch
from layer_tools import build, pixels
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel

import sformer
from sformer import SFNConfig, SFormerError, UncalibratedError, convert, is_calibrated, load_model, save_model
from sformer.layers import named_neurons

CONFIGS = {'plain': SFNConfig(), 'silent': SFNConfig(levels=8, silence=0.02), 'density': SFNConfig(4, fire='density')}


class ExponentialMovingAverage(AveragedModel):
    """That of torchvision's reference for classification."""

    def __init__(self, model, decay):
        super().__init__(model, None, lambda average, new, _: decay * average + (1 - decay) * new, use_buffers=True)


def neurons(model):
    return {f'{name}.{key}': value.clone() for name, neuron in named_neurons(model)
            for key, value in neuron.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def trained(model, average, decay, steps=40):
    """What the weights of the average have to be after some steps of training."""
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1e-4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        average(model)
        for name, p in model.named_parameters():
            expected[name] = p.detach().clone() if i == 0 else decay * expected[name] + (1 - decay) * p.detach()
    return expected


@pytest.mark.parametrize('config, decay', [
    *(('plain', decay) for decay in (.9, .99, .9998, .99998)), ('silent', .9998), ('density', .99)])
def test_average_of_torchvision(config, decay, tmp_path):
    model, x = convert(build(depth=1), [pixels(16)], CONFIGS[config]), pixels(4, seed=5)
    before = neurons(model)
    average = ExponentialMovingAverage(model, decay)
    expected = trained(model, average.update_parameters, decay)
    reference = copy.deepcopy(model)
    reference.load_state_dict(expected, strict=False)
    reference.load_state_dict({**before, **expected})
    loaded = load_model(save_model(average.module, tmp_path / 'average'))
    assert same(neurons(loaded), before) and is_calibrated(loaded)
    for name, p in loaded.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), reference.eval()(x), rtol=1e-4, atol=1e-5)
    assert loaded.conversion.changed == ('fine-tuned',)


@pytest.mark.parametrize('look', [
    lambda average: average.eval(), lambda average: average.state_dict(), lambda average: is_calibrated(average),
    lambda average: copy.deepcopy(average)], ids=['eval', 'state_dict', 'is_calibrated', 'deepcopy'])
def test_whoever_looks_sees_what_was_fitted(look):
    model = convert(build(), [pixels(16)])
    average = ExponentialMovingAverage(model, .9)
    for _ in range(30):
        average.update_parameters(model)
    fitted = dict(model.named_buffers())
    blurred = {name for name, b in average.module.named_buffers() if not torch.equal(b, fitted[name])}
    assert {name.rpartition('.')[2] for name in blurred} >= {'step', 'levels', 'gain'}  # else nothing is shown
    looked = look(average)
    other = looked if isinstance(looked, AveragedModel) else average
    for name, buffer in fitted.items():
        assert torch.equal(buffer, dict(other.module.named_buffers())[name]), name


@pytest.mark.parametrize('kind', [ModelEmaV2, ModelEmaV3])
def test_averages_of_timm(kind):
    model = convert(build(), [pixels(16)])
    average = kind(model, decay=.9998)
    for _ in range(50):
        average.update(model)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(average.module.named_buffers())[name]), name


def test_thresholds_that_were_set_by_hand_stay():
    """Of a copy, too: only an average is undone."""
    model = copy.deepcopy(convert(build(), [pixels(16)]))
    neuron = model.blocks[0].mlp.fc1.neuron
    expected = neuron.step.clone() * 1.001
    neuron.step.mul_(1.001)
    model.eval().state_dict()
    assert torch.equal(neuron.step, expected) and is_calibrated(model)
    again = copy.deepcopy(model)
    average = ExponentialMovingAverage(again, .99)
    for _ in range(5):
        average.update_parameters(again)
    assert torch.equal(average.eval().module.blocks[0].mlp.fc1.neuron.step, expected)


def test_thresholds_of_several_fits_are_no_thresholds(tmp_path):
    """An average that began with other ones has none, and is refused."""
    model = convert(build(), [pixels(16)])
    average = ExponentialMovingAverage(model, .9)
    average.update_parameters(model)
    other = convert(build(seed=3), [pixels(16)])
    average.update_parameters(other)
    assert not is_calibrated(average.module)
    with pytest.raises(UncalibratedError, match='have default thresholds, or averages of several'):
        save_model(average.module, tmp_path / 'average')
    assert isinstance(UncalibratedError(), SFormerError) and sformer.is_calibrated(model)
