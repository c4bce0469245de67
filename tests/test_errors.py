"""The tree of errors is the one that is drawn; missing packages are named."""
import importlib
import pkgutil
import re
import sys

import pytest

import sformer
from sformer import SFormerError, errors
from sformer.detection import drawing, masks


def test_every_error_is_drawn():
    for module in pkgutil.walk_packages(sformer.__path__, 'sformer.'):
        if module.name != 'sformer.__main__':
            importlib.import_module(module.name)
    kinds = [kind for kind in SFormerError.__subclasses__() if kind.__module__.split('.')[0] == 'sformer']
    assert not [kind for kind in kinds if kind.__subclasses__()]  # or the drawing needs one more level
    drawn = dict(re.findall(r'[├└]── (\w+) *(?:of `([\w.]+)`)?', errors.__doc__))
    assert drawn == {kind.__name__: kind.__module__.removeprefix('sformer.').replace('errors', '') for kind in kinds}


def test_packages_that_are_missing_or_do_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    for call, package in ((lambda: drawing.draw_file(None, 'image.jpg', 'out.png'), 'matplotlib'),
                          (masks.mask_tools, 'pycocotools')):
        with pytest.raises(SFormerError) as e:
            call()
        assert str(e.value) == f"{package} is missing: pip install '.[detection]' in a clone of sformer."
    with pytest.raises(SFormerError, match=r"extra 'onnx' brings does not load: libonnx\.so: gone\."):
        with errors.needed_packages('onnx'):
            raise ImportError('libonnx.so: gone')
