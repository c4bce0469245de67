"""Model cards: what was recorded about a model, and nothing else, as a page and as metadata for the Hub."""
import io
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch.nn as nn

from .checkpoints import state_hash
from .errors import SFormerError
from .layers import is_calibrated
from .model_config import CONFIG_NAME, WEIGHTS_NAME, read_config

__all__ = ['Record', 'read_record', 'recorded_results', 'render_card', 'render_eval_results', 'render_plots']

TEMPLATE = Path(__file__).parent / 'templates' / 'model_card.md'

DATASETS = {'digits': 'Digits (scikit-learn)', 'dead-leaves': 'dead leaves (generated images)'}

# identifiers that the Hub takes as a license; others go by `other` with a name and a link
LICENSES = (
    'apache-2.0', 'mit', 'bsd-2-clause', 'bsd-3-clause', 'bsd-3-clause-clear', 'cc0-1.0', 'cc-by-2.0', 'cc-by-4.0',
    'cc-by-sa-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0', 'cc-by-nc-nd-4.0', 'gpl-3.0', 'lgpl-3.0', 'agpl-3.0', 'mpl-2.0',
    'unlicense', 'openrail', 'etalab-2.0', 'other', 'unknown')

# label, key of the SFormer, key of the source, format
SIDES = (
    ('top-1 [%]', 'top1', 'source_top1', '.2f'),
    ('top-5 [%]', 'top5', 'source_top5', '.2f'),
    ('negative log-likelihood', 'nll', 'source_nll', '.4f'),
    ('expected calibration error [%]', 'ece', 'source_ece', '.2f'),
)
SINGLE = (
    ('agreement with the source [%]', 'agreement', '.2f'),
    ('relative logit error', 'relative_logit_error', '.4f'),
    ('firing rate', 'firing_rate', '.3f'),
    ('parameters [million]', 'param_count', '.2f'),
)
SETTINGS = (
    ('benchmark', 'benchmark'), ('image size', 'img_size'), ('crop', 'crop_pct'), ('interpolation', 'interpolation'),
    ('mixed precision', 'amp'), ('device', 'device'), ('processes', 'world_size'), ('images per batch', 'batch_size'),
    ('images left out', 'skipped_images'), ('spikes counted on images', 'firing_images'),
)


@dataclass
class Record:
    """All that a card may say.

    Args:
        name: Name of the model.
        load_name: What `timm.create_model` loads it by.
        architecture: Entrypoint.
        weights_sha256: `sformer.utils.state_hash` of the weights that everything here belongs to.
        input_size: (C, H, W).
        num_classes: Number of classes.
        calibrated: Whether thresholds were fitted.
        conversion: Record that `sformer.convert` made.
        training: Record of the source's training, where this project trained it.
        evaluations: Results of `sformer.evaluate`, by file name.
        curve: Results of conversions with other N, in ascending order; each has `levels` and what `evaluate` returns.
        curve_command: What measured the curve.
        license: License of the source weights.
        base_model: Hub id of the source weights.
        dataset_ids: Hub id by the name that a dataset has in results.
        note: What else has to be known about how it was measured.
    """
    name: str
    load_name: str
    architecture: str
    weights_sha256: str
    input_size: List[int]
    num_classes: int
    calibrated: bool = True
    conversion: Dict[str, Any] = field(default_factory=dict)
    training: Optional[Dict[str, Any]] = None
    evaluations: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    curve: List[Dict[str, Any]] = field(default_factory=list)
    curve_command: Optional[str] = None
    license: Optional[str] = None
    base_model: Optional[str] = None
    dataset_ids: Dict[str, str] = field(default_factory=dict)
    note: Optional[str] = None

    @property
    def changed(self) -> bool:
        """Whether the weights are not those of the source any more."""
        return bool(self.conversion.get('changed'))


# What was recorded ----------------------------------------------------------------------------------------------------


