"""Totals of a profile against counting by hand, to the unit."""
import pytest
import torch
from layer_tools import build, levels_of, pixels
from torch import nn

from sformer import SFNConfig, calibrate_, convert, spiking_
from sformer.neurons import CODINGS
from sformer.profiling import profile_model


def fired(model, images):
    """Levels of every neuron as nested lists of Python's integers, by path."""
    return {name: levels.tolist() for name, levels in levels_of(model, images).items()}


def spikes(k, coding):
    return {'unary': abs(k), 'binary': bin(k).count('1'), 'graded': int(k != 0)}[coding]


def flat(levels):
    return [k for row in levels for k in flat(row)] if isinstance(levels, list) else [levels]


@pytest.mark.parametrize('coding', CODINGS)
def test_two_layers(coding):
    torch.manual_seed(0)
    model = spiking_(nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).eval(), SFNConfig(4, token_scale=False))
    calibrate_(model, [torch.randn(32, 5)])
    x = torch.randn(6, 5)
    k = fired(model, x)
    profile = profile_model(model, x.split(4))
    by_hand = [fan_out * sum(spikes(level, coding) for level in flat(k[name]))
               for name, fan_out in (('0.neuron', 7), ('2.neuron', 3))]
    assert [o.synaptic_operations[coding] * 6 for o in profile.operations] == pytest.approx(by_hand, rel=1e-12)
    assert [o.macs for o in profile.operations] == [35, 21] and [o.weights for o in profile.operations] == [35, 21]
    assert [(f.function, f.elements) for f in profile.floating] == [('gelu', 7)]
    for site in profile.sites:
        levels = flat(k[site.name])
        assert site.histogram == {level: levels.count(level) for level in sorted(set(levels))}
        columns = list(zip(*k[site.name], strict=True))
        assert site.dead == pytest.approx(sum(not any(c) for c in columns) / len(columns))
        assert (site.bits, site.signed) == (4, True)  # -4 ... 4


@pytest.mark.parametrize('size', [None, (9, 9), (10, 9), (10, 10)])
@pytest.mark.parametrize('padding', [0, 1])
def test_a_transposed_convolution_of_the_size_that_is_asked_for(size, padding):
    """The rows that `output_size` adds at the end are added up, too: it was counted as if it had not been said."""
    class Enlarged(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 4, stride=2, padding=padding, output_padding=1)

        def forward(self, x):
            height, width = (None, None) if size is None else (n - 2 * padding + 1 for n in size)
            return self.up(x, output_size=None if size is None else (height, width))
    torch.manual_seed(0)
    model, x = spiking_(Enlarged().eval(), SFNConfig(4)), torch.randn(3, 2, 4, 4)
    calibrate_(model, [x])
    height, width = model(x).shape[-2:]
    assert height in (10 - 2 * padding, 11 - 2 * padding)
    k = fired(model, x)['up.neuron']
    operation, = profile_model(model, [x]).operations
    for coding in CODINGS:
        by_hand = 0
        for image in k:
            for channel in image:
                for i, row in enumerate(channel):
                    for j, level in enumerate(row):
                        reached = sum(0 <= 2 * i - padding + a < height and 0 <= 2 * j - padding + b < width
                                      for a in range(4) for b in range(4))
                        by_hand += 3 * reached * spikes(level, coding)
        assert round(3 * operation.synaptic_operations[coding]) == by_hand


def test_a_dead_neuron_is_seen():
    model = spiking_(nn.Sequential(nn.Linear(4, 2)).eval(), SFNConfig(4, token_scale=False))
    x = torch.randn(16, 4)
    calibrate_(model, [x])
    x[:, 1] = 0
    site, = profile_model(model, [x]).sites
    assert site.dead == 0.25 and site.activity < 1


@pytest.mark.parametrize('coding', CODINGS)
def test_a_block(coding):
    model, images = convert(build(depth=1), [pixels(8)], SFNConfig(6)), pixels(2, seed=3)
    k = fired(model, images)
    found = {o.name: round(2 * o.synaptic_operations[coding]) for o in profile_model(model, [images]).operations}

    def s(name):
        return [[[[spikes(n, coding) for n in row] for row in head] for head in image]
                for image in k[f'blocks.0.attn.products.0.{name}_neuron']]
    q, key, v, attn = s('q'), s('k'), s('v'), s('attn')
    pairs = dict.fromkeys(('QK^T', 'AV'), 0)
    for image in range(2):
        for head in range(len(q[0])):
            for i, row in enumerate(q[image][head]):
                for j, other in enumerate(key[image][head]):
                    pairs['QK^T'] += sum(a * b for a, b in zip(row, other, strict=True))
                    pairs['AV'] += attn[image][head][i][j] * sum(v[image][head][j])
    for kind, count in pairs.items():
        assert found.pop(f'blocks.0.attn.products.0 {kind}') == count
    for name, count in found.items():
        fan_out = model.get_submodule(name).weight.shape[0]
        assert count == fan_out * sum(spikes(n, coding) for n in flat(k[f'{name}.neuron']))
    assert len(found) == 6


def test_functions_on_currents():
    model = convert(build(depth=1), [pixels(8)])
    width, tokens = model.embed_dim, 1 + model.patch_embed.num_patches
    found = {(f.name, f.function): f.elements for f in profile_model(model, [pixels(3)]).floating}
    assert found['blocks.0.norm1', 'native_layer_norm'] == tokens * width
    assert found['blocks.0', 'add'] == 2 * tokens * width
    assert found['blocks.0.mlp.act', 'gelu'] == tokens * model.blocks[0].mlp.fc1.out_features
    assert found['blocks.0.attn.products.0', 'exp'] == model.blocks[0].attn.num_heads * tokens ** 2
    assert not any('neuron' in name for name, _ in found)
