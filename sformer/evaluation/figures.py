"""Figures of results: of classifiers, and of detectors.

A new figure is a new entry here. From then on results have it, whatever reads them checks it, `compare`, CSV and cards
show it, and the table of the documents, which `scripts/make_tables.py` writes, explains it.
"""
from collections.abc import Callable

import numpy as np

from ..execution import EngineNetwork
from .metrics import (
    Counted,
    agreeing,
    calibration_error,
    confidences,
    differences,
    likelihood,
    relative_error,
    reliability,
)
from .schema import (
    COUNT,
    FLAG,
    PERCENT,
    POSITIVE,
    SHARE,
    TEXT,
    TEXTS,
    Check,
    Figure,
    Schema,
    check_values,
    mapping,
    number,
)

__all__ = ['CLASSIFICATION', 'DETECTION', 'PRECISION', 'precision', 'precision_figures']

MAX_PASSED_OVER = 100  # of the files that are passed over in a folder; an archive of macOS has one for each image

CLASSIFICATION = Schema('classifiers', first='top1', mark='top1', begins=(  # as tables of timm's results do
    'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation'))
DETECTION = Schema('detectors', first='masks', mark='boxes')


def _spiking(counted: Counted) -> bool:
    return counted.subject.spiking


def _by_engine(counted: Counted) -> bool:
    return isinstance(counted.subject.model, EngineNetwork)


def _described(key: str) -> Callable[[Counted], object]:
    """What an exported graph says of itself."""
    def of(counted: Counted) -> object:
        model = counted.subject.model
        return model.describe()[key] if isinstance(model, EngineNetwork) else None
    return of


def _param_count(counted: Counted) -> object:
    if _by_engine(counted):
        return _described('param_count')(counted)
    return round(sum(p.numel() for p in counted.subject.model.parameters()) / 1e6, 4)


def _entrypoint(counted: Counted) -> str:
    model = counted.subject.model
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def _speed(counted: Counted) -> float | None:
    return round(counted.num / counted.network_seconds, 2) if counted.network_seconds else None


# Classifiers ----------------------------------------------------------------------------------------------------------

