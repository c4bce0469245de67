"""Model cards: what was recorded about a model, and nothing else, as a page and as metadata for the Hub."""
import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..conversion.record import ADAPTED, BALANCED, COMPENSATED, CONCENTRATED, DISTILLED, FINE_TUNED, RECONSTRUCTED
from ..data.names import known_data
from ..errors import SFormerError
from ..evaluation.schema import Result, schema_of
from ..files import Json, may_write, write_aside
from ..saving.model_config import WEIGHTS_NAME
from .model_record import ModelRecord
from .plots import is_own_plot, need_pages, render_plots

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ['render_card', 'render_eval_results', 'write_card']

TEMPLATE = Path(__file__).parent / 'templates' / 'model_card.md'

DATASET_TITLES = {'digits': 'Digits (scikit-learn)', 'dead-leaves': 'dead leaves (generated images)'}

# identifiers that the Hub takes as a licence; others go by `other` with a name and a link
LICENSES = (
    'apache-2.0', 'mit', 'bsd-2-clause', 'bsd-3-clause', 'bsd-3-clause-clear', 'cc0-1.0', 'cc-by-2.0', 'cc-by-4.0',
    'cc-by-sa-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0', 'cc-by-nc-nd-4.0', 'gpl-3.0', 'lgpl-3.0', 'agpl-3.0', 'mpl-2.0',
    'unlicense', 'openrail', 'etalab-2.0', 'other', 'unknown')

NEURONS = dict(
    levels='levels N per branch', fire='fire function', attention_fire='fire function of the softmax',
    activation_fire='fire function after activation functions',
    initial_potential='initial membrane potential [steps]', dead_zone='dead zone [steps]', scale='scaling factor',
    silence='price of activity', keys_rest='silent keys count as the mean', lateral='groups that feed back',
    lateral_zone='residuals without a lateral spike', lateral_cost='most feedback weights per weight',
    estimator='threshold estimator', compensate='weights compensate for neurons', balance='attention is balanced',
    concentrate='residual stream is concentrated', effort='effort of conversion')
CHANGES = {
    COMPENSATED: 'compensate for its neurons', BALANCED: 'are balanced for its neurons',
    CONCENTRATED: 'have few channels of the residual stream carry most of it',
    RECONSTRUCTED: 'were trained block by block to follow that network',
    DISTILLED: 'were trained to follow that network', FINE_TUNED: 'were changed afterwards',
    ADAPTED: 'were given other shapes or precision'}


# What is said of it ---------------------------------------------------------------------------------------------------


def _dataset_id(record: ModelRecord, used: Json, key: str = 'dataset') -> str | None:
    """Hub id of the data set of a result; None for those that are not on the Hub."""
    name = used.get(key)
    if name in record.dataset_ids:
        return record.dataset_ids[name]
    if not name or name in DATASET_TITLES:
        return None
    # a result that knows revisions has one for data from the Hub; without that, what is no folder is from there
    if not used['dataset_revision'] if 'dataset_revision' in used else Path(name).expanduser().exists():
        return None
    if (known := known_data(name)) is not None:
        return known.repository
    return name if re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', name) else None


def _dataset_title(record: ModelRecord, used: Json, key: str = 'dataset') -> str:
    name = used.get(key) or ''
    if name in DATASET_TITLES:
        return DATASET_TITLES[name]
    copied = 'dataset_revision' in used and not used['dataset_revision'] and known_data(name)
    if name in record.dataset_ids or used.get('local_copy') or copied:
        return f'{record.dataset_ids.get(name, name)} (local copy)'
    return _dataset_id(record, used, key) or (Path(name).name if name else 'images of the caller')


def _with_split(title: str, split: str | None) -> str:
    return f'{title}, split {split}' if split else title


def _versions(versions: dict[str, str] | None) -> str:
    return ', '.join(f'{name} {version}' for name, version in (versions or {}).items())


def _calibration(record: ModelRecord) -> str:
    used = record.conversion.get('calibration') or {}
    if not used.get('num_images'):
        return 'images that were not recorded'
    title = _with_split(_dataset_title(record, used, 'name'), used.get('split'))
    return f'{used["num_images"]:,} images of {title}'


