"""`sformer compare`."""
import sys
from typing import Annotated, Any, Dict, List

import typer

from ..errors import SFormerError
from .evaluate import detectors, run_evaluation
from .options import EvaluationOptions, Format, TableFormat, unfolded
from .tables import print_csv, print_table

__all__ = ['compare']

# head, key and digits of a column; all that fits beside a name into 80 columns
COLUMNS = (
    ('top-1 [%]', 'top1', 2), ('source top-1', 'source_top1', 2), ('agree [%]', 'agreement', 2),
    ('logit error', 'relative_logit_error', 4), ('activity', 'activity', 3), ('images /s', 'images_per_second', 1))
CSV_COLUMNS = (
    'model', 'architecture', 'dataset', 'split', 'num_images', 'top1', 'top5', 'nll', 'ece', 'source_top1',
    'source_top5', 'source_nll', 'source_ece', 'agreement', 'relative_logit_error', 'activity', 'spikes_unary',
    'spikes_binary', 'spikes_graded', 'param_count', 'images_per_second', 'weights_sha256')


@unfolded
def compare(
        models: Annotated[List[str], typer.Argument(help='Folders of SFormers, hf-hub:ID, or names of timm models')],
        options: EvaluationOptions,
        format: TableFormat = Format.table,
) -> None:
    """Evaluate several models in one pass over the images, and print one table."""
    if detectors(models):
        raise SFormerError(f'{models[0]} is a detector: sformer evaluate takes it.')
    results = run_evaluation(models, options)
    if not results:
        return
    if format == Format.csv:
        print_csv(CSV_COLUMNS, [with_spikes(result) for result in results])
    else:
        first = results[0]
        split = f' ({first["split"]})' if first['split'] else ''
        heads = ('model', *(head for head, _, _ in COLUMNS))
        print_table(f'{first["num_images"]} images of {first["dataset"]}{split}', heads, [
            (result['model'], *(cell(result.get(key), digits) for _, key, digits in COLUMNS)) for result in results])
    if options.results_file:
        print(f'results in {options.results_file}', file=sys.stderr if format == Format.csv else sys.stdout)


def with_spikes(result: Dict[str, Any]) -> Dict[str, Any]:
    """Result with a column for each coding of its spikes."""
    spikes = result.get('spikes_per_neuron') or {}
    return dict(result, **{f'spikes_{coding}': number for coding, number in spikes.items()})


def cell(value: Any, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'
