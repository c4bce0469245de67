"""Tables for people, which fit into 80 columns, and for programs."""
import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ['append_csv', 'print_table', 'print_csv']

MIN_WIDTH = 60  # a terminal narrower than that wraps lines by itself


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column holds names, which are wrapped where they are too long; nothing is cut.

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
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(heads[0], overflow='fold')
    for head, *cells in zip(heads[1:], *(row[1:] for row in rows), strict=True):
        table.add_column(head, overflow='fold', justify='right', width=max(map(len, [*head.split(), *cells])))
    for row in rows:
        table.add_row(*row)
    console.print(f'{title}\n')
    console.print(table)


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
