"""The record of a model: everything that was written down about it, checked before anything of it is published."""
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch.nn as nn

from ..detection import DetectorConfig, is_detector, load_detector
from ..detection.detector_entrypoints import detector_name
from ..detection.detector_folders import read_detector_config
from ..detection.pictures import read_picture
from ..errors import SFormerError
from ..files import state_hash
from ..layers import is_calibrated
from ..saving import load_model
from ..saving.model_config import CONFIG_NAME, DETECTOR_KEY, conversion_of, read_config

__all__ = ['ModelRecord', 'load_recorded', 'read_record', 'recorded_results', 'neuron_configs']


@dataclass
class ModelRecord:
    """All that a card may say.

    Args:
        name: Name of the model.
        load_name: What `timm.create_model` loads it by, a detector `sformer.detection.load_detector`.
        architecture: Entrypoint.
        weights_sha256: `sformer.files.state_hash` of the weights that everything here belongs to.
        input_size: (C, H, W).
        num_classes: Number of classes.
        calibrated: Whether thresholds were fitted.
        conversion: Record that `sformer.convert` made.
        sfn: How neurons fire.
        fit: How their thresholds were fitted.
        training: Record of the source's training, where this project trained it.
        evaluations: Results of `sformer.evaluate`, by file name.
        curve: Results of conversions with other N, in ascending order; each has `levels` and what `evaluate` returns.
        curve_command: What measured the curve.
        license: Licence of the source weights.
        base_model: Hub id of the source weights.
        dataset_ids: Hub id by the name that a data set has in results.
        note: What else has to be known about how it was measured.
        detector: What a detector is built of, fields of `sformer.detection.DetectorConfig`; None for classifiers.
        pictures: What `sformer detect show` says of the PNGs that it drew of these weights, by file name.
    """
    name: str
    load_name: str
    architecture: str
    weights_sha256: str
    input_size: List[int]
    num_classes: int
    calibrated: bool = True
    conversion: Dict[str, Any] = field(default_factory=dict)
    sfn: Dict[str, Any] = field(default_factory=dict)
    fit: Dict[str, Any] = field(default_factory=dict)
    training: Optional[Dict[str, Any]] = None
    evaluations: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    curve: List[Dict[str, Any]] = field(default_factory=list)
    curve_command: Optional[str] = None
    license: Optional[str] = None
    base_model: Optional[str] = None
    dataset_ids: Dict[str, str] = field(default_factory=dict)
    note: Optional[str] = None
    detector: Optional[Dict[str, Any]] = None
    pictures: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    @property
    def changed(self) -> Tuple[str, ...]:
        """Why the weights are not those of the source any more; empty if they are."""
        return tuple(self.conversion.get('changed') or ())


