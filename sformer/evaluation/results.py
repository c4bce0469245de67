"""Results files: JSON, and CSV that begins as timm's does, or with what detectors are judged by."""
import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

import torch.nn as nn

from ..errors import SFormerError
from ..files import locked, may_write, state_hash, write_file, write_json, written_to
from ..saving.model_config import CONFIG_NAME, WEIGHTS_NAME
from .schema import SCHEMAS, Result, is_result, schema_of

__all__ = ['check_replaceable', 'check_results_file', 'write_results']

FORMATS = ('json', 'csv')


def check_results_file(path: str | Path, format: str | None = None) -> str:
    """Make sure that results can be written, before there are any.

    Args:
        path: Results file; there may be one already. Of a link, the file that it leads to.
        format: `json` or `csv`; None goes by the file's suffix, and is `json` without one.

    Returns:
        The format.

    Raises:
        SFormerError: If the format is unknown, a file that is there is not one of results, or none can be written.
    """
    path = Path(path)
    format = format or path.suffix.lstrip('.').lower() or 'json'
    if format not in FORMATS:
        raise SFormerError(f'results are written as {" or ".join(FORMATS)}, not as {format!r} (--results-format).')
    if path.name in (CONFIG_NAME, WEIGHTS_NAME):
        raise SFormerError(f'{path}: {path.name} is the name of a part of a model. Name the results otherwise.')
    may_write(path, 'results', _has_rows if format == 'csv' else lambda file: _read_json(file) is not None)
    return format


def check_replaceable(path: str | Path, models: Iterable[nn.Module], dataset: str) -> None:
    """Make sure that JSON results which are there are replaced by ones of the same models and images.

    Args:
        path: JSON results file; there may be one already.
        models: What is going to be evaluated.
        dataset: Name of the data set.

    Raises:
        SFormerError: If the file has results of other weights or of another data set.
    """
    results = _read_json(written_to(path))
    if not results:
        return
    hashes = {state_hash(model.state_dict()) for model in models}
    for result in results:
        if result.get('weights_sha256') not in hashes or result.get('dataset') != dataset:
            what = 'other weights' if result.get('dataset') == dataset else f'another data set, {result.get("dataset")}'
            raise SFormerError(f'{path} has a result of {result["model"]} with {what}, which would be lost. '
                               f'Name another file, or remove it.')


def _read_json(path: Path) -> list[Result] | None:
    """Results in a JSON file; none if it is missing or empty, None if it holds something else."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError):
        return None
    results = found if isinstance(found, list) else [found]
    return results if all(is_result(r) and 'model' in r for r in results) else None


def write_results(path: str | Path, results: list[Result], format: str = 'json') -> None:
    """Write results: a JSON object (a list if there are several), or rows that are appended to a CSV file.

    Rows and columns of a CSV file that is there are kept. Files are written aside and renamed; of a link, the file
    that it leads to. Bytes of file names that are not UTF-8 are written as escapes.

    Raises:
        SFormerError: If a CSV file that is there is not one of results.
        OSError: If the file cannot be written.
    """
    path = written_to(path)
    try:
        _write_format(path, results, format)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e


def _write_format(path: Path, results: list[Result], format: str) -> None:
    if format == 'json':
        write_json(path, results[0] if len(results) == 1 else results)
        return
    rows = [schema_of(result).row(result) for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f'.{path.name}.lock')):  # others may append at the same time
        columns, old = _read_csv(path)
        begins = [column for result in results for column in schema_of(result).begins]
        columns = list(dict.fromkeys([*columns, *begins, *(column for row in rows for column in row)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows([*old, *rows])
        write_file(path, text.getvalue().encode('utf-8', 'backslashreplace'))


def _has_rows(path: Path) -> bool:
    """Whether `_read_csv` can read a file; else it says why not."""
    _read_csv(path)
    return True


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a results file; none if there is none."""
    if not path.exists() or path.stat().st_size == 0:
        return [], []
    csv.field_size_limit(2 ** 31 - 1)  # the names of unreadable images are a single field
    try:
        with open(path, newline='', encoding='utf-8') as f:
            reader = csv.DictReader(f)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as e:
        raise SFormerError(f'{path} is no CSV file of results: {e}.') from e
    if not any(schema.owns_columns(columns) for schema in SCHEMAS) or len(set(columns)) != len(columns):
        raise SFormerError(
            f'{path} is no CSV file of results: its first line is {", ".join(columns)[:80]!r}. Name another file.')
    if any(None in row or None in row.values() for row in rows):
        raise SFormerError(f'{path} has rows with more or fewer fields than its first line. Name another file.')
    return columns, rows
