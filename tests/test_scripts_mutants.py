"""`scripts/mutants.py`: which mutants it makes, in which order, and which of a small package survive."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / 'scripts'

SOURCE = '''"""Of a small package, with an é before what is changed."""
LIMIT = 3


def clipped(x: int, low: int = 0) -> int:
    """x, between two bounds."""
    é = 'é' if x < low else 'e'
    if not isinstance(x, int):
        raise TypeError(f'{x + 1} is no number')
    print(é, 7)
    return max(low, min(x, LIMIT))


Number = int | float
'''
TESTS = '''from sformer.neurons.small import clipped


def test_a_large_one():
    assert clipped(9) == 3 and clipped(2) == 2
'''


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import mutants
    return mutants


def test_what_is_changed(mutants):
    found = [m for m in mutants.mutants_of('neurons/small', SOURCE) if mutants.differs(m, SOURCE)]
    changes = {(m.line, m.kind, m.before, m.after) for m in found}
    assert {
        (2, 'other constant', '3', '(4)'), (2, 'other constant', '3', '(2)'), (5, 'other constant', '0', '(1)'),
        (7, 'flipped comparison', 'x < low', '(x >= low)'), (7, 'moved border', 'x < low', '(x <= low)'),
        (7, 'never', "'é' if x < low else 'e'", "('e')"), (7, 'early return', '', 'return x\n    '),
        (8, 'removed not', 'not isinstance(x, int)', '(isinstance(x, int))'),
        (11, 'min for max', 'max(low, min(x, LIMIT))', '(min(low, min(x, LIMIT)))'),
        (11, 'nothing returned', 'return max(low, min(x, LIMIT))', 'return None'),
    } <= changes
    assert not {1, 6, 9, 10, 14} & {m.line for m in found}, 'what is said, to readers or by errors, is no result'
    for m in found:
        assert SOURCE[m.start:m.end] == m.before and m.of(SOURCE) != SOURCE
        compile(m.of(SOURCE), 'small', 'exec')
    assert len({m.id for m in found}) == len(found)


def test_folders_and_modules_take_turns(mutants):
    every = [m for name in ('neurons/a', 'neurons/b', 'layers/a', 'saving/a')
             for m in mutants.mutants_of(name, SOURCE)]
    drawn = [*mutants.drawn(every, 3)]
    assert sorted(m.id for m in drawn) == sorted(m.id for m in every)
    assert {m.module.split('/')[0] for m in drawn[:3]} == {'neurons', 'layers', 'saving'}
    assert {m.module for m in drawn[:6]} == {'neurons/a', 'neurons/b', 'layers/a', 'saving/a'}
    again, other = ([m.id for m in mutants.drawn(every, seed)] for seed in (3, 4))
    assert again == [m.id for m in drawn] != other


def test_every_module_that_mutates_has_tests(mutants):
    tree = SCRIPTS.parent
    for path in (tree / 'sformer').glob('*/*.py'):
        if path.parent.name in mutants.FOLDERS and path.stem != '__init__':
            assert mutants.tests_of(f'{path.parent.name}/{path.stem}', tree), path
    for name, files in mutants.TESTS.items():
        assert (tree / 'sformer' / f'{name}.py').exists(), name
        assert all((tree / 'tests' / f'{file}.py').exists() for file in files), name


@pytest.mark.slow
def test_what_survives(tmp_path):
    tree, out = tmp_path / 'tree', tmp_path / 'out.json'
    for folder, name, text in (
            ('sformer', '__init__.py', ''), ('sformer/neurons', '__init__.py', ''),
            ('sformer/neurons', 'small.py', SOURCE), ('tests/neurons', 'test_small.py', TESTS)):
        (tree / folder).mkdir(parents=True, exist_ok=True)
        (tree / folder / name).write_text(text, encoding='utf-8')
    before = {path: path.read_bytes() for path in tree.rglob('*') if path.is_file()}

    def run(number):
        command = [sys.executable, str(SCRIPTS / 'mutants.py'), '--tree', str(tree), '--out', str(out)]
        environment = {name: value for name, value in os.environ.items() if 'PYTEST' not in name}
        return subprocess.run([*command, '--number', str(number)], check=True, capture_output=True, text=True,
                              cwd=tmp_path, env=environment).stdout
    run(3)
    first = json.loads(out.read_text())
    said = run(99)
    results = json.loads(out.read_text())
    assert len(first) == 3 and all(results[id] == first[id] for id in first)
    assert said.count(' s)\n') == len(results) - 3, 'what was run is not run again'
    outcome = {(r['kind'], r['before'], r['after']): r['outcome'] for r in results.values()}
    assert outcome['other constant', '3', '(4)'] == outcome['min for max', 'max(low, min(x, LIMIT))',
                                                            '(min(low, min(x, LIMIT)))'] == 'failed'
    assert outcome['other constant', '0', '(1)'] == 'passed'  # nobody tests the lower bound
    survivors = sum(value == 'passed' for value in outcome.values())
    assert f'{len(results)} run, {survivors} survived' in said and set(outcome.values()) == {'passed', 'failed'}
    failed = next(r for r in results.values() if r['outcome'] == 'failed' and r['line'] == 2)
    assert failed['noticed_by'].endswith('test_small.py::test_a_large_one')
    assert {path: path.read_bytes() for path in tree.rglob('*') if path.is_file()} == before
