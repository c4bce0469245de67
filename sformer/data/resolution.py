"""From a name to the images that it stands for."""
import contextlib
import errno
import glob
import hashlib
import logging
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import SFormerError
from .columns import Columns, find_columns
from .delivery import ChosenImages, ImageData, Stream
from .image_folders import EVALUATION_SPLITS, class_folders, find_images, split_folders
from .origins import GENERATED, DeadLeaves, Digits, Files, Table, TableStream
from .preprocessing import Preprocessor, check_data_config, one_line
from .shards import check_archive, check_shards, file_sample, find_damage, find_shards, parquet_rows

__all__ = ['choose', 'open_images']

_logger = logging.getLogger(__name__)

_NUM_GENERATED = 256


@dataclass(frozen=True)
class _Request:
    """The arguments of `open_images`; `size` is that of the preprocessing, (C, H, W)."""
    name: str
    split: Optional[str]
    size: Tuple[int, int, int]
    num_images: Optional[int]
    seed: int
    image_column: Optional[str]
    label_column: Optional[str]
    needs_labels: bool
    streaming: bool

    def check(self) -> None:
        _check_choice(repr(self.name), self.num_images, self.seed)

    def refuse_table_options(self) -> None:
        column = self.image_column or self.label_column
        if column:
            raise SFormerError(f'{self.name!r} has no columns, so {column!r} cannot be one of them')
        if self.streaming:
            raise SFormerError(f'{self.name!r} is read image by image anyway: it cannot and need not be streamed')

    def choose_split(self, splits: Sequence[str]) -> str:
        if self.split is not None:
            if self.split not in splits:
                raise SFormerError(f'{self.name!r} has no split {self.split!r}, but: {", ".join(splits)}')
            return self.split
        if len(splits) == 1:
            return splits[0]
        # Calibration never looks at evaluation images, unless told to.
        fitting = [s for s in splits if s in (EVALUATION_SPLITS if self.needs_labels else ('train', 'training'))]
        if len(fitting) != 1:
            raise SFormerError(f'choose a split of {self.name!r}: {", ".join(splits)}')
        return fitting[0]

    def find_columns(self, features) -> Columns:
        return find_columns(repr(self.name), features, self.image_column, self.label_column, self.needs_labels)


@dataclass
class _Found:
    origin: Union[DeadLeaves, Digits, Files, Table, TableStream]
    split: Optional[str] = None
    revision: Optional[str] = None
    passed_over: List[str] = field(default_factory=list)


def open_images(
        name: str,
        split: Optional[str] = None,
        *,
        data_config: Union[Dict[str, Any], Sequence[Dict[str, Any]]],
        num_images: Optional[int] = None,
        seed: int = 0,
        image_column: Optional[str] = None,
        label_column: Optional[str] = None,
        needs_labels: bool = False,
        streaming: bool = False,
) -> ImageData:
    """Find the images that a name stands for. In this order, a name is:

    * `dead-leaves`: generated images, unlabelled;
    * `digits`: the handwritten digits of scikit-learn, 8x8 and grey, splits `train` (1,257) and `test` (540);
    * a folder with files like `train-*.parquet`, in itself or in its subfolder `data`;
    * a folder with WebDataset archives like `train-*.tar`;
    * a folder of images: class folders, below split folders or not; without class folders, unlabelled;
    * a data set of the Hugging Face Hub.

    Args:
        name: One of the above.
        split: Split. None takes the only one; else `train`, or where labels are needed the split for evaluation.
        data_config: Preprocessing, as `timm.data.resolve_data_config` returns it; several of them for batches that
            hold every image once per preprocessing (`ImageData.batches` delivers the first).
        num_images: Size of a random subset, in the order of the data; None takes all (256 of `dead-leaves`). Of a
            stream, the first ones.
        seed: Seed of the subset, or of the generated images.
        image_column: Column of the images; None finds it: by a usual name, or as the only one of images.
        label_column: Column of the labels; None finds it: by a usual name, or as the only one of class labels.
        needs_labels: Insist on labels. They are delivered anyway where they are known.
        streaming: Read shards as they are needed instead of downloading or converting all splits first; for parquet
            folders, WebDataset folders and the Hub.

    Raises:
        SFormerError: Nothing, or too little, goes by this name; a file or folder cannot be read; or a split, a column
            or the preprocessing is wrong.
    """
    configs = [data_config] if isinstance(data_config, dict) else list(data_config)
    size = check_data_config(configs[0])[0]
    request = _Request(name, split, size, num_images, seed, image_column, label_column, needs_labels, streaming)
    request.check()
    return _image_data(request, _find(request), configs)


