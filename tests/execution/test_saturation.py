"""Products of bytes are exact on processors that add pairs of them in 16 bits, which saturate: by a bound that every
graph is held to, by an emulation of such pairs, and by the engine itself, kept from what this processor knows more."""
import copy
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from execution_tools import FAST, FEW_CONFIGS, MORE_CONFIGS, NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_tools import pixels, rng, spiking
from timm.layers import Attention

import sformer
from sformer import SFNConfig, SFormerError, export_onnx, load_onnx, spiking_, to_integer_
from sformer.execution import exported as loading
from sformer.execution import graph, integer
from sformer.execution.integer import IntegerLinear, exact_blocks, multiplies_int8
from sformer.execution.onnx import to_onnx
from sformer.execution.saturation import fits, upright, weight_limit, zero_point

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
from sformer.execution.proof import saturating  # noqa: E402

pytestmark = pytest.mark.usefixtures('operators_read_once')


def pairwise(levels, weight):
    """Sums (M, D) of products of unsigned bytes (M, C) and signed ones (C, D) as `vpmaddubsw` makes them: pairs are
    added in 16 bits, which saturate."""
    if levels.shape[1] % 2:
        levels, weight = np.pad(levels, ((0, 0), (0, 1))), np.pad(weight, ((0, 1), (0, 0)))
    products = levels[:, :, None].astype(np.int64) * weight[None]
    return np.clip(products[:, ::2] + products[:, 1::2], -2 ** 15, 2 ** 15 - 1).sum(1)


def extremes(shape, low, high, seed):
    """Integers of which many are as far from zero as can be."""
    numbers = np.random.default_rng(seed)
    chosen = numbers.integers(low, high + 1, shape)
    return np.where(numbers.random(shape) < 0.5, np.where(numbers.random(shape) < 0.5, low, high), chosen)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 128), st.integers(1, 127), st.integers(1, 9), st.integers(0, 10 ** 6))
def test_weights_within_the_limit_are_summed_exactly(below, above, columns, seed):
    limit, zero = weight_limit((-below, above)), zero_point((-below, above))
    levels, weight = extremes((5, columns), -below, above, seed), extremes((columns, 7), -limit, limit, seed + 1)
    assert zero + above <= 255 and limit >= 64
    assert (pairwise(levels + zero, weight) - zero * weight.sum(0) == levels @ weight).all()


def test_the_limit_is_tight():
    for low, high in ((-63, 63), (-64, 64), (-63, 126), (-128, 127), (0, 255), (-127, 127)):
        limit, zero = weight_limit((low, high)), zero_point((low, high))
        assert limit == 127 or 2 * (high + zero) * (limit + 1) >= 2 ** 15
    with pytest.raises(ValueError, match='levels from -128 to 128 are no byte'):
        zero_point((-128, 128))
    levels = np.full((1, 2), 255)
    assert pairwise(levels, np.full((2, 1), 65)) != 2 * 255 * 65


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 127), st.integers(1, 127), st.booleans(), st.integers(0, 10 ** 6))
def test_levels_that_fit_meet_levels_exactly(a, b, unsigned, seed):
    ranges = (0 if unsigned else -a, 2 * a if unsigned else a), (-b, b)
    if fits(*ranges):
        shift = 0 if unsigned else 128  # what engines add to signed bytes
        x, y = extremes((4, 6), *ranges[0], seed), extremes((6, 3), *ranges[1], seed + 1)
        assert (pairwise(x + shift, y) - shift * y.sum(0) == x @ y).all()
    assert fits((-63, 63), (-63, 63)) and fits((0, 255), (-63, 63))
    assert not fits((-127, 127), (-127, 127)) and not fits((0, 255), (-127, 127))


def test_channels_stand_upright():
    tops = torch.tensor([[63., 63, 126, 63], [63., 126, 63, 63]])
    flipped, levels, limits = upright(tops)
    assert flipped.tolist() == [False, True, False, False] and levels == (-63, 126)
    assert limits.tolist() == [127, 86, 86, 127]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(1, 300), st.integers(1, 127))
def test_blocks_of_columns_are_exact_in_float32(seed, columns, largest):
    weight = torch.from_numpy(extremes((6, columns), -127, 127, seed)).to(torch.int8)
    blocks = exact_blocks(weight, largest)
    assert sum(blocks) == columns
    for part in weight.split(blocks, 1):
        assert (part.abs().sum(1, dtype=torch.int64) * largest < 2 ** 24).all()


@pytest.mark.parametrize('columns', [40, 3000])
def test_both_products_of_a_linear_layer_are_exact(columns):
    inputs = 1e3 * torch.randn(4, columns, generator=rng(0))
    layer = spiking(nn.Sequential(nn.Linear(columns, 6)), inputs, SFNConfig(127))
    to_integer_(layer, portable=False)
    whole = layer[0]
    assert type(whole) is IntegerLinear
    levels = torch.from_numpy(extremes((9, whole.weight.shape[1]), -127, 127, 0)).to(torch.int8)
    whole.columns, whole.floating, whole.weight = None, None, torch.from_numpy(
        extremes(tuple(whole.weight.shape), -127, 127, 1)).to(torch.int8)
    whole.blocks = exact_blocks(whole.weight, 127)
    assert (len(whole.blocks) > 1) == (columns == 3000)
    for whole.int8 in (True, False) if multiplies_int8() else (False,):
        assert torch.equal(whole.sums(levels).long(), levels.long() @ whole.weight.long().T)
        assert f'exact sums by {"int8" if whole.int8 else "float32"} products' in repr(whole)


