"""From a name to the images that it stands for."""
import contextlib
import dataclasses
import errno
import glob
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import SFormerError
from ..files import Json
from .columns import Columns, find_columns
from .delivery import ChosenImages, ImageData, Stream
from .image_folders import class_folders, find_images, split_folders
from .names import Located, find_data, known_data
from .origins import GENERATED, DeadLeaves, Digits, Files, Table, TableStream
from .preprocessing import Preprocessor, check_data_config, one_line
from .request import ImageRequest
from .shards import check_archive, check_shards, file_sample, find_damage, find_shards, parquet_rows

__all__ = ['open_images', 'open_request']

_logger = logging.getLogger(__name__)

_NUM_GENERATED = 256


@dataclass
class _Found:
    origin: DeadLeaves | Digits | Files | Table | TableStream
    split: str | None = None
    revision: str | None = None
    passed_over: list[str] = field(default_factory=list)


def open_images(
        name: str,
        split: str | None = None,
        *,
        data_config: Json | Sequence[Json],
        **options: Any,
) -> ImageData:
    """Find the images that a name stands for. In this order, a name is:

    * `dead-leaves`: generated images, unlabelled;
    * `digits`: the handwritten digits of scikit-learn, 8x8 and grey, splits `train` (1,257) and `test` (540);
    * a folder with files like `train-*.parquet`, in itself or in its subfolder `data`;
    * a folder with WebDataset archives like `train-*.tar`;
    * a folder of images: class folders, below split folders or not; without class folders, unlabelled;
    * a data set of the Hugging Face Hub, by its id or a short name (`SHORT_NAMES`).

    Instead of a folder, `NAME=FOLDER` has results call it NAME, and NAME alone is looked for in the folder that the
    environment variable `SFORMER_DATA` names.

    Args:
        name: One of the above.
        split: As of `ImageRequest`.
        data_config: As of `open_request`.
        **options: Other fields of `ImageRequest`: `num_images`, `seed`, `image_column`, `label_column`,
            `needs_labels`, `streaming`.

    Raises:
        SFormerError: Nothing, or too little, goes by this name; a file or folder cannot be read; or a split, a column
            or the preprocessing is wrong.
    """
    return open_request(ImageRequest(dataset=name, split=split, **options), data_config)


def open_request(
        request: ImageRequest,
        data_config: Json | Sequence[Json],
) -> ImageData:
    """Find the images that are wanted; see `open_images`.

    Args:
        request: Which.
        data_config: Preprocessing, as `timm.data.resolve_data_config` returns it; several of them for batches that
            hold every image once per preprocessing (`ImageData.batches` delivers the first).
    """
    configs = [data_config] if isinstance(data_config, dict) else list(data_config)
    size = check_data_config(configs[0])[0]
    place = find_data(request.dataset)
    streaming, known = request.streaming, known_data(place.name)
    if streaming is None:
        streaming = place.folder is None and known is not None and known.large
    request = dataclasses.replace(request, dataset=place.name, streaming=bool(streaming))
    return _image_data(request, _find(request, place, size), configs)


def _image_data(request: ImageRequest, found: _Found, data_configs: Sequence[Json]) -> ImageData:
    origin = found.origin
    split = found.split
    title = f'{request.dataset!r}' + (f' (split {split!r})' if split else '')
    indices = _choose(title, origin.num_images, request)
    chosen = None if indices is None else indices.tolist()
    preprocessor = Preprocessor(title, data_configs, isinstance(origin, DeadLeaves), request.needs_labels)
    dataset: ChosenImages | Stream
    if isinstance(origin, TableStream):
        if request.num_images not in (None, origin.num_images):
            origin.take(request.num_images)
        dataset = Stream(origin, preprocessor)
        identity = origin.identity(chosen)
    else:
        assert indices is not None  # what is read by index says how many there are
        dataset = ChosenImages(origin, indices, preprocessor)
        identity = origin.identity(indices.tolist())
    return ImageData(
        name=request.dataset,
        split=split,
        num_images=None if chosen is None else len(chosen),
        fingerprint=_fingerprint(origin.kind, split, identity, chosen),
        class_names=origin.class_names,
        dataset=dataset,
        revision=found.revision,
        num_shards=origin.num_shards if isinstance(origin, TableStream) else 1,
        image_column=origin.columns.image if origin.columns else None,
        label_column=origin.columns.label if origin.columns else None,
        passed_over=found.passed_over,
    )


