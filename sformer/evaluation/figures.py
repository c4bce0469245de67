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

CLASSIFICATION = Schema('classifiers', first='top1', mark='top1')
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
        key='model', meaning='what was named on the command line; of `sformer.evaluate`, the entrypoint', check=TEXT,
        make=_entrypoint),
    Figure(key='architecture', meaning='the entrypoint', check=TEXT),
    Figure(key='dataset', meaning='images: their name', check=TEXT, needed=True, make=lambda c: c.images.name),
    Figure(key='split', meaning='their split', check=TEXT, make=lambda c: c.images.split),
    Figure(
        key='dataset_fingerprint', meaning='their identity', check=TEXT, make=lambda c: c.images.fingerprint),
    Figure(
        key='dataset_revision', meaning='the commit on the Hub', check=TEXT, make=lambda c: c.images.revision),
    Figure(
        key='image_column', meaning='what was read', check=TEXT,
        make=lambda c: getattr(c.images, 'image_column', None)),
    Figure(
        key='label_column', meaning='likewise, of labels', check=TEXT,
        make=lambda c: getattr(c.images, 'label_column', None)),
    Figure(
        key='benchmark', meaning='how it is scored', check=TEXT, setting='benchmark',
        make=lambda c: c.subject.benchmark.name),
    Figure(key='num_images', meaning='images that count', check=COUNT, make=lambda c: c.num),
    Figure(
        key='skipped_images', meaning='images without a label in this benchmark', check=COUNT,
        setting='images left out', make=lambda c: sum(record['skipped'] for record in c.records)),
    Figure(
        key='bad_images', meaning='unreadable images, by name', check=TEXTS,
        make=lambda c: [name for record in c.records for name in record['bad']]),
    Figure(
        key='num_passed_over', check=COUNT, make=lambda c: len(c.images.passed_over),
        meaning='what is in a folder and no image with a label: hidden or other files, images beside class folders'),
    Figure(
        key='passed_over', meaning=f'the first {MAX_PASSED_OVER} of them by name', check=TEXTS,
        make=lambda c: c.images.passed_over[:MAX_PASSED_OVER]),
    Figure(
        key='top1', meaning='images whose first prediction is right', check=PERCENT, unit='%', needed=True,
        of_source=True, label='top-1', listed='Top-1 accuracy [%]', head='top-1 [%]', source_head='source top-1',
        said='top-1 {:.2f} %', count=lambda batch: batch.hits[:, 0]),
    Figure(
        key='top1_err', meaning='100 less `top1`', check=PERCENT, unit='%',
        make=lambda c: round(100 - c.percent('top1'), 4)),
    Figure(
        key='top5', meaning='images of which one of the first five predictions is right', check=PERCENT, unit='%',
        of_source=True, label='top-5', listed='Top-5 accuracy [%]', said='top-5 {:.2f} %',
        count=lambda batch: batch.hits.any(1)),
    Figure(
        key='top5_err', meaning='100 less `top5`', check=PERCENT, unit='%',
        make=lambda c: round(100 - c.percent('top5'), 4)),
    Figure(
        key='nll', meaning='mean negative log-likelihood; null with several labels per image', check=POSITIVE,
        unit='nats', digits=4, of_source=True, label='negative log-likelihood', said='NLL {:.4f}', count=likelihood),
    Figure(
        key='ece', meaning='expected calibration error, 15 bins', check=PERCENT, unit='%', of_source=True,
        label='expected calibration error', said='calibration error {:.2f} %', count=confidences, total=reliability,
        make=lambda c: calibration_error(c.totals('ece'), c.num)),
    Figure(
        key='agreement', meaning='equal predictions of model and source', check=PERCENT, unit='%', pair=True,
        label='agreement with the source', head='agree [%]', said='agreement {:.2f} %', count=agreeing),
    Figure(
        key='relative_logit_error', check=POSITIVE, digits=4, pair=True, label='relative logit error',
        meaning="norm of the difference of logits over the norm of the source's", head='logit error',
        said='relative logit error {:.4f}', count=differences,
        make=lambda c: relative_error(c.sums('relative_logit_error'))),
    Figure(
        key='activity', check=SHARE, digits=3, label='activity, the share of neurons that fire', head='activity',
        meaning='share of neurons that fire ([codings](concepts.md#what-a-spike-costs-codings))', where=_spiking,
        make=lambda c: c.activity.mean()),
    Figure(
        key='activity_per_site', meaning='the same per site', check=mapping(SHARE), column=None, where=_spiking,
        make=lambda c: c.activity.per_site()),
    Figure(
        key='spikes_per_neuron', meaning='spikes per neuron by coding', check=mapping(POSITIVE),
        label='spikes per neuron', column='spikes', where=_spiking, make=lambda c: c.activity.spikes_per_neuron(),
        parts={coding: Figure(key=coding, meaning='', check=POSITIVE, digits=3, label=f'{coding} coding')
               for coding in ('unary', 'binary', 'graded')}),
    Figure(
        key='activity_images', check=COUNT, setting='spikes counted on images', where=_spiking,
        meaning='images on which spikes were counted: the first 512, in whole batches (of a stream, the first of each '
                'shard)', make=lambda c: sum(record['activity_images'] for record in c.records)),
    Figure(
        key='param_count', meaning='parameters', check=POSITIVE, unit='million', label='parameters', make=_param_count),
    Figure(
        key='img_size', meaning='height and width of the input', check=COUNT, unit='pixels', setting='image size',
        make=lambda c: c.subject.data_config['input_size'][-1]),
    Figure(
        key='crop_pct', meaning='share that the centre crop keeps', check=SHARE, setting='crop',
        make=lambda c: c.subject.data_config['crop_pct']),
    Figure(
        key='interpolation', meaning='how images are resized', check=TEXT, setting='interpolation',
        make=lambda c: c.subject.data_config['interpolation']),
    Figure(
        key='seconds', meaning='time in the network, averaged over processes', check=POSITIVE, unit='s', of_source=True,
        make=lambda c: round(c.network_seconds, 3)),
    Figure(
        key='images_per_second', meaning='of all processes together', check=POSITIVE, unit='images/s', digits=1,
        head='images /s', make=_speed),
    Figure(
        key='decode_seconds', meaning='work of loading: decoding', check=POSITIVE, unit='s',
        make=lambda c: round(c.seconds('decode'), 3)),
    Figure(
        key='preprocess_seconds', meaning='work of loading: preprocessing', check=POSITIVE, unit='s',
        make=lambda c: round(c.seconds('preprocess'), 3)),
    Figure(key='wait_seconds', meaning='how long the networks waited for it', check=POSITIVE, unit='s'),
    Figure(key='wall_seconds', meaning='all of the run', check=POSITIVE, unit='s'),
    Figure(
        key='engine', meaning='of an export: what ran it', check=TEXT, where=_by_engine, make=_described('engine')),
    Figure(
        key='exported_of_sha256', meaning='of an export: state hash of its model', check=TEXT, where=_by_engine,
        make=_described('exported_of_sha256')),
    Figure(
        key='weights_sha256', meaning='state hash of the model, neurons included', check=TEXT, needed=True),
    Figure(key='batch_size', meaning='images per batch and process', check=COUNT, setting='images per batch'),
    Figure(key='seed', meaning='seed of the choice of images', check=number(-2 ** 63, 2 ** 63, 'a seed', whole=True)),
    Figure(key='workers', meaning='processes per process that decode', check=COUNT),
    Figure(key='world_size', meaning='processes', check=COUNT, setting='processes'),
    Figure(key='streaming', meaning='whether shards were read as they were needed', check=FLAG),
    Figure(key='device', meaning='what it ran on', check=TEXT, setting='device'),
    Figure(key='amp', meaning='mixed precision', check=TEXT, setting='mixed precision'),
    Figure(key='torchcompile', meaning='whether networks were compiled', check=FLAG),
    Figure(key='channels_last', meaning='whether memory was in this format', check=FLAG),
    Figure(key='versions', meaning='of python and the packages', check=mapping(TEXT)),
    Figure(key='peak_memory_mib', meaning='peak memory of a process', check=POSITIVE, unit='MiB'),
    Figure(key='peak_device_memory_mib', meaning='likewise on the device (CUDA)', check=POSITIVE, unit='MiB'),
    Figure(
        key='source_model', meaning="what it was compared with, if not its own source (`--source-model`)", check=TEXT,
        setting='compared with'),
    Figure(key='command', meaning='the command line', check=TEXT),
    Figure(key='levels', meaning='of a point of a curve: its number of levels N',
           check=number(1, 2 ** 15, 'a number of levels', whole=True)),
    Figure(key='curve', meaning='of `scripts/publish_zoo.py`: results of conversions with other N',
           check=Check('a list', lambda v: isinstance(v, list)), column=None),
    Figure(key='curve_command', meaning='what measured them', check=TEXT),
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
        key=key, meaning=meaning, check=PERCENT, unit='%', label=key, listed=f'{key} [%]', head=key,
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
    Figure(key='problems', meaning='images and annotations that are not usable, a line each', check=TEXTS,
           setting='images and annotations left out'),
    Figure(
        key='boxes', check=AVERAGES, needed=True, of_source=True, label='boxes', listed='boxes', head='box',
        source_head='source box', parts=PRECISION,
        meaning='average precision of boxes, over all and by category in `per_class`, null where there is no object'),
    Figure(
        key='masks', meaning='the same of masks, of a detector that segments', check=AVERAGES, of_source=True,
        label='masks', listed='masks', head='mask', source_head='source mask', parts=PRECISION),
    *_also('seconds', 'source_model', 'command'),
)
