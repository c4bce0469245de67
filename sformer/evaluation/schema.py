"""The schema of a result: what is known of a figure stands in one entry, and everything that has figures reads it.

Results are made, checked, printed, written as CSV, put into cards and documented by it. The entries are in `figures`.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from .metrics import Counted, Scored, column_sums

__all__ = [
    'COUNT', 'FLAG', 'PERCENT', 'POSITIVE', 'SCHEMAS', 'SHARE', 'TEXT', 'TEXTS', 'Check', 'Figure', 'Leaf', 'Result',
    'SOURCE', 'Schema', 'Score', 'check_values', 'in_line', 'is_result', 'mapping', 'number', 'schema_of',
]

Result = dict[str, Any]  # JSON, as `sformer evaluate` writes it
SOURCE = 'source_'  # what the key of a source's figure begins with


# Checks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What a value has to be, in words and in code."""
    words: str
    fits: Callable[[Any], bool]


def number(low: float, high: float, words: str, whole: bool = False) -> Check:
    kinds = int if whole else (int, float)
    return Check(
        words, lambda v: isinstance(v, kinds) and not isinstance(v, bool) and low <= v <= high and v < math.inf)


def mapping(values: Check) -> Check:
    return Check(
        f'names, each with {values.words}', lambda v: isinstance(v, dict) and all(map(values.fits, v.values())))


TEXT = Check('text', lambda v: isinstance(v, str))
TEXTS = Check('a list of texts', lambda v: isinstance(v, list) and all(map(TEXT.fits, v)))
FLAG = Check('true or false', lambda v: isinstance(v, bool))
PERCENT = number(0, 100, 'a percentage from 0 to 100')
SHARE = number(0, 1, 'a share from 0 to 1')
POSITIVE = number(0, math.inf, 'a finite number, 0 or more')
COUNT = number(0, 2 ** 53, 'a whole number, 0 or more', whole=True)


def check_values(values: object, checks: Mapping[str, Check], needed: Iterable[str] = ()) -> None:
    """Raise ValueError that names the first value which is not what it has to be; each may be missing or null, but for
    those that are needed."""
    if not isinstance(values, dict):
        raise ValueError(f'{_short(values)} is no object of JSON')
    for key, check in checks.items():
        value = values.get(key)
        if (value is not None or key in needed) and not check.fits(value):
            raise ValueError(f'{key} is {_short(value)}, not {check.words}')


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