def _choose(title: str, available: int | None, request: ImageRequest) -> np.ndarray | None:
    """Indices of the images that are asked for; None if only the end of a stream will tell."""
    if available is None:
        return None if request.num_images is None else np.arange(request.num_images)
    indices = request.choose(available, title)
    return np.arange(len(indices)) if request.streaming else indices


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _find(request: ImageRequest, place: Located, size: tuple[int, int, int]) -> _Found:
    name, folder = request.dataset, place.folder
    if name == GENERATED:
        return _open_dead_leaves(request, size)
    if name == 'digits':
        if Path(name).is_dir():
            _logger.warning("'digits' is the data set of scikit-learn; the folder is './digits'")
        request.refuse_table_options()
        split = request.choose_split(['train', 'test'])
        return _Found(Digits(split), split)
    if folder is None:
        return _open_hub(request, place)
    kind, splits = find_shards(folder)
    if kind:
        return _open_shards(request, kind, splits)
    return _open_image_folder(request, folder)


def _open_dead_leaves(request: ImageRequest, size: tuple[int, int, int]) -> _Found:
    request.refuse_table_options()
    if request.split is not None:
        raise SFormerError(f"'dead-leaves' has no splits, so not {request.split!r} either")
    if request.needs_labels:
        raise SFormerError("'dead-leaves' images have no labels: name a labelled data set")
    return _Found(DeadLeaves(request.num_images or _NUM_GENERATED, size, request.seed))


def _open_image_folder(request: ImageRequest, folder: Path) -> _Found:
    request.refuse_table_options()
    name, split = request.dataset, request.split
    splits = split_folders(folder, split)
    if splits:
        split = request.choose_split(splits)
    elif split is not None:
        raise SFormerError(f'{name!r} has no split {split!r}, and no other: it has no split folders')
    root = folder / split if split else folder
    class_names = class_folders(folder, splits, split) or None
    paths, passed_over = find_images(root)
    labels = None
    if class_names:
        by_name = {c: i for i, c in enumerate(class_names)}
        classes = {path: by_name[top] for path in paths if (top := path.split(os.sep)[0]) in by_name}
        passed_over = sorted(passed_over + [path for path in paths if path not in classes])  # beside the classes
        if paths and not classes:
            raise SFormerError(f'no images in the class folders of {str(root)!r}, only beside them: {paths[0]}')
        paths = sorted(classes, key=classes.__getitem__)
        labels = [classes[path] for path in paths]
    if not paths:
        raise SFormerError(f'no images or parquet files in folder {str(root)!r}')
    if request.needs_labels and not class_names:
        raise SFormerError(f'the images of {name!r} have no labels: {str(root)!r} has no class folders')
    return _Found(Files(root, paths, labels, class_names), split, passed_over=passed_over)


def _columns(request: ImageRequest, features: Mapping[str, object]) -> Columns:
    return find_columns(
        repr(request.dataset), features, request.image_column, request.label_column, request.needs_labels)


def _open_shards(request: ImageRequest, kind: str, splits: dict[str, list[Path]]) -> _Found:
    """Open parquet or WebDataset files with `datasets`."""
    datasets = _import_datasets()
    split = request.choose_split(list(splits))
    files = splits[split]
    patterns = [glob.escape(os.path.abspath(path)) for path in files]  # `datasets` takes every name for a pattern
    try:
        check_shards(kind, files)
        num_rows = parquet_rows(files) if kind == 'parquet' else None
        if kind == 'webdataset' and not request.streaming:  # a stream checks an archive when it has read it
            for path in files:
                check_archive(path)
        origin = [file_sample(path) for path in files]
        with _quiet_progress():
            # Always split 'train' to `datasets`, which does not take every file name prefix for a split. Its cache goes
            # by paths and times of the files alone: the name of the configuration has it go by their content, too.
            table = datasets.load_dataset(
                kind, _fingerprint(origin), data_files=patterns, split='train', streaming=request.streaming)
    except Exception as e:
        problem = one_line(e) if isinstance(e, SFormerError) else \
            _full_disk(e) or find_damage(kind, files) or one_line(e)
        raise SFormerError(f'cannot read the {kind} files of {request.dataset!r} (split {split!r}): {problem}') from e
    columns = _columns(request, table.features)
    if request.streaming:
        return _Found(TableStream(table, columns, origin, num_rows, files), split)
    return _Found(Table(table, columns, origin), split)


