"""Which changes of the package no test notices: mutants of its modules, each run against the tests of its module.

    python scripts/mutants.py --number 100 --out mutants.json
    python scripts/mutants.py --number 20 --only neurons/functional
    python scripts/mutants.py --again 3f2a90c1b7

A mutant is the package with one expression or statement changed: a comparison, a term, a constant, a `min` for a
`max`, a return at the start of a function. They are drawn by a seed, in turn from each folder, there from each module
and from each kind of change. Everything happens in a copy of the tree. What is slow to import is imported once; each
mutant is a fork of that process, so it costs its tests. A run that was stopped goes on with the same command. What
survives is a gap in the tests, or means the same as the original: somebody has to look.
"""
import ast
import compileall
import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

ROOT = Path(__file__).parents[1]
FOLDERS = ('neurons', 'layers', 'conversion', 'execution', 'evaluation', 'detection', 'publishing', 'saving')
POLL = 0.02  # seconds
PRELOADED = ('torch', 'timm', 'datasets', 'pytest', 'hypothesis', 'sklearn.datasets', 'torchvision', 'pycocotools.mask')

# module -> files of tests, where it has none of its own name; the first ones are the likeliest to notice
TESTS = {
    'baselines/counting': ['baselines/test_counting', 'baselines/test_stepped'],
    'data/batches': ['data/test_delivery', 'data/test_planned', 'data/test_request'],
    'detection/detector_entrypoints': ['detection/test_detector_folders', 'cli/test_detect'],
    'detection/drawing': ['detection/test_detector_evaluation', 'publishing/test_detector_figures'],
    'detection/masks': ['detection/test_annotations', 'detection/test_coco', 'detection/test_detector_evaluation'],
    'detection/pictures': ['publishing/test_detector_figures', 'cli/test_detect'],
    'evaluation/figures': [
        'evaluation/test_metrics', 'evaluation/test_schema', 'evaluation/test_summary', 'evaluation/test_evaluate',
        'evaluation/test_activity', 'detection/test_detector_evaluation'],
    'execution/exported': ['execution/test_engines', 'cli/test_export', 'execution/test_saturation'],
    'execution/graph': ['execution/test_engines', 'execution/test_saturation', 'models/test_sformer'],
    'execution/onnx': ['execution/test_engines', 'cli/test_export', 'models/test_sformer'],
    'execution/operators': ['execution/test_engines', 'execution/test_saturation', 'models/test_sformer'],
    'execution/processor': ['execution/test_saturation', 'execution/test_engines'],
    'execution/proof': ['execution/test_saturation', 'execution/test_engines'],
    'execution/quantisers': ['execution/test_engines', 'execution/test_saturation'],
    'execution/rounding': ['execution/test_integer', 'execution/test_engines'],
    'execution/timing': ['execution/test_engines', 'test_scripts_baselines'],
    'layers/watch': ['conversion/test_calibration', 'layers/test_products', 'profiling/test_operations'],
    'neurons/levels': ['neurons/test_functional', 'neurons/test_scale_and_fire'],
    'neurons/registry': ['neurons/test_own_neuron', 'neurons/test_config'],
    'neurons/functional': ['neurons/test_scale_and_fire', 'neurons/test_shared'],
    'profiling/constants': ['profiling/test_energy'],
    'profiling/floating': ['profiling/test_operations', 'profiling/test_counts'],
    'publishing/profile_plots': ['publishing/test_profile_page', 'publishing/test_plots'],
}


# Kinds of changes: an expression becomes one of others

OTHER_WAY = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
AT_THE_BORDER = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
NAMES = {
    'min': 'max', 'max': 'min', 'amin': 'amax', 'amax': 'amin', 'any': 'all', 'all': 'any', 'sum': 'mean',
    'mean': 'sum', 'floor': 'ceil', 'ceil': 'floor', 'round': 'floor', 'argmax': 'argmin', 'clamp_min': 'clamp_max',
    'clamp_max': 'clamp_min', 'minimum': 'maximum', 'maximum': 'minimum', 'cumsum': 'cumprod'}
SKIPPED_METHODS = (
    'abs', 'square', 'sqrt', 'log2', 'exp', 'clone', 'round', 'floor', 'clamp', 'clamp_min', 'eval', 'detach', 'double',
    'sort', 'strip', 'resolve', 'contiguous', 'unique')
SPEAKING = ('print', 'warn', 'warning', 'info', 'debug', 'echo')  # what they say is no result


def _compared(node: ast.Compare) -> Iterator[tuple[str, ast.expr]]:
    for kind, table in (('flipped comparison', OTHER_WAY), ('moved border', AT_THE_BORDER)):
        for i, operator in enumerate(node.ops):
            if type(operator) in table:
                operators = [*node.ops]
                operators[i] = table[type(operator)]()
                yield kind, ast.Compare(node.left, operators, node.comparators)


