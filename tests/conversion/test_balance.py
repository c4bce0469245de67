"""Balanced transforms: the least noise, the same function, and a record that says so."""
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_tools import FAMILIES, build, pixels, relative_error, rng, same_state, state_of
from neuron_tools import prop

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
from sformer.conversion import changed
from sformer.conversion.balance import balanced, flat
from sformer.conversion.search import Bench
from sformer.layers.heads import head_weights

BALANCE = FitConfig(balance=True)


@prop
@given(st.integers(1, 96))
def test_flat_matrices_are_orthogonal_and_flat(size):
    f = flat(size)
    assert f.shape == (size, size)
    torch.testing.assert_close(f @ f.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    if size & (size - 1) == 0:
        torch.testing.assert_close(f.abs(), torch.full_like(f, size ** -0.5))
    assert f.abs().max() <= (2 / size) ** 0.5 + 1e-12


def noise(a, power, cost):
    inverse = torch.linalg.inv(a)
    return ((a @ power @ a.T).diagonal() * (inverse.T @ cost @ inverse).diagonal()).sum().item()


@prop
@given(st.integers(0, 999), st.sampled_from([4, 8, 12]))
def test_no_transform_makes_less_noise(seed, size):
    def matrix(seed):
        x = torch.randn(3 * size, size, generator=rng(seed)).double() * torch.logspace(0, -0.7, size).double()
        return x.T @ x
    power, cost = matrix(seed), matrix(seed + 1)
    a = balanced(power, cost)
    least = noise(a, power, cost)
    root = torch.linalg.cholesky(power)
    if size != 12:
        bound = torch.linalg.eigvalsh(root.T @ cost @ root).clamp_min(0).sqrt().sum().item() ** 2 / size
        assert least == pytest.approx(bound, rel=1e-6)
    for i in range(20):
        other = a + 0.1 * a.abs().mean() * torch.randn(size, size, generator=rng(i)).double()
        assert noise(other, power, cost) > (1 - 1e-9 if size != 12 else 0.9) * least
    assert noise(torch.eye(size, dtype=torch.float64), power, cost) > least


def test_of_what_is_never_there_nothing_is_turned():
    zero, one = torch.zeros(4, 4).double(), torch.eye(4).double()
    assert torch.equal(balanced(zero, one), one) and torch.equal(balanced(one, zero), one)


# what of a family is balanced: queries and keys, values
EXPECTED = {
    'vit': (True, True), 'deit distilled': (True, True), 'beit': (True, True), 'beit v2': (True, True),
    'eva02': (False, True), 'eva02 fused': (False, True), 'res post': (True, True), 'qk norm': (False, True),
    'inner norms': (True, False), 'glu mlp': (True, True), 'swiglu': (True, True), 'map pooling': (True, True),
    'gated attention': (True, False), 'gated rope attention': None, 'differential': None, 'parallel scaling': None,
    'parallel scaling fused': None, 'differential parallel scaling': None, 'parallel things': (True, True)}


@pytest.mark.parametrize('family', [
    name if name in ('vit', 'beit v2', 'eva02', 'eva02 fused', 'qk norm', 'gated attention', 'parallel things')
    else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
@torch.no_grad()
def test_every_family_computes_what_it_did(family):
    source = build(family)
    spiking = spiking_(copy.deepcopy(source), SFNConfig())
    found = [(layer.queries is not None, layer.values is not None) for _, layer in head_weights(spiking)]
    if EXPECTED[family] is None and not any(any(pair) for pair in found):
        with pytest.raises(SFormerError, match='balance'):
            calibrate_(spiking, [pixels(8)], BALANCE)
        return
    assert {*found} == {EXPECTED[family]}
    calibrate_(spiking, [pixels(8)], BALANCE)
    assert changed(spiking) == ('balanced',)
    images = pixels(4, seed=3)
    assert relative_error(source_view(spiking)(images), source(images)) < 2e-5
    assert not same_state(source_view(spiking), state_of(source))


@torch.no_grad()
def test_few_levels_are_closer_to_the_source(source, digits):
    images = digits[0][:128]
    plain, better = (relative_error(convert(source, 'digits', SFNConfig(4), fit, split='train')(images), source(images))
                     for fit in (FitConfig(), BALANCE))
    assert better < plain


def test_the_record_says_so_and_the_network_inside_is_taken(tmp_path, caplog):
    source = build()
    model = convert(source, [pixels(8)], SFNConfig(8), BALANCE)
    loaded = load_model(save_model(model, tmp_path / 'm'))
    for network in (model, loaded):
        assert changed(network) == ('balanced',) and network.conversion.fit.balance
        with pytest.raises(SFormerError, match='balanced'):
            source_of(network)
    caplog.clear()
    again = convert(loaded, [pixels(8)], SFNConfig(8))
    bench = Bench(loaded, pixels(8), pixels(4))
    assert changed(again) == ('balanced',) and not caplog.records
    with torch.no_grad():
        assert relative_error(bench.expected, source(pixels(4))) < 2e-5


def test_weights_stay_where_calibration_fails():
    source = build()
    before = state_of(source)
    with pytest.raises(SFormerError):
        convert(source, [pixels(8), torch.full((8, 3, 32, 32), float('nan'))] * 9, SFNConfig(8), BALANCE, inplace=True)
    assert same_state(source, before)


def test_what_others_read_stays():
    source = build()
    source.blocks[1].attn.qkv.weight = source.blocks[0].attn.qkv.weight
    spiking = spiking_(source, SFNConfig())
    assert not list(head_weights(spiking))
