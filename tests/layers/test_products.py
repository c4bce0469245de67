"""The products: what enters each of them is an integer times a step, in every family, and nothing else multiplies."""
import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from layer_tools import FAMILIES, build, hooked, pixels, relative_error, rng, spiking, watch_products
from torch.utils._python_dispatch import TorchDispatchMode

from sformer import FitConfig, SFNConfig, named_neurons, source_view, spiking_
from sformer.layers import AttentionProduct, products
from sformer.neurons import MAX_LEVEL, MAX_WIDE_LEVEL, CurrentStatistics, GradedCoding, ScaleAndFire


def attention(levels=32, v_dim=8, config=None, seed=0, keys=6):
    """A fitted attention product, and q, k, v."""
    product = AttentionProduct(2, 8, v_dim, config or SFNConfig(levels=levels))
    sizes = (6, 8), (keys, 8), (keys, v_dim)
    q, k, v = (torch.randn(3, 2, *size, generator=rng(seed + i)) for i, size in enumerate(sizes))
    for neuron, x in ((product.q_neuron, q), (product.k_neuron, k), (product.v_neuron, v)):
        statistics = neuron.statistics()
        statistics.update(x)
        neuron.fit(statistics)
    statistics = product.attn_neuron.statistics()
    if statistics is not None:
        statistics.update(products.softmax_numerators(q * 8 ** -0.5 @ k.transpose(-2, -1)))
    product.attn_neuron.fit(statistics)
    return product, q, k, v


# every family

@pytest.mark.parametrize('family, levels', [('vit', 4), *((family, 32) for family in FAMILIES)])
def test_what_enters_a_product_is_an_integer_times_a_step(family, levels):
    model = spiking(build(family), pixels(), SFNConfig(levels=levels))
    watch, count = watch_products(model, pixels(3, seed=5))
    assert not watch.analog, 'an operand was no spikes'
    assert watch.count == count, 'a product that no neuron is in front of'
    neurons = dict(named_neurons(model))
    assert Counter(operand.neuron for operand in watch.seen) == Counter(neurons.keys())  # each once
    for operand in watch.seen:  # and the watch has compared the tensor with these levels
        neuron = neurons[operand.neuron]
        assert operand.levels.dtype == (torch.int8 if getattr(neuron, 'signed', True) else torch.int16)
        top = 128 if isinstance(neuron, GradedCoding) else MAX_LEVEL if neuron.signed else MAX_WIDE_LEVEL
        assert 0 < operand.levels.int().abs().max() <= top, operand.neuron
        off_centre = operand.tensor.double() - operand.center.double()
        k = off_centre / operand.step.double()
        assert torch.equal(k.round(), operand.levels.double()) and (k - k.round()).abs().max() < 1e-2


@pytest.mark.parametrize('fire, attention_fire', [
    ('quadratic', 'uniform'), ('power2', 'power2'), ('density', 'density')])
def test_what_enters_a_product_is_an_integer_times_a_step_whatever_the_fire_function(fire, attention_fire):
    model = spiking(build(), pixels(), SFNConfig(7, fire, attention_fire))
    watch, count = watch_products(model, pixels(3, seed=5))
    assert not watch.analog and watch.count == count == len(watch.seen) - 4  # QK^T and AV have two operands each


def test_the_watch_sees_what_is_analog():
    model = spiking(build('gated attention', depth=2), pixels())
    watch, _ = watch_products(source_view(model), pixels(3))
    assert Counter(watch.analog) == {'linear': 11, 'conv2d': 1, 'scaled_dot_product_attention': 6, 'mul': 4}
    for name in ('head.neuron', 'blocks.1.attn.gate_neuron', 'blocks.0.attn.products.0.q_neuron'):
        broken = copy.deepcopy(model)
        neuron = broken.get_submodule(name)
        neuron.forward = lambda x: x * 1.  # lets currents pass
        with pytest.raises(AssertionError, match=name):
            watch_products(broken, pixels(3))


# softmax

@pytest.mark.parametrize('levels', [1, 3, 32, 127])
@pytest.mark.parametrize('mask', [dict(), dict(is_causal=True)], ids=['free', 'causal'])
def test_rows_sum_to_one(levels, mask):
    # what is constant over all keys must pass unchanged, however coarse the spikes of softmax are
    product, q, k, _ = attention(levels)
    value = torch.linspace(-1, 1, 16).view(1, 2, 1, 8).expand(3, 2, 6, 8)
    product.v_neuron.forward = lambda v: v
    with torch.no_grad(), hooked(product.attn_neuron) as numerators:
        out = product(q, k, value, **mask)
    torch.testing.assert_close(out, value, rtol=1e-6, atol=1e-6)
    assert ((numerators[0].sum(-1) - 1).abs() > 1e-3).any()  # spikes themselves do not


