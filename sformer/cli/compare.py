"""`sformer compare`."""
import sys
from typing import Annotated

import typer

from .evaluate import run_evaluation
from .options import EvaluationOptions, Format, Given, TableFormat, unfolded
from .tables import print_csv, print_table

__all__ = ['compare']


@unfolded
def compare(
        models: Annotated[list[str], typer.Argument(help='Folders of SFormers, hf-hub:ID, or names of timm models')],
        options: EvaluationOptions,
        given: Given,
        format: TableFormat = Format.table,
) -> None:
    """Evaluate several models in one pass over the images, or detectors one after another, and print one table."""
    _, results = run_evaluation(models, options, given)
    if not results:
        return
    from ..evaluation.schema import schema_of
    first = results[0]
    schema = schema_of(first)
    if format == Format.csv:
        print_csv(schema.columns(), [schema.row(result) for result in results])
    else:
        split = f' ({first["split"]})' if first['split'] else ''
        heads, rows = schema.table(results)
        print_table(f'{first["num_images"]} images of {first["dataset"]}{split}', ['model', *heads], [
            [result['model'], *row] for result, row in zip(results, rows, strict=True)])
    if options.results_file:
        print(f'results in {options.results_file}', file=sys.stderr if format == Format.csv else sys.stdout)