# Figures --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One figure of a result.

    Args:
        key: Its key in JSON.
        meaning: What it is, for the documents.
        check: What its value has to be where there is one.
        unit: What it is counted in.
        digits: Decimals that people see.
        needed: Whether there is no result without it.
        of_source: Whether the source has it too, as `source_KEY`.
        label: Its row in a card; none without one.
        setting: Its name where a card says how it was measured.
        listed: Its name in an index of the Hub.
        head: Its column in the table of `sformer compare`.
        source_head: The column of the source's.
        said: How `sformer evaluate` prints it, a format of the value.
        column: Its column in CSV; that of its key if not given, none if None.
        count: What is counted of each image of a batch, (B,) or (B, K); None where it means nothing.
        total: What a record keeps of the counts of a chunk, for JSON; their sums.
        pair: Whether it compares with the source, so that there is none without one.
        where: Whether a result has it at all.
        make: Its value, from what was counted of all images; the mean of `count`, in percent if that is its unit.
        parts: Figures that it is a mapping of, by their keys.
    """
    key: str
    meaning: str
    check: Check
    _: KW_ONLY
    unit: str = ''
    digits: int = 2
    needed: bool = False
    of_source: bool = False
    label: str = ''
    setting: str = ''
    listed: str = ''
    head: str = ''
    source_head: str = ''
    said: str = ''
    column: str | None = ''
    count: Callable[[Scored], torch.Tensor | None] | None = None
    total: Callable[[list[Any]], list[Any]] = column_sums
    pair: bool = False
    where: Callable[[Counted], bool] = lambda counted: True
    make: Callable[[Counted], object] | None = None
    parts: dict[str, Figure] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        return ('', SOURCE) if self.of_source else ('',)

    def value(self, counted: Counted) -> Any:
        """What was found; None where it means nothing."""
        if self.make is not None:
            return self.make(counted)
        sums = counted.sums(self.key)
        if sums is None:
            return None
        return round(100 * sums[0] / counted.num, 4) if self.unit == '%' else round(sums[0] / counted.num, 6)

    def leaves(self, side: str = '') -> list[Leaf]:
        """Where its value stands in a result, or those of its parts."""
        column = None if self.column is None else f'{side}{self.column or self.key}'
        head = self.source_head if side else self.head
        if not self.parts:
            return [Leaf(self, (side + self.key,), column, _titled(self.label, self.unit), head, self.listed)]
        leaves = []
        for part in self.parts.values():
            part_head = part.source_head if side else part.head
            leaves.append(Leaf(
                part, (side + self.key, part.key), f'{column}_{part.key}',
                f'{self.label}, {_titled(part.label, part.unit)}',
                f'{head} {part_head}' if head and part_head else '',
                f'{self.listed} {part.listed}' if part.listed else ''))
        return leaves


def _titled(label: str, unit: str) -> str:
    return f'{label} [{unit}]' if label and unit else label


@dataclass(frozen=True)
class Leaf:
    """A single value of a result.

    Args:
        figure: What it is.
        path: Keys that lead to it.
        column: Its column in CSV; None if it has none.
        label: Its row in a card.
        head: Its column in a table.
        listed: Its name in an index of the Hub.
    """
    figure: Figure
    path: tuple[str, ...]
    column: str | None
    label: str
    head: str
    listed: str

    def value(self, result: Result) -> Any:
        """Its value; None where there is none."""
        found: Any = result
        for key in self.path:
            found = (found or {}).get(key)
        return found

    def text(self, result: Result) -> str:
        value = self.value(result)
        return '' if value is None else f'{value:.{self.figure.digits}f}'


class Score:
    """Counts of one network on one chunk, for all figures that are counted by images."""

    def __init__(self, figures: Iterable[Figure]):
        self.figures = [figure for figure in figures if figure.count is not None]
        self.values: dict[str, list[Any] | None] = {figure.key: [] for figure in self.figures}

    def add(self, batch: Scored) -> None:
        for figure in self.figures:
            values = self.values[figure.key]
            if figure.pair and batch.expected is None or values is None or figure.count is None:
                continue
            counts = figure.count(batch)
            if counts is None:
                self.values[figure.key] = None
            else:
                values += counts.tolist()

    def record(self) -> dict[str, list[Any] | None]:
        """What is kept of each, for JSON; null where it means nothing."""
        totals = {}
        for figure in self.figures:
            values = self.values[figure.key]
            totals[figure.key] = None if values is None else figure.total(values)
        return totals


class Schema:
    """Figures of the results of a task, in the order in which a result has them.

    Args:
        name: The task.
        first: Key of the figure that an index compares by, where a result has it.
        mark: Key that results of this task have, and no others.
        begins: Columns that CSV begins with, whatever a result has.
    """

    def __init__(self, name: str, first: str, mark: str, begins: Sequence[str] = ('model',)):
        self.name = name
        self.first = first
        self.mark = mark
        self.begins = begins
        self.figures: dict[str, Figure] = {}
        SCHEMAS.append(self)

    def register(self, *figures: Figure) -> None:
        """Add figures, which results have from then on.

        Raises:
            ValueError: If there is one of this key.
        """
        for figure in figures:
            if figure.key in self.figures:
                raise ValueError(f'results of {self.name} have a figure {figure.key!r} already.')
            self.figures[figure.key] = figure

    def places(self) -> Iterator[tuple[str, str, Figure]]:
        """Key, side and figure of everything that a result may have."""
        for figure in self.figures.values():
            for side in figure.sides:
                yield side + figure.key, side, figure

    def leaves(self) -> list[Leaf]:
        return [leaf for _, side, figure in self.places() for leaf in figure.leaves(side)]

    # making and checking

    def score(self) -> Score:
        return Score(self.figures.values())

    def make(self, counted: Mapping[str, Counted], **given: object) -> Result:
        """A result.

        Args:
            counted: What was counted, by side: `''` and, if there is a source, `'source_'`.
            **given: Values that are not counted.

        Raises:
            ValueError: If a value is given that no figure says what it is.
        """
        result: Result = {}
        for key, side, figure in self.places():
            if key in given:
                result[key] = given.pop(key)
            elif side in counted and (figure.make or figure.count) and figure.where(counted[side]):
                if SOURCE in counted or not figure.pair:
                    result[key] = figure.value(counted[side])
        if given:
            raise ValueError(f'results of {self.name} have no figure {", ".join(given)}.')
        return result

    def check(self, result: object, needed: Iterable[str] | None = None) -> None:
        """Raise ValueError that names the first value of a result that cannot be.

        Args:
            result: What has to be one.
            needed: Figures that it has to have; those that every result has if None.
        """
        if needed is None:
            needed = [figure.key for figure in self.figures.values() if figure.needed]
        check_values(result, {key: figure.check for key, _, figure in self.places()}, needed)

    # forms

    def row(self, result: Result) -> dict[str, object]:
        """Cells of CSV: a column per part of a figure; what no figure describes is kept."""
        places = {key: figure.leaves(side) for key, side, figure in self.places()}
        row: dict[str, object] = {}
        for key, value in result.items():
            if key in places:
                found = {leaf.column: leaf.value(result) for leaf in places[key] if leaf.column is not None}
            else:
                found = {key: value}
            row |= {column: _cell(part) for column, part in found.items()}
        return row

    def owns_columns(self, columns: Collection[str]) -> bool:
        """Whether rows of CSV with these columns may be results of this task."""
        mark = self.figures.get(self.mark)
        marks = [leaf.column for leaf in mark.leaves()] if mark else []
        return 'model' in columns and any(column in columns for column in marks)

    def columns(self) -> list[str]:
        """All columns of CSV."""
        return [leaf.column for leaf in self.leaves() if leaf.column is not None]

    def table(self, results: list[Result]) -> tuple[list[str], list[list[str]]]:
        """Heads and cells of a table for people, without columns in which nobody has anything."""
        leaves = [leaf for leaf in self.leaves()
                  if leaf.head and any(leaf.value(result) is not None for result in results)]
        return [leaf.head for leaf in leaves], [[leaf.text(result) for leaf in leaves] for result in results]

    def has_source(self, result: Result) -> bool:
        """Whether a result has figures of the source, too."""
        return any(side and figure.label and key in result for key, side, figure in self.places())

    def card_rows(self, result: Result) -> list[list[str]]:
        """Rows of a card: a label, the figure of the source if it has any, and the own one."""
        sides = self.has_source(result)
        rows = []
        for figure in self.figures.values():
            theirs = figure.leaves(SOURCE) if figure.of_source else []
            for leaf, other in zip_longest(figure.leaves(), theirs):
                cells = [other.text(result) if other else '', leaf.text(result)] if figure.label else []
                if any(cells):
                    rows.append([leaf.label, *cells[not sides:]])
        return rows

    def settings(self, result: Result) -> list[str]:
        """How it was measured, for a card; lists say how many they have."""
        found = []
        for figure in self.figures.values():
            value = result.get(figure.key)
            if figure.setting and value:
                found.append(f'{figure.setting} {len(value) if isinstance(value, list) else value}')
        return found

    def listed(self, result: Result) -> list[tuple[str, float]]:
        """Names and values of what an index may list, the one to compare by first."""
        leaves = [leaf for leaf in self.leaves() if leaf.listed and leaf.path[0] in self.figures]
        leaves.sort(key=lambda leaf: leaf.path[0] != self.first)
        return [(leaf.listed, leaf.value(result)) for leaf in leaves if leaf.value(result) is not None]

    def said(self, result: Result, side: str = '') -> str:
        """Figures that the model and its source have, of one of them, in a line."""
        return in_line({side + figure.key: figure for figure in self.figures.values() if figure.of_source}, result)

    def compared(self, result: Result) -> str:
        """Figures that compare a model with its source, in a line."""
        return in_line({figure.key: figure for figure in self.figures.values() if figure.pair}, result)

    def documented(self) -> str:
        """The table of the documents."""
        lines = ['| key | what it is | unit |', '| --- | --- | --- |']
        for figure in self.figures.values():
            keys = ', '.join(f'`{side}{figure.key}`' for side in figure.sides)
            meaning = figure.meaning
            if figure.parts:
                parts = [f'`{key}` {part.meaning}'.strip() for key, part in figure.parts.items()]
                columns = [f'`{leaf.column}`' for leaf in figure.leaves()]
                meaning += f': {", ".join(parts)}; in CSV {", ".join(columns)}'
            elif figure.column is None:
                meaning += '; in JSON alone'
            units = dict.fromkeys([figure.unit, *(part.unit for part in figure.parts.values())])
            lines.append(f'| {keys} | {meaning} | {", ".join(filter(None, units))} |')
        return '\n'.join(lines)


SCHEMAS: list[Schema] = []


def is_result(value: object) -> bool:
    return isinstance(value, dict) and any(schema.mark in value for schema in SCHEMAS)


def schema_of(result: Result) -> Schema:
    """The schema of a result, of whatever task."""
    return next(schema for schema in SCHEMAS if schema.mark in result)


def in_line(figures: Mapping[str, Figure], values: Result) -> str:
    """Values as figures say them; a dash if there is none."""
    found = [(figure.said, values.get(key)) for key, figure in figures.items() if figure.said]
    return '   '.join(said.format(value) for said, value in found if value is not None) or '-'


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else '' if value is None else value
