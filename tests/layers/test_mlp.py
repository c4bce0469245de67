"""MLPs: both operands of a gate spike, and what is not a product stays as it was."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_tools import hooked, randomise_, relative_error, spiking, tokens, watch_products
from timm import layers as tl

from sformer import SFNConfig, named_neurons, source_view, spiking_
from sformer.layers import SpikingLinear

GATED = {
    'packed': (tl.GluMlp, dict(hidden_features=32)),
    'packed, gate last': (tl.GluMlp, dict(hidden_features=32, gate_last=True)),
    'packed, gate first': (tl.GluMlp, dict(hidden_features=32, gate_last=False)),
    'packed, silu': (tl.GluMlp, dict(hidden_features=32, act_layer=nn.SiLU, gate_last=False)),
    'packed, norm': (tl.GluMlp, dict(hidden_features=32, norm_layer=nn.LayerNorm)),
    'separate': (tl.SwiGLU, dict(hidden_features=16)),
    'separate, norm': (tl.SwiGLU, dict(hidden_features=16, norm_layer=nn.LayerNorm)),
}
kinds = pytest.mark.parametrize('kind', GATED)


def gated(kind, levels=127):
    """Spiking MLP, its source, and tokens."""
    cls, kwargs = GATED[kind]
    source, x = randomise_(cls(16, **kwargs)), tokens(30)
    return spiking(source, x, SFNConfig(levels=levels)), source, x


@kinds
def test_gated_mlp_comes_close_to_its_source(kind):
    mlp, source, x = gated(kind)
    with torch.no_grad():
        assert relative_error(mlp(x), source(x)) < 0.02
        assert torch.equal(source_view(mlp)(x), source(x))


@kinds
def test_both_operands_of_the_gate_are_spikes(kind):
    mlp, _, x = gated(kind, levels=8)
    watch, _ = watch_products(mlp, x)
    assert not watch.analog
    assert sorted(o.neuron for o in watch.seen) == sorted(name for name, _ in named_neurons(mlp))
    with torch.no_grad():
        before = mlp(x)
        for name in ('gate_neuron', 'value_neuron'):
            other = copy.deepcopy(mlp)
            getattr(other, name).register_forward_hook(lambda neuron, args, out: torch.zeros_like(out))
            assert relative_error(other(x), before) > 0.3, name


@kinds
def test_neurons_of_a_gate_have_a_step_per_channel(kind):
    mlp, _, _ = gated(kind)
    assert mlp.gate_neuron.step.shape == mlp.value_neuron.step.shape == (16,)
    assert mlp.fc2.neuron.step.shape == (16,)


def test_the_gate_spikes_after_its_activation_function():
    mlp, _, x = gated('packed')
    with torch.no_grad(), hooked(mlp.gate_neuron) as out:
        mlp(x)
    assert out[0].amin() >= 0 and out[0].amax() <= 1 + 1e-3  # a sigmoid


@pytest.mark.parametrize('act, ratio', [(nn.GELU, 2), (nn.SiLU, 2), (nn.ReLU, 1)])
def test_the_hidden_activation_is_fitted_as_lopsided_as_it_is(act, ratio):
    source = randomise_(tl.Mlp(16, 32, act_layer=act))
    x = 3 * tokens(80)
    mlp = spiking(source, x)
    positive, negative = mlp.fc2.neuron.multiplier.int()
    assert (positive >= ratio * negative).float().mean() > 0.9
    with torch.no_grad():
        error = relative_error(mlp(x), source(x))
        if ratio > 1:
            mlp.fc2.neuron.multiplier.copy_(torch.stack([positive, positive]))
            assert relative_error(mlp(x), source(x)) > error


def test_few_levels_spread_out_after_an_activation_function():
    source, x = randomise_(tl.Mlp(16, 32)), 3 * tokens(80)
    errors = {}
    for name in ('auto', 'uniform'):
        mlp = spiking(source, x, SFNConfig(6, activation_fire=name))
        assert mlp.fc1.neuron.fire_function == 'widening'
        assert mlp.fc2.neuron.levels.tolist() == ([1, 3, 5, 8, 11, 15] if name == 'auto' else [1, 2, 3, 4, 5, 6])
        with torch.no_grad():
            hidden = source.act(source.fc1(x))
            errors[name] = relative_error(mlp.fc2.neuron(hidden), hidden)
    assert errors['auto'] < 0.9 * errors['uniform']
    normed = spiking(randomise_(tl.Mlp(16, 32, norm_layer=nn.LayerNorm)), x, SFNConfig(6))
    assert normed.fc2.neuron.fire_function == 'widening'  # what it reads comes from a norm


@pytest.mark.parametrize('levels', [4, 8, 32])
@pytest.mark.parametrize('gated', [tl.SwiGLU, tl.SwiGLUPacked], ids=['SwiGLU', 'SwiGLUPacked'])
def test_levels_after_a_gate_follow_the_tails_of_a_product(gated, levels):
    source, x = randomise_(gated(16, 32)), 3 * tokens(80)
    read, errors = [], {}
    with source.fc2.register_forward_pre_hook(lambda _, args: read.append(args[0].detach())):
        source(x)
    product = read[0]
    for name in ('auto', 'uniform'):
        mlp = spiking(source, x, SFNConfig(levels, activation_fire=name))
        with torch.no_grad():
            errors[name] = relative_error(mlp.fc2.neuron(product), product)
    assert mlp.fc2.neuron.fire_function == 'uniform'
    assert errors['auto'] < 0.9 * errors['uniform']
    normed = spiking(randomise_(gated(16, 32, norm_layer=nn.LayerNorm)), x, SFNConfig(levels))
    assert normed.fc2.neuron.fire_function == normed.value_neuron.fire_function

def test_a_second_layer_that_is_filtered_out_stays_as_it_is():
    mlp = spiking_(randomise_(tl.Mlp(16, 32)), filter_fn=lambda layer, name: name != 'fc2')
    assert type(mlp.fc1) is SpikingLinear and type(mlp.fc2) is nn.Linear


def test_dropout_of_a_gated_mlp_is_applied_in_training():
    mlp = spiking(randomise_(tl.SwiGLU(16, 16, drop=0.5)), tokens())
    with torch.no_grad():
        assert torch.equal(mlp(tokens()), mlp(tokens()))
        mlp.train()
        assert not torch.equal(mlp(tokens()), mlp(tokens()))
