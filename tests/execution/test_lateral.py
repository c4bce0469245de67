"""Neurons that feed back fire the same levels in every execution."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, rng

from sformer import SFNConfig, calibrate_, convert, spiking_, to_integer_, to_spikes_
from sformer.execution.fired import LateralLevels, signed_levels
from sformer.neurons import LateralScaleAndFire

CONFIGS = [SFNConfig(4, lateral=4), SFNConfig(16, lateral=3, lateral_zone=0.3, silence=0.02),
           SFNConfig(8, 'uniform', lateral=2, token_scale=False)]


def layer_of(config, seed=0):
    """A linear layer whose input is lopsided in one channel and long-tailed in another, and such an input."""
    x = torch.randn(40, 24, generator=rng(seed))
    x[:, 3] = torch.where(x[:, 3] > 0, 5 * x[:, 3], -0.1)
    x[:, 7] = -x[:, 7].exp()
    layer = spiking_(nn.Sequential(nn.Linear(24, 8)), config)
    calibrate_(layer, [x])
    assert type(layer[0].neuron) is LateralScaleAndFire and layer[0].neuron.encode(x).lateral.any()
    return layer, x


@pytest.mark.parametrize('config', CONFIGS, ids=str)
@torch.no_grad()
def test_a_layer_is_its_simulation(config):
    layer, x = layer_of(config)
    spikes = layer[0].neuron.encode(x)
    decoded = spikes.decode().double()
    exact = decoded @ layer[0].weight.double().T + layer[0].bias
    for coding in ('binary', 'graded'):
        out = to_spikes_(copy.deepcopy(layer), coding)(x)
        assert (out - exact).abs().max() <= 1e-5 * exact.abs().max()
    integer = copy.deepcopy(layer)
    report, = to_integer_(integer)
    assert report.integer and torch.equal(integer[0].neuron.encode(x).levels, spikes.levels)
    sums = spikes.levels.double() @ integer[0].weight.double().T * integer[0].weight_step
    expected = sums * (1 if spikes.token_scale is None else spikes.token_scale) + integer[0].bias
    torch.testing.assert_close(integer(x), expected.float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_feedback_makes_rounding_of_weights_no_louder():
    """What a layer in integers adds to its simulation, with feedback and without."""
    x = torch.randn(400, 48, generator=rng(1)) * torch.logspace(0, 1, 48)
    torch.manual_seed(0)
    source, added = nn.Sequential(nn.Linear(48, 12)), []
    for groups in (0, 8):
        layer = spiking_(copy.deepcopy(source), SFNConfig(4, lateral=groups))
        calibrate_(layer, [x])
        simulated = layer(x)
        to_integer_(layer)
        added.append((layer(x) - simulated).norm() / simulated.norm())
    assert 0 < added[1] < 1.15 * added[0]


@pytest.mark.parametrize('stand_up', [False, True])
@pytest.mark.parametrize('config', CONFIGS, ids=str)
@torch.no_grad()
def test_a_graph_fires_the_same_levels(config, stand_up, monkeypatch):
    layer, x = layer_of(config)
    neuron = layer[0].neuron
    levels = signed_levels(neuron, stand_up)
    monkeypatch.setattr(torch.jit, 'is_tracing', lambda: True)  # operators of ONNX then compute
    assert type(levels) is LateralLevels
    k, row = levels(x)
    spikes = neuron.encode(x)
    flip = 1 if levels.flip is None else levels.flip
    same = (k * flip == spikes.levels).float().mean()
    assert same > 0.999  # but where a potential lies within float rounding of a boundary
    assert levels.range[0] <= k.min() and k.max() <= levels.range[1]
    if row is not None:
        torch.testing.assert_close(row, spikes.token_scale)


@pytest.mark.slow  # one graph of two engines; each execution alone is held by the tests below
@pytest.mark.usefixtures('operators_read_once')
@torch.no_grad()
def test_engines_agree_with_torch(tmp_path):
    pytest.importorskip('onnxruntime')
    from sformer import export_onnx, load_onnx
    from sformer.execution.engines import ENGINES
    from sformer.execution.proof import saturating
    model, images = convert(build('vit', depth=1), [pixels(8)], SFNConfig(8, lateral=3)), pixels(12)
    export_onnx(model, tmp_path / 'm.onnx')
    import onnx
    assert not saturating(onnx.load(tmp_path / 'm.onnx'))
    to_integer_(model)
    expected = model(images)
    for engine in ENGINES:
        out = load_onnx(tmp_path / 'm.onnx', engine)(images)
        each = (out - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert each.median() < 0.05 and each.max() < 0.15, (engine, each)