def _computed(node: ast.BinOp) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.left, (ast.Constant, ast.JoinedStr)) and not _is_number(node.left):
        return  # text
    yield 'dropped term', node.left
    yield 'dropped term', node.right
    if type(node.op) in OPERATORS:
        yield 'other operator', ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)


def _chosen(node: ast.BoolOp) -> Iterator[tuple[str, ast.expr]]:
    yield 'and for or', ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    for i in range(len(node.values)):
        left = [*node.values[:i], *node.values[i + 1:]]
        yield 'dropped condition', left[0] if len(left) == 1 else ast.BoolOp(node.op, left)


def _negated(node: ast.UnaryOp) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.op, ast.Not):
        yield 'removed not', node.operand
    elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield 'other sign', node.operand


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _constant(node: ast.Constant) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.value, bool):
        yield 'other constant', ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield 'other constant', ast.Constant(node.value + 1)
        if node.value > 0:
            yield 'other constant', ast.Constant(node.value - 1)
    elif isinstance(node.value, float):
        yield 'other constant', ast.Constant(1.5 * node.value if node.value else 1.)


def _called(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    function = node.func
    if isinstance(function, ast.Attribute):
        if function.attr in NAMES:
            other = ast.Attribute(function.value, NAMES[function.attr], ast.Load())
            yield f'{NAMES[function.attr]} for {function.attr}', ast.Call(other, node.args, node.keywords)
        if function.attr in SKIPPED_METHODS:
            yield 'skipped method', function.value
    elif isinstance(function, ast.Name):
        other_name = {'sum': 'max', 'round': 'int'}.get(function.id, NAMES.get(function.id))
        if other_name in ('min', 'max', 'any', 'all', 'int'):
            called = ast.Name(other_name, ast.Load())
            yield f'{other_name} for {function.id}', ast.Call(called, node.args, node.keywords)
        if function.id in ('sorted', 'reversed', 'abs') and len(node.args) == 1:
            yield 'skipped function', node.args[0] if function.id == 'abs' else ast.parse(
                f'list({ast.unparse(node.args[0])})', mode='eval').body
    for i in range(len(node.keywords)):
        yield 'dropped argument', ast.Call(function, node.args, [*node.keywords[:i], *node.keywords[i + 1:]])


def _either(node: ast.IfExp) -> Iterator[tuple[str, ast.expr]]:
    if any(isinstance(part, ast.JoinedStr) for part in (node.body, node.orelse)):
        return  # text
    yield 'always', node.body
    yield 'never', node.orelse


EXPRESSIONS: dict[type[ast.expr], Callable[[Any], Iterator[tuple[str, ast.expr]]]] = {
    ast.Compare: _compared, ast.BinOp: _computed, ast.BoolOp: _chosen, ast.UnaryOp: _negated, ast.Constant: _constant,
    ast.Call: _called, ast.IfExp: _either}


def _stated(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """What a statement becomes."""
    if isinstance(node, ast.If):
        yield 'flipped condition', ast.unparse(ast.UnaryOp(ast.Not(), node.test))  # takes the place of its test
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) or isinstance(node, ast.AugAssign):
        yield 'dropped statement', 'pass'
    elif isinstance(node, (ast.Continue, ast.Break)):
        yield 'dropped statement', 'pass'
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield 'nothing returned', 'return None'


def _early(node: ast.FunctionDef) -> str:
    """A return for the start of a function: of what it was given, if it returns anything."""
    arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ('self', 'cls')]
    returns = any(isinstance(n, ast.Return) and n.value is not None for n in ast.walk(node))
    return f'return {arguments[0]}' if returns and arguments else 'return None'


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of a module.

    Args:
        module: The module, as `folder/name`.
        line: Where it is changed, from 1.
        kind: What kind of change it is.
        start: First character that is replaced.
        end: The character after the last one.
        before: What stands there.
        after: What takes its place.
    """
    module: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    after: str

    @property
    def id(self) -> str:
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:10]

    def of(self, source: str) -> str:
        """The module with this change."""
        return source[:self.start] + self.after + source[self.end:]


def mutants_of(module: str, source: str) -> list[Mutant]:
    """All mutants of a module; some of them may be no code, or the same one."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    content = source.encode()

    def place(line: int, column: int) -> int:
        """The character at a line and a byte in it, where ast has them."""
        return len(content[:starts[line - 1] + column].decode())

    found: dict[str, Mutant] = {}

    def add(node: Any, kind: str, after: str, empty: bool = False) -> None:
        start = place(node.lineno, node.col_offset)
        end = start if empty else place(node.end_lineno, node.end_col_offset)
        mutant = Mutant(module, node.lineno, kind, start, end, source[start:end], after)
        found[mutant.id] = mutant

    for node in _without_words(ast.parse(source)):
        if isinstance(node, ast.expr):
            for kind, expression in EXPRESSIONS.get(type(node), lambda _: ())(node):
                add(node, kind, f'({ast.unparse(expression)})')
        elif isinstance(node, ast.FunctionDef):
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            if body and not isinstance(body[0], (ast.FunctionDef, ast.Raise, ast.Return, ast.Pass)):
                indent = ' ' * body[0].col_offset
                add(body[0], 'early return', f'{_early(node)}\n{indent}', empty=True)
        elif isinstance(node, ast.stmt):
            for kind, after in _stated(node):
                add(node.test if isinstance(node, ast.If) else node, kind, after)
    return [*found.values()]


