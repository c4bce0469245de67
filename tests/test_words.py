"""Words: the glossary explains those of the code, each names what is there, and none stands for a second thing; tests
name what is public."""
import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from test_house import MODULES, ROOT, defined

from sformer import FitConfig, SFNConfig
from sformer.conversion import CalibrationRecord, Conversion
from sformer.evaluation.figures import CLASSIFICATION, DETECTION
from sformer.neurons import Spikes

CONCEPTS = (ROOT / 'docs' / 'concepts.md').read_text(encoding='utf-8')
GLOSSARY = [row.split(' | ') for table in re.findall(
    r'^\| word \| what it is \| in code \|\n\| --- \| --- \| --- \|\n((?:\|.*\|\n)+)', CONCEPTS, re.M)
    for row in table.replace('\\|', '/').splitlines()]
NAMED = {name for *_, code in GLOSSARY for name in re.findall(r'`([\w.]+)`', code)}
KEYS = {*CLASSIFICATION.figures, *DETECTION.figures}
TOP = defined()

# what was another word for something, and would be one again -> the word
OTHER_WORDS = {
    r'row[ _](?:factor|share|scale)': 'token scale',
    r'token factor': 'token scale',
    r'sources? of (?:the )?(?:images|data)': 'origin',
    r'conversion result|result of (?:the|a) conversion': 'record',
    r'record of (?:the|an) evaluation': 'result',
    r'firing level': 'fired level',
}


def found(name: str) -> bool:
    """Whether the package has something of this name: a class, a function, a field or a method, a figure."""
    top, *parts = name.split('.')
    if not parts and name in KEYS:
        return True
    for module in TOP.get(top, ()):
        value = getattr(importlib.import_module(module), top, None)
        if all(hasattr(value, part) or part in fields(value) for part in parts):
            return True
    return False


def fields(value: object) -> set[str]:
    kinds = value.__mro__ if isinstance(value, type) else ()
    return {name for kind in kinds for name in vars(kind).get('__annotations__', {})}


def test_each_row_names_what_is_there():
    assert len(GLOSSARY) > 30 and all(len(row) == 3 for row in GLOSSARY), 'the tables are read'
    assert not {name for name in NAMED if not found(name)}
    assert not [row[0] for row in GLOSSARY if not re.search(r'`[\w.]+`', row[2])]


def test_each_word_is_explained_once():
    words = [re.sub(r' `.*', '', row[0].removeprefix('| ')) for row in GLOSSARY]
    assert len(words) == len({*words})
    explained = [name for *_, code in GLOSSARY for name in re.findall(r'`([\w.]+)`', code)]
    assert len(explained) == len({*explained}), 'and no name stands in two rows'


@pytest.mark.parametrize('owner, names', [
    ('SFNConfig', [field.name for field in dataclasses.fields(SFNConfig)]), ('Spikes', Spikes._fields)])
def test_what_neurons_are_told_and_give_is_in_the_glossary(owner, names):
    assert {f'{owner}.{name}' for name in names} <= NAMED


def test_fields_and_figures_that_are_words_of_the_glossary_are_named_there():
    """As `Conversion.recipe`: whoever adds a field or a figure of such a name says which of the two it is."""
    words = {re.sub(r' `.*| N$', '', row[0].removeprefix('| ')).replace(' ', '_') for row in GLOSSARY}
    for owner in (Conversion, CalibrationRecord, SFNConfig, FitConfig):
        names = {field.name for field in dataclasses.fields(owner)} & words
        assert {f'{owner.__name__}.{name}' for name in names} <= NAMED
    assert KEYS & words <= NAMED | {'levels'}  # of a point of a curve, as of `SFNConfig`


def test_how_neurons_are_fitted_is_explained():
    assert not [field.name for field in dataclasses.fields(FitConfig) if f'`{field.name}`' not in CONCEPTS]


@pytest.mark.parametrize('other', OTHER_WORDS)
def test_one_word_stands_for_one_thing(other):
    paths = [*MODULES.values(), ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    assert not [(path.name, match[0]) for path in paths
                for match in re.finditer(other, path.read_text(encoding='utf-8'), re.IGNORECASE)], OTHER_WORDS[other]


def private_names(path: Path) -> set[str]:
    """Private names at the top of modules of the package that a file speaks of, as the names of its imports go."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    found, ours = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'sformer':
            ours |= {alias.asname or alias.name for alias in node.names}
            found |= {alias.name for alias in node.names if alias.name.startswith('_')}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split('.')[0] in ours:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('setattr'):
            place, *rest = [ast.literal_eval(part) if isinstance(part, ast.Constant) else ast.unparse(part)
                            for part in node.args]
            names = [place, *rest[:1]] if place in ours or str(place).startswith('sformer.') else []
            found |= {name for text in names for name in str(text).split('.')}
    return {name for name in found if name.startswith('_') and not name.startswith('__')} & TOP.keys()


def test_tests_name_what_is_public():
    assert not [(path.name, names) for path in (ROOT / 'tests').rglob('*.py') if (names := private_names(path))]


def test_private_names_are_seen(tmp_path):
    for text in ('from sformer.evaluation.labels import _subset',
                 'from sformer.evaluation import labels\nlabels._subset()',
                 "from sformer.evaluation import labels\npatch.setattr(labels, '_subset', None)",
                 "patch.setattr('sformer.evaluation.labels._subset', None)"):
        (tmp_path / 'test.py').write_text(text)
        assert private_names(tmp_path / 'test.py') == {'_subset'}, text