CLASSIFICATION.register(
    Figure(
        'model', 'what was named on the command line; of `sformer.evaluate`, the entrypoint', TEXT, make=_entrypoint),
    Figure('architecture', 'the entrypoint', TEXT),
    Figure('dataset', 'images: their name', TEXT, needed=True, make=lambda c: c.images.name),
    Figure('split', 'their split', TEXT, make=lambda c: c.images.split),
    Figure('dataset_fingerprint', 'their identity', TEXT, make=lambda c: c.images.fingerprint),
    Figure('dataset_revision', 'the commit on the Hub', TEXT, make=lambda c: c.images.revision),
    Figure('image_column', 'what was read', TEXT, make=lambda c: getattr(c.images, 'image_column', None)),
    Figure('label_column', 'likewise, of labels', TEXT, make=lambda c: getattr(c.images, 'label_column', None)),
    Figure('benchmark', 'how it is scored', TEXT, setting='benchmark', make=lambda c: c.subject.benchmark.name),
    Figure('num_images', 'images that count', COUNT, make=lambda c: c.num),
    Figure(
        'skipped_images', 'images without a label in this benchmark', COUNT, setting='images left out',
        make=lambda c: sum(record['skipped'] for record in c.records)),
    Figure(
        'bad_images', 'unreadable images, by name', TEXTS,
        make=lambda c: [name for record in c.records for name in record['bad']]),
    Figure(
        'num_passed_over',
        'what is in a folder and no image with a label: hidden or other files, images beside class folders', COUNT,
        make=lambda c: len(c.images.passed_over)),
    Figure(
        'passed_over', f'the first {MAX_PASSED_OVER} of them by name', TEXTS,
        make=lambda c: c.images.passed_over[:MAX_PASSED_OVER]),
    Figure(
        'top1', 'images whose first prediction is right', PERCENT, unit='%', needed=True, of_source=True, label='top-1',
        listed='Top-1 accuracy [%]', head='top-1 [%]', source_head='source top-1', said='top-1 {:.2f} %',
        count=lambda batch: batch.hits[:, 0]),
    Figure('top1_err', '100 less `top1`', PERCENT, unit='%', make=lambda c: round(100 - c.percent('top1'), 4)),
    Figure(
        'top5', 'images of which one of the first five predictions is right', PERCENT, unit='%', of_source=True,
        label='top-5', listed='Top-5 accuracy [%]', said='top-5 {:.2f} %', count=lambda batch: batch.hits.any(1)),
    Figure('top5_err', '100 less `top5`', PERCENT, unit='%', make=lambda c: round(100 - c.percent('top5'), 4)),
    Figure(
        'nll', 'mean negative log-likelihood; null with several labels per image', POSITIVE, unit='nats', digits=4,
        of_source=True, label='negative log-likelihood', said='NLL {:.4f}', count=likelihood),
    Figure(
        'ece', 'expected calibration error, 15 bins', PERCENT, unit='%', of_source=True,
        label='expected calibration error', said='calibration error {:.2f} %', count=confidences, total=reliability,
        make=lambda c: calibration_error(c.totals('ece'), c.num)),
    Figure(
        'agreement', 'equal predictions of model and source', PERCENT, unit='%', pair=True,
        label='agreement with the source', head='agree [%]', said='agreement {:.2f} %', count=agreeing),
    Figure(
        'relative_logit_error', "norm of the difference of logits over the norm of the source's", POSITIVE, digits=4,
        pair=True, label='relative logit error', head='logit error', said='relative logit error {:.4f}',
        count=differences, make=lambda c: relative_error(c.sums('relative_logit_error'))),
    Figure(
        'activity', 'share of neurons that fire ([codings](concepts.md#what-a-spike-costs-codings))', SHARE, digits=3,
        label='activity, the share of neurons that fire', head='activity', where=_spiking,
        make=lambda c: c.activity.mean()),
    Figure(
        'activity_per_site', 'the same per site', mapping(SHARE), column=None, where=_spiking,
        make=lambda c: c.activity.per_site()),
    Figure(
        'spikes_per_neuron', 'spikes per neuron by coding, lateral ones among them', mapping(POSITIVE),
        label='spikes per neuron', column='spikes', where=_spiking, make=lambda c: c.activity.spikes_per_neuron(),
        parts={
            **{coding: Figure(coding, '', POSITIVE, digits=3, label=f'{coding} coding')
               for coding in ('unary', 'binary', 'graded')},
            'lateral': Figure('lateral', '', POSITIVE, digits=3, label='of them lateral, in graded coding')}),
    Figure(
        'activity_images',
        'images on which spikes were counted: the first 512, in whole batches (of a stream, the first of each shard)',
        COUNT, setting='spikes counted on images', where=_spiking,
        make=lambda c: sum(record['activity_images'] for record in c.records)),
    Figure('param_count', 'parameters', POSITIVE, unit='million', label='parameters', make=_param_count),
    Figure(
        'img_size', 'height and width of the input', COUNT, unit='pixels', setting='image size',
        make=lambda c: c.subject.data_config['input_size'][-1]),
    Figure(
        'crop_pct', 'share that the centre crop keeps', SHARE, setting='crop',
        make=lambda c: c.subject.data_config['crop_pct']),
    Figure(
        'interpolation', 'how images are resized', TEXT, setting='interpolation',
        make=lambda c: c.subject.data_config['interpolation']),
    Figure(
        'seconds', 'time in the network, averaged over processes', POSITIVE, unit='s', of_source=True,
        make=lambda c: round(c.network_seconds, 3)),
    Figure(
        'images_per_second', 'of all processes together', POSITIVE, unit='images/s', digits=1, head='images /s',
        make=_speed),
    Figure(
        'decode_seconds', 'work of loading: decoding', POSITIVE, unit='s',
        make=lambda c: round(c.seconds('decode'), 3)),
    Figure(
        'preprocess_seconds', 'work of loading: preprocessing', POSITIVE, unit='s',
        make=lambda c: round(c.seconds('preprocess'), 3)),
    Figure('wait_seconds', 'how long the networks waited for it', POSITIVE, unit='s'),
    Figure('wall_seconds', 'all of the run', POSITIVE, unit='s'),
    Figure('engine', 'of an export: what ran it', TEXT, where=_by_engine, make=_described('engine')),
    Figure(
        'exported_of_sha256', 'of an export: state hash of its model', TEXT, where=_by_engine,
        make=_described('exported_of_sha256')),
    Figure('weights_sha256', 'state hash of the model, neurons included', TEXT, needed=True),
    Figure('batch_size', 'images per batch and process', COUNT, setting='images per batch'),
    Figure('seed', 'seed of the choice of images', number(-2 ** 63, 2 ** 63, 'a seed', whole=True)),
    Figure('workers', 'processes per process that decode', COUNT),
    Figure('world_size', 'processes', COUNT, setting='processes'),
    Figure('streaming', 'whether shards were read as they were needed', FLAG),
    Figure('device', 'what it ran on', TEXT, setting='device'),
    Figure('amp', 'mixed precision', TEXT, setting='mixed precision'),
    Figure('torchcompile', 'whether networks were compiled', FLAG),
    Figure('channels_last', 'whether memory was in this format', FLAG),
    Figure('versions', 'of python and the packages', mapping(TEXT)),
    Figure('peak_memory_mib', 'peak memory of a process', POSITIVE, unit='MiB'),
    Figure('peak_device_memory_mib', 'likewise on the device (CUDA)', POSITIVE, unit='MiB'),
    Figure(
        'source_model', "what it was compared with, if not its own source (`--source-model`)", TEXT,
        setting='compared with'),
    Figure('command', 'the command line', TEXT),
    Figure(
        'levels', 'of a point of a curve: its number of levels N',
        number(1, 2 ** 15, 'a number of levels', whole=True)),
    Figure(
        'curve', 'of `scripts/publish_zoo.py`: results of conversions with other N',
        Check('a list', lambda v: isinstance(v, list)), column=None),
    Figure('curve_command', 'what measured them', TEXT),
)

