"""The house holds: imports run downwards, in no circle, and to the front; files and functions stay readable.

`docs/extend.md` says the same in words.
"""
import ast
import functools
import importlib
import re
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import yaml
from torch import nn

from sformer.layers import Multiplying
from sformer.models import SFormerMixin

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'sformer'

# From below to above: a part may import those of lines above its own, and itself; nothing of its own line or below.
ORDER = (
    ('errors',),
    ('files', 'neurons'),
    ('data', 'layers'),
    ('models',),
    ('conversion',),
    ('execution', 'saving'),
    ('evaluation', 'profiling'),
    ('baselines', 'detection'),
    ('tasks',),
    ('publishing',),
    ('cli',),
    ('__init__', '__main__'),
)
RANK = {part: i for i, parts in enumerate(ORDER) for part in parts}
LOOSE = {'__init__', '__main__', 'errors', 'files'}  # everything else lies in a wing

# Imported where they are used, since `import sformer` is to take as long as `import timm`.
SLOW = {'accelerate', 'datasets', 'huggingface_hub', 'jinja2', 'matplotlib', 'neurobench', 'nncf', 'onnx',
        'onnxruntime', 'onnxscript', 'openvino', 'optuna', 'pyarrow', 'pycocotools', 'rich', 'torchao'}
NOT_EVERYWHERE = {'fcntl', 'resource'}  # not on Windows

# where code outside of layers/ and models/ asks of which type a layer is -> why
ASKED = {
    ('sformer.saving.folders', 'SpikingLayer'): 'what an execution has made is in no table that a config could name',
    ('sformer.detection.drawing', 'WindowedMixin'): 'windows are put together to the map that is drawn',
}

MAX_LINES = 400  # of a file; of functions, ruff counts statements and branches


# what is defined in two modules -> why
COMMAND = 'the command has the name of the verb that it runs'
TWICE = {
    **dict.fromkeys(('benchmark', 'convert', 'evaluate', 'predict', 'publish', 'search', 'sweep'), COMMAND),
    '_logger': 'every module that warns has its own',
    'Batch': 'of images, and of their ids before they are read',
}