def _image_data(request: _Request, found: _Found, data_configs: Sequence[Dict[str, Any]]) -> ImageData:
    name, origin, split = request.name, found.origin, found.split
    title = f'{name!r}' + (f' (split {split!r})' if split else '')
    indices = _choose(title, origin.num_images, request)
    chosen = None if indices is None else indices.tolist()
    preprocessor = Preprocessor(title, data_configs, isinstance(origin, DeadLeaves), request.needs_labels)
    dataset: Union[ChosenImages, Stream]
    if isinstance(origin, TableStream):
        if request.num_images not in (None, origin.num_images):
            origin.take(request.num_images)
        dataset = Stream(origin, preprocessor)
    else:
        dataset = ChosenImages(origin, indices, preprocessor)
    return ImageData(
        name=name,
        split=split,
        num_images=None if chosen is None else len(chosen),
        fingerprint=_fingerprint(origin.kind, split, origin.identity(chosen), chosen),
        class_names=origin.class_names,
        dataset=dataset,
        revision=found.revision,
        num_shards=origin.num_shards if isinstance(origin, TableStream) else 1,
        image_column=origin.columns.image if origin.columns else None,
        label_column=origin.columns.label if origin.columns else None,
        passed_over=found.passed_over,
    )


def _choose(title: str, available: Optional[int], request: _Request) -> Optional[np.ndarray]:
    """Indices of the images that are asked for; None if only the end of a stream will tell."""
    if available is None:
        return None if request.num_images is None else np.arange(request.num_images)
    indices = choose(title, available, request.num_images, request.seed)
    return np.arange(len(indices)) if request.streaming else indices


def choose(title: str, available: int, num_images: Optional[int] = None, seed: int = 0) -> np.ndarray:
    """Sorted indices of a random subset of images.

    Args:
        title: What the images are called in errors.
        available: How many there are.
        num_images: Size of the subset; None takes all.
        seed: Seed of the subset.

    Raises:
        SFormerError: If there are none, fewer than are asked for, or none is asked for, or the seed is negative.
    """
    _check_choice(title, num_images, seed)
    if not available:
        raise SFormerError(f'{title} has no images')
    if num_images is not None and num_images > available:
        raise SFormerError(f'{num_images} images asked for, but {title} has only {available}')
    if num_images is None or num_images == available:
        return np.arange(available)
    # Sorted, because neighbours are fast to read.
    return np.sort(np.random.default_rng(seed).choice(available, num_images, replace=False))


def _check_choice(title: str, num_images: Optional[int], seed: int) -> None:
    if num_images is not None and num_images < 1:
        raise SFormerError(f'{num_images} images of {title} asked for: at least 1 is needed')
    if seed < 0:
        raise SFormerError(f'seed {seed} is negative: seeds are 0 or more')


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _find(request: _Request) -> _Found:
    name = request.name
    if name == GENERATED:
        return _open_dead_leaves(request)
    if name == 'digits':
        if Path(name).is_dir():
            _logger.warning("'digits' is the data set of scikit-learn; the folder is './digits'")
        request.refuse_table_options()
        split = request.choose_split(['train', 'test'])
        return _Found(Digits(split), split)
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        return _open_hub(request)
    kind, splits = find_shards(folder)
    if kind:
        return _open_shards(request, kind, splits)
    return _open_image_folder(request, folder)


def _open_dead_leaves(request: _Request) -> _Found:
    request.refuse_table_options()
    if request.split is not None:
        raise SFormerError(f"'dead-leaves' has no splits, so not {request.split!r} either")
    if request.needs_labels:
        raise SFormerError("'dead-leaves' images have no labels: name a labelled data set")
    return _Found(DeadLeaves(request.num_images or _NUM_GENERATED, request.size, request.seed))