def differs(mutant: Mutant, source: str) -> bool:
    """Whether a mutant can be compiled and is another module than the original."""
    try:
        return ast.dump(ast.parse(mutant.of(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def _without_words(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that may change a result: no types, decorators, texts, or what errors and warnings say."""
    for field, value in ast.iter_fields(node):
        if field in ('annotation', 'returns', 'decorator_list') or isinstance(node, ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr) or _speaks(child):
                continue
            yield child
            yield from _without_words(child)


def _speaks(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    if not isinstance(call, ast.Call):
        return False
    name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
    return name in SPEAKING


def drawn(mutants: list[Mutant], seed: int) -> Iterator[Mutant]:
    """Mutants in a random order, in turn from each folder, in it from each module, and of that from each kind."""
    generator = random.Random(seed)

    def turns(mutants: list[Mutant], keys: list[Callable[[Mutant], str]]) -> Iterator[Mutant]:
        if not keys:
            yield from generator.sample(mutants, len(mutants))
            return
        groups: dict[str, list[Mutant]] = {}
        for mutant in mutants:
            groups.setdefault(keys[0](mutant), []).append(mutant)
        left = [turns(groups[name], keys[1:]) for name in generator.sample(sorted(groups), len(groups))]
        while left:
            for group in [*left]:
                mutant = next(group, None)
                if mutant is None:
                    left.remove(group)
                else:
                    yield mutant
    yield from turns(mutants, [lambda m: m.module.split('/')[0], lambda m: m.module, lambda m: m.kind])


# What a mutant is run against

def tests_of(module: str, tree: Path) -> list[str]:
    """Files of tests that belong to a module, relative to the tree."""
    folder, name = module.split('/')
    own = sorted(path.relative_to(tree) for path in (tree / 'tests' / folder).glob(f'test_{name}*.py'))
    named = [Path('tests', f'{file}.py') for file in TESTS.get(module, [])]
    return [str(path) for path in dict.fromkeys([*own, *named]) if (tree / path).exists()]


class FirstFailure:
    """A plugin of pytest that writes what failed first."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid, encoding='utf-8')

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


def run_tests(tree: Path, tests: list[str], scratch: Path, limit: float) -> dict[str, Any]:
    """Run tests on a tree in a fork of this process.

    Args:
        tree: The tree, whose `sformer` this process has not imported.
        tests: What pytest is given: files of tests, relative to the tree.
        scratch: Folder for what pytest writes.
        limit: Time [s], after which the fork and what it has started are killed.

    Returns:
        `outcome`: `passed`, `failed`, `too long` or `broken` (the tests do not run), `seconds`, and `noticed_by`.
    """
    first, base = scratch / 'first', scratch / 'base'
    first.unlink(missing_ok=True)
    shutil.rmtree(base, ignore_errors=True)
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 3
        try:
            with (scratch / 'log').open('w') as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.chdir(tree)
            sys.dont_write_bytecode = True  # of a file that is changed twice in a second it would be the wrong one
            import pytest
            code = int(pytest.main(
                ['-x', '-q', '-n', '0', '-p', 'no:cacheprovider', f'--basetemp={base}', *tests],
                plugins=[FirstFailure(first)]))
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    code, waited = None, 0.
    while code is None and waited < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(POLL)
            waited += POLL  # not by the clock, which goes on where a machine is stopped
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what its tests have left
    if code is None:
        os.waitpid(child, 0)
    outcome = 'too long' if code is None else {0: 'passed', 5: 'broken'}.get(code, 'failed')
    return dict(outcome=outcome, seconds=round(time.perf_counter() - start, 2),
                noticed_by=first.read_text(encoding='utf-8') if first.exists() else None)


@contextlib.contextmanager
def copied(tree: Path) -> Iterator[tuple[Path, Path]]:
    """A copy of a tree, which this process takes its modules from, and an empty folder."""
    with tempfile.TemporaryDirectory(prefix='mutants') as folder:
        copy, scratch = Path(folder, 'tree'), Path(folder, 'scratch')
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns('.git', '__pycache__', '.*_cache'))
        scratch.mkdir()
        compileall.compile_dir(copy, quiet=2)  # once, not in each fork
        sys.path[:0] = [str(copy), str(copy / 'tests')]
        os.environ['PYTHONPATH'] = os.pathsep.join([str(copy), str(copy / 'tests')])  # of processes that tests start
        yield copy, scratch


def preload() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    loaded = [name for name in sys.modules if name.split('.')[0] == 'sformer']
    assert not loaded, f'{loaded[0]} was imported with others, and would hide its mutants'


def judge(mutant: Mutant, tree: Path, scratch: Path, limit: float, passing: set[str]) -> dict[str, Any]:
    """Run a mutant. What fails is run without the change, too, unless it is among the tests that are known to pass,
    which are added to."""
    tests = tests_of(mutant.module, tree)
    if not tests:
        raise SystemExit(f'no test belongs to {mutant.module}: name some in TESTS.')
    path = tree / 'sformer' / f'{mutant.module}.py'
    original = path.read_bytes()
    for stale in (path.parent / '__pycache__').glob(f'{path.stem}.*'):
        stale.unlink()
    path.write_bytes(mutant.of(original.decode()).encode())
    try:
        found = run_tests(tree, tests, scratch, limit)
    finally:
        path.write_bytes(original)
    failed = found['noticed_by']
    if failed is not None and failed not in passing:
        how = [] if '::' in failed else ['--collect-only']
        if run_tests(tree, [failed, *how], scratch, limit)['outcome'] != 'passed':
            return dict(dataclasses.asdict(mutant), tests=tests, **dict(found, outcome='broken'))
        passing.add(failed)
    return dict(dataclasses.asdict(mutant), tests=tests, **found)


def main(
        number: Annotated[int, typer.Option(help='Mutants')] = 100,
        seed: Annotated[int, typer.Option(help='Seed of the draw')] = 0,
        only: Annotated[Optional[list[str]], typer.Option(help='Modules, as neurons/functional, or folders')] = None,
        again: Annotated[Optional[list[str]], typer.Option(help='Mutants by their ids, run once more')] = None,
        out: Annotated[Path, typer.Option(help='Results; what stands there is not run again')] = Path('mutants.json'),
        limit: Annotated[float, typer.Option(help='Time that the tests of a mutant may take [s]')] = 300.,
        minutes: Annotated[float, typer.Option(help='Time after which no other mutant is begun')] = 600.,
        tree: Annotated[Path, typer.Option(help='Tree with sformer/ and tests/')] = ROOT,
) -> None:
    """Make mutants, run their tests, and write which of them survived."""
    end = time.monotonic() + 60 * minutes
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    out = out.resolve()
    names = {path.relative_to(tree / 'sformer').with_suffix('').as_posix(): path.read_text(encoding='utf-8')
             for path in sorted((tree / 'sformer').glob('*/*.py')) if path.stem != '__init__'}
    wanted = only or FOLDERS
    mutants = [mutant for name, source in names.items() if name in wanted or name.split('/')[0] in wanted
               for mutant in mutants_of(name, source)]
    if again:
        chosen = [mutant for mutant in mutants if mutant.id in again]
        results = {id: result for id, result in results.items() if id not in again}
    else:
        usable = (mutant for mutant in drawn(mutants, seed) if differs(mutant, names[mutant.module]))
        chosen = [*itertools.islice(usable, number)]
    print(f'{len(chosen)} of {len(mutants)} mutants of {len({m.module for m in mutants})} modules')
    passing: set[str] = set()
    with copied(tree.resolve()) as (copy, scratch):
        preload()
        for mutant in chosen:
            if mutant.id in results or time.monotonic() > end:
                continue
            result = results[mutant.id] = judge(mutant, copy, scratch, limit, passing)
            aside = out.with_name(f'.{out.name}')  # not by sformer.files, which would be here for each fork
            aside.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
            aside.replace(out)
            print(f'{mutant.id} {mutant.module}:{mutant.line} {mutant.kind}: {result["outcome"]} '
                  f'({result["seconds"]} s)', flush=True)
    run = [results[mutant.id] for mutant in chosen if mutant.id in results]
    survivors = [result for result in run if result['outcome'] == 'passed']
    print(f'{len(run)} run, {len(survivors)} survived:')
    for r in survivors:
        print(f'  {r["module"]}:{r["line"]} {r["kind"]}: {r["before"]!r} -> {r["after"]!r}')


if __name__ == '__main__':
    typer.run(main)