@pytest.mark.parametrize('initial_potential', [0.5, 0.])
@pytest.mark.parametrize('name', ['uniform', 'quadratic', 'power2', 'density'])
def test_the_strongest_key_fires_at_the_top_level(name, initial_potential):
    for levels in (1, 2, 7) if name == 'power2' else (1, 7, 13, 26, 32, 63, 126, 127):
        config = SFNConfig(levels, attention_fire=name, initial_potential=initial_potential)
        product, q, k, v = attention(config=config)
        with torch.no_grad(), hooked(product.attn_neuron) as numerators:
            product(q, k, v)
        top = numerators[0].amax(dim=-1, keepdim=True)
        assert (top == product.attn_neuron.threshold[0] * product.attn_neuron.levels[-1]).all(), levels


@pytest.mark.parametrize('recipe', [
    dict(levels=1, scale=2.5), dict(levels=1, scale=1.01, initial_potential=0.), dict(levels=4, scale=40.),
    dict(levels=1, dead_zone=1.), dict(levels=8, dead_zone=8.),
])
def test_a_row_is_never_silent(recipe):
    # a row without spikes would be divided by a sum of zero
    product, q, k, v = attention(config=SFNConfig(**recipe))
    with torch.no_grad(), hooked(product.attn_neuron) as numerators:
        assert torch.isfinite(product(q, k, v)).all()
    assert (numerators[0].sum(-1) > 0).all()


def test_softmax_has_more_levels_than_eight_bits_can_carry():
    # a sink takes nearly all of a row: what the other keys give is small, but not nothing
    product, q, k, v = attention(127)
    q[:], k[:] = 0., 0.
    k[:, :, 0, 0], q[..., 0] = 16., 0.75  # scores of 4.2 beside 0: numerators of 1 and 0.014
    for neuron, x in ((product.q_neuron, q), (product.k_neuron, k)):
        statistics = neuron.statistics()
        statistics.update(x)
        neuron.fit(statistics)
    reference = F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad(), hooked(product.attn_neuron) as numerators:
        error = relative_error(product(q, k, v), reference)
    assert 0.005 < numerators[0][..., 1].max() < 0.03 and error < 0.01


MASKS = {
    'causal': dict(is_causal=True),
    'bool': dict(attn_mask=torch.ones(6, 6, dtype=torch.bool).tril(2)),
    'nothing for one': dict(attn_mask=(torch.arange(6) != 3)[:, None].expand(6, 6).contiguous()),
    'additive': dict(attn_mask=torch.linspace(-3, 3, 36).view(6, 6)),
    'minus infinity': dict(attn_mask=torch.zeros(6, 6).masked_fill(torch.eye(6).bool(), float('-inf'))),
    'per head': dict(attn_mask=torch.linspace(-3, 3, 72).view(1, 2, 6, 6)),
    'scale': dict(scale=0.1),
}


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('v_dim', [8, 16])
def test_attention_comes_close_to_that_of_torch(mask, v_dim):
    product, q, k, v = attention(127, v_dim)
    with torch.no_grad():
        out, reference = product(q, k, v, **MASKS[mask]), F.scaled_dot_product_attention(q, k, v, **MASKS[mask])
    assert relative_error(out, reference) < 0.03
    if mask != 'scale':
        assert relative_error(reference, F.scaled_dot_product_attention(q, k, v)) > 1e-2  # the mask matters