def _recipe(record: ModelRecord) -> list[tuple[str, object]]:
    c = record.conversion
    rows: list[tuple[str, object]] = [('architecture', f'`{record.architecture}`')]
    rows += record.of_task.recipe(record)
    if record.base_model:
        of = 'source' if record.of_task.source_is_base else 'backbone'
        rows.append((f'{of} weights', hub_link(record.base_model)))
    if record.license:
        rows.append(('licence of the source weights', record.license))
    if c.get('source_sha256'):
        rows.append(('state hash of the source', f'`{c["source_sha256"]}`'))
    rows.append(('state hash of this model', f'`{record.weights_sha256}`'))
    if c.get('weights_sha256'):
        rows.append((f'SHA-256 of `{WEIGHTS_NAME}`', f'`{c["weights_sha256"]}`'))
    fit = {k: v for k, v in record.fit.items() if k != 'quantile' or record.fit.get('estimator') == 'quantile'}
    fit = {k: v for k, v in fit.items() if v or k not in ('compensate', 'balance', 'concentrate')}
    if fit.get('effort') == 'usual':
        del fit['effort']
    sfn = {k: v for k, v in record.sfn.items()
           if (k not in ('silence', 'keys_rest') or v) and (not k.startswith('lateral') or record.sfn.get('lateral'))}
    rows += [(NEURONS.get(key, key.replace('_', ' ')), value) for key, value in {**sfn, **fit}.items()]
    if c.get('distillation'):
        rows.append(('trained to follow its source', c['distillation']))
    if c.get('calibration'):
        rows.append(('calibration', _calibration(record)))
    if c.get('versions'):
        rows.append(('converted with', _versions(c['versions'])))
    return rows


def _trained(record: ModelRecord) -> str:
    """Whether the weights of the source were kept."""
    trained = {RECONSTRUCTED, DISTILLED, FINE_TUNED, ADAPTED} & {*record.changed}
    what = [CHANGES[reason] for reason in record.changed]
    return ' without training' * (not trained) + (f', with weights that {" and ".join(what)}' if what else '')


def _training(record: ModelRecord) -> list[tuple[str, object]]:
    t = record.training or {}
    rows: list[tuple[str, object]] = []
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


def _result(record: ModelRecord, result: Result) -> Json:
    schema = schema_of(result)
    rows = schema.card_rows(result) + record.of_task.card_rows(result)
    title = _with_split(_dataset_title(record, result), result.get('split'))
    settings = schema.settings(result)
    if record.changed and schema.has_source(result) and not result.get('source_model'):
        settings.append('the source is the network of the weights of this model without neurons')
    return dict(
        title=f'{title}, {result["num_images"]:,} images' if result.get('num_images') else title,
        rows=_cells(rows), sides=schema.has_source(result), command=result.get('command'),
        settings='; '.join(settings), versions=_versions(result.get('versions')))


def _curve(record: ModelRecord) -> Json | None:
    if not record.curve:
        return None
    first = record.curve[0]
    title = _with_split(_dataset_title(record, first), first.get('split')) if 'dataset' in first else ''
    count = f' ({first["num_images"]:,} images)' if first.get('num_images') else ''
    return dict(rows=[(r['levels'], f'{r["top1"]:.2f}') for r in record.curve], command=record.curve_command,
                of=f', evaluated on {title}{count}' if title else '')


def _comparable(record: ModelRecord) -> list[Result]:
    """Results that an index may list by data set and split: with its own labels, and of each the one on most images."""
    found: dict[tuple[str, str | None], Result] = {}
    for result in record.evaluations.values():
        key = result['dataset'], result.get('split')
        if result.get('benchmark') != 'imagenet-real' and \
                (key not in found or (found[key].get('num_images') or 0) < (result.get('num_images') or 0)):
            found[key] = result
    return list(found.values())


def _eval_results(record: ModelRecord) -> list['EvalResult']:
    from huggingface_hub import EvalResult
    entries = []
    task, task_name = _task(record)
    for result in _comparable(record):
        common: Json = dict(
            task_type=task, task_name=task_name, metric_type=record.of_task.metric,
            dataset_type=_dataset_id(record, result) or Path(result['dataset']).name,
            dataset_name=_dataset_title(record, result), dataset_split=result.get('split'),
            dataset_revision=result.get('dataset_revision'))
        count = f' on {result["num_images"]:,} images' if result.get('num_images') else ''
        entries += [EvalResult(metric_name=f'{name}{count}', metric_value=value, **common)
                    for name, value in schema_of(result).listed(result)]
    return entries


def _task(record: ModelRecord) -> tuple[str, str]:
    """Identifier and name of the task on the Hub."""
    return record.of_task.hub_task(record.built)


def _metadata(record: ModelRecord) -> 'ModelCardData':
    from huggingface_hub import ModelCardData
    from huggingface_hub.utils import validate_repo_id
    used = [_dataset_id(record, record.conversion.get('calibration') or {}, 'name')]
    used += [_dataset_id(record, result) for result in record.evaluations.values()]
    datasets = [i for i in dict.fromkeys(used) if i]
    results = _eval_results(record)
    known = record.license is None or record.license in LICENSES
    task, _ = _task(record)
    library = record.of_task.library
    if not known and not record.base_model:
        raise SFormerError(f'licence {record.license!r} is none of the identifiers that the Hub knows; '
                           f'name the model that has it (--base-model), for a link to its terms.')
    try:
        for repo_id in (*([record.base_model] if record.base_model else ()), *datasets):
            validate_repo_id(repo_id)
    except ValueError as e:
        raise SFormerError(str(e).splitlines()[0]) from e
    return ModelCardData(
        library_name=library, pipeline_tag=task,
        license=record.license if known else 'other',
        license_name=None if known else record.license,
        license_link=None if known else f'https://huggingface.co/{record.base_model}',
        base_model=record.base_model or None,
        # what the Hub calls models whose weights or activations were mapped to fewer levels
        base_model_relation=('quantized' if record.of_task.source_is_base and not record.changed else 'finetune')
        if record.base_model else None,
        datasets=datasets or None,
        metrics=[record.of_task.metric] if results else None,
        tags=[*dict.fromkeys((library, 'sformer', task, 'spiking-neural-network', 'vision-transformer', 'safetensors',
                              'arxiv:2510.23383'))],
        model_name=record.name if results else None, eval_results=results or None)


