"""`sformer benchmark`."""
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import command_line
from .options import MAX_BATCH_SIZE, unfolded
from .tables import print_table

if TYPE_CHECKING:
    from ..execution.timing import BenchmarkResult
    from ..files import Json

__all__ = ['benchmark']


@unfolded
def benchmark(
        model: Annotated[str, typer.Argument(help='Folder of an SFormer, hf-hub:ID, or name of one with weights')],
        execution: Annotated[list[str] | None, typer.Option(
            help='What is measured: simulate, integer, openvino, onnxruntime ...  [default: openvino]')] = None,
        against: Annotated[list[str] | None, typer.Option(
            help='What it is compared with: source:fp32, source:bf16, openvino:fp32, openvino:nncf, openvino:int8 ...  '
                 '[default: source:fp32 source:bf16]')] = None,
        batch_size: Annotated[list[int] | None, typer.Option(
            min=1, max=MAX_BATCH_SIZE, help='Images per forward pass  [default: 8]')] = None,
        pairs: Annotated[int, typer.Option(min=1, max=1000, help='Rounds')] = 9,
        results_file: Annotated[Path | None, typer.Option(help='JSON file for the results')] = None,
) -> None:
    """Time executions of an SFormer on this CPU, against its source and others, in turn within one process."""
    if results_file:
        from ..files import holds, may_write
        may_write(results_file, 'timings', holds('results', 'processor'))
    from ..execution import benchmark as measure
    from ..files import write_json
    from ..tasks import open_model
    wanted: Json = dict(executions=execution, against=against, batch_sizes=batch_size)
    wanted = {key: value for key, value in wanted.items() if value}
    result = measure(open_model(model, 'benchmark'), pairs=pairs, **wanted)
    for table in tables(result):
        print_table(*table)
        print()
    print(f'{result["processor"]} ({result["instruction_set"]}), {result["threads"]} threads, '
          f'medians of {pairs} rounds (smallest to largest), '
          + ', '.join(f'{name} {version}' for name, version in result['versions'].items()
                      if name in ('torch', 'timm', 'openvino', 'onnxruntime')))
    for name, reason in result['skipped'].items():
        print(f'{name} is left out: {reason}.')
    if result['verdict']:
        print(result['verdict'])
    if results_file:
        write_json(results_file, dict(result, model=model, command=command_line()))
        print(f'results in {results_file}')


def tables(result: 'BenchmarkResult') -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """A table per batch size."""
    found: list[tuple[str, Sequence[str], list[list[str]]]] = []
    for size in dict.fromkeys(row['batch_size'] for row in result['results']):
        rows = [row for row in result['results'] if row['batch_size'] == size]
        others = list(dict.fromkeys(name for row in rows for name in row['speedup']))
        cells = [[row['execution'], f'{1e3 * row["seconds"]:.1f}', *(_speedup(row['speedup'].get(o)) for o in others)]
                 for row in rows]
        heads = ('execution', 'ms', *(f'times {other}' for other in others))
        found.append((f'batch {size}', heads, cells))
    return found


def _speedup(spread: dict[str, float] | None) -> str:
    return '' if spread is None else f'{spread["median"]:.2f} ({spread["min"]:.2f}-{spread["max"]:.2f})'
