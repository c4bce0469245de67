"""The tree of errors is the one that is drawn."""
import importlib
import pkgutil
import re

import sformer
from sformer import SFormerError, errors


def test_every_error_is_drawn():
    for module in pkgutil.walk_packages(sformer.__path__, 'sformer.'):
        if module.name != 'sformer.__main__':
            importlib.import_module(module.name)
    kinds = [kind for kind in SFormerError.__subclasses__() if kind.__module__.split('.')[0] == 'sformer']
    assert not [kind for kind in kinds if kind.__subclasses__()]  # or the drawing needs one more level
    drawn = dict(re.findall(r'[├└]── (\w+) *(?:of `([\w.]+)`)?', errors.__doc__))
    assert drawn == {kind.__name__: kind.__module__.removeprefix('sformer.').replace('errors', '') for kind in kinds}
