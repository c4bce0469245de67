"""scripts/read_export.py: logits of an SFormer by its file alone, beside those of `to_integer_`."""
import copy
import functools
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from layer_tools import build, pixels

from sformer import SFNConfig, convert, named_neurons, to_integer_
from sformer.execution import export_safetensors
from sformer.layers import named_products

ROOT = Path(__file__).parents[1]

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / 'scripts')
    script = importlib.import_module('read_export')


def fired_by(network, images):
    """What a network in integers gives, and the levels that each of its neurons fires."""
    levels = {}

    def keep(name, encode, x):
        spikes = encode(x)
        levels[name] = spikes.levels.numpy()
        return spikes

    def fire(neuron, args):
        neuron.encode(args[0])
    for name, neuron in named_neurons(network):
        neuron.encode = functools.partial(keep, name, neuron.encode)
    for _, layer, products in named_products(network):
        if not layer.executed:  # such as attention, which calls its neurons by their float form
            for neuron in {neuron for product in products for neuron in product.operands}:
                neuron.register_forward_pre_hook(fire)
    with torch.inference_mode():
        return network(images).numpy(), levels


NETWORKS = {
    'default': ({}, SFNConfig()),
    'fast': ({}, SFNConfig.recipe('fast')),
    'few levels, qk norm': (dict(qk_norm=True), SFNConfig(8)),
    'silent, registers': (dict(reg_tokens=2, no_embed_class=True), SFNConfig(16, silence=0.02)),
    'floor, mean of tokens': (dict(global_pool='avg', class_token=False), SFNConfig(9, initial_potential=0.)),
    'LayerScale, norms': (dict(init_values=0.5, pre_norm=True, scale_mlp_norm=True, scale_attn_norm=True),
                          SFNConfig(32, dead_zone=0.8)),
    'density, no classes': (dict(num_classes=0), SFNConfig(12, fire='density', attention_fire='density'))}


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('max_error', [0.03, 0.])
def test_logits_are_those_of_integers(name, max_error, tmp_path, monkeypatch):
    arguments, config = NETWORKS[name]
    model = convert(build('vit', depth=2, **arguments), [pixels()], config)
    reports = export_safetensors(model, tmp_path / 'm.safetensors', max_error=max_error)
    assert {report.integer for report in reports} == {max_error > 0}
    network = copy.deepcopy(model)
    to_integer_(network, max_error)
    images = pixels(4, seed=3)
    expected, levels = fired_by(network, images)
    reader = script.Network(tmp_path / 'm.safetensors')
    unequal = {}

    def fire(neuron, x):
        """What float rounding moved over a boundary is put right, or it would move more in the layers that follow."""
        k, row = type(reader).fire(reader, neuron, x)
        unequal[neuron] = (k != levels[neuron]).mean()
        return levels[neuron].astype('f8'), row
    monkeypatch.setattr(reader, 'fire', fire)
    actual = reader(images.numpy())
    assert unequal.keys() == {name for name, _ in named_neurons(model)}
    assert np.mean(list(unequal.values())) < 1e-4
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_images_to_classes(tmp_path, capsys, monkeypatch):
    model = convert(build('vit'), [pixels()], SFNConfig())
    export_safetensors(model, tmp_path / 'm.safetensors')
    np.save(tmp_path / 'images.npy', pixels(4).numpy())
    logits = script.Network(tmp_path / 'm.safetensors')(pixels(4).numpy())
    to_integer_(model)
    with torch.inference_mode():
        assert np.abs(logits - model(pixels(4)).numpy()).max() < 0.05 * np.abs(logits).max()
    source = Path(script.__file__).read_text(encoding='utf-8')
    monkeypatch.setattr(sys, 'argv', ['read_export.py', str(tmp_path / 'm.safetensors'), str(tmp_path / 'images.npy')])
    exec(compile(source, 'read_export.py', 'exec'), {'__name__': '__main__'})
    assert capsys.readouterr().out == f'{logits.argmax(1)}\n'


@pytest.mark.parametrize('family, word', [('eva02', 'Eva'), ('glu mlp', 'gate'), ('differential', 'DiffAttention')])
def test_networks_that_are_not_read_are_refused(family, word, tmp_path):
    export_safetensors(convert(build(family), [pixels()], SFNConfig()), tmp_path / 'm.safetensors')
    with pytest.raises(SystemExit, match=word):
        script.Network(tmp_path / 'm.safetensors')


def test_the_reader_is_short():
    assert Path(script.__file__).read_text(encoding='utf-8').count('\n') <= 100