def network_of(layers, size, config=SFNConfig()):
    """A spiking network of some layers, that reads images (C, H, W) of a size."""
    network = nn.Sequential(*copy.deepcopy(layers)).eval()
    network.pretrained_cfg = dict(input_size=size)
    sformer.calibrate_(spiking_(network, config), [torch.randn(16, *size, generator=rng(0))])
    return network


def graph_of(network):
    """Its graph, as it is exported."""
    to_integer_(network)
    graph.to_graph_(network)
    return to_onnx(network)


@pytest.mark.parametrize('family, config, depth', NETWORKS)
def test_every_product_of_a_graph_is_within_the_bound(exported, family, config, depth):
    assert not saturating(onnx.load(exported(family, config, depth)[1]))


@pytest.mark.slow
def test_products_of_convolutions_are_within_the_bound():
    layers = (
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1), nn.Conv2d(4, 2, 1))
    assert not saturating(graph_of(network_of(layers, (3, 16, 16))))


LINEAR = (nn.Flatten(), nn.Linear(24, 6))
ATTENTION = (nn.Flatten(2), Attention(8, 2))  # channels are tokens


@pytest.mark.parametrize('layers, config, where, name, removed', [
    (LINEAR, SFNConfig(), graph, 'beside_weights', lambda k, levels, left=0: graph.beside_levels(k, (-1, 1))),
    (LINEAR, SFNConfig(127, **FAST), integer, '_weight_limit', lambda layer: 127),
    (ATTENTION, SFNConfig(127, **FAST), graph, 'fits', lambda a, b: True),
], ids=['zero point', 'weight limit', 'levels that meet levels'])
def test_the_proof_fails_where_the_bound_is_left(layers, config, where, name, removed, monkeypatch):
    monkeypatch.setattr(where, name, removed)
    assert saturating(graph_of(network_of(layers, (3, 2, 4), config)))


@pytest.fixture(scope='module')
def wants_vnni(tmp_path_factory):
    path = tmp_path_factory.mktemp('vnni') / 'model.onnx'
    export_onnx(network_of(LINEAR, (3, 2, 4), SFNConfig(127)), path, portable=False)
    return path


def test_a_graph_that_wants_vnni_is_refused_without(wants_vnni, monkeypatch):
    monkeypatch.setattr(loading, 'sums_exactly', lambda engine: True)
    assert load_onnx(wants_vnni)(torch.randn(5, 3, 2, 4)).isfinite().all()
    monkeypatch.setattr(loading, 'sums_exactly', lambda engine: False)
    with pytest.raises(SFormerError, match=r'products of bytes .* no VNNI: export the model again, without --no-port'):
        load_onnx(wants_vnni)


AS_WITHOUT_VNNI = '''
import sys
import torch
from sformer import SFormerError, load_onnx
from sformer.execution.processor import sums_exactly

if sums_exactly('openvino'):
    sys.exit(77)
vnni, file, *graphs = sys.argv[1:]
try:
    load_onnx(vnni, 'openvino')
    sys.exit('a graph that wants VNNI was loaded')
except SFormerError as e:
    assert 'no VNNI' in str(e), e
images, *expected = torch.load(file)
for path, logits in zip(graphs, expected, strict=True):
    found = load_onnx(path, 'openvino')(images)
    each = (found - logits).flatten(1).norm(dim=1) / logits.flatten(1).norm(dim=1)
    assert each.median() < 1e-3 and each.max() < 0.1, (path, each)
'''


@pytest.mark.slow
@pytest.mark.parametrize('configs', [FEW_CONFIGS, MORE_CONFIGS], ids=['few', 'more'])
def test_an_engine_kept_from_vnni_is_exact(exported, wants_vnni, tmp_path, configs):
    pytest.importorskip('openvino')
    if platform.machine() not in ('x86_64', 'AMD64'):
        pytest.skip('another processor than x86 does not saturate')
    tensors, graphs = [pixels(12)], []
    for config in configs:
        model, path = exported('vit', config, 1)
        to_integer_(model)
        with torch.no_grad():
            tensors.append(model(tensors[0]))
        graphs.append(path)
    torch.save(tensors, tmp_path / 'tensors')
    limited = dict(os.environ, ONEDNN_MAX_CPU_ISA='AVX2', PYTHONPATH=os.pathsep.join(sys.path))
    run = subprocess.run([sys.executable, '-c', AS_WITHOUT_VNNI, wants_vnni, tmp_path / 'tensors', *graphs],
                         env=limited, capture_output=True, text=True, timeout=240)
    if run.returncode == 77:
        pytest.skip('OpenVINO sums exactly here, whatever ONEDNN_MAX_CPU_ISA says')
    assert run.returncode == 0, run.stderr