def _open_image_folder(request: _Request, folder: Path) -> _Found:
    request.refuse_table_options()
    name, split = request.name, request.split
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
        classes = {path: by_name.get(path.split(os.sep)[0]) for path in paths}
        passed_over = sorted(passed_over + [path for path in paths if classes[path] is None])  # beside the classes
        paths = sorted((path for path in paths if classes[path] is not None), key=classes.__getitem__)
        labels = [classes[path] for path in paths]
        if classes and not paths:
            beside = next(iter(classes))
            raise SFormerError(f'no images in the class folders of {str(root)!r}, only beside them: {beside}')
    if not paths:
        raise SFormerError(f'no images or parquet files in folder {str(root)!r}')
    if request.needs_labels and not class_names:
        raise SFormerError(f'the images of {name!r} have no labels: {str(root)!r} has no class folders')
    return _Found(Files(root, paths, labels, class_names), split, passed_over=passed_over)


def _open_shards(request: _Request, kind: str, splits: Dict[str, List[Path]]) -> _Found:
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
        raise SFormerError(f'cannot read the {kind} files of {request.name!r} (split {split!r}): {problem}') from e
    columns = request.find_columns(table.features)
    if request.streaming:
        return _Found(TableStream(table, columns, origin, num_rows, files), split)
    return _Found(Table(table, columns, origin), split)


def _open_hub(request: _Request) -> _Found:
    name = request.name
    looked_for = f"{name!r} is not a folder, not 'dead-leaves' or 'digits'"
    if name and Path(name).expanduser().exists():
        raise SFormerError(f'{name!r} is a file: name the folder it is in')
    if not re.fullmatch(r'\w[\w.-]*(/[\w.-]+)?', name):
        raise SFormerError(f'{looked_for}, and cannot be a Hugging Face dataset id')
    datasets = _import_datasets()
    revision = _hub_revision(name)
    pinned = dict(revision=revision) if revision else {}  # so that what is recorded is what is read
    options = dict(streaming=True) if request.streaming else {}
    try:
        with _quiet_progress():
            tables = datasets.load_dataset(name, **options, **pinned)
    except Exception as e:
        full = _full_disk(e)
        raise SFormerError(f'cannot copy {name!r}: {full}' if full else
                           f'{looked_for}, and the Hugging Face Hub said: {one_line(e)}') from e
    split = request.choose_split(list(tables))
    table = tables[split]
    if not request.streaming:
        # The Hub's fingerprint hashes repository, revision and split; it is the same on every machine.
        origin = getattr(table, '_fingerprint', None)
        return _Found(Table(table, request.find_columns(table.features), origin), split, revision)
    try:
        table = table if table.features else table._resolve_features()
    except Exception as e:
        raise SFormerError(f'cannot read {name!r} (split {split!r}): {one_line(e)}') from e
    sizes = getattr(table.info, 'splits', None) or {}
    num_rows = sizes[split].num_examples if split in sizes else None
    stream = TableStream(table, request.find_columns(table.features), (name, revision), num_rows or None)
    return _Found(stream, split, revision)


def _hub_revision(name: str) -> Optional[str]:
    """Commit that `main` of a data set on the Hub is at; None where the Hub cannot be asked."""
    import huggingface_hub
    from datasets import config
    if config.HF_HUB_OFFLINE:
        return None
    for pause in (1, 3, 0):
        try:
            return huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
        except Exception as e:  # datasets will say what is wrong, or have it in its cache
            status = getattr(getattr(e, 'response', None), 'status_code', 0)
            if status != 429 and status < 500:
                return None
            time.sleep(pause)  # many processes ask at once
    return None


def _import_datasets() -> Any:
    """`datasets`, whose import sets the level of its logger anew; what it was before stays."""
    logger = logging.getLogger('datasets')
    level = logger.level
    import datasets
    if level:
        logger.setLevel(level)
    return datasets


def _full_disk(error: Optional[BaseException]) -> str:
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
def _quiet_progress():
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
