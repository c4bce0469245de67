"""Convert, evaluate, render and publish the named zoo: all `sformer_*` entries whose source has published weights.

    accelerate launch scripts/publish_zoo.py --namespace my-org --imagenet DIR
    python scripts/publish_zoo.py --namespace my-org --imagenet DIR --only 'sformer_tiny*' --curve 4 --curve 8 --dry-run

The table is the zoo: `sformer_base.TAG` has the weights `TAG` of the timm model that it has the architecture of.
Sources without a classifier cannot be evaluated and are left out. Each entry has a folder below `--work`. What is
complete there is not done again, so a run that was interrupted is simply repeated. The main process converts and
publishes; all processes evaluate.
"""
import contextlib
import dataclasses
import fnmatch
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Callable, Dict, Iterator, List, Optional, Sequence

import timm
import torch
import typer

import sformer
from sformer.conversion.sources import create_source
from sformer.errors import SFormerError
from sformer.evaluation.launch import Group
from sformer.files import state_hash, write_json
from sformer.models.zoo import ZOO
from sformer.neurons import SFNConfig
from sformer.publishing.model_record import recorded_results
from sformer.publishing.publish import check_repo_id, prepare, publish

IMAGENET = 'ILSVRC/imagenet-1k'
PATIENCE = 86400.  # seconds for a conversion, or an upload, by the main process


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Args:
        name: Name of the model and of its repository.
        source: timm model, with the tag of its weights.
        config: Neurons.
        calibration: Calibration images, as for `sformer.convert`.
        split: Split of the calibration images.
        num_images: Number of calibration images.
        dataset: Dataset to evaluate on; the one of `--imagenet` if None.
        eval_split: Split to evaluate on.
        checkpoint: Weights of the source, if not its published ones.
        model_kwargs: Arguments of the source.
        data_config: Preprocessing of the source: mean, std, crop_pct, interpolation.
        license: License of the source weights, if they are not published ones.
    """
    name: str
    source: str
    config: SFNConfig = SFNConfig()
    calibration: str = 'dead-leaves'
    split: Optional[str] = None
    num_images: int = 256
    dataset: Optional[str] = None
    eval_split: Optional[str] = None
    checkpoint: Optional[Path] = None
    model_kwargs: Dict[str, Any] = field(default_factory=dict)
    data_config: Dict[str, Any] = field(default_factory=dict)
    license: Optional[str] = None


# what differs from the defaults, by name
OVERRIDES: Dict[str, Dict[str, Any]] = {}


def zoo() -> List[Entry]:
    """The table: the entries of the zoo that have classes, with every tag of theirs."""
    entries = []
    for architecture, (source, tags) in ZOO.items():
        for tag in tags.split():
            name = f'{architecture}.{tag}'
            if timm.get_pretrained_cfg(name).num_classes:
                entries.append(Entry(name, f'{source}.{tag}', **OVERRIDES.get(name, {})))
    return entries


def convert(entry: Entry, folder: Path) -> None:
    """Convert the source of an entry, unless its folder holds exactly that."""
    try:
        done = sformer.load_model(folder)
        record = done.conversion
        if record and (done.sfn_config, record.calibration.num_images, record.zoo_entry) == (
                entry.config, entry.num_images, _identity(entry)):
            return
    except SFormerError:
        pass  # not there, or not whole
    source = create_source(
        entry.source, entry.checkpoint, preprocessing=dict(entry.data_config), **entry.model_kwargs)
    with all_cores():
        model = sformer.convert(
            source, entry.calibration, entry.config, split=entry.split, num_images=entry.num_images, inplace=True,
            command=command())
    model.conversion = dataclasses.replace(model.conversion, zoo_entry=_identity(entry))
    sformer.save_model(model, folder, overwrite=True)


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Threads for the one process that works, where the launcher allows each of many a single one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _identity(entry: Entry) -> str:
    return f'{entry.name} <- {entry.source} ({entry.calibration}{f", {entry.split}" if entry.split else ""})'


def evaluate(entry: Entry, folder: Path, dataset: str, group: Group, **options: Any) -> Dict[str, Any]:
    """Result of the model in a folder, measured by all processes unless it is recorded there."""
    model = on_all(group, sformer.load_model, folder)
    results, _ = recorded_results(folder, state_hash(model.state_dict()))
    recorded = [result for result in results.values()
                if result['dataset'] == dataset and entry.eval_split in (None, result.get('split'))]
    if all(group.gather(bool(recorded))):
        return recorded[0]
    result = sformer.evaluate(model.to(group.device), dataset, entry.eval_split, **options)
    return dict(model=entry.name, architecture=result.pop('model'), **result, command=command())


def command() -> str:
    return shlex.join(['python', 'scripts/publish_zoo.py', *sys.argv[1:]])


def produce(
        entry: Entry,
        work: Path,
        imagenet: Optional[str],
        curve: Sequence[int],
        group: Group,
        **options: Any,
) -> Path:
    """Everything but the publication of an entry; returns its folder."""
    dataset = entry.dataset or imagenet
    if dataset is None:
        raise SFormerError(f'{entry.name} is evaluated on ImageNet; name its folder with --imagenet.')

    def measure(entry: Entry, folder: Path) -> Dict[str, Any]:
        on_main(group, convert, entry, folder)
        result = evaluate(entry, folder, dataset, group, **options)
        on_main(group, write_json, folder / 'eval.json', result)
        return result

    folder = work / entry.name
    result = measure(entry, folder)
    if curve:
        points = []
        for levels in sorted({*curve, entry.config.levels}):
            other = result
            if levels != entry.config.levels:
                config = dataclasses.replace(entry.config, levels=levels)
                other = measure(dataclasses.replace(entry, config=config), folder / 'levels' / str(levels))
            keys = ('dataset', 'split', 'num_images', 'top1', 'source_top1', 'activity', 'weights_sha256')
            points.append(dict(levels=levels, **{key: other[key] for key in keys if key in other}))
        if result.get('curve') != points:
            on_main(group, write_json, folder / 'eval.json', dict(result, curve=points, curve_command=command()))
    return folder


def on_all(group: Group, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function on every process; the error of one is the error of all."""
    error, done = None, None
    try:
        done = function(*args, **kwargs)
    except SFormerError as e:
        error = str(e)
    except Exception as e:  # whatever it is, the other entries need not suffer
        error = f'{type(e).__name__}: {e}'
    for other in group.gather(error):
        if other is not None:
            raise SFormerError(other)
    return done


