"""Reconstruction: weights of each block follow those of the source; no labels, and a record that says so."""
import copy

import pytest
import timm
import torch
from layer_tools import build, pixels, randomise_, relative_error, same_state, state_of

from sformer import (
    FitConfig,
    SFNConfig,
    SFormerError,
    calibrate_,
    convert,
    load_model,
    save_model,
    source_of,
    source_view,
    spiking_,
)
from sformer.conversion import changed, importance, reconstruction
from sformer.conversion.importance import Importance, importance_of
from sformer.conversion.reconstruction import block_names, reconstruct_

HIGH = FitConfig(effort='high')
FEW = SFNConfig(levels=2)


def run(network, batch):
    return network(batch)


@pytest.fixture(scope='module', autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, 'STEPS', 8)
        patch.setattr(reconstruction, 'LEARNING_RATE', 1e-3)
        yield


@pytest.fixture(scope='module')
def trained():
    """A source, what it was converted to, what that was trained to, and what came of each block."""
    source, x = build(), pixels(16)
    plain = convert(source, [x], FEW)
    model = copy.deepcopy(plain)
    return source, plain, model, reconstruct_(model, source, [x], run)


def test_no_block_ends_further_from_its_source(trained):
    _, plain, model, found = trained
    assert [result.name for result in found] == ['blocks.0', 'blocks.1']
    assert all(result.after <= result.before for result in found) and found[0].after < 0.95 * found[0].before
    moved = [not same_state(model.get_submodule(result.name), state_of(plain.get_submodule(result.name)))
             for result in found]
    assert moved == [result.after < result.before for result in found]


def test_what_was_found_is_so(trained, monkeypatch):
    """Where all blocks before are as trained, by another way than that of the training; for errors of any direction."""
    source, plain, _, _ = trained
    x = pixels(16)
    model = copy.deepcopy(plain)
    monkeypatch.setattr(Importance, 'settle', lambda self, power: None)
    found = reconstruct_(model, source, [x], run)
    with torch.no_grad():
        for i, result in enumerate(found):
            tokens, expected = (network._pos_embed(network.patch_embed(x)) for network in (model, source))
            for block, other in zip(model.blocks[:i], source.blocks[:i], strict=True):
                tokens, expected = block(tokens), other(expected)
            expected = source.blocks[i](expected)
            for network, error in ((plain, result.before), (model, result.after)):
                apart = (network.blocks[i](tokens) - expected) / expected.std(-1, correction=0, keepdim=True)
                assert importance.ANY * apart.square().mean().item() == pytest.approx(error, rel=1e-4)


def test_all_else_stays(trained):
    """Thresholds, and what is no block; and what only spikes moved is not what the source was."""
    source, plain, model, _ = trained
    inside = {name for name, _ in model.named_parameters() if name.startswith('blocks.')}
    before, now = state_of(plain), state_of(model)
    moved = {name for name, value in now.items() if not torch.equal(value, before[name])}
    assert moved and moved <= inside and same_state(source_view(plain), state_of(source))
    assert not any(p.grad is not None for p in model.parameters())


def test_conversion_says_so(tmp_path):
    source, x = build(), pixels(8)
    model, again = (convert(source, [x], FEW, HIGH) for _ in range(2))
    assert same_state(model, state_of(again))  # whatever torch's generator has done meanwhile
    plain = convert(source, [x], FEW)
    with torch.no_grad():
        assert relative_error(model(x), source(x)) < relative_error(plain(x), source(x))
    loaded = load_model(save_model(model, tmp_path / 'm'))
    for network in (model, loaded):
        assert changed(network) == network.conversion.changed == ('reconstructed',)
        assert network.conversion.fit.effort == 'high'
        with pytest.raises(SFormerError, match='were trained block by block to follow its source'):
            source_of(network)
    assert same_state(loaded, state_of(model))


