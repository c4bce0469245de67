"""Weights read spikes for what they stand for: least squares, and nothing else of the model moves."""
import copy

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from layer_tools import FAMILIES, build, pixels, relative_error, rng
from neuron_tools import seeds

from sformer import FitConfig, SFNConfig, SFormerError, calibrate_, convert, spiking_
from sformer.conversion import calibration, compensation
from sformer.neurons import ScaleAndFire

COMPENSATE = FitConfig(compensate=True)


def correlated(seed, shape, channels):
    """Currents of few causes and a little noise, one of them a thousand times as strong as another."""
    g = rng(seed)
    causes = torch.randn(*shape, 3, generator=g) @ torch.randn(3, channels, generator=g)
    return (causes + 0.1 * torch.randn(*shape, channels, generator=g)) * torch.logspace(-1.5, 1.5, channels)


def both(layer, x, config=SFNConfig(levels=2)):
    """A layer that spikes without and with compensation."""
    plain, better = (spiking_(copy.deepcopy(layer), config) for _ in range(2))
    calibrate_(plain, [x])
    calibrate_(better, [x], COMPENSATE)
    return plain, better


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_what_a_layer_loses_is_orthogonal_to_what_it_reads(seed):
    """The normal equations: no other weights and no other bias have a smaller squared error."""
    layer = nn.Linear(8, 5)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(compensation, 'RIDGE', 1e-6)
        x = correlated(seed, (400,), 8) + 1
        plain, better = both(layer, x)
        lost, s = layer(x) - better(x), better.neuron(x)
        cosines = (lost.T @ s) / (lost.norm(dim=0)[:, None] * s.norm(dim=0)).clamp_min(1e-9)
    assert cosines.abs().max() < 1e-2 and (lost.mean(0).abs() < 1e-3 * lost.abs().amax(0) + 1e-6).all()
    assert lost.norm() < (layer(x) - plain(x)).norm()


@pytest.mark.parametrize('layer', [
    nn.Linear(8, 5), nn.Linear(8, 5, bias=False), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 3, padding=1),
    nn.ConvTranspose2d(8, 5, 2, stride=2)], ids=str)
def test_every_kind_of_layer_comes_closer(layer):
    is_linear = isinstance(layer, nn.Linear)
    x, other = correlated(0, (8, 16, 16), 8).chunk(2)  # of the same mixture
    x, other = (t if is_linear else t.permute(0, 3, 1, 2) for t in (x, other))
    with torch.no_grad():
        plain, better = both(layer, x)
        errors = [relative_error(spiking(other), layer(other)) for spiking in (plain, better)]
        assert errors[1] < 0.9 * errors[0]
        if not is_linear:  # zeros around an image stay zeros
            assert torch.equal(better(0 * x), layer(0 * x))
    assert better.neuron.compensated and not plain.neuron.compensated
    for name, buffer in plain.neuron.saved_buffers().items():
        assert torch.equal(buffer, better.neuron.get_buffer(name)) == (name != 'calibrated'), name


def test_a_convolution_in_groups_is_left_alone():
    layer = nn.Conv2d(8, 8, 3, groups=4)
    _, better = both(layer, correlated(0, (4, 16, 16), 8).permute(0, 3, 1, 2))
    assert torch.equal(better.weight, layer.weight)


def test_channels_that_never_fire():
    layer, x = nn.Linear(8, 5), correlated(0, (200,), 8)
    x[:, 2] = 0
    _, better = both(layer, x)
    assert all(p.isfinite().all() for p in better.parameters())
    torch.testing.assert_close(better.weight[:, 2], layer.weight[:, 2])


@pytest.mark.parametrize('bias', [True, False])
def test_channels_that_rest_at_a_centre(bias):
    """Their constant is no spike: it says nothing of others, whatever float32 makes of its square."""
    layer = spiking_(nn.Linear(8, 5, bias=bias), SFNConfig(levels=4, silence=0.1))
    x = correlated(0, (3000,), 8)
    x[:, 2:5] = torch.tensor([8., -5., 0.]) + 0.01 * x[:, 2:5]
    calibrate_(layer, [x])
    layer.neuron.quiet[2:5] = 100.
    layer.neuron.center[2:5] = torch.tensor([8., -5., 0.]) + 1e-3
    seen = compensation.Correlation(layer.neuron)
    for batch in x.split(100):
        seen(batch)
    a, shift = seen.decoder(bias)
    with torch.no_grad():
        s = layer.neuron(x).double()
    assert not (s[:, 2:5] != s[0, 2:5]).any()
    assert not a[:, 2:5].any() and a.abs().max() < 2
    before, after = (x - s).square().sum(0), (x - s - s @ a.T - shift).square().sum(0)
    assert (after <= before * 1.0001 + 1e-6).all() and after.sum() < before.sum()