def _open_hub(request: ImageRequest, place: Located) -> _Found:
    name, known = request.dataset, known_data(place.name)
    looked_for = f"{name!r} is not a folder, not 'dead-leaves' or 'digits'"
    if name and Path(name).expanduser().exists():
        raise SFormerError(f'{name!r} is a file: name the folder it is in')
    if not re.fullmatch(r'\w[\w.-]*(/[\w.-]+)?', name):
        raise SFormerError(f'{looked_for}, and cannot be a Hugging Face dataset id')
    if known and not known.repository:
        raise SFormerError(f'{name!r} is no folder and not on the Hub: {place.hint}')
    datasets = _import_datasets()
    options: dict[str, Any] = dict(streaming=True) if request.streaming else {}
    try:
        if revision := hub_revision(place.repository):
            options['revision'] = revision  # so that what is recorded is what is read
        with _quiet_progress():
            tables = datasets.load_dataset(place.repository, **options)
    except Exception as e:
        full = _full_disk(e)
        if full:
            raise SFormerError(f'cannot copy {name!r}: {full}') from e
        if known:
            raise SFormerError(f'{name!r} is {place.repository} on the Hugging Face Hub, which is not to be had here: '
                               f'{place.hint} ({one_line(e)})') from e
        raise SFormerError(f'{looked_for}, and the Hugging Face Hub said: {one_line(e)}') from e
    split = request.choose_split(list(tables))
    table = tables[split]
    if not request.streaming:
        # The Hub's fingerprint hashes repository, revision and split; it is the same on every machine.
        origin = getattr(table, '_fingerprint', None)
        return _Found(Table(table, _columns(request, table.features), origin), split, revision)
    try:
        table = table if table.features else table._resolve_features()
    except Exception as e:
        raise SFormerError(f'cannot read {name!r} (split {split!r}): {one_line(e)}') from e
    sizes = getattr(table.info, 'splits', None) or {}
    num_rows = sizes[split].num_examples if split in sizes else None
    stream = TableStream(table, _columns(request, table.features), (place.repository, revision), num_rows or None)
    return _Found(stream, split, revision)


def hub_revision(name: str) -> str | None:
    """Commit that `main` of a data set on the Hub is at; None where the Hub does not say, or cannot be asked and there
    is a copy in the cache. Without one, the client's error: `datasets` would ask for half of a minute."""
    import huggingface_hub
    from datasets import config
    if config.HF_HUB_OFFLINE:
        return None
    for pause in (1, 3, 0):
        try:
            return huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
        except Exception as e:  # datasets will say what is wrong, or have it in its cache
            response = getattr(e, 'response', None)
            if response is None and not _is_cached(name):
                raise
            status = getattr(response, 'status_code', 0)
            if status != 429 and status < 500:
                return None
            time.sleep(pause)  # many processes ask at once
    return None


def _is_cached(name: str) -> bool:
    """Whether `datasets` may have a copy of a data set of the Hub."""
    from datasets import config
    cache = Path(config.HF_DATASETS_CACHE)
    plain = name.replace('/', '').replace('_', '').lower()
    return cache.is_dir() and any(path.name.replace('_', '').lower() == plain for path in cache.iterdir())


def _import_datasets() -> ModuleType:
    """`datasets`, whose import sets the level of its logger anew; what it was before stays."""
    logger = logging.getLogger('datasets')
    level = logger.level
    import datasets
    if level:
        logger.setLevel(level)
    return datasets


def _full_disk(error: BaseException | None) -> str:
    """What to say if a full disk is behind an error; nothing if it is not."""
    while error is not None:
        if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in str(error) \
                or 'Not enough disk space' in str(error):
            from datasets import config
            return (f'the disk of its copy is full ({config.HF_DATASETS_CACHE}). Have HF_HOME name a folder on another '
                    f'one or, in an evaluation, do without a copy: --streaming (streaming=True)')
        error = error.__cause__ or error.__context__
    return ''


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """No progress bars where nobody watches them."""
    import datasets
    if datasets.are_progress_bars_disabled() or (sys.stdout.isatty() and sys.stderr.isatty()):
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