@pytest.mark.parametrize('fit', [dict(balance=True), dict(compensate=True)])
def test_beside_what_else_moves_weights(fit):
    """What is followed is the source, not what compensates for its neurons."""
    source, x = build(depth=1), pixels(8)
    config = SFNConfig(levels=2, lateral=2, silence=0.01)
    plain = convert(source, [x], config, FitConfig(**fit))
    model = convert(source, [x], config, FitConfig(**fit, effort='high'))
    assert {*changed(model)} == {*changed(plain), 'reconstructed'} and len(changed(model)) == 2


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Bypassed(torch.nn.Module):
    """What the first block gives goes past the second one, to the third."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 16, 8, 8)
        self.blocks = torch.nn.ModuleList(Pair() for _ in range(3))
        randomise_(self)

    def forward(self, x):
        x = self.blocks[0](self.embed(x).flatten(2).mT)
        return self.blocks[2](x + self.blocks[1](x))


HIERARCHY = dict(
    img_size=32, num_classes=7, patch_size=2, window_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2))


@pytest.mark.parametrize('source, names', [
    (lambda: build('eva02', depth=2), ['blocks.0', 'blocks.1']),  # whose blocks are told positions
    (lambda: timm.create_model('swin_tiny_patch4_window7_224', **HIERARCHY).eval(),
     ['layers.0.blocks.0', 'layers.1.blocks.0', 'layers.1.blocks.1']),
    (lambda: timm.create_model('resnet10t', num_classes=7, stem_width=8, channels=(8, 8, 8, 8)).eval(),
     [f'layer{i}.0' for i in (1, 2, 3, 4)]),
    (Bypassed, ['blocks.0', 'blocks.1'])], ids=['eva02', 'swin', 'resnet', 'bypassed'])
def test_blocks_of_other_networks(source, names, caplog):
    source, x = source(), pixels(8)
    module = spiking_(copy.deepcopy(source), FEW)
    calibrate_(module, [x])
    assert block_names(module)[:len(names)] == names
    found = reconstruct_(module, source, [x], run)
    assert [result.name for result in found] == names
    assert all(result.after <= result.before for result in found)
    assert any(result.after < result.before for result in found)
    left = [name for name in block_names(module) if name not in names]
    assert left == (['blocks.2'] if 'blocks.2 reads more than what the block before it gives' in caplog.text else [])


def test_what_has_no_blocks_is_refused():
    source = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.Flatten(), torch.nn.Linear(128, 4)).eval()
    module = spiking_(copy.deepcopy(source), FEW)
    with pytest.raises(SFormerError, match='no blocks in a row that can be trained .*: leave out effort=high'):
        calibrate_(module, [pixels(8)], HIGH)
    assert same_state(source_view(module), state_of(source))


def test_frozen_weights_and_those_of_others_stay():
    source, x = build(), pixels(8)
    source.blocks[1].mlp.fc1.weight = source.blocks[0].mlp.fc1.weight
    source.blocks[0].norm1.requires_grad_(False)
    model = convert(source, [x], FEW, HIGH)
    for name in ('blocks.0.mlp.fc1.weight', 'blocks.0.norm1.weight', 'head.weight', 'pos_embed'):
        assert torch.equal(model.get_parameter(name), source.get_parameter(name))
    assert not torch.equal(model.blocks[0].mlp.fc1.bias, source.blocks[0].mlp.fc1.bias)
    for frozen in (build().requires_grad_(False), build().double().bfloat16()):
        with pytest.raises(SFormerError, match='no weight of a block can be trained: all are frozen'):
            convert(frozen, [x], FEW, HIGH)


def test_what_diverges_is_an_error_that_leaves_weights_as_they_were(monkeypatch):
    source = build()
    before = state_of(source)
    monkeypatch.setattr(reconstruction, 'LEARNING_RATE', 1e30)
    with pytest.raises(SFormerError, match=r'the error of blocks\.0 is not finite: leave out effort=high'):
        convert(source, [pixels(8)], FEW, FitConfig(effort='high', balance=True), inplace=True)
    assert same_state(source, before)


def test_memory_is_bounded(monkeypatch):
    source, x = build(), pixels(24)
    plain = convert(source, [x], FEW)
    model, other = (copy.deepcopy(plain) for _ in range(2))
    monkeypatch.setattr(reconstruction, 'HELD_BYTES', reconstruction.HELD * 8 * 17 * 32 * 4)  # 8 images of 17 tokens
    reconstruct_(model, source, [x], run)
    reconstruct_(other, source, [x[:8]], run)
    assert same_state(model, state_of(other))


@torch.no_grad()
def test_what_errors_cost():
    """Small errors of what a block gives cost as much as is said: of tokens, each of a class of its own."""
    source, x = build(depth=1), pixels(64)
    cost = importance_of(source, ['blocks.0'], [*x.split(8)], run)['blocks.0']
    tokens = source._pos_embed(source.patch_embed(x))
    target = source.blocks[0](tokens)
    errors = []
    for part in (slice(0, 1), slice(1, None)):
        noise = torch.zeros_like(target)
        noise[:, part] = 1e-3 * torch.randn(noise[:, part].shape, generator=torch.Generator().manual_seed(1))
        out = source.forward_head(source.norm(target + noise))
        found = cost.error(target + noise, target) - importance.ANY * (
            noise / target.std(-1, correction=0, keepdim=True)).square().mean()
        errors.append((found.item(), relative_error(out, source(x)) ** 2))
    assert errors[0][0] == pytest.approx(errors[0][1], rel=0.3) and errors[1] == (pytest.approx(0, abs=1e-9), 0)


def test_maps_have_a_number_per_element():
    cost = Importance()
    for size in (4, 4, 6):  # the last is left out
        cost.add(torch.full((2, 3, size, size), 2.))
    cost.settle(8.)
    out = torch.zeros(1, 3, 4, 4)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    any_error = importance.ANY * (target / target.std((1, 2, 3), correction=0, keepdim=True)).square().mean()
    assert torch.allclose(cost.error(out, target), 2 * target.square().sum() + any_error)
    other = torch.ones(1, 3, 6, 6)
    assert cost.error(other, other) == 0 and 0 < cost.error(0 * other, other) < float('inf')
