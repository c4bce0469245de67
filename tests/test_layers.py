"""Spiking layers: what conversion keeps of a timm model, what it refuses, and what attention computes on spikes."""
import contextlib
import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm import layers as tl
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock, VisionTransformer

import sformer
from sformer import SFNConfig, UnsupportedLayerError, bypass_neurons, named_neurons, source_of, spiking_
from sformer.calibration import fit_thresholds_, observe
from sformer.layers import SPIKING_LAYERS, SpikingAttention, SpikingConv2d, SpikingLinear, SpikingMlp, SpikingPatchEmbed
from sformer.neurons import DirectCoding, Neuron, ScaleAndFire

VARIANTS = {
    'plain': {},
    'qk_norm': dict(qk_norm=True),
    'reg_tokens': dict(reg_tokens=4, no_embed_class=True),
    'gap': dict(global_pool='avg'),
    'layer_scale': dict(init_values=0.1),
    'pre_norm': dict(pre_norm=True),
    'no_bias': dict(qkv_bias=False, proj_bias=False),
    'inner_norms': dict(scale_attn_norm=True, scale_mlp_norm=True),
    'silu_rms_norm': dict(act_layer=nn.SiLU, norm_layer=tl.RmsNorm),
    'parallel_things': dict(block_fn=ParallelThingsBlock, init_values=0.1),
    'res_post': dict(block_fn=ResPostBlock, init_values=0.1),
    'no_head': dict(num_classes=0),
    'gray': dict(in_chans=1),
    'dropout': dict(drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1, patch_drop_rate=0.1),
}
variants = pytest.mark.parametrize('variant', sorted(VARIANTS))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # timm initialises from the global generator


