"""What layers say that they multiply: it is what they compute; one of one's own is counted or refused by name."""
import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, relative_error, rng, spiking, tokens

from sformer import (
    SFNConfig,
    SFormerError,
    UnsupportedLayerError,
    convert,
    export_onnx,
    named_neurons,
    neurobench_view,
    source_of,
    to_integer_,
    to_spikes_,
)
from sformer.evaluation import activity
from sformer.layers import SPIKING_LAYERS, Product, SpikingLayer, SpikingLinear, named_products, register_spiking
from sformer.neurons import CODINGS, NEURON_TYPES, Spikes, register_neuron, spikes_in
from sformer.neurons.base import Neuron
from sformer.profiling import energy, profile_model

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, bias=False),
    nn.Conv2d(4, 8, 3, padding=1, groups=4, padding_mode='reflect'), nn.Conv2d(4, 6, 1, padding='same'),
    nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False)]


class TokenMixing(nn.Module):
    """Each channel of a token is a sum over all tokens, as in an MLP-Mixer: a product that no layer here has."""

    def __init__(self, length):
        super().__init__()
        self.mixing = nn.Parameter(torch.eye(length) + 0.1 * torch.randn(length, length, generator=rng(3)))

    def forward(self, x):
        return self.mixing @ x


class SpikingTokenMixing(SpikingLayer, TokenMixing):
    spiking_parts = ('mixed_neuron',)

    def add_neurons(self, config):
        self.mixed_neuron = NEURON_TYPES[config.neuron]((1,), config)

    def forward(self, x):
        return self.mixing @ self.mixed_neuron(x)

    def multiplies(self):
        return [Product('token mixing', (self.mixed_neuron,), lambda x, weight: weight @ x, weight=self.mixing)]


class Halves(Neuron):
    """Whole numbers up to 8 of half a current of one."""

    def __init__(self, shape, config, device=None, **site):
        super().__init__(device=device)
        self.register_buffer('step', torch.tensor(0.5, device=device))

    def encode(self, x):
        return Spikes((x.detach().float() / self.step).round().clamp(-8, 8).to(torch.int8), self.step)

    def statistics(self):
        return None

    def fit(self, statistics, config=None):
        self.mark_calibrated()


@pytest.fixture(autouse=True)
def registered():
    layers, neurons = dict(SPIKING_LAYERS), dict(NEURON_TYPES)
    register_spiking(TokenMixing)(SpikingTokenMixing)
    register_neuron('halves', Halves)
    yield
    for table, before in ((SPIKING_LAYERS, layers), (NEURON_TYPES, neurons)):
        table.clear()
        table.update(before)


def mixing(neuron='scale_and_fire'):
    source = build(depth=1)
    source.norm_pre = TokenMixing(17)
    return convert(source, [pixels(8)], SFNConfig(neuron=neuron))


@pytest.mark.parametrize('neuron', ['scale_and_fire', 'halves'])
def test_a_layer_of_ones_own_is_counted(neuron):
    model, images = mixing(neuron), pixels(3, seed=4)
    levels = []
    handle = model.norm_pre.mixed_neuron.register_forward_pre_hook(
        lambda neuron, args: levels.append(neuron.encode(args[0]).levels))
    with torch.no_grad():
        model(images)
    handle.remove()
    profile = profile_model(model, [images])
    operation, = (operation for operation in profile.operations if operation.name == 'norm_pre')
    assert operation.kind == 'token mixing' and operation.operands == ('norm_pre.mixed_neuron',)
    assert operation.macs == 17 * 17 * 32 and operation.weights == 17 * 17
    for coding in CODINGS:  # each spike of a token meets the weights of 17 tokens
        assert operation.synaptic_operations[coding] == spikes_in(levels[0], coding).sum().item() * 17 / 3
    assert not [operation.name for operation in profile.operations if operation.kind == 'floating']
    assert activity(model, images)['norm_pre.mixed_neuron'] == (levels[0] != 0).double().mean().item()
    account, without = (energy(operations, profile.sites)['account']['graded'] for operations in (
        profile.operations, [other for other in profile.operations if other is not operation]))
    assert account['operations'] > without['operations'] and account['weights'] > without['weights']


@pytest.mark.parametrize('neuron', ['scale_and_fire', 'halves'])
def test_a_layer_of_ones_own_stays_or_is_refused_by_name(neuron, tmp_path):
    model, images = mixing(neuron), pixels(3, seed=4)
    whole = copy.deepcopy(model)
    report, = (report for report in to_integer_(whole) if not report.integer)
    assert report.name == 'norm_pre' and 'no form of token mixing in integers' in report.reason
    assert type(whole.norm_pre) is SpikingTokenMixing
    with torch.no_grad():
        assert neuron == 'halves' or relative_error(whole(images), model(images)) < 0.1  # which are coarse
    for refused, message in (
            (lambda: to_spikes_(model), r'norm_pre \(SpikingTokenMixing\) are not executed spike by spike: '
             'they are token mixing, not one of'),
            (lambda: export_onnx(model, tmp_path / 'a.onnx'),
             r'norm_pre \(SpikingTokenMixing\) has no form in ONNX: it multiplies token mixing'
             if neuron == 'scale_and_fire' else 'a Halves has no form in ONNX')):
        with pytest.raises(SFormerError, match=message):
            refused()
    assert type(model.blocks[0].mlp.fc1) is SpikingLinear and not list(tmp_path.iterdir())
    assert type(source_of(model).norm_pre) is TokenMixing