def neuron_configs(config: Mapping[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """How the neurons of a `config.json` fire, and how their thresholds were fitted."""
    sfn = config.get('sfn') if DETECTOR_KEY in config else config.get('model_args', {}).get('sfn')
    return sfn or {}, (config.get('sformer') or {}).get('fit') or {}


# Checks ---------------------------------------------------------------------------------------------------------------

Check = Tuple[str, Callable[[Any], bool]]  # what a value has to be, in words and in code


def _number(low: float, high: float, words: str, whole: bool = False) -> Check:
    kinds = int if whole else (int, float)
    return words, lambda v: isinstance(v, kinds) and not isinstance(v, bool) and low <= v <= high and v < math.inf


def _mapping(values: Check) -> Check:
    return f'names, each with {values[0]}', lambda v: isinstance(v, dict) and all(map(values[1], v.values()))


TEXT: Check = 'text', lambda v: isinstance(v, str)
TEXTS: Check = 'a list of texts', lambda v: isinstance(v, list) and all(map(TEXT[1], v))
PERCENT = _number(0, 100, 'a percentage from 0 to 100')
SHARE = _number(0, 1, 'a share from 0 to 1')
POSITIVE = _number(0, math.inf, 'a finite number, 0 or more')
COUNT = _number(0, 2 ** 53, 'a whole number, 0 or more', whole=True)
LEVELS = _number(1, 2 ** 15, 'a number of levels', whole=True)


# What is published of a result; each may be missing, or null where nothing was measured
RESULT = {
    **dict.fromkeys(('model', 'architecture', 'dataset', 'split', 'dataset_fingerprint', 'dataset_revision', 'command',
                     'benchmark', 'interpolation', 'amp', 'device', 'weights_sha256', 'curve_command',
                     'source_model'), TEXT),
    **dict.fromkeys(('top1', 'top1_err', 'top5', 'top5_err', 'ece', 'source_top1', 'source_top5', 'source_ece',
                     'agreement'), PERCENT),
    **dict.fromkeys(('nll', 'source_nll', 'relative_logit_error', 'param_count', 'seconds', 'source_seconds',
                     'images_per_second'), POSITIVE),
    **dict.fromkeys(('num_images', 'num_passed_over', 'skipped_images', 'activity_images', 'img_size', 'batch_size',
                     'world_size', 'workers'), COUNT),
    'crop_pct': SHARE, 'activity': SHARE, 'activity_per_site': _mapping(SHARE),
    'spikes_per_neuron': _mapping(POSITIVE), 'versions': _mapping(TEXT), 'bad_images': TEXTS, 'passed_over': TEXTS,
}
POINT = {**RESULT, 'levels': LEVELS}

PRECISION: Dict[str, Check] = dict.fromkeys(('mAP', 'mAP50', 'mAP75'), PERCENT)


def _is_precision(value: Any) -> bool:
    classes = value.get('per_class') or {} if isinstance(value, dict) else None
    if not isinstance(classes, dict):
        return False
    try:
        for figures in (value, *classes.values()):
            _check_values(figures, PRECISION)
    except ValueError:
        return False
    return all(map(TEXT[1], classes))


COCO: Check = 'percentages of average precision', _is_precision
DETECTION = {
    **{key: RESULT[key] for key in (
        'model', 'architecture', 'dataset', 'split', 'dataset_fingerprint', 'command', 'device', 'weights_sha256',
        'param_count', 'seconds', 'source_seconds', 'num_images', 'world_size', 'versions', 'source_model')},
    **dict.fromkeys(('boxes', 'masks', 'source_boxes', 'source_masks'), COCO), 'problems': TEXTS,
}


def _check_values(values: Any, checks: Mapping[str, Check], needed: Tuple[str, ...] = ()) -> None:
    """Raise ValueError that names the first value which is not what it has to be."""
    if not isinstance(values, dict):
        raise ValueError(f'{_short(values)} is no record')
    for key, (words, fits) in checks.items():
        value = values.get(key)
        if (value is not None or key in needed) and not fits(value):
            raise ValueError(f'{key} is {_short(value)}, not {words}')


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _check_result(result: Dict[str, Any], path: Path) -> None:
    """Raise SFormerError unless everything that is published of a result can be true."""
    try:
        if 'boxes' in result:
            _check_values(result, DETECTION, ('dataset', 'boxes', 'weights_sha256'))
        else:
            _check_values(result, RESULT, ('dataset', 'top1', 'weights_sha256'))
        curve = result.get('curve') or []
        if not isinstance(curve, list):
            raise ValueError(f'curve is {_short(curve)}, not a list')
        for point in curve:
            _check_values(point, POINT, ('levels', 'top1'))
        json.dumps(result, allow_nan=False)  # JSON has no NaN, and the Hub takes none
    except ValueError as e:
        raise SFormerError(f'{path} is not as sformer evaluate wrote it: {e}.') from None


def _check_config(config: Dict[str, Any], path: Path, num_classes: int) -> None:
    """Raise SFormerError unless everything that is published of a config can be true."""
    cfg, conversion = config.get('pretrained_cfg', {}), config.get('sformer', {})

    def names(value: Any) -> bool:
        return TEXTS[1](value) and len(value) == num_classes

    labels: Dict[str, Check] = {
        'label_names': (f'a list of {num_classes} names', names),
        'label_descriptions': ('texts', lambda v: TEXTS[1](v) or _mapping(TEXT)[1](v))}
    try:
        _check_values(config, labels)
        _check_values(cfg, {**labels, 'license': TEXT})
        _check_values(conversion.get('calibration') or {}, dict(num_images=COUNT))
        _check_values(neuron_configs(config)[0], dict(levels=LEVELS))
    except ValueError as e:
        raise SFormerError(f'{path} cannot be published: {e}.') from None


# What was recorded ----------------------------------------------------------------------------------------------------


def recorded_results(folder: Path, weights_sha256: str) -> Tuple[Dict[str, Dict[str, Any]], List[str]]:
    """Results files in a folder, as `sformer evaluate --results-file` writes them.

    Args:
        folder: Folder with JSON files.
        weights_sha256: Hash of the weights that results must be of.

    Returns:
        Results of these weights by file name (one per file: of several models, that of these weights), and the names
        of files that have results of other weights only.

    Raises:
        SFormerError: If a result of these weights has a value that no evaluation gives; names file and value.
    """
    results: Dict[str, Dict[str, Any]] = {}
    others = []
    for path in sorted(Path(folder).glob('*.json')):
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError):
            continue
        found = [r for r in (found if isinstance(found, list) else [found]) if isinstance(r, dict)
                 and {'weights_sha256', 'dataset'} <= {*r} and {'top1', 'boxes'} & {*r}]
        if path.name == CONFIG_NAME or not found:
            continue
        own = next((r for r in found if r['weights_sha256'] == weights_sha256), None)
        if own is None:
            others.append(path.name)
        else:
            _check_result(own, path)
            results[path.name] = own
    return results, others


def load_recorded(folder: Path) -> nn.Module:
    """The SFormer in a folder, a classifier or a detector.

    Raises:
        SFormerError: If there is none that is whole, or it is a detector that was not converted.
    """
    if not is_detector(folder):
        return load_model(folder)
    detector: Any = load_detector(folder)
    if not hasattr(detector, 'conversion'):
        raise SFormerError(f'{folder} holds a detector without neurons: sformer convert makes an SFormer of it.')
    return detector


def _pictures(folder: Path, weights_sha256: str) -> Dict[str, Dict[str, Any]]:
    found = {path.name: read_picture(path, weights_sha256) for path in sorted(folder.glob('*.png'))}
    return {name: dict(values, folder=str(folder)) for name, values in found.items() if values}


def read_record(
        folder: Path,
        model: nn.Module,
        *,
        name: Optional[str] = None,
        repo_id: Optional[str] = None,
        license: Optional[str] = None,
        base_model: Optional[str] = None,
        dataset_ids: Optional[Dict[str, str]] = None,
) -> Tuple[ModelRecord, List[str]]:
    """Gather what a folder records about the model in it.

    Args:
        folder: Folder of an SFormer, with the results files of its evaluations.
        model: The model in it.
        name: Name of the model; that of the repository or of the folder if None.
        repo_id: Repository that it will be in.
        license: Licence of the source weights, where the conversion could not know it.
        base_model: Hub id of the source weights, where the conversion could not know it.
        dataset_ids: Hub id by the name of a data set in results, for local copies.

    Returns:
        The record, and the names of files with results of other weights.

    Raises:
        SFormerError: If the config or a result has a value that can't be true; one line that names file and value.
    """
    folder = Path(folder)
    config = read_detector_config(folder) if is_detector(folder) else read_config(folder)
    detector = config.get(DETECTOR_KEY)
    num_classes = len(detector['categories']) if detector else \
        config.get('num_classes', getattr(model, 'num_classes', None))
    _check_config(config, folder / CONFIG_NAME, num_classes)
    cfg = config.get('pretrained_cfg', {})
    converted = conversion_of(config)
    conversion = {} if converted is None else converted.to_dict()
    weights_sha256 = state_hash(model.state_dict())
    results, others = recorded_results(folder, weights_sha256)
    published = conversion.get('source_weights')
    if published and base_model is None and '://' not in published:
        base_model = published.partition('@')[0]
    curves = [r for r in results.values() if r.get('curve')]
    sfn, fit = neuron_configs(config)
    return ModelRecord(
        name=name or (repo_id or '').rpartition('/')[2] or folder.resolve().name,
        load_name=f'hf-hub:{repo_id}' if repo_id else f'local-dir:{folder}',
        architecture=detector_name(DetectorConfig(**detector)) if detector else config['architecture'],
        weights_sha256=weights_sha256,
        input_size=[3, *detector['image_size']] if detector else list(cfg.get('input_size', (3, 224, 224))),
        num_classes=num_classes, detector=detector, pictures=_pictures(folder, weights_sha256) if detector else {},
        calibrated=is_calibrated(model), conversion=conversion, sfn=sfn, fit=fit, evaluations=results,
        curve=curves[0]['curve'] if curves else [], curve_command=curves[0].get('curve_command') if curves else None,
        license=license or (cfg.get('license') if published else None), base_model=base_model,
        dataset_ids=dict(dataset_ids or {}),
    ), others
