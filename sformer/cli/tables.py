"""Tables for people, which fit into 80 columns, and for programs; and where those for programs may be written."""
import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Sequence, Set

from ..errors import SFormerError
from .arguments import check_folder

__all__ = ['append_csv', 'check_own_file', 'print_table', 'print_csv']

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


def print_csv(columns: Sequence[str], rows: Iterable[Dict[str, Any]]) -> None:
    """Print rows as CSV, a value that a row does not have as an empty field."""
    writer = csv.DictWriter(sys.stdout, columns, restval='', extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def check_own_file(path: Path, what: str, keys: Set[str], columns: Optional[Sequence[str]] = None) -> Any:
    """Make sure that a command can write to a file, and that what is there is a file of its own.

    Args:
        path: JSON file or, where there are columns, a CSV file.
        what: What is in it, for errors.
        keys: Keys of the object in a JSON file by which it is known.
        columns: Columns of a CSV file, by which it is known.

    Returns:
        The content of a JSON file that is there; None without one.

    Raises:
        SFormerError: If it cannot be written, or would replace another file.
    """
    from ..saving.model_config import CONFIG_NAME, WEIGHTS_NAME
    check_folder(path)
    suffixes = ['.json', *(['.csv'] if columns else [])]
    if path.is_dir():
        raise SFormerError(f'{path} is a folder. Name a file in it.')
    if path.suffix.lower() not in ('', *suffixes) or path.name in (CONFIG_NAME, WEIGHTS_NAME):
        raise SFormerError(f'{path} is no name for {what}, which are written to a file that ends in '
                           f'{" or ".join(suffixes)} and is no part of a model.')
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise SFormerError(f'{path} cannot be written: {existing} is read-only for you, or no folder.')
    if not path.exists() or path.is_file() and path.stat().st_size == 0:
        return None
    try:
        text = path.read_text(encoding='utf-8') if path.is_file() else ''
        found = next(csv.reader(io.StringIO(text))) if path.suffix.lower() == '.csv' else json.loads(text)
    except (OSError, ValueError, StopIteration, csv.Error, RecursionError):
        found = None
    if isinstance(found, dict) and keys <= {*found} or columns and found == [*columns]:
        return found if isinstance(found, dict) else None
    raise SFormerError(f'{path} is there and holds no {what}, which would take its place. Name another file.')


def append_csv(path: Path, columns: Sequence[str], rows: Iterable[Dict[str, Any]]) -> None:
    """Write rows to a CSV file, below those that are there."""
    from ..files import write_aside
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
    old = path.read_text(encoding='utf-8') if path.exists() else ''
    if not old:
        writer.writeheader()
    writer.writerows(rows)
    path = path.resolve()  # of a link, where it leads
    with write_aside(path.parent) as aside:
        (aside / path.name).write_text(old + text.getvalue(), encoding='utf-8')