# Detectors ------------------------------------------------------------------------------------------------------------

# by their keys, figures that are made of COCO's precision (IoU from 0.50 to 0.95 by 0.05, recall, category ...)
PRECISION: dict[str, Figure] = {}
PRECISION_PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {}


def precision(key: str, meaning: str, part: Callable[[np.ndarray], np.ndarray], source_head: str = '') -> None:
    """Register an average of precision, of boxes and of masks, over all and by category.

    Args:
        key: Its key.
        meaning: What it is, in brackets.
        part: What it averages over, of the precision by IoU and others.
        source_head: Its column of the source in a table; none without one.
    """
    PRECISION[key] = Figure(
        key, meaning, PERCENT, unit='%', label=key, listed=f'{key} [%]', head=key,
        source_head=source_head, said=f'{key} {{:.2f}}')
    PRECISION_PARTS[key] = part


precision('mAP', '(mean over IoU of 0.50 to 0.95)', lambda values: values, source_head='mAP')
precision('mAP50', '(at IoU of 0.50)', lambda values: values[0])
precision('mAP75', '(at IoU of 0.75)', lambda values: values[5])


def precision_figures(values: np.ndarray) -> dict[str, float | None]:
    """Averages of precision [%], (IoU, ...), -1 where there is no object; None where there is none at all."""
    found: dict[str, float | None] = {}
    for key, part in PRECISION_PARTS.items():
        counted = part(values)
        counted = counted[counted > -1]
        found[key] = round(100 * float(counted.mean()), 4) if counted.size else None
    return found


def _is_precision(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    checks = {key: figure.check for key, figure in PRECISION.items()}
    classes = value.get('per_class') or {}
    try:
        for figures in (value, *classes.values()):
            check_values(figures, checks)
    except (ValueError, AttributeError):
        return False
    return all(map(TEXT.fits, classes))


def _also(*keys: str) -> list[Figure]:
    """Figures that results of classifiers have, too."""
    return [CLASSIFICATION.figures[key] for key in keys]


AVERAGES = Check('percentages of average precision', _is_precision)

DETECTION.register(
    *_also('model', 'architecture', 'dataset', 'split', 'dataset_fingerprint', 'num_images', 'seed', 'weights_sha256',
           'param_count', 'device', 'world_size', 'versions'),
    Figure(
        'problems', 'images and annotations that are not usable, a line each', TEXTS,
        setting='images and annotations left out'),
    Figure(
        'boxes', 'average precision of boxes, over all and by category in `per_class`, null where there is no object',
        AVERAGES, needed=True, of_source=True, label='boxes', listed='boxes', head='box', source_head='source box',
        parts=PRECISION),
    Figure(
        'masks', 'the same of masks, of a detector that segments', AVERAGES, of_source=True, label='masks',
        listed='masks', head='mask', source_head='source mask', parts=PRECISION),
    *_also('seconds', 'source_model', 'command'),
)
