"""What all threads of a process share is changed by one of them at a time, and put back: threads export, load and fit
at once, and find what they would find alone."""
import contextlib
import logging
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_tools import build, pixels
from timm.layers import pos_embed_sincos

from sformer import SFNConfig, convert
from sformer.detection import DetectorConfig, create_detector
from sformer.errors import quiet
from sformer.execution.onnx import rotary_products
from sformer.saving.pretrained import float32_by_default


def shared():
    """What threads share, as it is."""
    return (
        [*warnings.filters], logging.getLogger('shared').level, torch.get_default_dtype(), pos_embed_sincos.rot,
        sys.stdout, torch.get_rng_state().tolist())


@contextlib.contextmanager
def bfloat16_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize('change, around', [
    (lambda: quiet('shared'), contextlib.nullcontext), (rotary_products, contextlib.nullcontext),
    (float32_by_default, bfloat16_by_default)], ids=['warnings', 'rotary embedding', 'dtype'])
def test_the_one_that_ends_last_puts_back_what_was_there(change, around):
    """Of two that overlap, were they let: the first one to begin is the first one to end."""
    entered, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def changing(index):
        with change():
            entered[index].set()
            assert leave[index].wait(20)

    with around(), ThreadPoolExecutor(2) as pool:
        before = shared()
        first = pool.submit(changing, 0)
        assert entered[0].wait(20) and shared() != before
        second = pool.submit(changing, 1)
        assert not entered[1].wait(0.2)
        leave[0].set()
        first.result()
        assert entered[1].wait(20)
        leave[1].set()
        second.result()
        assert shared() == before


def test_other_threads_turn_as_ever_while_a_graph_is_made():
    x = torch.randn(2, 5, 8)
    x[0, 0, 0] = torch.inf  # which a product makes NaN of
    expected = pos_embed_sincos.rot(x)
    with rotary_products(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: pos_embed_sincos.rot(x)).result(), expected)
        assert pos_embed_sincos.rot(x).isnan().any()


@pytest.mark.slow
def test_graphs_that_are_made_at_once_are_those_that_are_made_alone():
    pytest.importorskip('onnxscript')
    from sformer.execution import to_integer_
    from sformer.execution.graph import to_graph_
    from sformer.execution.onnx import graph_hash, to_onnx

    def network(family):
        model = convert(build(family, depth=1), [pixels()], SFNConfig(8))
        to_integer_(model)
        to_graph_(model)
        return model

    networks = [network('eva02') for _ in range(2)]
    expected = [graph_hash(to_onnx(networks[0]))] * 2
    before = shared()
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda network: graph_hash(to_onnx(network)), networks)] == expected
    assert shared() == before


def test_models_that_are_converted_at_once_are_those_that_are_converted_alone():
    sources = [build(family, depth=1) for family in ('vit', 'eva02', 'beit')]

    def state(source):
        model = convert(source, [pixels()], SFNConfig(8, silence=0.01))
        return {name: value for name, value in model.state_dict().items()}

    expected = [*map(state, sources)]
    before = shared()
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(state, sources)]
    assert shared() == before
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def test_detectors_that_are_built_at_once_are_of_their_seeds(monkeypatch):
    """The new weights of heads are drawn from torch's state, which threads share."""
    from sformer.detection import detectors
    monkeypatch.setattr(detectors, 'create_source', None)  # no weights are loaded
    monkeypatch.setattr(detectors, 'create_backbone', lambda *args: build('vit', depth=1))
    config = DetectorConfig('vit_tiny_patch16_224', {1: 'thing'}, image_size=(64, 64), channels=16, hidden=16)

    def heads(seed):
        detector = create_detector(config, seed=seed)
        return torch.cat([p.flatten() for name, p in detector.named_parameters() if '.vit.' not in name])

    expected = [heads(seed) for seed in range(4)]
    before = shared()
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(heads, range(4))]
    assert shared() == before and all(map(torch.equal, found, expected))
