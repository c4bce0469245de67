"""Exported networks, which all tests of execution share."""
import hashlib

import pytest
from layer_tools import build, pixels

from sformer import convert, export_onnx


@pytest.fixture(scope='session')
def exported(made_once):
    """`exported(family, config, depth)`: a network of the caller's own, and its graph, which is written once."""
    def exported(family, config, depth):
        model = convert(build(family, depth=depth), [pixels()], config)
        name = hashlib.sha256(repr((family, config, depth)).encode()).hexdigest()[:16]
        return model, made_once(f'{name}.onnx', lambda path: export_onnx(
            model, path, command='sformer export a b'))
    return exported