def name_of(path: Path) -> str:
    """Name of the module in a file of the package; `sformer.__init__` is the package itself."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' and len(parts) > 2 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob('*.py'))}


def part_of(module: str) -> str:
    return module.split('.')[1]


def resolve(module: str, path: Path, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Absolute names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ''
    if node.level:
        package = module.split('.') if path.name == '__init__.py' and path.parent != PACKAGE else module.split('.')[:-1]
        above = package[:len(package) - node.level + 1]
        base = '.'.join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        inner = f'{base}.{alias.name}'
        yield inner if inner in MODULES else 'sformer.__init__' if base == 'sformer' else base


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


@functools.cache
def imports(module: str, path: Path) -> tuple[tuple[str, bool, int], ...]:
    """What a module imports: its name, whether it waits until a function is called (what is not of this package, also
    where it is for types alone), and the line."""
    def visit(node: ast.AST, inside: bool, types_alone: bool = False) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                for name in resolve(module, path, child):
                    yield name, inside or (types_alone and name not in MODULES), child.lineno
            yield from visit(
                child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
                types_alone or (isinstance(child, ast.If) and ast.unparse(child.test) == 'TYPE_CHECKING'))
    return tuple(visit(parsed(path), False))


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Nodes of a circle of a graph; none if it has none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node):], node]
        if node in done:
            return []
        for after in sorted(edges.get(node, ())):
            if found := search(after, [*path, node]):
                return found
        done.add(node)
        return []
    return next(filter(None, (search(node, []) for node in sorted(edges))), [])


def test_a_circle_is_found():
    assert circle({'a': {'b'}, 'b': {'c', 'd'}, 'c': set(), 'd': {'b'}}) == ['b', 'd', 'b']
    assert not circle({'a': {'b', 'c'}, 'b': {'c'}})


def test_every_part_has_its_place():
    parts = {part_of(module) for module in MODULES}
    assert parts == set(RANK)


def test_no_module_is_loose():
    assert {path.stem for path in PACKAGE.glob('*.py')} == LOOSE
    assert {part.split('.')[0] for parts in ORDER for part in parts} - LOOSE == {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != '__pycache__'}


def commands() -> dict[str, set[str]]:
    """Files of the commands, and what each, or the tasks that it asks, imports from which wing, as `wing.verb`."""
    def imported(path: Path) -> set[str]:
        nodes = [node for node in ast.walk(parsed(path))
                 if isinstance(node, ast.ImportFrom)]
        return {f'{(node.module or "").split(".")[0]}.{alias.name}' for node in nodes for alias in node.names}

    of_tasks = {name for module, path in MODULES.items() if part_of(module) == 'tasks' for name in imported(path)}
    found = {path.stem: imported(path) for module, path in MODULES.items()
             if part_of(module) == 'cli' and path.stem != '__init__'}
    return {stem: names | of_tasks if 'tasks.task_of' in names else names for stem, names in found.items()}


def test_no_file_name_has_two_meanings():
    """A command may have the name of the verb that it runs: `sformer convert` runs `conversion.convert`."""
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        if path.stem != '__init__':
            places.setdefault(path.stem, []).append(part_of(module))
    for wing in (path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != '__pycache__'):
        places.setdefault(wing, []).append(wing)
    run = commands()
    wrong = {}
    for name, parts in places.items():
        others = [part for part in parts if part != 'cli']
        verb = len(parts) - len(others) == 1 and others and any(
            imported.startswith(f'{others[0]}.') for imported in run[name])
        if len(parts) > 1 and not (len(others) == 1 and verb):
            wrong[name] = parts
    assert not wrong


def test_no_circle():
    edges = {}
    for module, path in MODULES.items():
        targets = {name for name, inside, _ in imports(module, path) if not inside and name in MODULES}
        # importing `a.b` runs `a` first, except for what is being run already
        for target in list(targets):
            above = ['.'.join(target.split('.')[:i]) for i in range(2, target.count('.') + 1)]
            targets |= {package for package in above if not f'{module}.'.startswith(f'{package}.')}
        edges[module] = targets
    assert sum(map(len, edges.values())) > 100  # the graph is there
    assert not circle(edges), ' -> '.join(circle(edges))


def all_imports() -> Iterator[tuple[str, str, bool, str]]:
    """Every import of the package: its module, what is imported, whether inside of a function, all that in words."""
    for module, path in MODULES.items():
        for name, inside, line in imports(module, path):
            yield module, name, inside, f'{module}:{line} imports {name}'


def test_imports_run_downwards():
    wrong = [words for module, name, _, words in all_imports()
             if name in MODULES and part_of(name) != part_of(module) and RANK[part_of(name)] >= RANK[part_of(module)]]
    assert not wrong


def test_only_what_is_slow_is_imported_inside_of_a_function():
    allowed = SLOW | NOT_EVERYWHERE
    of_cli = allowed | {'sformer', 'timm', 'torch'}  # whose help does not wait for torch
    wrong = [words for module, name, inside, words in all_imports()
             if inside and name.split('.')[0] not in (of_cli if part_of(module) == 'cli' else allowed)]
    assert not wrong


def test_what_is_slow_is_not_imported_with_the_package():
    wrong = [words for module, name, inside, words in all_imports()
             if part_of(module) != 'cli' and not inside and name.split('.')[0] in SLOW]  # as nothing else imports it
    assert not wrong


def test_scripts_and_tests_import_what_is_there():
    wrong = []
    for path in (*(ROOT / 'scripts').glob('*.py'), *(ROOT / 'tests').rglob('*.py')):
        nodes = [*ast.walk(parsed(path))]
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        wrong += [f'{path} imports {name}' for name in names - {*MODULES, 'sformer'} if name.split('.')[0] == 'sformer']
    assert not wrong


def defined() -> dict[str, list[str]]:
    """Names that are defined at the top of modules, and where."""
    found: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        names = set()
        for node in parsed(path).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        for name in names - {'__all__'}:
            found.setdefault(name, []).append(module)
    return found


def test_what_is_defined_twice_has_a_reason():
    twice = {name for name, modules in defined().items() if len(modules) > 1}
    assert twice == TWICE.keys() and len(TWICE) <= 9


def layer_types(module: str) -> set[str]:
    """Types of layers, by name, that a module asks of something whether it is one of."""
    tree, names = parsed(MODULES[module]), vars(importlib.import_module(module))
    asked = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('isinstance', 'issubclass'):
            asked.append(node.args[1])
        elif isinstance(node, ast.Compare) and any(
                getattr(getattr(side, 'func', None), 'id', '') == 'type' for side in (node.left, *node.comparators)):
            asked += [node.left, *node.comparators]
        elif isinstance(node, (ast.Dict, ast.Set)):  # a table by type
            asked += [key for key in (node.keys if isinstance(node, ast.Dict) else node.elts) if key is not None]
    found = set()
    for part in (part for expression in asked for part in ast.walk(expression)):
        if isinstance(part, (ast.Name, ast.Attribute)):
            kind: object = types.SimpleNamespace(**names)
            for name in ast.unparse(part).split('.'):
                kind = getattr(kind, name, None)
            if (isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module and (
                    issubclass(kind, Multiplying) or kind.__module__.split('.')[0] in ('torch', 'timm', 'torchvision')
                    or kind.__module__.startswith('sformer.layers')) and not issubclass(kind, SFormerMixin)):
                found.add(kind.__name__)
    return found


def test_layers_say_what_they_multiply():
    """And nobody asks of which type they are: whoever did would pass over a layer of one's own without a word."""
    found = {(module, name) for module in MODULES if part_of(module) not in ('layers', 'models', 'neurons', '__main__')
             for name in layer_types(module)}
    assert found == ASKED.keys() and len(ASKED) <= 3


