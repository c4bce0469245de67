"""Mutants of a module: its source with one expression or statement changed; `scripts/mutants.py` runs them."""
import ast
import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ['Mutant', 'differs', 'drawn', 'mutants_of']

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
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if _speaks(child) or _names_a_type(child):
                continue
            yield child
            yield from _without_words(child)


def _speaks(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    if not isinstance(call, ast.Call):
        return False
    name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
    return name in SPEAKING


def _names_a_type(node: ast.AST) -> bool:
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return isinstance(target, ast.Name) and re.match('[A-Z][a-z]', target.id) is not None


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