def randomise_(model, seed=0):
    """Weights as a trained model has them: timm starts with zero biases, and norms that do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(**kwargs):
    args = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7)
    return randomise_(VisionTransformer(**dict(args, **kwargs)))


def images(n=4, chans=3, seed=1):
    return torch.randn(n, chans, 32, 32, generator=torch.Generator().manual_seed(seed))


def calibrate_(model, batch, config):
    fit_thresholds_(model, observe(model, [batch])[0], config)
    return model


def tokens(n=3, length=6, dim=16, seed=2):
    return torch.randn(n, length, dim, generator=torch.Generator().manual_seed(seed))


class Masked(nn.Module):
    """Attention under one fixed mask: what `observe` can call with tokens alone."""

    def __init__(self, layer, mask):
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x):
        return self.layer(x, **self.mask)


def attention(config=SFNConfig(), mask=None, **kwargs):
    """A calibrated attention layer, its source, and tokens."""
    source = randomise_(tl.Attention(16, num_heads=2, qkv_bias=True, **kwargs))
    layer, x = spiking_(copy.deepcopy(source), config), tokens()
    calibrate_(Masked(layer, mask or {}), x, config)
    return layer, source, x


def relative_error(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


@contextlib.contextmanager
def hooked(module):
    """List of the outputs of a module."""
    outputs = []
    handle = module.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    try:
        yield outputs
    finally:
        handle.remove()


# What stays

@variants
def test_parameters_stay_bit_for_bit(variant):
    source = build(**VARIANTS[variant])
    model = spiking_(copy.deepcopy(source))
    before, after = dict(source.named_parameters()), dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    neurons = [name for name, _ in named_neurons(model)]
    added = set(model.state_dict()) - set(source.state_dict())
    assert added and all(name.rpartition('.')[0] in neurons for name in added)
    assert set(source.state_dict()) <= set(model.state_dict())


@variants
def test_weights_move_either_way(variant):
    source, other = build(**VARIANTS[variant]), randomise_(build(**VARIANTS[variant]), seed=9)
    model = spiking_(copy.deepcopy(other))
    x = images(chans=VARIANTS[variant].get('in_chans', 3))
    assert not model.load_state_dict(source.state_dict(), strict=False).unexpected_keys
    with bypass_neurons(model):
        torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-5)
    assert not other.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert torch.equal(other(x), source(x))


@variants
def test_every_layer_with_weights_is_spiking(variant):
    model = spiking_(build(**VARIANTS[variant]))
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert layers and all(type(m) in (SpikingLinear, SpikingConv2d) for m in layers)
    assert all(isinstance(m.neuron, Neuron) for m in layers)
    products = [m for m in model.modules() if isinstance(m, tl.Attention)]
    assert products and all(type(m) is SpikingAttention for m in products)
    for m in products:
        assert all(isinstance(getattr(m, f'{x}_neuron'), ScaleAndFire) for x in ('q', 'k', 'v', 'attn'))


@variants
def test_bypassed_neurons_compute_the_source(variant):
    source = build(**VARIANTS[variant])
    model = spiking_(copy.deepcopy(source))
    x = images(chans=VARIANTS[variant].get('in_chans', 3))
    with torch.no_grad(), bypass_neurons(model):
        torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert relative_error(model(x), source(x)) > 1e-4  # the context has ended


MASKS = {
    'causal': dict(is_causal=True),
    'bool': dict(attn_mask=torch.ones(17, 17, dtype=torch.bool).tril(2)),
    'nothing for one': dict(attn_mask=(torch.arange(17) != 3)[:, None].expand(17, 17).contiguous()),
    'additive': dict(attn_mask=torch.linspace(-3, 3, 17 * 17).view(17, 17)),
    'per head': dict(attn_mask=torch.linspace(-3, 3, 2 * 17 * 17).view(1, 2, 17, 17)),
}


@pytest.mark.parametrize('block_fn', [Block, ResPostBlock, ParallelThingsBlock])
@pytest.mark.parametrize('mask', sorted(MASKS))
def test_bypassed_neurons_compute_the_masked_source(mask, block_fn):
    source = build(block_fn=block_fn)
    model = spiking_(copy.deepcopy(source))
    x = images()
    with torch.no_grad(), bypass_neurons(model):
        out = model(x, **MASKS[mask])
        torch.testing.assert_close(out, source(x, **MASKS[mask]), rtol=1e-5, atol=1e-5)
        assert relative_error(out, source(x)) > 1e-3  # the mask matters


def test_bypass_ends_after_an_error_and_observes_every_neuron():
    model, seen = spiking_(build()), []
    with pytest.raises(ZeroDivisionError):
        with bypass_neurons(model, lambda name, neuron, x: seen.append(name)):
            model(images())
            raise ZeroDivisionError
    assert seen and set(seen) == {name for name, _ in named_neurons(model)}
    assert not any('forward' in neuron.__dict__ for _, neuron in named_neurons(model))


@pytest.mark.parametrize('variant', ['plain', 'qk_norm', 'gap', 'inner_norms', 'parallel_things', 'res_post'])
def test_many_levels_come_close_to_the_source(variant):
    source, x = build(**VARIANTS[variant]), images(8)
    with torch.no_grad():
        reference, errors = source(x), {}
        for levels in (8, 127):
            config = SFNConfig(levels=levels)
            model = calibrate_(spiking_(copy.deepcopy(source), config), x, config)
            model.patch_embed.proj.neuron.set_range(torch.full((3,), -5.), torch.full((3,), 5.))
            errors[levels] = relative_error(model(x), reference)
    assert errors[127] < 0.03 and errors[127] < errors[8] / 3, errors


# What is refused

class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize('module, named', [
    (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.GELU(), nn.BatchNorm1d(4))),
     r'1\.1 \(torch\.nn\.modules\.batchnorm\.BatchNorm1d\)'),
    (nn.Sequential(nn.Linear(4, 4), Subclass(4, 4)), r'1 \(.*test_layers\.Subclass\)'),
    (nn.Conv1d(4, 4, 1), r'\(root\) \(torch\.nn\.modules\.conv\.Conv1d\)'),
    (nn.MultiheadAttention(4, 1), r'\(root\) .*MultiheadAttention.*out_proj'),
])
def test_unsupported_layer_is_named_and_nothing_changes(module, named):
    kinds, keys = [type(m) for m in module.modules()], list(module.state_dict())
    with pytest.raises(UnsupportedLayerError, match=named):
        spiking_(module)
    assert [type(m) for m in module.modules()] == kinds and list(module.state_dict()) == keys


@pytest.mark.parametrize('kwargs, named', [
    (dict(mlp_layer=tl.GatedMlp), r'blocks\.0\.mlp \(timm\.layers\.mlp\.GatedMlp\)'),
    (dict(act_layer=nn.PReLU), r'blocks\.0\.mlp\.act \(torch\.nn.*\.PReLU\)'),
])
def test_unsupported_model_is_named_and_nothing_changes(kwargs, named):
    model = build(**kwargs)
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(UnsupportedLayerError, match=named):
        sformer.models.spiking_model_(model)
    assert [type(m) for m in model.modules()] == kinds and list(model.state_dict()) == keys
    assert not hasattr(model, 'sfn_config')


def test_many_unsupported_layers_are_counted():
    with pytest.raises(UnsupportedLayerError, match=r'3 \(.*and 2 more\. Register'):
        spiking_(nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(6))))


# Again

def test_spiking_twice_changes_nothing():
    config = SFNConfig(levels=8)
    model = calibrate_(spiking_(build(), config), images(), config)
    neurons, state = dict(named_neurons(model)), {k: v.clone() for k, v in model.state_dict().items()}
    assert spiking_(model, SFNConfig(levels=99)) is model
    again = dict(named_neurons(model))
    assert list(again) == list(neurons) and all(again[name] is neurons[name] for name in neurons)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_second_call_converts_a_layer_that_was_put_in_later():
    config = SFNConfig(levels=8)
    model = calibrate_(spiking_(build(), config), images(), config)
    model.head = nn.Linear(32, 3)
    spiking_(model, config)
    assert type(model.head) is SpikingLinear and not model.head.neuron.calibrated
    assert all(neuron.calibrated for name, neuron in named_neurons(model) if name != 'head.neuron')


@variants
def test_source_of_is_the_inverse(variant):
    source = build(**VARIANTS[variant])
    model = sformer.models.spiking_model_(copy.deepcopy(source))
    spiking_state = {k: v.clone() for k, v in model.state_dict().items()}
    back = source_of(model)
    assert [(n, type(m)) for n, m in back.named_modules()] == [(n, type(m)) for n, m in source.named_modules()]
    state = back.state_dict()
    assert list(state) == list(source.state_dict())
    assert all(torch.equal(state[k], v) for k, v in source.state_dict().items())
    x = images(chans=VARIANTS[variant].get('in_chans', 3))
    with torch.no_grad():
        assert torch.equal(back(x), source(x))
        back.patch_embed.proj.weight.zero_()  # a copy
    assert type(model) is sformer.SFormer
    assert all(torch.equal(v, spiking_state[k]) for k, v in model.state_dict().items())


def test_spiking_layers_differ_from_their_sources_by_class_only():
    for source, spiking in SPIKING_LAYERS.items():
        assert issubclass(spiking, source) and spiking is not source


# Where neurons sit

def test_granularity_of_thresholds():
    model = spiking_(build())
    shapes = {name.removeprefix('blocks.0.'): tuple(n.threshold.shape[1:]) for name, n in named_neurons(model)}
    assert shapes['attn.qkv.neuron'] == shapes['attn.proj.neuron'] == shapes['mlp.fc1.neuron'] == (32,)
    assert shapes['mlp.fc2.neuron'] == (128,)
    assert shapes['attn.q_neuron'] == shapes['attn.k_neuron'] == shapes['attn.attn_neuron'] == (2, 1, 1)
    assert shapes['head.neuron'] == (32,)
    assert isinstance(model.patch_embed.proj.neuron, DirectCoding)
    signed = {name.rpartition('.')[2]: neuron.signed for name, neuron in named_neurons(model)
              if isinstance(neuron, ScaleAndFire)}
    assert signed == dict(q_neuron=True, k_neuron=True, v_neuron=True, neuron=True, attn_neuron=False)


@pytest.mark.parametrize('act, low', [(nn.GELU, 0.17), (nn.SiLU, 0.2785), (nn.ReLU, 1e-3)])
def test_default_range_of_the_hidden_activation_is_lopsided(act, low):
    mlp = spiking_(tl.Mlp(8, 16, act_layer=act))
    assert type(mlp) is SpikingMlp
    top = mlp.fc2.neuron.threshold[:, 0] * mlp.fc2.neuron.levels[-1]
    assert top[0] == pytest.approx(4) and top[1] == pytest.approx(low, rel=0.01)
    plain = spiking_(tl.Mlp(8, 16, norm_layer=nn.LayerNorm)).fc2.neuron.threshold
    assert torch.equal(plain[0], plain[1])  # behind a norm the range of the activation says nothing


def test_layers_multiply_spikes_with_weights():
    generator = torch.Generator().manual_seed(3)
    linear = spiking_(randomise_(nn.Linear(6, 5)), SFNConfig(levels=4))
    x = torch.randn(7, 6, generator=generator)
    positive, negative = (linear.neuron.spikes(x).float() * sign for sign in (1, -1))
    theta = linear.neuron.threshold
    spikes = positive.clamp_min(0) * theta[0] - negative.clamp_min(0) * theta[1]
    torch.testing.assert_close(linear(x), spikes @ linear.weight.T + linear.bias)
    conv = spiking_(randomise_(nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1)), SFNConfig(levels=4))
    y = torch.randn(2, 3, 8, 8, generator=generator)
    expected = nn.functional.conv2d(conv.neuron(y), conv.weight, conv.bias, stride=2, padding=1)
    assert torch.equal(conv(y), expected) and not torch.allclose(conv(y), nn.Conv2d.forward(conv, y))


def test_patch_embedding_reads_8_bit_pixels_without_loss():
    embed = randomise_(tl.PatchEmbed(16, 4, 3, 8))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    x = (pixels / 255 - 0.5) / 0.5
    expected = embed(x)
    assert type(spiking_(embed)) is SpikingPatchEmbed
    torch.testing.assert_close(embed(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter():
    config = SFNConfig(levels=16)
    model = calibrate_(spiking_(build(qk_norm=True, init_values=0.1), config), images(), config).train()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


# Attention

@pytest.mark.parametrize('levels', [1, 3, 32, 127])
@pytest.mark.parametrize('mask', [dict(), dict(is_causal=True)], ids=['free', 'causal'])
def test_rows_sum_to_one(levels, mask):
    # what is constant over all keys must pass unchanged, however coarse the spikes of softmax are
    layer, _, x = attention(SFNConfig(levels=levels))
    value = torch.linspace(-1, 1, 16).view(1, 2, 1, 8).expand(3, 2, 6, 8)
    layer.v_neuron.forward = lambda v: v
    q, k, _ = layer.qkv(x).reshape(3, 6, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    with torch.no_grad(), hooked(layer.attn_neuron) as numerators:
        out = layer.spiking_product(q, k, value, **mask)
    torch.testing.assert_close(out, value, rtol=1e-6, atol=1e-6)
    rows = numerators[0] / numerators[0].sum(-1, keepdim=True)
    torch.testing.assert_close(rows.sum(-1), torch.ones(3, 2, 6), rtol=1e-6, atol=1e-6)
    assert ((numerators[0].sum(-1) - 1).abs() > 1e-3).any()  # spikes themselves do not


@pytest.mark.parametrize('firing', ['round', 'floor'])
@pytest.mark.parametrize('name', ['uniform', 'quadratic', 'power2', 'density'])
def test_the_strongest_key_fires_at_the_top_level(name, firing):
    for levels in (1, 2, 7) if name == 'power2' else (1, 7, 13, 26, 32, 63, 126, 127):
        layer, _, x = attention(SFNConfig(levels=levels, attention_fire=name, firing=firing))
        neuron = layer.attn_neuron
        with torch.no_grad(), hooked(neuron) as numerators:
            layer(x)
        top = numerators[0].amax(dim=-1, keepdim=True)
        assert (top == neuron.threshold[0] * neuron.levels[-1]).all(), levels


@pytest.mark.parametrize('recipe', [
    dict(levels=1, scale=2.5), dict(levels=1, scale=1.01, firing='floor'), dict(levels=4, scale=40.),
    dict(levels=1, dead_zone=1.), dict(levels=8, dead_zone=64.),
])
def test_a_row_is_never_silent(recipe):
    # a row without spikes would be divided by a sum of zero
    layer, _, x = attention(SFNConfig(**recipe))
    with torch.no_grad():
        assert torch.isfinite(layer(x)).all()


def test_causal_tokens_do_not_see_the_future():
    layer, _, x = attention()
    other = x.clone()
    other[:, 4:] = tokens(seed=7)[:, 4:]
    with torch.no_grad():
        causal = layer(x, is_causal=True), layer(other, is_causal=True)
        free = layer(x), layer(other)
    torch.testing.assert_close(causal[0][:, :4], causal[1][:, :4], rtol=1e-5, atol=1e-5)
    assert relative_error(free[0][:, :4], free[1][:, :4]) > 1e-2


@pytest.mark.parametrize('mask', [
    dict(), dict(attn_mask=torch.ones(6, 6).tril(1).bool()), dict(attn_mask=torch.linspace(-2, 2, 36).view(6, 6)),
    dict(is_causal=True),
], ids=['free', 'bool', 'additive', 'causal'])
@pytest.mark.parametrize('kwargs', [
    dict(), dict(norm_layer=nn.LayerNorm, qk_norm=True), dict(norm_layer=nn.LayerNorm, scale_norm=True),
    dict(gated=True), dict(attn_head_dim=4), dict(dim_out=12),
], ids=lambda kwargs: '-'.join(kwargs) or 'plain')
def test_attention_comes_close_to_its_source(kwargs, mask):
    layer, source, x = attention(SFNConfig(levels=127), mask, **kwargs)
    with torch.no_grad():
        reference = source(x, **mask)
        assert relative_error(layer(x, **mask), reference) < 0.03
        with bypass_neurons(layer):
            torch.testing.assert_close(layer(x, **mask), reference, rtol=1e-5, atol=1e-5)


def test_a_gate_multiplies_spikes():
    layer, _, x = attention(SFNConfig(levels=127), {}, gated=True)
    with torch.no_grad():
        before = layer(x)
        for name in ('gate_neuron', 'value_neuron'):
            other = copy.deepcopy(layer)
            getattr(other, name).threshold.mul_(200)  # nothing reaches its first boundary any more
            assert relative_error(other(x), before) > 0.5, name


def test_many_keys_do_not_overflow_float16():
    attn, v = torch.ones(1, 1, 1025, dtype=torch.float16), torch.full((1, 1025, 1), 80., dtype=torch.float16)
    total = attn.sum(dim=-1, keepdim=True)
    assert torch.isinf(attn @ v).all(), 'or there would be nothing to avoid'
    assert SpikingAttention.weighted_mean(None, attn, v, total).item() == pytest.approx(80, rel=1e-2)


def shift_keys_(layer, constant):
    """Add a constant to every key, by the bias of the projection."""
    with torch.no_grad():
        layer.qkv.bias.view(3, 16)[1] += constant


def test_a_constant_added_to_all_keys_changes_nothing():
    # softmax is blind to it, and so are keys that are centred before they fire
    config = SFNConfig(levels=16)
    layer, source, x = attention(config)
    constant = torch.linspace(-8, 8, 16)
    shift_keys_(source, constant)
    with torch.no_grad():
        out = layer(x)
        shifted = calibrate_(spiking_(source, config), x, config)
        assert relative_error(shifted(x), out) < 1e-3
        shifted.k_neuron.center.zero_()  # without it the constant takes up the levels
        assert relative_error(shifted(x), out) > 1e-2


def test_one_large_constant_key_channel_costs_no_levels():
    # an offset that is common to all keys, as trained networks have in a few channels
    config = SFNConfig(levels=32)
    layer, source, x = attention(config)
    with torch.no_grad():
        error = relative_error(layer(x), source(x))
        shift_keys_(source, torch.eye(16)[3] * 100)
        reference = source(x)
        shifted = calibrate_(spiking_(source, config), x, config)
        assert relative_error(shifted(x), reference) < 1.5 * error + 1e-3


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'deit_tiny_patch16_224'])
def test_timm_models_convert(name):
    source = timm.create_model(name, img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2, num_classes=5)
    model = spiking_(copy.deepcopy(randomise_(source)))
    with torch.no_grad(), bypass_neurons(model):
        torch.testing.assert_close(model(images()), source(images()), rtol=1e-5, atol=1e-5)