def test_types_that_are_asked_for_are_seen():
    assert 'SpikingConvMixin' in layer_types('sformer.models.sformer')
    assert layer_types('sformer.layers.spiking') >= {'AttentionProduct', 'SpikingLayer', 'Multiplying'}


ASKS = re.compile(r'detect|classif|segment|boxes', re.IGNORECASE)  # what tells one task from others
OF_TASKS = {'tasks', 'detection'}  # and `sformer detect`, commands of one task


def conditions(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Match):
            yield node.subject
        elif isinstance(node, (ast.BoolOp, ast.Compare)):
            yield node


def asking(tree: ast.AST) -> set[int]:
    """Lines with a condition on which task something is of: by a name, a key, or a word in it."""
    def words(node: ast.AST) -> Iterator[str]:
        for part in ast.walk(node):
            yield getattr(part, 'id', '') or getattr(part, 'attr', '')
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and ' ' not in part.value:
                yield part.value
    return {node.lineno for node in conditions(tree) if any(map(ASKS.search, words(node)))}


def test_who_asks_is_noticed():
    for text in ('x = 1 if is_detector(name) else 2', "rows = [r for r in found if 'boxes' in r]",
                 "if record.task == 'classification':\n    pass", 'y = isinstance(m, Segmenter) and m',
                 'match detector:\n    case None:\n        pass'):
        assert asking(ast.parse(text)) == {1}, text
    assert not asking(ast.parse("print('no detector') if task.options else detect(x)"))


def test_nobody_asks_which_task_it_is():
    """But tasks: everybody else asks the task. A third one is a file in `tasks`."""
    found = [f'{module}:{line}' for module, path in MODULES.items()
             if part_of(module) not in OF_TASKS and module != 'sformer.cli.detect'
             for line in asking(parsed(path))]
    found += [f'{path.name}: {tag}' for path in PACKAGE.rglob('templates/*')
              for tag in re.findall(r'\{[{%].*?\bif\b.*?[}%]\}', path.read_text(encoding='utf-8')) if ASKS.search(tag)]
    assert not found
    importing = {module for module, path in MODULES.items() for name, _, _ in imports(module, path)
                 if name.startswith('sformer.detection') and part_of(module) not in OF_TASKS}
    assert importing <= {'sformer.__init__', 'sformer.cli.detect', 'sformer.publishing.model_record'}


