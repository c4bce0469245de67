"""Tables: for people, which fit into a terminal, for programs, and for documents and papers."""
import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, TextIO

import typer

__all__ = [
    'Format', 'TableFormat', 'append_csv', 'print_csv', 'print_table', 'said_beside', 'show_table', 'table_lines',
]


class Format(str, Enum):
    """How a table is printed."""
    table = 'table'
    csv = 'csv'
    md = 'md'
    latex = 'latex'


TableFormat = Annotated[Format, typer.Option(
    '--format', help='A table to read, Markdown or LaTeX of it, or CSV with more columns')]

MIN_WIDTH = 60  # a terminal narrower than that wraps lines by itself
MIN_NAMES = 20  # room that names have before columns make way


def show_table(
        format: Format,
        title: str,
        heads: Sequence[str],
        rows: Sequence[Sequence[str]],
        columns: Sequence[str] | None = None,
        records: Iterable[Mapping[str, object]] = (),
) -> None:
    """Print a table in a format.

    Args:
        format: How.
        title: What the table is of; it is no part of CSV, and a comment in Markdown and LaTeX.
        heads: Head per column, of which the first holds names.
        rows: Cells.
        columns: Columns of CSV, if it has others than the table.
        records: Rows of these columns.
    """
    if format == Format.table:
        print_table(title, heads, rows)
    elif format != Format.csv:
        print('\n'.join(table_lines(format, title, heads, rows)))
    elif columns is not None:
        print_csv(columns, records)
    else:
        csv.writer(sys.stdout, lineterminator='\n').writerows([heads, *rows])


def table_lines(format: Format, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, or in LaTeX with the rules of the package booktabs."""
    if format == Format.md:
        lines = [[cell.replace('|', '\\|') for cell in line] for line in (heads, *rows)]
        lines.insert(1, ['---', *['---:'] * (len(heads) - 1)])
        return [f'<!-- {title.replace("--", "- -")} -->', *(f'| {" | ".join(line)} |' for line in lines)]
    first, *others = [' & '.join(map(_latex, line)) + r' \\' for line in (heads, *rows)]
    return [f'% {title}', rf'\begin{{tabular}}{{l{"r" * (len(heads) - 1)}}}', r'\toprule', first, r'\midrule', *others,
            r'\bottomrule', r'\end{tabular}']


LATEX = {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}', '±': r'$\pm$',
         **{sign: f'\\{sign}' for sign in '&%$#_{}'}}


def _latex(cell: str) -> str:
    """A cell in LaTeX; a minus in front of a number is one."""
    text = ''.join(LATEX.get(sign, sign) for sign in cell)
    return f'$-${text[1:]}' if text[:1] == '-' and text[1:2].isdigit() else text


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column holds names, which are wrapped where they are too long; nothing is cut. Columns
    that have no room stand in further tables below.

    Args:
        title: What the table is of.
        heads: Head per column.
        rows: Cells.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    console = Console(markup=False, highlight=False, emoji=False)
    console.width = max(console.width, MIN_WIDTH)
    columns = zip(heads[1:], *(row[1:] for row in rows), strict=True)
    widths = [max(map(len, [*head.split(), *cells])) for head, *cells in columns]
    names = min(MIN_NAMES, max(len(row[0]) for row in (heads, *rows)))
    console.print(f'{title}\n')
    for i, part in enumerate(_parts(widths, console.width - names)):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(heads[0], overflow='fold')
        for column in part:
            table.add_column(heads[column + 1], overflow='fold', justify='right', width=widths[column])
        for row in rows:
            table.add_row(row[0], *(row[column + 1] for column in part))
        console.print(*[''] * (i > 0), table)


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns of these widths by the table that they stand in, each with a blank in front."""
    parts: list[list[int]] = [[]]
    left = room
    for column, width in enumerate(widths):
        if parts[-1] and left < width + 1:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= width + 1
    return parts


def said_beside(format: Format) -> TextIO:
    """Where a command says what is no part of its table."""
    return sys.stdout if format == Format.table else sys.stderr


def print_csv(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Print rows as CSV, a value that a row does not have as an empty field."""
    writer = csv.DictWriter(sys.stdout, columns, restval='', extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def append_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows to a CSV file, below those that are there."""
    from ..files import write_file
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
    old = path.read_bytes() if path.exists() else b''
    if not old:
        writer.writeheader()
    writer.writerows(rows)
    write_file(path, old + text.getvalue().encode())
