"""`sformer compare`."""
from typing import Annotated

import typer

from .evaluate import run_evaluation
from .options import EvaluationOptions, Given, unfolded
from .tables import Format, TableFormat, said_beside, show_table

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
    split = f' ({first["split"]})' if first['split'] else ''
    heads, cells = schema.table(results)
    show_table(format, f'{first["num_images"]} images of {first["dataset"]}{split}', ['model', *heads],
               [[result['model'], *row] for result, row in zip(results, cells, strict=True)],
               schema.columns(), map(schema.row, results))
    if options.results_file:
        print(f'results in {options.results_file}', file=said_beside(format))
