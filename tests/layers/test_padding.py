"""Padded tokens of images of different sizes: they neither fire nor count, and change nothing."""
import copy

import pytest
import timm
import torch
from layer_tools import randomise_, rng

import sformer
from sformer.layers import named_neurons
from sformer.profiling import profile_model

PATCH = 4
SMALL = dict(patch_size=PATCH, embed_dim=32, depth=2, num_heads=2, num_classes=5)
FAMILIES = {
    'average': ('naflexvit_base_patch16_gap', {}),
    'attention pool': ('naflexvit_base_patch16_map', {}),
    'rotary, gated': ('naflexvit_base_patch16_gap', dict(attn_type='eva', swiglu_mlp=True, rope_type='axial')),
    'Gemma': ('gemma4_vit_167m', dict(head_dim=16, intermediate_size=64)),
}


@pytest.fixture(scope='module', params=FAMILIES)
def model(request):
    name, args = FAMILIES[request.param]
    torch.manual_seed(0)
    source = randomise_(timm.create_model(name, **SMALL, **args))
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=rng(0)) / 255
    mean, std = (torch.tensor(source.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    return sformer.convert(source, [(images - mean) / std])


def patches(rows=3, columns=2, padding=0):
    """Flat patches of two images, as NaFlex delivers them, of which the last are padding."""
    num = rows * columns
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij'), -1).flatten(0, 1)
    x = torch.rand(2, num, PATCH * PATCH * 3, generator=rng(1))
    return dict(
        patches=torch.cat([x, torch.zeros(2, padding, x.shape[-1])], 1),
        patch_coord=torch.cat([grid, torch.zeros(padding, 2, dtype=torch.long)]).expand(2, -1, -1),
        patch_valid=torch.cat([torch.ones(2, num), torch.zeros(2, padding)], 1).bool())


def test_padding_changes_nothing(model):
    with torch.no_grad():
        torch.testing.assert_close(model(patches(padding=3)), model(patches()), rtol=1e-4, atol=1e-5)


def test_padding_does_not_fire(model):
    fired = {}
    copied = copy.deepcopy(model)
    for name, neuron in named_neurons(copied):
        neuron.register_forward_hook(
            lambda neuron, args, out, name=name: fired.update({name: neuron.encode(args[0]).levels}))
    with torch.no_grad():
        copied(patches(padding=3))
    tokens = {name: levels for name, levels in fired.items() if levels.ndim > 2 and levels.shape[-2] > 1}
    assert len(tokens) >= 8 * 2
    for name, levels in tokens.items():
        assert not levels[..., -3:, :].any(), f'{name} fires where there is padding'
        assert levels[..., :-3, :].any()


def test_padding_does_not_count(model):
    padded, plain = (profile_model(model, [patches(padding=padding)]) for padding in (3, 0))
    for one, other in zip(padded.operations, plain.operations, strict=True):
        assert one.macs == other.macs and one.synaptic_operations == other.synaptic_operations, one.name
    for one, other in zip(padded.sites, plain.sites, strict=True):
        assert (one.neurons, one.activity) == (other.neurons, other.activity), one.name


def test_threads_do_not_share_padding(model):
    """What is padding for one call is none for the next one."""
    model(patches(padding=3))
    seen = []
    handle = next(neuron for name, neuron in named_neurons(model) if 'attn.' in name).register_forward_pre_hook(
        lambda neuron, args: seen.append(args[0]))
    model(torch.rand(2, 3, 16, 16, generator=rng(2)))
    handle.remove()
    assert seen[0].abs().amin() > 0