def test_tied_weights_are_left_alone():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    net[1].weight = net[0].weight
    spiking_(net, SFNConfig(levels=2))
    assert [name for name, _ in compensation.compensable(net)] == ['2']


def test_layers_without_a_bias_share_none():
    net = spiking_(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Conv2d(8, 4, 1)))
    assert [name for name, _ in compensation.compensable(net)] == ['0', '1', '2']


def test_layers_that_share_a_bias_are_left_alone():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    net[1].bias = net[0].bias
    spiking_(net, SFNConfig(levels=2))
    assert [name for name, _ in compensation.compensable(net)] == ['2']


def test_a_module_is_not_compensated_twice():
    module = spiking_(nn.Sequential(nn.Linear(8, 5)))
    calibrate_(module, [correlated(0, (50,), 8)], COMPENSATE)
    for fit in (FitConfig(), COMPENSATE):
        with pytest.raises(SFormerError, match='start from the source itself'):
            calibrate_(module, [correlated(0, (50,), 8)], fit)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x -= 1
        return self.fc(x)


def test_a_forward_that_writes_to_its_input():
    source, x = InPlace(), correlated(0, (50,), 8)
    models = [spiking_(copy.deepcopy(source)) for _ in range(2)]
    fit = FitConfig(compensate=True, unbiased=False)
    calibrate_(models[0], [x.clone()], fit)
    calibrate_(nn.Sequential(models[1].fc), [x - 1], fit)
    assert torch.equal(models[0].fc.weight, models[1].fc.weight)


@pytest.mark.parametrize('family', [
    name if name in ('vit', 'eva02', 'differential', 'map pooling', 'gated attention')
    else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_each_layer_of_a_network_comes_closer(family):
    source, x = build(family), pixels(24)
    config = SFNConfig(levels=8, silence=0.02)
    plain, better = (convert(source, [x], config, FitConfig(compensate=c)) for c in (False, True))
    layers, currents = dict(compensation.compensable(better)), {}
    for name in layers:
        source.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, name=name: currents.setdefault(name, args[0]))
    with torch.no_grad():
        source(x)
        lost = [sum((source.get_submodule(name)(h) - model.get_submodule(name)(h)).square().sum()
                    for name, h in currents.items()) for model in (plain, better)]
    assert lost[1] < 0.97 * lost[0]
    changed = {name for name, p in source.named_parameters() if not torch.equal(p, better.get_parameter(name))}
    assert changed and {name.rpartition('.')[0] for name in changed} <= set(layers)
    assert better.conversion.changed and not plain.conversion.changed
    assert better.conversion.source_sha256 == plain.conversion.source_sha256


def test_its_source_is_not_inside():
    model = convert(build(), [pixels(8)], fit=COMPENSATE)
    with pytest.raises(SFormerError, match='convert the source itself'):
        convert(model, [pixels(8)])
    assert any(isinstance(module, ScaleAndFire) for module in model.modules())


def test_images_are_held_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(calibration, 'HELD_IMAGES', 32)
    seen = []
    add = compensation.Correlation.forward
    monkeypatch.setattr(compensation.Correlation, 'forward', lambda self, x: seen.append(len(x)) or add(self, x))
    model = spiking_(build())
    assert calibrate_(model, iter([pixels(20)] * 4), COMPENSATE) == 80
    layers = sum(1 for _ in compensation.compensable(model))
    assert sum(seen) == 32 * layers


def test_little_memory_takes_more_passes(monkeypatch):
    models, views = [], []
    view = calibration.shared_copy
    monkeypatch.setattr(calibration, 'shared_copy', lambda *args: views.append(args) or view(*args))
    for size in (2 ** 31, 1, 8 * 3 * 32 ** 2):
        monkeypatch.setattr(calibration, 'SUMMED_BYTES', size)
        models.append(convert(build(), [pixels(8)], SFNConfig(levels=8, silence=0.02), COMPENSATE))
        passes = len(views)
    assert passes > 3 * 3 + sum(1 for _ in compensation.compensable(models[0]))
    for other in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(
            models[0].state_dict().values(), other.state_dict().values(), strict=True))


def test_weights_are_left_alone_if_it_fails(monkeypatch):
    source = build()

    def fails(self, x):
        raise SFormerError('out of order')
    monkeypatch.setattr(compensation.Correlation, 'forward', fails)
    before = copy.deepcopy(source.state_dict())
    with pytest.raises(SFormerError, match='out of order'):
        convert(source, [pixels(8)], fit=COMPENSATE, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