class _Largest(TorchDispatchMode):
    """The largest tensor that is computed."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize('mask', MASKS)
def test_blocks_of_queries_attend_as_all_of_them(mask):
    product, q, k, v = attention()
    q, k, v = (x[:2] for x in (q, k, v))
    with torch.no_grad():
        whole = product(q, k, v, **MASKS[mask])
        product.max_scores = 2 * 2 * 6 * 4  # of six rows at most four, so three and three
        with hooked(product.attn_neuron) as numerators:
            out = product(q, k, v, **MASKS[mask])
    assert [n.shape[-2] for n in numerators] == ([6] if mask == 'causal' else [3, 3])
    torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-7)


def test_memory_of_attention_does_not_grow_with_the_square_of_tokens():
    product, q, k, v = attention(keys=2048)
    q = q[:, :, :1].repeat(1, 1, 2048, 1)
    product.max_scores = 2 ** 16
    with torch.inference_mode(), _Largest() as watch:
        out = product(q, k, v)
    assert watch.numel <= 2 ** 17 < 3 * 2 * 2048 ** 2  # queries and keys themselves are below that
    assert out.shape == q.shape
    q.requires_grad_()
    with hooked(product.attn_neuron) as numerators:  # with gradients nothing is saved by blocks
        product(q, k, v).sum().backward()
    assert [n.shape[-2] for n in numerators] == [2048] and q.grad.any()


def test_an_exported_graph_has_all_queries_in_one_block():
    product, q, k, v = attention()
    product.max_scores = 1
    with torch.no_grad():
        expected = product(q, k, v)
        program = torch.export.export(product, (q, k, v))
        assert sum(node.target is torch.ops.aten.exp.default for node in program.graph.nodes) == 1
        torch.testing.assert_close(program.module()(q, k, v), expected, rtol=1e-6, atol=1e-7)


def test_a_row_that_may_see_no_key_attends_to_nothing():
    product, q, k, v = attention()
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    q.requires_grad_()
    out = product(q, k, v, attn_mask=mask)
    assert not out[:, :, 2].any() and out[:, :, 1].any()
    out.sum().backward()
    assert torch.isfinite(q.grad).all() and not q.grad[:, :, 2].any()


def test_softmax_numerators_are_those_of_softmax():
    scores = 5 * torch.randn(2, 2, 4, 7, generator=rng())
    numerators = products.softmax_numerators(scores)
    assert (numerators.amax(-1) == 1).all() and (numerators > 0).all()
    torch.testing.assert_close(numerators / numerators.sum(-1, keepdim=True), scores.softmax(-1))


def test_many_keys_do_not_overflow_float16():
    product, q, k, v = attention(keys=1025)
    q, k, v = 0 * q, 0 * k, torch.full_like(v, 80)
    product.v_neuron.forward = lambda v: v
    out = product(q.half(), k.half(), v.half())
    assert torch.isinf(torch.ones(1, 1025).half() @ v[0, 0].half()).all(), 'or there would be nothing to avoid'
    torch.testing.assert_close(out, torch.full_like(out, 80), rtol=1e-2, atol=0)


def test_dropout_is_applied_to_the_spikes_of_softmax():
    product, q, k, v = attention()
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        plain = product(q, k, v)
        assert torch.equal(product(q, k, v, dropout_p=0.), plain)
        outs = torch.stack([product(q, k, v, dropout_p=0.5) for _ in range(400)])
        assert not torch.equal(outs[0], outs[1])
        torch.testing.assert_close(outs.mean(0), plain, rtol=0, atol=0.25)  # as dropout of the softmax would
        assert not product(q, k, v, dropout_p=1.).any()


# keys

def test_a_constant_added_to_all_keys_changes_nothing():
    product, q, k, v = attention(16)
    shift = torch.linspace(-8, 8, 16).view(2, 1, 8)
    with torch.no_grad():
        out = product(q, k, v)
        shifted, _, _, _ = attention(16)
        statistics = shifted.k_neuron.statistics()
        statistics.update(k + shift)
        shifted.k_neuron.fit(statistics)
        assert relative_error(shifted(q, k + shift, v), out) < 1e-3
        product.k_neuron.center.zero_()  # without it the constant takes up the levels
        assert relative_error(product(q, k + shift, v), out) > 1e-2


def test_one_large_constant_key_channel_costs_no_levels():
    # an offset that is common to all keys, as trained networks have in a few channels
    product, q, k, v = attention(32)
    shift = torch.zeros(2, 1, 8)
    shift[1, 0, 3] = 100.
    with torch.no_grad():
        error = relative_error(product(q, k, v), F.scaled_dot_product_attention(q, k, v))
        statistics = product.k_neuron.statistics()
        statistics.update(k + shift)
        product.k_neuron.fit(statistics)
        reference = F.scaled_dot_product_attention(q, k + shift, v)
        assert relative_error(product(q, k + shift, v), reference) < 1.5 * error + 1e-3


# granularity, weights, gates

def test_granularity_of_steps():
    model = spiking_(build())
    shapes = {name.removeprefix('blocks.0.'): tuple(n.step.shape) for name, n in named_neurons(model)}
    assert shapes['attn.qkv.neuron'] == shapes['attn.proj.neuron'] == shapes['mlp.fc1.neuron'] == (32,)
    assert shapes['mlp.fc2.neuron'] == (128,) and shapes['head.neuron'] == (32,)
    assert shapes['attn.products.0.attn_neuron'] == (2, 1, 1)
    for name in ('q', 'k', 'v'):
        assert shapes[f'attn.products.0.{name}_neuron'] == (2, 1, 16)
    assert tuple(model.blocks[0].attn.products[0].k_neuron.center.shape) == (2, 1, 16)
    assert isinstance(model.patch_embed.proj.neuron, GradedCoding)
    unsigned = [name for name, n in named_neurons(model) if isinstance(n, ScaleAndFire) and not n.signed]
    assert unsigned == [f'blocks.{i}.attn.products.0.attn_neuron' for i in range(2)]


def fitted(x, levels=32):
    neuron = ScaleAndFire((x.shape[-1],), SFNConfig(levels))
    statistics = CurrentStatistics((x.shape[-1],), True)
    statistics.update(x)
    neuron.fit(statistics)
    return neuron


def test_linear_is_the_product_of_spikes_and_folded_weights():
    x = torch.randn(7, 6, generator=rng(3)) * torch.logspace(-2, 2, 6)
    weight, bias, neuron = torch.randn(5, 6, generator=rng(4)), torch.randn(5, generator=rng(5)), fitted(x, 4)
    spikes = neuron.encode(x)
    out = spikes.levels.double() @ (weight * spikes.step).double().T + bias  # one integer product
    torch.testing.assert_close(products.linear(neuron, x, weight, bias), out.float())


def test_multiply_is_the_product_of_two_spikes():
    a, b = (torch.randn(7, 6, generator=rng(i)) for i in (3, 4))
    a_neuron, b_neuron = fitted(a), fitted(b, 8)
    integers = a_neuron.encode(a).levels.int() * b_neuron.encode(b).levels.int()
    torch.testing.assert_close(products.multiply(a_neuron, a, b_neuron, b), integers * a_neuron.step * b_neuron.step)


def test_heads_that_share_keys_share_their_octaves():
    """Keys fire once for all heads of a group, though what their queries would have of them differs."""
    product = AttentionProduct(4, 8, config=SFNConfig(16), group_size=2)
    k, v = (torch.randn(3, 2, 6, 8, generator=rng(i)).repeat_interleave(2, 1) for i in (1, 2))
    q = torch.randn(3, 4, 6, 8, generator=rng(3)) * 2. ** torch.randint(-4, 5, (4, 1, 8), generator=rng(4))
    neurons = dict(q_neuron=q, k_neuron=k, v_neuron=v)
    statistics = {name: product.get_submodule(name).statistics() for name in (*neurons, 'attn_neuron')}
    for name, x in neurons.items():
        statistics[name].update(x)
    product.fit_neurons(statistics, FitConfig())
    octaves = product.k_neuron.step.log2().unflatten(0, (2, 2))
    assert torch.equal(octaves[:, 0], octaves[:, 1]) and not torch.equal(octaves[0], octaves[1])
    size_q, size_k = (x.square().mean((0, 2)).sqrt().log2() for x in (q, k))  # per head and channel
    for group in (slice(0, 2), slice(2, 4)):
        wanted = ((size_q - size_k)[group] / 2).mean(0)
        expected = -(wanted - wanted.mean()).round()
        found = product.k_neuron.step[group][0, 0].log2()
        torch.testing.assert_close(found - found[0], expected - expected[0])
    levels = product.k_neuron.encode(k).levels.unflatten(1, (2, 2))
    assert torch.equal(levels[:, :, 0], levels[:, :, 1])
    steps = product.q_neuron.step * product.k_neuron.step
    torch.testing.assert_close(steps, steps[..., :1].expand_as(steps))
    assert relative_error(product(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 0.2


def test_dead_zones_leave_steps_of_queries_and_keys_one_product():
    config = SFNConfig(8, silence=0.1)
    product = AttentionProduct(2, 8, config=config)
    q, k, v = (torch.randn(3, 2, 6, 8, generator=rng(i)) for i in (1, 2, 3))
    neurons = dict(q_neuron=q, k_neuron=k, v_neuron=v)
    for neuron in (product.q_neuron, product.k_neuron):
        neuron.set_quiet(torch.linspace(0, 4, 8).expand(neuron.step.shape))  # of some channels, beyond all currents
    statistics = {name: product.get_submodule(name).statistics() for name in (*neurons, 'attn_neuron')}
    for name, x in neurons.items():
        statistics[name].update(x)
    product.fit_neurons(statistics, FitConfig())
    steps = product.q_neuron.step * product.k_neuron.step
    torch.testing.assert_close(steps, steps[..., :1].expand_as(steps))
