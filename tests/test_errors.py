"""The tree of errors is the one that is drawn; missing packages are named; every message stands in a test."""
import ast
import importlib
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

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


# messages -------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
HOLE = '\0'  # what is filled in

# start of a message that stands in no test -> why
IN_NO_TEST = {
    'the reloaded SFormer gives other logits': 'the demo says what `save_model` has checked: there is no such model',
}


def text_of(node: ast.AST) -> str:
    """What an expression says, as far as it stands in the code, with holes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(HOLE if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return HOLE


def messages(tree: ast.AST) -> Iterator[str]:
    """What is said where something is raised, and where something is checked."""
    for node in ast.walk(tree):
        said = None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            said = node.exc.args[:1]
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'check':
            said = node.args[1:2]
        yield from map(text_of, said or ())


def runs_of_words(text: str, among: set[str] | None = None) -> set[str]:
    """Two to eight words of a text, one after the other, without punctuation and what regular expressions add; only
    those that are `among` such runs of others."""
    runs = set()
    for part in text.split(HOLE):
        words = re.findall(r"\w[\w'-]*", part.replace('\\', ''))
        for i in range(len(words)):
            for j in range(i + 2, min(i + 8, len(words)) + 1):
                run = ' '.join(words[i:j])
                if among is not None and run not in among:
                    break  # and so is none that is longer
                runs.add(run)
    return runs


def in_no_test(said: set[str], tests: set[str]) -> set[str]:
    """Messages of which no test has words that tell it from all others; its longest words, if it has none of these."""
    runs = {message: runs_of_words(message) for message in said}
    owners = Counter(run for found in runs.values() for run in found)
    missing = set()
    for message, found in runs.items():
        own = {run for run in found if owners[run] == 1} or {max(found, key=len, default='')} - {''}
        if own and not own & tests:
            missing.add(message)
    return missing


def test_messages_are_found():
    code = 'raise ValueError(f"{x} is no tree" + " at all: " + y)\ncheck(x > 1, "x is not above 1")\nraise OSError'
    said = {*messages(ast.parse(code))}
    assert said == {f'{HOLE} is no tree at all: {HOLE}', 'x is not above 1'}
    assert in_no_test(said, runs_of_words('no tree')) == {'x is not above 1'}
    assert not in_no_test(said, runs_of_words(r'5 is no tree, but not x is not above 1\.'))
    assert in_no_test({'it is no tree', 'it is no bush'}, runs_of_words('it is no')) == {
        'it is no tree', 'it is no bush'}


def test_every_message_stands_in_a_test():
    said = {message for path in (ROOT / 'sformer').rglob('*.py')
            for message in messages(ast.parse(path.read_text(encoding='utf-8')))}
    among = set().union(*map(runs_of_words, said))
    tests: set[str] = set()
    for path in (ROOT / 'tests').rglob('*.py'):
        if path != Path(__file__):
            for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
                if isinstance(node, (ast.Constant, ast.JoinedStr)):
                    tests |= runs_of_words(text_of(node), among)
    missing = in_no_test(said, tests)
    named = {message for message in missing for start in IN_NO_TEST if message.startswith(start)}
    assert missing == named, '\n'.join(message.replace(HOLE, '...') for message in sorted(missing - named))
    assert len(said) > 300 and len(named) == len(IN_NO_TEST)
