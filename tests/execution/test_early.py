"""Neurons that fire in the layer before: they are found where only they read what it gives, and fire the same."""
import pytest
import torch
from layer_tools import build, pixels
from timm.layers import pos_embed_sincos

from sformer import SFNConfig, convert, to_integer_
from sformer.execution.early import early_neurons
from sformer.execution.onnx import rotary_products

ONE_FOR_ALL = SFNConfig(127, token_scale=False)


def integers(family='vit', config=ONE_FOR_ALL, **kwargs):
    model = convert(build(family, depth=1, **kwargs), [pixels()], config)
    to_integer_(model)
    return model


@pytest.mark.parametrize('config', [ONE_FOR_ALL, SFNConfig(8, token_scale=False, silence=0.03)])
def test_they_fire_what_they_would_have_fired_later(config):
    model = integers(config=config)
    neurons, fired = early_neurons(model)
    attention = model.blocks[0].attn
    product = attention.products[0]
    assert fired == {product.q_neuron, product.k_neuron, product.v_neuron} and [*neurons] == ['blocks.0.attn.qkv']
    current = 3 * torch.randn(2, 17, attention.qkv.out_features, generator=torch.Generator().manual_seed(0))

    def moved(x):  # as timm's attention does
        return x.view(2, 17, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    early = moved(neurons['blocks.0.attn.qkv'].encode(current).levels)
    for neuron, x, levels in zip((product.q_neuron, product.k_neuron, product.v_neuron), moved(current), early,
                                 strict=True):
        expected = neuron.encode(x).levels
        assert (levels == expected).float().mean() > 0.9999 and expected.unique().numel() > 8


@pytest.mark.parametrize('family, config, kwargs, layers', [
    ('vit', SFNConfig(), {}, []),  # thresholds of queries and keys follow the token, and values are a part of the same
    ('eva02', SFNConfig(), dict(qkv_fused=False), ['v_proj']),
    ('eva02', ONE_FOR_ALL, dict(qkv_fused=False), ['v_proj']),  # queries and keys are turned first
    ('eva02', ONE_FOR_ALL, {}, []), ('qk norm', ONE_FOR_ALL, {}, []),
    ('beit', ONE_FOR_ALL, {}, []),  # adds its bias in place
])
def test_only_neurons_of_what_is_not_changed_on_its_way_fire_early(family, config, kwargs, layers):
    model = integers(family, config, **kwargs)
    neurons, fired = early_neurons(model)
    assert [name.rpartition('.')[2] for name in neurons] == layers
    assert fired == {model.blocks[0].attn.products[0].v_neuron for _ in layers}


def test_what_something_else_reads_as_well_stays_a_current():
    model = integers()
    product = model.blocks[0].attn.products[0]
    product.register_forward_pre_hook(lambda product, args: print(args[0].sum()))
    assert early_neurons(model) == ({}, set())


def test_a_layer_that_is_called_twice_fires_for_one_product_only():
    model = integers()
    model.blocks.append(model.blocks[0])
    assert early_neurons(model) == ({}, set())


def test_rotary_embeddings_turn_by_a_product_only_while_a_graph_is_made():
    x, rot = torch.randn(2, 3, 5, 8), pos_embed_sincos.rot
    with pytest.raises(RuntimeError), rotary_products():
        assert pos_embed_sincos.rot is not rot and torch.equal(pos_embed_sincos.rot(x), rot(x))
        raise RuntimeError
    assert pos_embed_sincos.rot is rot