def recorded_results(folder: Path, weights_sha256: str) -> Tuple[Dict[str, Dict[str, Any]], List[str]]:
    """Results files in a folder, as `sformer evaluate --results-file` writes them.

    Args:
        folder: Folder with JSON files.
        weights_sha256: Hash of the weights that results must be of.

    Returns:
        Results of these weights by file name (one per file: of several models, that of these weights), and the names
        of files that have results of other weights only.
    """
    results: Dict[str, Dict[str, Any]] = {}
    others = []
    for path in sorted(Path(folder).glob('*.json')):
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError):
            continue
        needed = {'weights_sha256', 'dataset', 'top1'}
        found = [r for r in (found if isinstance(found, list) else [found]) if isinstance(r, dict) and needed <= {*r}]
        if path.name == CONFIG_NAME or not found:
            continue
        own = next((r for r in found if r['weights_sha256'] == weights_sha256), None)
        if own is None:
            others.append(path.name)
        elif not isinstance(own['dataset'], str) or not isinstance(own['top1'], (int, float)):
            raise SFormerError(f'{path} is not as sformer evaluate wrote it.')
        else:
            results[path.name] = own
    return results, others


def read_record(
        folder: Path,
        model: nn.Module,
        *,
        name: Optional[str] = None,
        repo_id: Optional[str] = None,
        license: Optional[str] = None,
        base_model: Optional[str] = None,
        dataset_ids: Optional[Dict[str, str]] = None,
) -> Tuple[Record, List[str]]:
    """Gather what a folder records about the model in it.

    Args:
        folder: Folder of an SFormer, with the results files of its evaluations.
        model: The model in it.
        name: Name of the model; that of the repository or of the folder if None.
        repo_id: Repository that it will be in.
        license: License of the source weights, where the conversion could not know it.
        base_model: Hub id of the source weights, where the conversion could not know it.
        dataset_ids: Hub id by the name of a dataset in results, for local copies.

    Returns:
        The record, and the names of files with results of other weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    cfg, conversion = config.get('pretrained_cfg', {}), config.get('sformer', {})
    weights_sha256 = state_hash(model.state_dict())
    results, others = recorded_results(folder, weights_sha256)
    published = conversion.get('source_weights')
    if published and base_model is None and '://' not in published:
        base_model = published.partition('@')[0]
    curves = [r for r in results.values() if r.get('curve')]
    return Record(
        name=name or (repo_id or '').rpartition('/')[2] or folder.resolve().name,
        load_name=f'hf-hub:{repo_id}' if repo_id else f'local-dir:{folder}',
        architecture=config['architecture'], weights_sha256=weights_sha256,
        input_size=list(cfg.get('input_size', (3, 224, 224))), num_classes=config.get('num_classes', model.num_classes),
        calibrated=is_calibrated(model), conversion=conversion, evaluations=results,
        curve=curves[0]['curve'] if curves else [], curve_command=curves[0].get('curve_command') if curves else None,
        license=license or (cfg.get('license') if published else None), base_model=base_model,
        dataset_ids=dict(dataset_ids or {}),
    ), others


# What is said of it ---------------------------------------------------------------------------------------------------


def _dataset_id(record: Record, used: Dict[str, Any], key: str = 'dataset') -> Optional[str]:
    """Hub id of the dataset of a result; None for those that are not on the Hub."""
    name = used.get(key)
    if name in record.dataset_ids:
        return record.dataset_ids[name]
    if not name or name in DATASETS:
        return None
    # a result that knows revisions has one for data from the Hub; without that, what is no folder is from there
    if not used['dataset_revision'] if 'dataset_revision' in used else Path(name).expanduser().exists():
        return None
    return name if re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', name) else None


def _dataset_title(record: Record, used: Dict[str, Any], key: str = 'dataset') -> str:
    name = used.get(key)
    if name in DATASETS:
        return DATASETS[name]
    if name in record.dataset_ids or used.get('local_copy'):
        return f'{record.dataset_ids.get(name, name)} (local copy)'
    return _dataset_id(record, used, key) or (Path(name).name if name else 'images of the caller')


def _with_split(title: str, split: Optional[str]) -> str:
    return f'{title}, split {split}' if split else title


def _versions(versions: Optional[Dict[str, str]]) -> str:
    return ', '.join(f'{name} {version}' for name, version in (versions or {}).items())


def _calibration(record: Record) -> str:
    used = record.conversion.get('calibration') or {}
    if not used.get('num_images'):
        return 'images that were not recorded'
    title = _with_split(_dataset_title(record, used, 'name'), used.get('split'))
    return f'{used["num_images"]:,} images of {title}'


def _recipe(record: Record) -> List[Tuple[str, Any]]:
    c, recipe = record.conversion, record.conversion.get('recipe') or {}
    rows: List[Tuple[str, Any]] = [
        ('architecture', f'`{record.architecture}`'), ('input', ' x '.join(map(str, record.input_size))),
        ('classes', record.num_classes)]
    if c.get('source'):
        rows.append(('source', f'`{c["source"]}`'))
    if record.base_model:
        rows.append(('source weights', f'[{record.base_model}](https://huggingface.co/{record.base_model})'))
    if record.license:
        rows.append(('license of the source weights', record.license))
    if c.get('source_sha256'):
        rows.append(('state hash of the source', f'`{c["source_sha256"]}`'))
    rows.append(('state hash of this model', f'`{record.weights_sha256}`'))
    if c.get('weights_sha256'):
        rows.append((f'SHA-256 of `{WEIGHTS_NAME}`', f'`{c["weights_sha256"]}`'))
    labels = dict(
        levels='levels N per branch', fire='fire function', attention_fire='fire function of the softmax',
        firing='firing', dead_zone='dead zone [steps]', scale='scaling factor', estimator='threshold estimator')
    rows += [(label, recipe[key]) for key, label in labels.items() if key in recipe]
    if recipe.get('estimator') == 'quantile':
        rows.append(('quantile', recipe['quantile']))
    rows += [(key.replace('_', ' '), value) for key, value in recipe.items() if key not in labels and key != 'quantile']
    if c.get('calibration'):
        rows.append(('calibration', _calibration(record)))
    if c.get('versions'):
        rows.append(('converted with', _versions(c['versions'])))
    return rows


def _training(record: Record) -> List[Tuple[str, Any]]:
    t = record.training or {}
    rows: List[Tuple[str, Any]] = []
    if 'train_samples' in t:
        recipe = t.get('recipe') or {}
        of = f' of {_dataset_title(record, recipe, "data")}' if recipe.get('data') else ''
        rows.append(('training images', f'{t["train_samples"]:,}{of}'))
    if 'epochs' in (t.get('recipe') or {}):
        rows.append(('epochs', t['recipe']['epochs']))
    if 'test_correct' in t:
        rows.append(('correct on the test split', f'{t["test_correct"]:,} of {t["test_samples"]:,}'))
    if t.get('versions'):
        rows.append(('trained with', _versions(t['versions'])))
    return rows


def _result(record: Record, result: Dict[str, Any]) -> Dict[str, Any]:
    sides = any(source in result for _, _, source, _ in SIDES)

    def cell(key, spec):
        return format(result[key], spec) if isinstance(result.get(key), (int, float)) else ''

    rows = []
    for label, key, source, spec in SIDES:
        if cell(key, spec) or cell(source, spec):
            rows.append([label, *([cell(source, spec)] if sides else []), cell(key, spec)])
    for label, key, spec in SINGLE:
        if cell(key, spec):
            rows.append([label, *([''] if sides else []), cell(key, spec)])
    title = _with_split(_dataset_title(record, result), result.get('split'))
    settings = [f'{label} {result[key]}' for label, key in SETTINGS if result.get(key)]
    return dict(
        title=f'{title}, {result["num_images"]:,} images' if 'num_images' in result else title,
        rows=_cells(rows), sides=sides, command=result.get('command'), settings='; '.join(settings),
        versions=_versions(result.get('versions')))


def _curve(record: Record) -> Optional[Dict[str, Any]]:
    if not record.curve:
        return None
    first = record.curve[0]
    title = _with_split(_dataset_title(record, first), first.get('split')) if 'dataset' in first else ''
    count = f' ({first["num_images"]:,} images)' if 'num_images' in first else ''
    return dict(rows=[(r['levels'], f'{r["top1"]:.2f}') for r in record.curve], command=record.curve_command,
                of=f', evaluated on {title}{count}' if title else '')


def _comparable(record: Record) -> List[Dict[str, Any]]:
    """Results that an index may list by dataset and split: with its own labels, and of each the one on most images."""
    found: Dict[Any, Dict[str, Any]] = {}
    for result in record.evaluations.values():
        key = result['dataset'], result.get('split')
        if result.get('benchmark') != 'imagenet-real' and \
                (key not in found or found[key].get('num_images', 0) < result.get('num_images', 0)):
            found[key] = result
    return list(found.values())


def _eval_results(record: Record) -> List[Any]:
    from huggingface_hub import EvalResult
    entries = []
    for result in _comparable(record):
        common = dict(
            task_type='image-classification', task_name='Image Classification',
            dataset_type=_dataset_id(record, result) or Path(result['dataset']).name,
            dataset_name=_dataset_title(record, result), dataset_split=result.get('split'),
            dataset_revision=result.get('dataset_revision'))
        count = f' on {result["num_images"]:,} images' if 'num_images' in result else ''
        for key, label in (('top1', 'Top-1'), ('top5', 'Top-5')):
            if isinstance(result.get(key), (int, float)):
                entries.append(EvalResult(
                    metric_type='accuracy', metric_name=f'{label} accuracy [%]{count}', metric_value=result[key],
                    **common))
    return entries


def _metadata(record: Record) -> Any:
    from huggingface_hub import ModelCardData
    from huggingface_hub.utils import validate_repo_id
    used = [_dataset_id(record, record.conversion.get('calibration') or {}, 'name')]
    used += [_dataset_id(record, result) for result in record.evaluations.values()]
    datasets = [i for i in dict.fromkeys(used) if i]
    results = _eval_results(record)
    known = record.license is None or record.license in LICENSES
    if not known and not record.base_model:
        raise SFormerError(f'license {record.license!r} is none of the identifiers that the Hub knows; '
                           f'name the model that has it (--base-model), for a link to its terms.')
    try:
        for repo_id in (*([record.base_model] if record.base_model else ()), *datasets):
            validate_repo_id(repo_id)
    except ValueError as e:
        raise SFormerError(str(e).splitlines()[0]) from e
    return ModelCardData(
        library_name='timm', pipeline_tag='image-classification',
        license=record.license if known else 'other',
        license_name=None if known else record.license,
        license_link=None if known else f'https://huggingface.co/{record.base_model}',
        base_model=record.base_model or None,
        # what the Hub calls models whose weights or activations were mapped to fewer levels
        base_model_relation=('finetune' if record.changed else 'quantized') if record.base_model else None,
        datasets=datasets or None,
        metrics=['accuracy'] if results else None,
        tags=['timm', 'sformer', 'image-classification', 'spiking-neural-network', 'vision-transformer', 'safetensors',
              'arxiv:2510.23383'],
        model_name=record.name if results else None, eval_results=results or None)


def render_card(record: Record, plots: Optional[Dict[str, str]] = None) -> Any:
    """Render a model card.

    Args:
        record: What was recorded.
        plots: Title of a plot -> its path relative to the card.

    Returns:
        A `huggingface_hub.ModelCard`, which parses and has passed the client's own checks.

    Raises:
        SFormerError: If the metadata break a rule of the Hub.
    """
    from huggingface_hub import ModelCard
    used = record.conversion.get('source')
    source = f'[{record.base_model}](https://huggingface.co/{record.base_model})' if record.base_model else \
        f'a `{used}`' if used else 'a network that was not recorded'
    metadata = _metadata(record)
    card = ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), m=record, source=source, recipe=_cells(_recipe(record)),
        training=_cells(_training(record)), results=[_result(record, r) for r in record.evaluations.values()],
        curve=_curve(record), calibration=_calibration(record), plots=list((plots or {}).items()))
    if ModelCard(str(card)).data.to_dict() != metadata.to_dict():
        raise SFormerError(f'the metadata of {record.name} do not survive YAML; see its records.')
    return card


def _cells(rows: Iterable[Sequence[Any]]) -> List[List[str]]:
    """Rows of a Markdown table: one line per cell, no bar that would start another."""
    return [[' '.join(str(value).split()).replace('|', r'\|') for value in row] for row in rows]


def render_eval_results(record: Record) -> Optional[str]:
    """Evaluation results in the Hub's `.eval_results/*.yaml` format; None if no result is on a dataset of the Hub."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump
    entries = []
    for result in _comparable(record):
        dataset = _dataset_id(record, result)
        if dataset:
            split = f', split {result["split"]}' if result.get('split') else ''
            count = f', {result["num_images"]} images' if 'num_images' in result else ''
            entries.append(EvalResultEntry(
                dataset_id=dataset, task_id='default', value=result['top1'],
                dataset_revision=result.get('dataset_revision'), notes=f'top-1 accuracy [%]{split}{count}'))
    return yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def render_plots(record: Record) -> Dict[str, Tuple[str, bytes]]:
    """Plots of what was measured.

    Returns:
        File name -> title and PNG. The PNG carries its numbers as the text chunk `sformer`, and nothing that changes
        from one drawing to the next.
    """
    from .demo import plot_accuracy, plot_firing_rates
    plots: Dict[str, Tuple[str, bytes]] = {}
    result = next((r for r in record.evaluations.values() if r.get('firing_rates')), None)
    levels = (record.conversion.get('recipe') or {}).get('levels')
    if result and levels:
        rates = result['firing_rates']
        plots['firing_rates.png'] = 'Firing rates', _png(
            lambda file: plot_firing_rates(rates, levels, file), dict(levels=levels, firing_rates=rates))
    if record.curve and 'source_top1' in record.curve[0]:
        top1 = {r['levels']: r['top1'] for r in record.curve}
        source = record.curve[0]['source_top1']
        plots['accuracy.png'] = 'Accuracy against N', _png(
            lambda file: plot_accuracy(top1, source, file), dict(top1=top1, source_top1=source))
    return plots


def _png(draw: Any, values: Dict[str, Any]) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    drawn, out, text = io.BytesIO(), io.BytesIO(), PngInfo()
    draw(drawn)
    text.add_text('sformer', json.dumps(values, sort_keys=True))
    with Image.open(drawn) as image:
        image.convert('RGB').save(out, 'PNG', pnginfo=text)
    return out.getvalue()


def card_name(record: Record) -> str:
    return re.sub(r'[^\w.-]+', '_', record.name) or 'model'


def write_card(record: Record, directory: Union[str, Path]) -> Path:
    """Write a card and its plots to a folder: `NAME.md`, `NAME.firing_rates.png` ...

    Returns:
        Path of the card.
    """
    from .checkpoints import write_aside
    name = card_name(record)
    plots = render_plots(record)
    card = render_card(record, {title: f'{name}.{file}' for file, (title, _) in plots.items()})
    with write_aside(Path(directory)) as aside:
        (aside / f'{name}.md').write_text(f'{card}\n', encoding='utf-8')
        for file, (_, png) in plots.items():
            (aside / f'{name}.{file}').write_bytes(png)
    return Path(directory) / f'{name}.md'


def shell(*words: Any) -> str:
    """Command line of words."""
    return shlex.join(str(word) for word in words)