def test_neurobench_is_given_no_layer_of_ones_own():
    pytest.importorskip('neurobench')
    with pytest.raises(SFormerError, match=r'norm_pre \(SpikingTokenMixing\) is of a kind that is not split'):
        neurobench_view(mixing('scale_and_fire'))


def test_a_layer_that_does_not_say_what_it_multiplies_is_refused_by_name():
    class Silent(SpikingTokenMixing):
        def forward(self, x):
            return 2 * super().forward(x)  # a forward of its own: what the other class says does not hold for it

    register_spiking(TokenMixing)(Silent)
    with pytest.raises(UnsupportedLayerError, match=r'norm_pre \(Silent\) does not say what it multiplies'):
        mixing()
    model = convert(build(depth=1), [pixels(8)])
    model.blocks[0].mlp.extra_neuron = Halves((1,), None)
    model.blocks[0].mlp.extra_neuron.mark_calibrated()
    for refused in (lambda: profile_model(model, [pixels(1)]), lambda: to_integer_(model), lambda: to_spikes_(model)):
        with pytest.raises(UnsupportedLayerError, match=r'blocks\.0\.mlp \(SpikingMlp\) does not say'):
            refused()


@pytest.mark.parametrize('layer', [nn.Linear(4, 6), nn.Linear(4, 6, bias=False), *CONVOLUTIONS], ids=str)
@torch.no_grad()
def test_a_product_is_what_its_layer_computes(layer):
    shape = (3, 7, 4) if isinstance(layer, nn.Linear) else (3, 4, 9, 9)
    x = torch.randn(shape, generator=rng(0))
    model = spiking(nn.Sequential(layer), x)
    (name, module, (product,)), = named_products(model)
    assert (name, module, product.operands) == ('0', model[0], (model[0].neuron,)) and product.weight is model[0].weight
    assert torch.equal(product.compute(model[0].neuron(x), product.weight, product.bias), model(x))
    k = spikes_in(model[0].neuron.encode(x).levels, 'unary')
    weights = torch.randint(0, 5, layer.weight.shape, generator=rng(1))
    assert product.count(k, weights) == product.compute(k.double(), weights.double()).sum().item() > 0
    assert product.count(k, weights) == dataclasses.replace(product, total=None).count(k, weights)


@pytest.mark.parametrize('layer', CONVOLUTIONS, ids=str)
@torch.no_grad()
def test_weights_by_output_read_their_channels(layer):
    """Values of input channels that stand beside weights are those of the currents that the weights meet."""
    product, = spiking(nn.Sequential(layer), torch.randn(2, 4, 9, 9, generator=rng(0)))[0].multiplies()
    assert product.in_channels == 4 and product.pads == (
        '' if type(layer) is nn.Conv2d and layer.padding == (0, 0) else layer.padding_mode)
    step = torch.tensor([1., 8., 0.5, 32.]).view(4, 1, 1)
    rows = product.by_output(product.weight)
    assert len(rows) == layer.out_channels and torch.equal(product.by_output(rows), product.weight)
    x, folded = torch.randn(2, 4, 9, 9, generator=rng(1)), product.by_output(rows * product.beside(step))
    torch.testing.assert_close(product.compute(x, folded), product.compute(x * step, product.weight))


@pytest.mark.parametrize('layer', CONVOLUTIONS, ids=str)
@torch.no_grad()
def test_every_convolution_is_executed_spike_by_spike(layer):
    x = torch.randn(3, 4, 9, 9, generator=rng(0))
    model = spiking(nn.Sequential(layer), x)
    binary, graded = (to_spikes_(copy.deepcopy(model), coding)(x) for coding in ('binary', 'graded'))
    assert torch.equal(binary, graded) and relative_error(binary, model(x)) < 1e-5
    for change in (to_spikes_, to_integer_):  # and what is made of it can be sent to another process
        change(model)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@torch.no_grad()
def test_products_of_attention_are_counted_by_their_sums():
    product = spiking(build(depth=1), pixels(8)).blocks[0].attn.products[0]
    for found, shapes in zip(product.multiplies(), (((2, 2, 5, 16), (2, 2, 7, 16)), ((2, 2, 5, 7), (2, 2, 7, 16))),
                             strict=True):
        a, b = (torch.randint(0, 9, shape, generator=rng(i)) for i, shape in enumerate(shapes))
        assert found.count(a, b) == found.compute(a.double(), b.double()).sum().item()


def test_what_is_executed_says_what_it_multiplies_as_well():
    """So spikes change their coding, and read integers; neurons are not called, so a profile refuses it by name."""
    model = convert(build('eva02', depth=1), [pixels(8)])
    kinds = {name: [product.kind for product in products] for name, _, products in named_products(model)}
    assert {kind for found in kinds.values() for kind in found} == {'linear', 'convolution', 'QK^T', 'AV', 'gate'}
    for change in (to_integer_, to_spikes_):
        other = copy.deepcopy(model)
        change(other)
        assert {name: [product.kind for product in products] for name, _, products in named_products(other)} == kinds
        with pytest.raises(SFormerError, match=r'patch_embed\.proj is executed in integers or spike by spike'):
            profile_model(other, [pixels(1)])
    layer = spiking(nn.Sequential(nn.Linear(8, 4)), tokens(dim=8))
    with pytest.raises(SFormerError, match='cannot be replaced in itself'):
        to_spikes_(layer[0])
    assert [name for name, _ in named_neurons(layer)] == ['0.neuron']
