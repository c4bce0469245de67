"""`sformer benchmark`."""
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import command_line
from .options import MAX_BATCH_SIZE, unfolded
from .tables import Format, TableFormat, print_csv, said_beside, show_table

if TYPE_CHECKING:
    from ..execution.timing import BenchmarkResult

__all__ = ['benchmark']


@unfolded
def benchmark(
        model: Annotated[str, typer.Argument(help='Folder of an SFormer, hf-hub:ID, or name of one with weights')],
        execution: Annotated[list[str] | None, typer.Option(
            help='What is measured: simulate, integer, openvino, onnxruntime, openvino:fast ...  [default: the engines '
                 'that are installed, also with the recipe fast if the model has another]')] = None,
        against: Annotated[list[str] | None, typer.Option(
            help='What it is compared with: openvino:fp32, openvino:bf16, openvino:nncf, openvino:int8, source:fp32, '
                 'onnxruntime:fp32 ...  [default: those of the engines that are installed]')] = None,
        batch_size: Annotated[list[int] | None, typer.Option(
            min=1, max=MAX_BATCH_SIZE, help='Images per forward pass  [default: 8]')] = None,
        pairs: Annotated[int, typer.Option(min=1, max=1000, help='Rounds')] = 9,
        threads: Annotated[int | None, typer.Option(
            min=1, max=1024, help='Threads that compute  [default: as many as there are cores]')] = None,
        results_file: Annotated[Path | None, typer.Option(help='JSON file for the results')] = None,
        format: TableFormat = Format.table,
) -> None:
    """Time executions of an SFormer on this CPU beside its source and others, and say which one to take."""
    if results_file:
        from ..files import holds, may_write
        may_write(results_file, 'timings', holds('results', 'processor'))
    import torch

    from ..execution import benchmark as measure
    from ..execution.timing import default_executions
    from ..files import write_json
    from ..tasks import open_model
    network = open_model(model, 'benchmark')
    if threads:
        torch.set_num_threads(threads)
    executions, others = default_executions(network)
    with contextlib.redirect_stdout(sys.stderr):  # of NNCF, which shows its progress
        result = measure(network, execution or executions, against or others, batch_size or [8], pairs)
    beside = said_beside(format)
    columns, records = rows(result)
    if format == Format.csv:
        print_csv(columns, records)
    else:
        for table in tables(result):
            show_table(format, *table)
            print()
    print(f'{result["processor"]} ({result["instruction_set"]}), {result["threads"]} threads, '
          f'medians of {pairs} rounds (smallest to largest), '
          + ', '.join(f'{name} {version}' for name, version in result['versions'].items()
                      if name in ('torch', 'timm', 'openvino', 'onnxruntime')), file=beside)
    for name, reason in result['skipped'].items():
        print(f'{name} is left out: {reason}.', file=beside)
    if results_file:
        write_json(results_file, dict(result, model=model, command=command_line()))
        print(f'results in {results_file}', file=beside)
    print(result['verdict'], file=beside)


MEGABYTE = 10 ** 6
TIMING_HEADS = ('execution', 'images/s', 'p50 [ms]', 'p95 [ms]', 'file [MB]', 'memory [MB]')


def rows(result: 'BenchmarkResult') -> tuple[list[str], list[dict[str, object]]]:
    """Columns and rows of CSV."""
    found: list[dict[str, object]] = []
    for row in result['results']:
        memory = '' if row['memory'] is None else f'{row["memory"] / MEGABYTE:.1f}'
        found.append(dict(
            execution=row['execution'], batch_size=row['batch_size'], threads=result['threads'],
            images_per_second=row['images_per_second'], p50_ms=1e3 * row['seconds'], p95_ms=1e3 * row['p95'],
            file_mb=row['size'] / MEGABYTE, memory_mb=memory,
            **{f'times_{other}': spread['median'] for other, spread in row['speedup'].items()},
            processor=result['processor'], instruction_set=result['instruction_set']))
    return list(dict.fromkeys(column for row in found for column in row)), found


def tables(result: 'BenchmarkResult') -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """A table per batch size."""
    found: list[tuple[str, tuple[str, ...], list[list[str]]]] = []
    for size in dict.fromkeys(row['batch_size'] for row in result['results']):
        timings = [row for row in result['results'] if row['batch_size'] == size]
        others = list(dict.fromkeys(name for row in timings for name in row['speedup']))
        cells = []
        for row in timings:
            memory = '' if row['memory'] is None else f'{row["memory"] / MEGABYTE:.0f}'
            cells.append([row['execution'], f'{row["images_per_second"]:.1f}', f'{1e3 * row["seconds"]:.1f}',
                          f'{1e3 * row["p95"]:.1f}', f'{row["size"] / MEGABYTE:.1f}', memory,
                          *(_speedup(row['speedup'].get(other)) for other in others)])
        found.append((f'batch {size}', (*TIMING_HEADS, *(f'times {other}' for other in others)), cells))
    return found


def _speedup(spread: dict[str, float] | None) -> str:
    return '' if spread is None else f'{spread["median"]:.2f} ({spread["min"]:.2f}-{spread["max"]:.2f})'
