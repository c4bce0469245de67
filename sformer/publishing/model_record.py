"""The record of a model: everything that was written down about it, checked before anything of it is published."""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn as nn

from ..detection.pictures import read_picture
from ..errors import SFormerError
from ..evaluation.figures import CLASSIFICATION
from ..evaluation.schema import COUNT, TEXT, TEXTS, Check, Result, check_values, is_result, mapping, schema_of
from ..files import Json, state_hash
from ..layers import is_calibrated
from ..saving.model_config import CONFIG_NAME, conversion_of
from ..tasks import Task, load_model, task_named, task_of

__all__ = ['ModelRecord', 'load_recorded', 'read_record', 'recorded_results', 'neuron_configs']


@dataclass
class ModelRecord:
    """All that a card may say.

    Args:
        name: Name of the model.
        load_name: What `sformer.load_model` loads it by.
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
        task: Name of its task.
        built: What else it is built of, of its task; of a detector, fields of `sformer.detection.DetectorConfig`.
        pictures: What PNGs that were drawn of these weights say of themselves, by file name.
    """
    name: str
    load_name: str
    architecture: str
    weights_sha256: str
    input_size: list[int]
    num_classes: int
    calibrated: bool = True
    conversion: Json = field(default_factory=dict)
    sfn: Json = field(default_factory=dict)
    fit: Json = field(default_factory=dict)
    training: Json | None = None
    evaluations: dict[str, Result] = field(default_factory=dict)
    curve: list[Result] = field(default_factory=list)
    curve_command: str | None = None
    license: str | None = None
    base_model: str | None = None
    dataset_ids: dict[str, str] = field(default_factory=dict)
    note: str | None = None
    task: str = 'classification'
    built: Json = field(default_factory=dict)
    pictures: dict[str, Json] = field(default_factory=dict)

    @property
    def changed(self) -> tuple[str, ...]:
        """Why the weights are not those of the source any more; empty if they are."""
        return tuple(self.conversion.get('changed') or ())

    @property
    def of_task(self) -> Task:
        """Whom to ask what is of its task."""
        return task_named(self.task)


def neuron_configs(config: Json) -> tuple[Json, Json]:
    """How the neurons of a `config.json` fire, and how their thresholds were fitted."""
    sfn = config.get('sfn') or config.get('model_args', {}).get('sfn')
    return sfn or {}, (config.get('sformer') or {}).get('fit') or {}


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_result(result: Result, path: Path) -> None:
    """Raise SFormerError unless everything that is published of a result can be true."""
    points = result.get('curve')
    try:
        schema_of(result).check(result)
        for point in points if isinstance(points, list) else ():
            CLASSIFICATION.check(point, needed=('levels', 'top1'))
        json.dumps(result, allow_nan=False)  # JSON has no NaN, and the Hub takes none
    except ValueError as e:
        raise SFormerError(f'{path} is not as sformer evaluate wrote it: {e}.') from None


def _check_config(config: Json, path: Path, num_classes: int | None) -> None:
    """Raise SFormerError unless everything that is published of a config can be true."""
    cfg = config.get('pretrained_cfg', {})
    conversion = config.get('sformer', {})
    texts = mapping(TEXT)
    labels = {
        'label_names': Check(f'a list of {num_classes} names', lambda v: TEXTS.fits(v) and len(v) == num_classes),
        'label_descriptions': Check('texts', lambda v: TEXTS.fits(v) or texts.fits(v))}
    try:
        check_values(config, labels)
        check_values(cfg, {**labels, 'license': TEXT})
        check_values(conversion.get('calibration') or {}, dict(num_images=COUNT))
        check_values(neuron_configs(config)[0], dict(levels=CLASSIFICATION.figures['levels'].check))
    except ValueError as e:
        raise SFormerError(f'{path} cannot be published: {e}.') from None


# What was recorded ----------------------------------------------------------------------------------------------------


def recorded_results(folder: Path, weights_sha256: str) -> tuple[dict[str, Result], list[str]]:
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
    results: dict[str, Result] = {}
    others = []
    for path in sorted(Path(folder).glob('*.json')):
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError):
            continue
        found = [r for r in (found if isinstance(found, list) else [found])
                 if is_result(r) and {'weights_sha256', 'dataset'} <= {*r}]
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
    """The SFormer in a folder, of whatever task.

    Raises:
        SFormerError: If there is none that is whole, or it was not converted.
    """
    model = load_model(folder)
    task_of(model).check_converted(model, folder)
    return model


def _pictures(folder: Path, weights_sha256: str) -> dict[str, Json]:
    found = {path.name: read_picture(path, weights_sha256) for path in sorted(folder.glob('*.png'))}
    return {name: dict(values, folder=str(folder)) for name, values in found.items() if values}


def read_record(
        folder: Path,
        model: nn.Module,
        *,
        name: str | None = None,
        repo_id: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
        dataset_ids: dict[str, str] | None = None,
) -> tuple[ModelRecord, list[str]]:
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
    task = task_of(folder)
    described = task.describe(folder, model)
    config = described.config
    _check_config(config, folder / CONFIG_NAME, described.num_classes)
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
        architecture=described.architecture, weights_sha256=weights_sha256, input_size=[*described.input_size],
        num_classes=described.num_classes, task=task.name, built=described.built,
        pictures=_pictures(folder, weights_sha256),
        calibrated=is_calibrated(model), conversion=conversion, sfn=sfn, fit=fit, evaluations=results,
        curve=curves[0]['curve'] if curves else [], curve_command=curves[0].get('curve_command') if curves else None,
        license=license or (cfg.get('license') if published else None), base_model=base_model,
        dataset_ids=dict(dataset_ids or {}),
    ), others
