"""What is written of a neuron in the words of ONNX fires what the neuron fires, whatever its config; without an engine:
operators have their values while torch traces."""
import pytest
import torch
from execution_tools import FEW_CONFIGS, MORE_CONFIGS
from layer_tools import build, pixels, relative_error, spiking

from sformer import named_neurons
from sformer.execution.fired import DecodedLevels, FiredLevels, PixelLevels, fired_levels
from sformer.neurons import GradedCoding, SharedScaleAndFire


@pytest.fixture
def values(monkeypatch):
    monkeypatch.setattr(torch.jit, 'is_tracing', lambda: True)


def currents(model, images):
    """Every neuron of a network, by its path, and the currents that it gets."""
    found, handles = {}, []
    for name, neuron in named_neurons(model):
        handles.append(neuron.register_forward_pre_hook(
            lambda neuron, args, name=name: found.update({name: (neuron, args[0])})))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def of_a_kind_of_its_own(config):
    return config.silence == 0 and (config.dead_zone or config.initial_potential != 0.5 or config.fire == 'power2')


@pytest.mark.parametrize('config', FEW_CONFIGS + [
    config if of_a_kind_of_its_own(config) else pytest.param(config, marks=pytest.mark.slow)
    for config in MORE_CONFIGS], ids=str)
@torch.no_grad()
def test_levels_are_those_of_the_neuron(values, config):
    found = currents(spiking(build(depth=1), pixels(), config), pixels(3, seed=3))
    lowest = 0.
    assert len(found) > 8
    for name, (neuron, x) in found.items():
        spikes = neuron.encode(x)
        expected = spikes.levels.float()
        written = fired_levels(neuron)
        assert type(written) is (PixelLevels if isinstance(neuron, GradedCoding) else FiredLevels)
        k, row = written(x)
        k = k.round().clamp(-128, 127) if isinstance(neuron, GradedCoding) else k.round()
        assert (k == expected).float().mean() > 0.999, name  # but for currents within rounding of a boundary
        lowest = min(lowest, expected.min().item())
        assert (row is None) == (spikes.token_scale is None)
        if row is not None:
            torch.testing.assert_close(row, spikes.token_scale)
        if expected.max() > 127:
            continue  # of a softmax: they meet no int8
        assert relative_error(DecodedLevels(neuron)(x), neuron(x)) < 0.02, name
        if isinstance(neuron, GradedCoding) or not neuron.signed:
            continue
        upright = FiredLevels(neuron, stand_up=True)
        k, row = upright(x)
        k = k.round()
        assert upright.range[0] <= k.min() and k.max() <= upright.range[1]
        if isinstance(neuron, SharedScaleAndFire):
            k = k - upright.zeros
        elif upright.flip is not None:
            k = k * upright.flip
        assert (k == expected).float().mean() > 0.999, name
    assert lowest < 0, 'both branches fire'
