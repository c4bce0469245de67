"""What neurons feed back: set by gradients of the source, in every family, saved, and better for it."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_tools import FAMILIES, build, pixels, relative_error, rng

from sformer import SFNConfig, SFormerError, calibrate_, convert, load_model, named_neurons, save_model, spiking_
from sformer.conversion import calibration
from sformer.evaluation import Activity
from sformer.neurons import LateralScaleAndFire, ScaleAndFire

FEW = SFNConfig(4)
LATERAL = SFNConfig(4, lateral=4)


def feeding(model):
    return {name: neuron for name, neuron in named_neurons(model) if isinstance(neuron, LateralScaleAndFire)}


def measured(source, images, config):
    """Relative error of the logits, and activity."""
    model, counts = convert(source, 'digits', config, split='train'), Activity()
    with torch.no_grad(), counts.observe(model):
        return relative_error(model(images), source(images)), counts.mean()


def test_a_trained_network_is_closer_to_its_source(source, digits):
    images = digits[0][:128]
    assert measured(source, images, LATERAL)[0] < 0.85 * measured(source, images, FEW)[0]


def test_what_others_take_up_is_silent_for_less(source, digits):
    price, images = 0.05, digits[0][:128]
    found = [measured(source, images, SFNConfig(16, silence=price, lateral=groups)) for groups in (0, 4)]
    alone, both = (error ** 2 + price * activity for error, activity in found)
    assert both < alone and found[1][1] < found[0][1]


def test_errors_cancel_where_the_network_looks():
    """Of a linear layer whose outputs count, all, as its weights say, and of what follows alone if few do."""
    x = torch.randn(16, 64, 24, generator=rng())
    for counts in (torch.ones(6), torch.tensor([1., 0., 0., 0., 0., 0.])):
        network = nn.Sequential(nn.Linear(24, 6), nn.Linear(6, 6, bias=False))
        with torch.no_grad():
            network[1].weight.copy_(torch.diag(counts))
        spiking_(network, LATERAL, lambda layer, name: name != '1')
        calibrate_(network, [x])
        neuron = network[0].neuron
        weight = counts[:, None] * network[0].weight.detach()
        other = copy.deepcopy(neuron)
        other.set_feedback(weight.T @ weight)
        told, cost = neuron(x) - x, other(x) - x
        assert relative_error(told @ weight.T, cost @ weight.T) < 0.5
        plain = ScaleAndFire((24,), FEW, token=True)
        plain.load_state_dict({name: neuron.state_dict()[name] for name in plain.state_dict()})
        assert (told @ weight.T).norm() < 0.8 * ((plain(x) - x) @ weight.T).norm()


@pytest.mark.parametrize('family', [
    name if name in ('vit', 'eva02', 'gated attention') else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES])
def test_every_family_feeds_back(family):
    model = convert(build(family), [pixels(8)], LATERAL)
    neurons = feeding(model)
    assert any('qkv' in name or 'q_proj' in name or 'in_proj' in name for name in neurons)
    assert any('fc2' in name or 'mlp_out' in name or 'out_proj' in name for name in neurons)
    assert all(neuron.feedback.any() for neuron in neurons.values())
    again = convert(build(family), [pixels(8)], LATERAL)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_feedback_that_would_cost_too_much_is_left_out():
    cheap = feeding(convert(build('vit'), [pixels(8)], SFNConfig(4, lateral=4, lateral_cost=0.2)))
    assert {name.split('.', 2)[2] for name in cheap if 'products' not in name} == {'attn.qkv.neuron', 'mlp.fc1.neuron'}
    assert not feeding(convert(build('vit'), [pixels(8)], FEW))


def test_sums_are_taken_in_parts_where_memory_is_short(monkeypatch):
    whole = convert(build('vit'), [pixels(8)], LATERAL)
    monkeypatch.setattr(calibration, 'SUMMED_BYTES', 1)
    parts = convert(build('vit'), [pixels(8)], LATERAL)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))


@torch.no_grad()
def test_a_saved_model_fires_the_same(tmp_path):
    model = convert(build('vit'), [pixels(8)], SFNConfig(4, lateral=3, lateral_zone=0.2))
    save_model(model, tmp_path / 'm')
    loaded = load_model(tmp_path / 'm')
    assert loaded.sfn_config == model.sfn_config and feeding(loaded).keys() == feeding(model).keys()
    assert torch.equal(loaded(pixels(3)), model(pixels(3)))


def test_an_output_that_is_no_tensor_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return {'a': self.layer(x)}

    network = spiking_(Two(), LATERAL)
    with pytest.raises(SFormerError, match='lateral'):
        calibrate_(network, [torch.randn(2, 4, 8, generator=rng())])
