"""Attention within windows is attention under a mask, on fewer scores; on spikes as without."""
import copy

import pytest
import timm
import torch
from layer_tools import relative_error, rng
from timm import layers as tl
from timm.models import eva
from torch import nn

from sformer import SFormerError, calibrate_, named_neurons, source_of, spiking_
from sformer.layers import token_grid, windowed_

PREFIX, DIM = 2, 32
KINDS = {
    'vit': lambda: tl.Attention(DIM, 2, qkv_bias=True),
    'vit, gated': lambda: tl.Attention(DIM, 2, qkv_bias=True, gated=True),
    'rope': lambda: tl.AttentionRope(DIM, 2, num_prefix_tokens=PREFIX),
    'eva': lambda: eva.EvaAttention(DIM, 2, num_prefix_tokens=PREFIX, qkv_fused=False, norm_layer=nn.LayerNorm),
}


def attention(kind, size):
    """Attention over all tokens and the same within windows."""
    torch.manual_seed(0)
    layer = KINDS[kind]().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer, windowed_(copy.deepcopy(layer), size, PREFIX)


def tokens(height, width, seed=1):
    return torch.randn(3, PREFIX + height * width, DIM, generator=rng(seed))


def rope(kind, height, width, heads=None):
    """Rotary embedding of a map, if the layer has one."""
    if kind not in ('rope', 'eva'):
        return {}
    made = tl.RotaryEmbeddingCat(DIM // 2, in_pixels=False).get_embed((height, width))
    if heads is not None:  # each with its own
        made = torch.stack([made.roll(i, 0) for i in range(heads)])
    return dict(rope=made)


def visible(height, width, size):
    """Mask (tokens, tokens) of prefix tokens and those of the same window."""
    y, x = torch.arange(height).div(size, rounding_mode='floor'), torch.arange(width).div(size, rounding_mode='floor')
    window = (y[:, None] * 1000 + x).flatten()
    mask = torch.ones(PREFIX + height * width, PREFIX + height * width, dtype=torch.bool)
    mask[PREFIX:, PREFIX:] = window[:, None] == window
    return mask


@torch.no_grad()
@pytest.mark.parametrize('size', [6, 50])
@pytest.mark.parametrize('kind', KINDS)
def test_a_window_as_large_as_the_map_is_global_attention(kind, size):
    whole, windowed = attention(kind, size)
    x = tokens(4, 6)
    with token_grid(4, 6):
        torch.testing.assert_close(windowed(x, **rope(kind, 4, 6)), whole(x, **rope(kind, 4, 6)))


@torch.no_grad()
@pytest.mark.parametrize('heads', [None, 2])
@pytest.mark.parametrize('kind', KINDS)
def test_patches_see_their_window_and_the_prefix(kind, heads):
    whole, windowed = attention(kind, 2)
    x = tokens(4, 6)
    with token_grid(4, 6):
        out = windowed(x, **rope(kind, 4, 6, heads))
    expected = whole(x, attn_mask=visible(4, 6, 2), **rope(kind, 4, 6, heads))
    torch.testing.assert_close(out[:, PREFIX:], expected[:, PREFIX:], rtol=1e-4, atol=1e-5)
    assert relative_error(out[:, PREFIX:], whole(x, **rope(kind, 4, 6))[:, PREFIX:]) > 0.05  # or windows do nothing
    # what a prefix token sees in each of the six windows, in the mean
    means = []
    for y in range(0, 4, 2):
        for left in range(0, 6, 2):
            inside = [(y + i) * 6 + left + j for i in range(2) for j in range(2)]
            part = x[:, [0, 1, *(PREFIX + i for i in inside)]]
            own = {key: value[..., inside, :] for key, value in rope(kind, 4, 6, heads).items()}
            means.append(whole(part, **own)[:, :PREFIX])
    torch.testing.assert_close(out[:, :PREFIX], torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_zeros_fill_up_windows_at_the_border(kind):
    whole, windowed = attention(kind, 3)
    x = tokens(4, 5)
    filled = torch.zeros(3, 6, 6, DIM)
    filled[:, :4, :5] = x[:, PREFIX:].unflatten(1, (4, 5))
    filled = torch.cat([x[:, :PREFIX], filled.flatten(1, 2)], 1)
    with token_grid(4, 5):
        out = windowed(x, **rope(kind, 4, 5))
    place = [min(y, 3) * 5 + min(x, 4) for y in range(6) for x in range(6)]
    own = {key: value[place] for key, value in rope(kind, 4, 5).items()}
    expected = whole(filled, attn_mask=visible(6, 6, 3), **own)
    expected = expected[:, PREFIX:].unflatten(1, (6, 6))[:, :4, :5].flatten(1, 2)
    torch.testing.assert_close(out[:, PREFIX:], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('height, width, size', [(4, 6, 2), (5, 7, 3), (3, 3, 9), (1, 8, 3), (2, 2, 1)])
def test_windows_are_joined_as_they_were_split(height, width, size):
    _, windowed = attention('vit', size)
    x = tokens(height, width)
    with token_grid(height, width):
        torch.testing.assert_close(windowed.join(windowed.split(x)), x)


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_on_spikes(kind):
    _, windowed = attention(kind, 2)
    x, given = tokens(4, 6), rope(kind, 4, 6)
    with token_grid(4, 6):
        expected = windowed(x, **given)
        spiking = nn.Sequential(copy.deepcopy(windowed))
        spiking_(spiking)
        assert {**spiking[0].state_dict()}.keys() >= windowed.state_dict().keys() == KINDS[kind]().state_dict().keys()
        calibrate_(spiking, [x], forward_fn=lambda network, x: network[0](x, **given))
        assert relative_error(spiking[0](x, **given), expected) < 0.08
        assert any(True for _ in named_neurons(spiking))
        torch.testing.assert_close(source_of(spiking)[0](x, **given), expected, rtol=0, atol=0)


def test_what_has_no_windows_is_named():
    block = timm.create_model('beit_base_patch16_224', embed_dim=32, depth=1, num_heads=2).blocks[0]
    with pytest.raises(SFormerError, match='beit.Attention has no windows: timm.layers.attention.Attention, '):
        windowed_(block.attn, 14, 1)
