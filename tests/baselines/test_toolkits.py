"""Toolkits of others, where they are installed."""
import sys

import pytest
import torch
from layer_tools import build, pixels, relative_error

from sformer import SFormerError
from sformer.baselines import nncf_int8, torchao_int8
from sformer.baselines.toolkits import openvino_float

REASON = "missing: pip install '.[baselines]'"


@pytest.mark.parametrize('name, make', [
    ('nncf', lambda source: nncf_int8(source, [pixels(2)])), ('torchao.quantization', torchao_int8)])
def test_what_is_missing_is_named(name, make, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SFormerError, match=r"missing: pip install '\.\[baselines\]' in a clone"):
        make(build())


@pytest.mark.slow
@pytest.mark.parametrize('family', ['vit', 'eva02'])
def test_nncf_takes_the_model(family):
    pytest.importorskip('nncf', reason=f'NNCF is {REASON}')
    source, images = build(family), pixels(8)
    with torch.no_grad():
        expected = source(images)
    assert relative_error(openvino_float(source)(images), expected) < 1e-4
    assert 1e-4 < relative_error(nncf_int8(source, [images])(images), expected) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize('family', ['vit', 'eva02'])
def test_torchao_takes_the_model(family):
    pytest.importorskip('torchao', reason=f'torchao is {REASON}')
    source, images = build(family), pixels(8)
    with torch.no_grad():
        expected = source(images)
        assert 1e-5 < relative_error(torchao_int8(source)(images), expected) < 0.1
        assert torch.equal(source(images), expected)