def render_card(record: ModelRecord, plots: dict[str, str] | None = None) -> 'ModelCard':
    """Render a model card.

    Args:
        record: What was recorded.
        plots: Title of a plot -> its path relative to the card.

    Returns:
        A `huggingface_hub.ModelCard`, which parses and has passed the client's own checks.

    Raises:
        SFormerError: If the metadata break a rule of the Hub, or a package is missing.
    """
    need_pages()
    from huggingface_hub import ModelCard
    used = record.conversion.get('source')
    source = hub_link(record.base_model) if record.base_model else f'a `{used}`' if used else \
        'a network that was not recorded'
    metadata = _metadata(record)
    card = ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), m=record, task=record.of_task, usage=record.of_task.usage(record),
        source=record.of_task.source_in_words(record.built, source), trained=_trained(record),
        recipe=_cells(_recipe(record)), training=_cells(_training(record)),
        results=[_result(record, r) for r in record.evaluations.values()], curve=_curve(record),
        calibration=_calibration(record), plots=list((plots or {}).items()))
    if ModelCard(str(card)).data.to_dict() != metadata.to_dict():
        raise SFormerError(f'the metadata of {record.name} do not survive YAML; see its records.')
    return card


def _cells(rows: Iterable[Sequence[object]]) -> list[list[str]]:
    """Rows of a Markdown table: one line per cell, no bar that would start another."""
    return [[' '.join(str(value).split()).replace('|', r'\|') for value in row] for row in rows]


def render_eval_results(record: ModelRecord) -> str | None:
    """Evaluation results in the Hub's `.eval_results/*.yaml` format; None if no result is on a data set of the Hub."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump
    entries = []
    for result in _comparable(record):
        dataset, figures = _dataset_id(record, result), schema_of(result).listed(result)
        if dataset and figures:
            name, value = figures[0]
            split = f', split {result["split"]}' if result.get('split') else ''
            count = f', {result["num_images"]} images' if result.get('num_images') else ''
            entries.append(EvalResultEntry(
                dataset_id=dataset, task_id='default', value=value, dataset_revision=result.get('dataset_revision'),
                notes=f'{name[0].lower()}{name[1:]}{split}{count}'))
    return yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def card_name(record: ModelRecord) -> str:
    return re.sub(r'[^\w.-]+', '_', record.name) or 'model'


def write_card(record: ModelRecord, directory: str | Path, overwrite: bool = False) -> Path:
    """Write a card and its plots to a folder: `NAME.md`, `NAME.activity.png` ...

    The last line of a card is a comment with the hash of what precedes it, so that edits are noticed.

    Args:
        record: What was recorded.
        directory: Folder; made if it is missing.
        overwrite: Replace files of these names that were edited, or written by somebody else.

    Returns:
        Path of the card.

    Raises:
        SFormerError: If a file would be lost that was not written here, or was edited afterwards; or a package is
            missing.
    """
    directory, name = Path(directory), card_name(record)
    plots = {f'{name}.{file}': plot for file, plot in render_plots(record).items()}
    text = _sealed(f'{render_card(record, {title: file for file, (title, _) in plots.items()})}\n')
    path = directory / f'{name}.md'
    may_write(directory, 'card or plot as sformer card wrote it', is_own, files=[path.name, *plots],
              overwrite=overwrite)
    with write_aside(directory) as aside:
        (aside / path.name).write_text(text, encoding='utf-8')
        for file, (_, png) in plots.items():
            (aside / file).write_bytes(png)
    return path


def _sealed(text: str) -> str:
    return f'{text}<!-- sformer card, SHA-256 {hashlib.sha256(text.encode()).hexdigest()} -->\n'


def is_own(path: Path) -> bool:
    """Whether a card is as it was written here, by whatever version, or a plot was drawn here."""
    if path.suffix == '.png':
        return is_own_plot(path)
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    lines = text.splitlines(keepends=True)
    return bool(lines) and _sealed(''.join(lines[:-1])) == text


def hub_link(repo_id: str) -> str:
    """Markdown link to a model on the Hub."""
    return f'[{repo_id}](https://huggingface.co/{repo_id})'


def shell(*words: object) -> str:
    """Command line of words."""
    return shlex.join(str(word) for word in words)