def test_files_are_short():
    long = {path.relative_to(ROOT).as_posix(): count
            for path in (*MODULES.values(), *sorted((ROOT / 'scripts').glob('*.py')))
            if (count := path.read_text(encoding='utf-8').count('\n')) > MAX_LINES}
    assert not long


MAX_ANY = 120  # of types that a third party has not, values of JSON, and arguments that are handed on
MAX_COMPLEXITY = 12


def test_types_say_something_and_lines_one_thing():
    texts = [path.read_text(encoding='utf-8') for path in MODULES.values()]
    assert sum(len(re.findall(r'\bAny\b', text)) for text in texts) <= MAX_ANY
    tool = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['tool']
    assert tool['ruff']['lint']['mccabe']['max-complexity'] == MAX_COMPLEXITY and 'overrides' not in tool['mypy']
    several = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)
               and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)
               and len(node.targets[0].elts) > 2]
    assert not several


def test_everybody_runs_the_same_commands():
    run = (ROOT / '.ci' / 'run').read_text(encoding='utf-8').splitlines()
    jobs = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text(encoding='utf-8'))['jobs']
    steps = [step['run'] for job in jobs.values() for step in job['steps'] if 'run' in step]
    ours = [part for line in run for part in line.split(' && ') if re.match(r'pip install|pytest|ruff|mypy', part)]
    assert steps[-4:] == ours and len(steps) == 5  # first of all, a CPU build of torch
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))['repos'][0]['hooks']
    assert [hook['entry'] for hook in hooks] == ['ruff check', 'mypy']


PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']


def modules_of(requirements: list[str]) -> set[str]:
    """Names that packages are imported by; an extra of this package stands for what it brings."""
    found = set()
    for requirement in requirements:
        if extras := re.match(r'sformer\[(.+)\]', requirement):
            found |= set().union(*(modules_of(PROJECT['optional-dependencies'][name]) for name in extras[1].split(',')))
        else:
            name = re.match(r'[\w-]+', requirement)[0].replace('-', '_').lower()
            found.add('PIL' if name == 'pillow' else name)
    return found


CORE = modules_of(PROJECT['dependencies'])
EXTRAS = {name: modules_of(requirements) for name, requirements in PROJECT['optional-dependencies'].items()}


def test_what_is_imported_is_declared():
    """Of what is not, a change in another package's dependencies would be noticed by users."""
    known = CORE | set(sys.stdlib_module_names) | {'sformer'}
    for _, name, inside, words in all_imports():
        assert name.split('.')[0] in (known | EXTRAS['all'] if inside else known), words


def test_extras():
    assert EXTRAS['all'] == set().union(*(modules for name, modules in EXTRAS.items() if name not in ('test', 'docs')))
    assert not CORE & set().union(*EXTRAS.values())


def test_hints_name_the_extra_that_brings_a_package():
    """And where an extra is needed, there is a hint."""
    hinted, unhinted = set(), set()

    def visit(node: ast.AST, extra: str | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                names = [child.module or ''] if isinstance(child, ast.ImportFrom) else [a.name for a in child.names]
                for name in {name.split('.')[0] for name in names if not getattr(child, 'level', 0)} & EXTRAS['all']:
                    (hinted if extra else unhinted).add((name, extra))
            call = child.items[0].context_expr if isinstance(child, ast.With) else None
            found = isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'needed_packages'
            visit(child, call.args[0].value if found else extra)
    for path in MODULES.values():
        visit(parsed(path), None)
    assert len(hinted) > 8 and not {(name, extra) for name, extra in hinted if name not in EXTRAS[extra]}
    assert {name for name, _ in unhinted} <= {name for name, _ in hinted}
