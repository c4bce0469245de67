"""Attention layers of timm on spikes: masks, gates, dropout, grouped queries, pooling, and what is refused."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_tools import build, hooked, pixels, randomise_, relative_error, same_state, spiking, state_of, tokens
from timm import layers as tl
from timm.models import beit, eva
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock

from sformer import SFNConfig, UnsupportedLayerError, named_neurons, source_view, spiking_
from sformer.layers import SPIKING_LAYERS, SpikingAttention, SpikingAttentionMixin, register_spiking
from sformer.neurons import ScaleAndFire

LAYERS = {
    'plain': lambda: tl.Attention(16, 2, qkv_bias=True),
    'qk norm': lambda: tl.Attention(16, 2, norm_layer=nn.LayerNorm, qk_norm=True),
    'scale norm': lambda: tl.Attention(16, 2, norm_layer=nn.LayerNorm, scale_norm=True),
    'gated': lambda: tl.Attention(16, 2, gated=True),
    'gated, scale norm': lambda: tl.Attention(16, 2, gated=True, norm_layer=nn.LayerNorm, scale_norm=True),
    'head dim': lambda: tl.Attention(16, 2, attn_head_dim=4),
    'dim out': lambda: tl.Attention(16, 2, dim_out=12),
    'rope layer': lambda: tl.AttentionRope(16, 2),
    'rope layer, unfused': lambda: tl.AttentionRope(16, 2, qkv_fused=False),
    'rope layer, gated': lambda: tl.AttentionRope(16, 2, gated=True),
    'grouped queries': lambda: tl.AttentionRope(16, 4, num_kv_heads=2, qkv_fused=False),
    'one key head': lambda: tl.AttentionRope(16, 4, num_kv_heads=1, qkv_fused=False, gated=True),
    'eva': lambda: eva.EvaAttention(16, 2, norm_layer=nn.LayerNorm),
    'eva, unfused': lambda: eva.EvaAttention(16, 2, qkv_fused=False, norm_layer=nn.LayerNorm),
    'eva, gated': lambda: eva.EvaAttention(16, 2, norm_layer=nn.LayerNorm, gated=True),
    'differential': lambda: tl.DiffAttention(16, 2, qkv_bias=True),
    'differential, dual': lambda: tl.DiffAttention(16, 2, dual_lambda=True, depth=3),
    'parallel scaling': lambda: ParallelScalingBlock(16, 2),
}
layers = pytest.mark.parametrize('layer', LAYERS)
MASKS = {
    'free': dict(),
    'causal': dict(is_causal=True),
    'bool': dict(attn_mask=torch.ones(6, 6).tril(1).bool()),
    'additive': dict(attn_mask=torch.linspace(-2, 2, 36).view(6, 6)),
    'nothing for one': dict(attn_mask=(torch.arange(6) != 3)[:, None].expand(6, 6).contiguous()),
}


def attention(layer='plain', config=SFNConfig(), mask='free'):
    """A calibrated attention layer, its source, and tokens."""
    source, x = randomise_(LAYERS[layer]()), tokens(8)
    return spiking(source, x, config, forward_fn=lambda net, x: net(x, **MASKS[mask])), source, x


@pytest.mark.parametrize('layer, mask', [
    *((layer, mask) for layer in LAYERS for mask in ('free', 'bool')),
    *((layer, mask) for layer in ('plain', 'grouped queries', 'eva', 'differential') for mask in MASKS
      if mask not in ('free', 'bool'))])
def test_attention_comes_close_to_its_source(layer, mask):
    model, source, x = attention(layer, SFNConfig(levels=127), mask)
    with torch.no_grad():
        out, reference = model(x, **MASKS[mask]), source(x, **MASKS[mask])
        assert relative_error(out, reference) < 0.03
        assert torch.equal(source_view(model)(x, **MASKS[mask]), reference)


@layers
def test_parameters_stay(layer):
    source = randomise_(LAYERS[layer]())
    model = spiking_(copy.deepcopy(source))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in source.named_parameters()}
    assert all(torch.equal(p, source.get_parameter(n)) for n, p in model.named_parameters())
    assert source_view(model).fused_attn == source.fused_attn  # whichever way the source computes


@pytest.mark.parametrize('fused', [True, False])
def test_either_way_of_the_source_is_the_same_spiking_layer(fused):
    model, source, x = attention()
    source.fused_attn = fused
    other = spiking_(copy.deepcopy(source))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert source_view(other).fused_attn is fused and torch.equal(source_view(other)(x), source(x))


def test_causal_tokens_do_not_see_the_future():
    layer, _, x = attention()
    other = x.clone()
    other[:, 4:] = tokens(8, seed=7)[:, 4:]
    with torch.no_grad():
        causal = layer(x, is_causal=True), layer(other, is_causal=True)
        free = layer(x), layer(other)
    torch.testing.assert_close(causal[0][:, :4], causal[1][:, :4], rtol=1e-5, atol=1e-5)
    assert relative_error(free[0][:, :4], free[1][:, :4]) > 1e-2


@pytest.mark.parametrize('block_fn', [Block, ResPostBlock, ParallelThingsBlock])
@pytest.mark.parametrize('mask', ['causal', 'bool', 'nothing for one', 'additive', 'per head'])
def test_a_mask_reaches_every_block(mask, block_fn):
    mask = {
        'causal': dict(is_causal=True),
        'bool': dict(attn_mask=torch.ones(17, 17, dtype=torch.bool).tril(2)),
        'nothing for one': dict(attn_mask=(torch.arange(17) != 3)[:, None].expand(17, 17).contiguous()),
        'additive': dict(attn_mask=torch.linspace(-3, 3, 17 * 17).view(17, 17)),
        'per head': dict(attn_mask=torch.linspace(-3, 3, 2 * 17 * 17).view(1, 2, 17, 17)),
    }[mask]
    source = build(block_fn=block_fn, init_values=0.5)
    model = spiking(source, pixels(), SFNConfig(levels=127), forward_fn=lambda net, x: net(x, **mask))
    with torch.no_grad():
        reference = source(pixels(), **mask)
        assert relative_error(model(pixels(), **mask), reference) < 0.03
        assert relative_error(reference, source(pixels())) > 1e-3  # the mask matters


# gates

@pytest.mark.parametrize('layer', ['gated', 'gated, scale norm', 'rope layer, gated', 'eva, gated', 'one key head'])
def test_a_gate_multiplies_spikes(layer):
    model, _, x = attention(layer, SFNConfig(levels=127))
    with torch.no_grad():
        before = model(x)
        with hooked(model.gate_neuron) as gates, hooked(model.value_neuron) as values, hooked(model.proj.neuron) as out:
            model(x)
        assert gates[0].amin() >= 0 and gates[0].amax() <= 1 + 1e-3  # after the sigmoid
        torch.testing.assert_close(model.proj.neuron(values[0] * gates[0]), out[0])
        for name in ('gate_neuron', 'value_neuron'):
            other = copy.deepcopy(model)
            getattr(other, name).step.mul_(200)  # nothing reaches its first boundary any more
            assert relative_error(other(x), before) > 0.3, name


def test_a_layer_without_a_gate_has_no_neurons_for_one():
    model = spiking_(LAYERS['plain']())
    assert model.gate_neuron is None and model.value_neuron is None
    assert sorted(n.rpartition('.')[2] for n, _ in named_neurons(model) if n.startswith('products')) == [
        'attn_neuron', 'k_neuron', 'q_neuron', 'v_neuron']


# families

def test_differential_attention_has_neurons_for_each_of_both():
    model, source, x = attention('differential', SFNConfig(levels=127))
    assert len(model.products) == 2
    for product in model.products:
        assert product.v_neuron.step.shape == (2, 1, 8) and product.q_neuron.step.shape == (2, 1, 4)
    assert not torch.equal(model.products[0].q_neuron.step, model.products[1].q_neuron.step)
    with torch.no_grad():
        before = model(x)
        for product in model.products:
            handle = product.q_neuron.register_forward_hook(lambda neuron, args, out: torch.zeros_like(out))
            assert relative_error(model(x), before) > 1e-3
            handle.remove()


def test_grouped_queries_share_their_keys():
    model, source, x = attention('grouped queries', SFNConfig(levels=127))
    assert model.products[0].k_neuron.step.shape == (4, 1, 4) and model.k_proj.weight.shape == (8, 16)
    k = model.products[0].k_neuron
    torch.testing.assert_close(k.center[0], k.center[1])  # heads 0 and 1 read the same keys
    torch.testing.assert_close(k.step[0], k.step[1])
    assert not torch.allclose(k.center[1], k.center[2])


def rope_of(length, dim, seed=4):
    angles = torch.randn(length, dim // 2, generator=torch.Generator().manual_seed(seed)).repeat_interleave(2, -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


@pytest.mark.parametrize('layer', ['rope layer', 'rope layer, unfused', 'eva', 'grouped queries'])
def test_rotary_embedding_acts_on_currents(layer):
    source, x = randomise_(LAYERS[layer]()), tokens(8)
    rope = rope_of(5, source.head_dim if hasattr(source, 'head_dim') else 8)
    model = spiking(source, x, SFNConfig(levels=127), forward_fn=lambda net, x: net(x, rope=rope))
    with torch.no_grad():
        reference = source(x, rope=rope)
        assert relative_error(model(x, rope=rope), reference) < 0.03
        assert relative_error(source(x), reference) > 1e-3


def test_relative_position_bias_is_added_to_the_scores():
    source, x = randomise_(beit.Attention(16, 2, window_size=(2, 2))), tokens(8, 5)
    bias = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    for args in ((), (bias,)):
        model = spiking(source, x, SFNConfig(levels=127), forward_fn=lambda net, x, args=args: net(x, *args))
        with torch.no_grad():
            assert relative_error(model(x, *args), source(x, *args)) < 0.03
    with torch.no_grad():
        assert relative_error(source(x), source(x, bias)) > 1e-2


@pytest.mark.parametrize('kwargs', [
    dict(), dict(qk_norm=True), dict(latent_len=3, pool_type='avg'), dict(latent_dim=8), dict(q_proj=False),
    dict(out_features=0), dict(pos_embed='abs', feat_size=6)], ids=lambda k: '-'.join(k) or 'plain')
def test_attention_pooling(kwargs):
    source, x = randomise_(tl.AttentionPoolLatent(16, num_heads=2, **kwargs)), tokens(8)
    model = spiking(source, x, SFNConfig(levels=127))
    with torch.no_grad():
        assert relative_error(model(x), source(x)) < 0.03
        assert torch.equal(source_view(model)(x), source(x))


@pytest.mark.parametrize('kwargs', [dict(), dict(pool_type='avg', pre_norm=True, post_norm=True)])
def test_pooling_without_weights(kwargs):
    source, x = randomise_(tl.AttentionPoolPrr(16, num_heads=2, **kwargs)), tokens(8)
    model = spiking(source, x, SFNConfig(levels=127))
    with torch.no_grad():
        assert relative_error(model(x), source(x)) < 0.03


# training

@pytest.mark.parametrize('layer', ['plain', 'eva', 'differential', 'gated', 'parallel scaling'])
def test_dropout_is_applied_in_training(layer):
    model, _, x = attention(layer)
    if hasattr(model, 'attn_drop_p'):
        model.attn_drop_p = 0.5
    model.attn_drop.p = 0.5
    with torch.no_grad():
        out = model(x)
        assert torch.equal(model(x), out), 'none in evaluation'
        model.train()
        assert not torch.equal(model(x), model(x))
        model.attn_drop.p = model.attn_drop_p = 0.
        assert torch.equal(model(x), out)


@layers
def test_gradients_reach_every_parameter(layer):
    model, _, x = attention(layer)
    model.train()(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layer', ['plain', 'gated', 'differential', 'eva'])
def test_low_precision_comes_close_to_float32(layer, dtype):
    model, _, x = attention(layer, SFNConfig(levels=127))
    with torch.no_grad():
        reference = model(x)
        state = {name: n.step.clone() for name, n in named_neurons(model)}
        out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and relative_error(out.float(), reference) < 0.05
    assert all(torch.equal(n.step, state[name]) for name, n in named_neurons(model))


# what is refused

def test_a_product_that_does_not_come_by_is_refused():
    class Other(tl.Attention):
        def forward(self, x):  # multiplies by itself
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)

    try:
        @register_spiking(Other)
        class SpikingOther(SpikingAttentionMixin, Other):
            pass

        model = spiking_(Other(16, 2))
        with pytest.raises(UnsupportedLayerError, match='a product of SpikingOther was not met'):
            model(tokens())
    finally:
        del SPIKING_LAYERS[Other]


def test_more_products_than_neurons_are_refused():
    class Twice(tl.Attention):
        def forward(self, x):
            return super().forward(super().forward(x))

    try:
        @register_spiking(Twice)
        class SpikingTwice(SpikingAttentionMixin, Twice):
            pass

        with pytest.raises(UnsupportedLayerError, match='SpikingTwice'):
            spiking_(Twice(16, 2))(tokens())
    finally:
        del SPIKING_LAYERS[Twice]


def test_a_gate_that_does_not_come_by_is_refused():
    model, _, x = attention('gated')
    model.gate = None  # its neurons are still there
    with pytest.raises(UnsupportedLayerError, match='a product of SpikingAttention was not met'):
        model(x)


def test_layers_without_weights_get_neurons():
    model = spiking_(nn.Sequential(tl.AttentionPoolPrr(16, 2)))
    assert all(isinstance(n, ScaleAndFire) for _, n in named_neurons(model)) and len(list(named_neurons(model))) == 4


def test_state_moves_between_layers():
    model, source, x = attention('gated')
    other = spiking_(randomise_(LAYERS['gated'](), seed=9))
    other.load_state_dict(model.state_dict())
    assert same_state(other, state_of(model)) and torch.equal(other(x), model(x))
    assert type(other) is SpikingAttention
