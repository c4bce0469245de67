"""`sformer compare`."""
import sys
from typing import Annotated, Any, Dict, List, Tuple

import typer

from ..publishing.detector_figures import FIGURES
from .evaluate import run_evaluation
from .options import EvaluationOptions, Format, TableFormat, unfolded
from .tables import print_csv, print_table

__all__ = ['compare']

# head, key and digits of a column; all that fits beside a name into 80 columns
COLUMNS = (
    ('top-1 [%]', 'top1', 2), ('source top-1', 'source_top1', 2), ('agree [%]', 'agreement', 2),
    ('logit error', 'relative_logit_error', 4), ('activity', 'activity', 3), ('images /s', 'images_per_second', 1))
IMAGE_COLUMNS = (
    'model', 'architecture', 'dataset', 'split', 'num_images', 'top1', 'top5', 'nll', 'ece', 'source_top1',
    'source_top5', 'source_nll', 'source_ece', 'agreement', 'relative_logit_error', 'activity', 'spikes_unary',
    'spikes_binary', 'spikes_graded', 'param_count', 'images_per_second', 'weights_sha256')

# the same of detectors: key of a result, which the source's has a prefix to, and head
KINDS = (('boxes', 'box'), ('masks', 'mask'))
DETECTION_COLUMNS = (
    'model', 'architecture', 'dataset', 'split', 'num_images',
    *(f'{prefix}{kind}_{name}' for prefix in ('', 'source_') for kind, _ in KINDS for name in FIGURES),
    'param_count', 'seconds', 'source_seconds', 'weights_sha256')


@unfolded
def compare(
        models: Annotated[List[str], typer.Argument(help='Folders of SFormers, hf-hub:ID, or names of timm models')],
        options: EvaluationOptions,
        format: TableFormat = Format.table,
) -> None:
    """Evaluate several models in one pass over the images, or detectors one after another, and print one table."""
    results = run_evaluation(models, options)
    if not results:
        return
    first = results[0]
    detectors = 'boxes' in first
    if format == Format.csv:
        print_csv(DETECTION_COLUMNS if detectors else IMAGE_COLUMNS, [
            with_precision(result) if detectors else with_spikes(result) for result in results])
    else:
        split = f' ({first["split"]})' if first['split'] else ''
        heads, rows = detection_table(results) if detectors else (('model', *(head for head, _, _ in COLUMNS)), [
            (result['model'], *(cell(result.get(key), digits) for _, key, digits in COLUMNS)) for result in results])
        print_table(f'{first["num_images"]} images of {first["dataset"]}{split}', heads, rows)
    if options.results_file:
        print(f'results in {options.results_file}', file=sys.stderr if format == Format.csv else sys.stdout)


def with_spikes(result: Dict[str, Any]) -> Dict[str, Any]:
    """Result with a column for each coding of its spikes."""
    spikes = result.get('spikes_per_neuron') or {}
    return dict(result, **{f'spikes_{coding}': number for coding, number in spikes.items()})


def with_precision(result: Dict[str, Any]) -> Dict[str, Any]:
    """Result with a column for each figure of average precision."""
    return dict(result, **{f'{prefix}{kind}_{name}': result[f'{prefix}{kind}'][name] for prefix in ('', 'source_')
                           for kind, _ in KINDS for name in FIGURES if f'{prefix}{kind}' in result})


def detection_table(results: List[Dict[str, Any]]) -> Tuple[Tuple[str, ...], List[Tuple[str, ...]]]:
    """Heads and rows: average precision of boxes and, where something segments, masks, beside the sources' mAP."""
    flat = [with_precision(result) for result in results]
    columns = [(f'{label} {name}', f'{kind}_{name}') for kind, label in KINDS for name in FIGURES]
    columns += [(f'source {label} mAP', f'source_{kind}_mAP') for kind, label in KINDS]
    columns = [(head, key) for head, key in columns if any(row.get(key) is not None for row in flat)]
    return ('model', *(head for head, _ in columns)), [
        (row['model'], *(cell(row.get(key), 2) for _, key in columns)) for row in flat]


def cell(value: Any, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'