def on_main(group: Group, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function on the main process while the others wait."""
    on_all(group, function if group.is_main else lambda *args, **kwargs: None, *args, **kwargs)


def run(
        entries: Sequence[Entry],
        namespace: str,
        work: Path,
        *,
        imagenet: Optional[str] = None,
        curve: Sequence[int] = (),
        private: bool = False,
        create_pr: bool = False,
        dry_run: bool = False,
        **options: Any,
) -> Dict[str, str]:
    """Produce and publish entries, one after the other.

    Args:
        entries: Rows of the table.
        namespace: User or organisation on the Hub.
        work: Folder for all models and results.
        imagenet: Dataset for entries that name none.
        curve: Other numbers of levels N to measure.
        private: Create private repositories.
        create_pr: Propose pull requests.
        dry_run: Show what would be published.
        **options: Of `sformer.evaluate`.

    Returns:
        Error by the name of each entry that failed; the others are published.
    """
    from huggingface_hub import get_token
    for entry in entries:
        check_repo_id(f'{namespace}/{entry.name}')
    if not dry_run and not get_token():
        raise SFormerError('publishing needs an access token of the Hub that may write: hf auth login, or HF_TOKEN.')
    failed: Dict[str, str] = {}
    with Group(timeout=PATIENCE).guard() as group:
        for entry in entries:
            repo_id = f'{namespace}/{entry.name}'
            how = dict(license=entry.license, dataset_ids={imagenet: IMAGENET} if imagenet else {})

            def finish(folder: Path, repo_id: str = repo_id, how: Dict[str, Any] = how) -> None:
                if dry_run:
                    print('\n'.join([f'{repo_id} would hold', *prepare(folder, repo_id, **how).listing()]), flush=True)
                else:
                    done = publish(folder, repo_id, private=private, create_pr=create_pr, **how)
                    what = 'published' if done.changed else 'nothing has changed'
                    print(f'{repo_id}: {what}, {done.url}', flush=True)

            try:
                folder = produce(entry, work, imagenet, curve, group, **options)
                on_main(group, finish, folder)
            except SFormerError as e:
                failed[entry.name] = str(e)
                if group.is_main:
                    print(f'{repo_id}: error: {e}', file=sys.stderr, flush=True)
    return failed


def main(
        namespace: Annotated[str, typer.Option(help='User or organisation on the Hub')],
        imagenet: Annotated[Optional[str], typer.Option(help='ImageNet-1k, as for sformer evaluate --dataset')] = None,
        work: Annotated[Path, typer.Option(help='Folder for all models and results')] = Path('zoo'),
        only: Annotated[Optional[List[str]], typer.Option(help='Names or patterns of entries')] = None,
        curve: Annotated[Optional[List[int]], typer.Option(help='Another number of levels N to measure')] = None,
        batch_size: Annotated[int, typer.Option(min=1)] = 64,
        workers: Annotated[int, typer.Option(min=0, help='Processes that decode images')] = 0,
        private: Annotated[bool, typer.Option('--private')] = False,
        create_pr: Annotated[bool, typer.Option('--create-pr')] = False,
        dry_run: Annotated[bool, typer.Option('--dry-run', help='Convert and evaluate, but publish nothing')] = False,
        list_: Annotated[bool, typer.Option('--list', help='Print the table')] = False,
) -> None:
    entries = [e for e in zoo() if not only or any(fnmatch.fnmatch(e.name, pattern) for pattern in only)]
    if not entries:
        raise SFormerError(f'no entry of the zoo matches {", ".join(only or [])}; --list shows all.')
    if list_:
        for entry in entries:
            print(f'{entry.name} <- {entry.source}')
        return
    failed = run(
        entries, namespace, work, imagenet=imagenet, curve=curve or (), private=private, create_pr=create_pr,
        dry_run=dry_run, batch_size=batch_size, workers=workers)
    if failed:
        raise SFormerError(f'{len(failed)} of {len(entries)} entries failed: {", ".join(failed)}. '
                           f'The same command goes on with them.')


if __name__ == '__main__':
    try:
        typer.run(main)
    except SFormerError as e:
        raise SystemExit(f'error: {e}') from None
