"""Images to calibrate and evaluate with: generated ones, a folder, or a data set of the Hugging Face Hub.

`open_images` turns a name into an `ImageData`, which delivers batches preprocessed as the model expects them.

With nothing at hand, `dead-leaves` generates images: shapes with a power-law size distribution that occlude one
another have the edges, scales and spectrum of photographs, and calibrate nearly as well.

* Lee, Mumford, Huang, 'Occlusion Models for Natural Images: A Statistical Study of a Scale-Invariant Dead Leaves
  Model', IJCV 2001.
* Baradad, Wulff, Wang, Isola, Torralba, 'Learning to See by Looking at Noise', NeurIPS 2021, arXiv 2106.05963.
"""
import contextlib
import glob
import hashlib
import io
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .errors import SFormerError

__all__ = ['Batch', 'ImageData', 'Plan', 'UnreadableImageError', 'dead_leaves', 'open_images']

_MODES = {1: 'L', 3: 'RGB'}  # PIL mode by number of channels
_NUM_GENERATED = 256
_EVALUATION_SPLITS = ('test', 'validation', 'valid', 'val', 'dev', 'eval')
_SPLIT_FOLDERS = ('train', 'training') + _EVALUATION_SPLITS
_IMAGE_COLUMNS = ('image', 'img', 'pixel_values', 'jpg', 'jpeg', 'png', 'webp', 'picture', 'photo')
_KEY_COLUMNS = ('__key__', 'file_name', 'filename', 'image_id')
_LABEL_COLUMNS = ('label', 'labels', 'fine_label', 'coarse_label', 'cls', 'class', 'target')


# Delivery ------------------------------------------------------------------------------------------------------------


class UnreadableImageError(SFormerError):
    """An image that is damaged, or no image at all."""


@dataclass
class Batch:
    """Some images of one chunk.

    Args:
        chunk: Shard, and number of the chunk in its shard. Data that are not streamed are one shard, 0.
        start: Position of the first image in the shard.
        num: Images that were read, delivered or not.
        images: Normalised float32 images (B, C, H, W), one tensor per preprocessing.
        labels: Accepted classes (B, L), int64; -1 fills up.
        skipped: Images without a label in this benchmark.
        bad: Names of unreadable images and what is wrong with them.
        ends_chunk: Whether this is the last batch of its chunk.
        ends_shard: Whether this is the last batch of its shard.
        decode_seconds: Time of the process that read and decoded the images.
        preprocess_seconds: Time of that process for resizing, cropping and normalising.
    """
    chunk: Tuple[int, int]
    start: int
    num: int
    images: List[torch.Tensor]
    labels: torch.Tensor
    skipped: int = 0
    bad: List[str] = field(default_factory=list)
    ends_chunk: bool = False
    ends_shard: bool = False
    decode_seconds: float = 0.
    preprocess_seconds: float = 0.

    def pin_memory(self) -> 'Batch':
        self.images = [x.pin_memory() for x in self.images]
        return self


@dataclass
class Plan:
    """Who evaluates what. Data are divided into chunks of fixed images in fixed batches, whoever takes them, so a
    result does not depend on the number of processes, and finished chunks need not be evaluated again.

    Args:
        batch_size: Images per batch.
        chunk_size: Images per chunk, a multiple of `batch_size`; the last chunk of a shard may be smaller.
        rank: This process.
        world_size: Number of processes.
        workers: Processes per process that read and decode, 0 for none.
        done: Finished chunks, as (shard, chunk).
        finished: Shards whose last chunk, and all before, are finished.
    """
    batch_size: int
    chunk_size: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    done: Set[Tuple[int, int]] = field(default_factory=set)
    finished: Set[int] = field(default_factory=set)


@dataclass
class ImageData:
    """A resolved set of images: iterable as often as needed, and sized unless it is streamed from who knows where.

    Args:
        name: What the user typed.
        split: Split in use, None where the data has none.
        num_images: Images delivered per pass; None where only the end of the stream will tell.
        fingerprint: Hash of what identifies the delivered images, for results files. It does not depend on where local
            data lies; of folders and parquet files it hashes names, sizes and samples, not every byte.
        class_names: Class names by label, None where unknown.
        dataset: Map-style data set of (image (C, H, W), label or None), or a stream.
        revision: Commit of a data set on the Hub.
        num_shards: Shards of a stream, else 1.
    """
    name: str
    split: Optional[str]
    num_images: Optional[int]
    fingerprint: Optional[str]
    class_names: Optional[List[str]]
    dataset: Dataset = field(repr=False, compare=False)
    revision: Optional[str] = None
    num_shards: int = 1

    def __len__(self) -> int:
        if self.num_images is None:
            raise TypeError(f'{self.name!r} is streamed and does not say how many images it has')
        return self.num_images

    @property
    def streamed(self) -> bool:
        return isinstance(self.dataset, _Stream)

    def label_with(self, labels: Callable[[Optional[int], Optional[str]], Sequence[int]]) -> None:
        """Have batches deliver other labels than those of the data.

        Args:
            labels: From the label of an image and its key (its file name, where it has one) to the classes that count
                as right; none to skip the image.
        """
        self.dataset.labels = labels  # type: ignore[attr-defined]

    def batches(
            self,
            batch_size: int,
            workers: int = 0,
    ) -> Iterator[Tuple[torch.Tensor, Optional[torch.Tensor]]]:
        """Deliver all images once, in order. At most a few batches per worker are in memory.

        Args:
            batch_size: Images per batch; the last batch may be smaller.
            workers: Worker processes, 0 to read in this one.

        Yields:
            Normalised float32 images (B, C, H, W), and int64 labels (B,) or None.

        Raises:
            SFormerError: An image cannot be read, or has no label although labels are needed.
        """
        loader = DataLoader(
            self.dataset,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(0),  # else the loader advances the user's global generator
        )
        for batch in loader:
            if isinstance(batch, SFormerError):
                raise batch
            yield batch

    def planned(self, plan: Plan, timeout: float = 0., pin_memory: bool = False) -> Iterator[Batch]:
        """Deliver the chunks of one rank that are not done, each image once.

        Args:
            plan: Who takes what.
            timeout: Seconds after which a worker that delivers nothing is given up; 0 waits for ever.
            pin_memory: Whether to deliver in page-locked memory.

        Raises:
            SFormerError: A worker died or hangs; an image has no label.
        """
        common: Dict[str, Any] = dict(
            batch_size=None, num_workers=plan.workers, timeout=timeout if plan.workers else 0, pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0))
        if isinstance(self.dataset, _Stream):
            loader = DataLoader(_PlannedStream(self.dataset, plan), **common)
        else:
            chunks = self._chunks(plan)
            common['num_workers'] = min(plan.workers, len(chunks))  # more would only cost memory
            common['timeout'] = timeout if common['num_workers'] else 0
            loader = DataLoader(_PlannedImages(self.dataset), sampler=chunks, **common)
        with lost_workers():
            for batch in loader:
                if isinstance(batch, SFormerError):
                    raise batch
                yield batch

    def _chunks(self, plan: Plan) -> List[Tuple[Tuple[int, int], int, int, bool, bool]]:
        """Batches of this rank: chunk, start, stop, and whether they end it and the data."""
        size = len(self)
        num_chunks = -(-size // plan.chunk_size)
        todo = [c for c in range(num_chunks) if (0, c) not in plan.done]
        batches = []
        for c in todo[plan.rank::plan.world_size]:
            end = min(size, (c + 1) * plan.chunk_size)
            for start in range(c * plan.chunk_size, end, plan.batch_size):
                stop = min(end, start + plan.batch_size)
                batches.append(((0, c), start, stop, stop == end, stop == size))
        return batches


def _collate(samples: List[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, SFormerError):
            return sample
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), None if labels[0] is None else torch.tensor(labels, dtype=torch.int64)


class _Preparation:
    """From what a source reads to tensors and labels.

    Errors are returned, not raised: a `DataLoader` worker would wrap them in its traceback.
    """

    def __init__(self, title: str, modes: List[str], transforms: List[Callable], needs_labels: bool):
        self.title = title
        self.modes = modes
        self.transforms = transforms
        self.needs_labels = needs_labels
        self.labels: Optional[Callable] = None

    def prepare(self, read: Callable[[], Tuple[Any, Optional[int], Optional[str]]], what: str, times: List[float]):
        """Read one image; returns its tensors and accepted classes (None to skip it), or an error."""
        from PIL import UnidentifiedImageError
        start = time.perf_counter()
        try:
            image, label, key = read()
            if self.needs_labels and (label is None or label < 0):
                return SFormerError(f'{what} of {self.title} has no label ({label})')
            accepted = None if label is None else [label] if self.labels is None else self.labels(label, key)
            if accepted is not None and len(accepted) == 0:
                return None
            # Loads the pixels. EXIF orientation is left alone, as in timm's evaluation.
            images = [image.convert(mode) for mode in self.modes]
        except SFormerError as e:
            return e
        except Exception as e:  # damaged files raise about anything: OSError, SyntaxError, struct.error, ...
            reason = 'not an image' if isinstance(e, UnidentifiedImageError) else _one_line(e)
            return UnreadableImageError(f'cannot read {what} of {self.title}: {reason}')
        decoded = time.perf_counter()
        tensors = [transform(image) for transform, image in zip(self.transforms, images, strict=True)]
        times[0] += decoded - start
        times[1] += time.perf_counter() - decoded
        return tensors, accepted

    def batch(self, chunk: Tuple[int, int], start: int, reads: List[Tuple[Callable, str]], **ends: bool):
        """Read a batch of images; returns a `Batch`, or an error that is not about one image."""
        times = [0., 0.]
        tensors, labels, bad, skipped = [], [], [], 0
        for read, what in reads:
            sample = self.prepare(read, what, times)
            if isinstance(sample, UnreadableImageError):
                bad.append(str(sample))
            elif isinstance(sample, SFormerError):
                return sample
            elif sample is None:
                skipped += 1
            else:
                tensors.append(sample[0])
                labels.append(sample[1] or [-1])
        width = max(map(len, labels), default=1)
        return Batch(
            chunk=chunk, start=start, num=len(reads),
            images=[torch.stack(x) for x in zip(*tensors, strict=True)],
            labels=torch.tensor([y + [-1] * (width - len(y)) for y in map(list, labels)], dtype=torch.int64).reshape(
                len(labels), width),
            skipped=skipped, bad=bad, decode_seconds=times[0], preprocess_seconds=times[1], **ends)


class _Images(_Preparation, Dataset):
    """The chosen images of a source, preprocessed."""

    def __init__(self, source, indices: np.ndarray, **kwargs):
        super().__init__(**kwargs)
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def reader(self, i: int) -> Tuple[Callable, str]:
        index = int(self.indices[i])
        return lambda: self.source.read(index), self.source.describe(index)

    def __getitem__(self, i: int):
        sample = self.prepare(*self.reader(i), [0., 0.])
        if isinstance(sample, tuple):
            tensors, accepted = sample
            return tensors[0], None if accepted is None else accepted[0]
        return sample


class _PlannedImages(Dataset):
    """Whole batches of a map-style data set, so that one worker makes one batch."""

    def __init__(self, images: _Images):
        self.images = images

    def __getitem__(self, item):
        chunk, start, stop, ends_chunk, ends_shard = item
        reads = [self.images.reader(i) for i in range(start, stop)]
        return self.images.batch(chunk, start, reads, ends_chunk=ends_chunk, ends_shard=ends_shard)


class _Stream(_Preparation, IterableDataset):
    """Rows of a `datasets.IterableDataset`, in shards; the first `limit` rows only, if there is a limit."""

    def __init__(self, table, row_reader: '_Rows', limit: Optional[int], **kwargs):
        super().__init__(**kwargs)
        self.table = table
        self.rows = row_reader
        self.limit = limit
        # the first rows of the whole stream are not those of its shards
        self.num_shards = 1 if limit is not None else table.num_shards

    def shard(self, index: int) -> Iterator[Dict[str, Any]]:
        import itertools
        table = self.table if self.limit is not None else self.table.shard(self.num_shards, index)
        # By `iter(batch_size)`, because `__iter__` divides the shards once more among the workers of a `DataLoader`,
        # and stops those that get none.
        batches = table.iter(batch_size=16)
        rows = (dict(zip(b, values, strict=True)) for b in batches for values in zip(*b.values(), strict=True))
        return itertools.islice(rows, self.limit)

    def __iter__(self):
        for shard in range(self.num_shards):
            for i, row in enumerate(self.shard(shard)):
                sample = self.prepare(lambda row=row: self.rows.read(row), f'image {i} of shard {shard}', [0., 0.])
                if isinstance(sample, tuple):
                    tensors, accepted = sample
                    sample = tensors[0], None if accepted is None else accepted[0]
                yield sample


class _PlannedStream(IterableDataset):
    """The chunks of a stream that are for one rank and one worker of it.

    A reader takes whole shards and reads nothing else. Shards that are left over when all readers have the same number
    are read by several, each of which decodes chunks of its own. So every chunk has exactly one reader:
    `datasets.split_dataset_by_node` would do the same, but with batches, and so last bits of logits, that depend on
    the number of processes.
    """

    def __init__(self, stream: _Stream, plan: Plan):
        self.stream, self.plan = stream, plan

    def __iter__(self):
        plan, stream = self.plan, self.stream
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader, readers = plan.rank * workers + worker, plan.world_size * workers
        shared = stream.num_shards % readers
        for shard in range(stream.num_shards):
            if shard < stream.num_shards - shared:
                team = [shard % readers]
            else:
                team = list(range((shard - stream.num_shards + shared), readers, shared))
            if shard in plan.finished or reader not in team:
                continue

            def mine(chunk, shard=shard, team=team):
                return (shard, chunk) not in plan.done and team[chunk % len(team)] == reader

            try:
                yield from self._shard(shard, mine)
            except Exception as e:  # the network, or a damaged file
                yield SFormerError(f'cannot read shard {shard} of {stream.title}: {_one_line(e)}')
                return

    def _shard(self, shard: int, mine: Callable[[int], bool]) -> Iterator[Any]:
        """Batches of the chunks of a shard that are mine; reads one row ahead to know which one is the last."""
        plan, stream = self.plan, self.stream
        rows: List[Dict[str, Any]] = []
        start = position = 0

        def batch(last: bool):
            reads = [(lambda row=row: stream.rows.read(row), f'image {start + i} of shard {shard}')
                     for i, row in enumerate(rows)]
            ends = last or (start + len(rows)) % plan.chunk_size == 0
            return stream.batch((shard, start // plan.chunk_size), start, reads, ends_chunk=ends, ends_shard=last)

        for row in stream.shard(shard):
            if rows and (len(rows) == plan.batch_size or position % plan.chunk_size == 0):
                yield batch(last=False)
                rows = []
            if mine(position // plan.chunk_size):
                start = start if rows else position
                rows.append(row)
            position += 1
        if rows:
            yield batch(last=True)


# Sources ------------------------------------------------------------------------------------------------------------
#
# len(), read(index) -> (PIL image, label or None, key or None), describe(index), identity(indices) -> what to hash


class _DeadLeaves:
    class_names = None

    def __init__(self, num_images: int, size: Tuple[int, int, int], seed: int):
        self.num_images, self.size, self.seed = num_images, size, seed

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int):
        from PIL import Image
        image = _dead_leaves_image(index, self.size, self.seed)
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), None, None

    def describe(self, index: int) -> str:
        return f'image {index}'

    def identity(self, indices: np.ndarray) -> Any:
        # The first pixels stand for the version of the generator.
        return self.size, self.seed, _dead_leaves_image(0, (3, 16, 16), 0).tobytes()


class _Digits:
    """The digits of scikit-learn: 8x8, levels 0 to 16."""

    def __init__(self, split: str):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        digits = load_digits()
        parts = train_test_split(np.arange(len(digits.target)), test_size=540, stratify=digits.target, random_state=0)
        indices = parts[('train', 'test').index(split)]
        self.images = np.round(digits.images[indices] * 255 / 16).astype(np.uint8)
        self.labels = digits.target[indices]
        self.class_names = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int):
        from PIL import Image
        return Image.fromarray(self.images[index]), int(self.labels[index]), None

    def describe(self, index: int) -> str:
        return f'image {index}'

    def identity(self, indices: np.ndarray) -> Any:
        return self.images.tobytes(), self.labels.tolist()


class _Files:
    """Image files below a folder, labelled by its class folders if it has any."""

    def __init__(self, folder: Path, class_names: Optional[List[str]]):
        self.folder = folder
        self.class_names = class_names
        self.paths: List[str] = []  # relative to the folder
        self.labels: List[int] = []
        for label, name in enumerate(class_names or ['']):
            paths = _image_files(folder / name)
            self.paths += [os.path.join(name, path) for path in paths]
            self.labels += [label] * len(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int):
        from PIL import Image
        with open(self.folder / self.paths[index], 'rb') as f:
            image = Image.open(f)
            image.load()
        return image, self.labels[index] if self.class_names else None, self.paths[index]

    def describe(self, index: int) -> str:
        return f"image {index} ('{self.paths[index]}')"

    def identity(self, indices: np.ndarray) -> Any:
        paths = [self.paths[i] for i in indices]
        return [(Path(path).as_posix(), os.path.getsize(self.folder / path)) for path in paths], self.class_names


class _Rows:
    """What rows of a `datasets` table mean. Images are decoded here, so that a damaged one can be named."""

    def __init__(self, image_column: str, label_column: Optional[str], key_column: Optional[str]):
        self.image_column, self.label_column, self.key_column = image_column, label_column, key_column

    @property
    def columns(self) -> List[str]:
        return [c for c in (self.image_column, self.label_column, self.key_column) if c]

    def read(self, row: Dict[str, Any]):
        value = row[self.image_column]
        key = value.get('path') if isinstance(value, dict) else None
        if key is None and self.key_column:
            key = str(row[self.key_column])
        return _decode(value), row[self.label_column] if self.label_column else None, key


class _Table:
    """Rows of a `datasets.Dataset`, memory-mapped."""

    def __init__(self, table, rows: _Rows, origin: Any):
        import datasets
        self.table = table.select_columns(rows.columns)
        if isinstance(table.features[rows.image_column], datasets.Image):
            self.table = self.table.cast_column(rows.image_column, datasets.Image(decode=False))
        self.rows, self.origin = rows, origin
        self.class_names = _class_names(table.features, rows)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int):
        return self.rows.read(self.table[index])

    def describe(self, index: int) -> str:
        return f'image {index}'

    def identity(self, indices: np.ndarray) -> Any:
        return self.origin, self.rows.image_column, self.rows.label_column


def _class_names(features, rows: _Rows) -> Optional[List[str]]:
    import datasets
    label = features[rows.label_column] if rows.label_column else None
    return list(label.names) if isinstance(label, datasets.ClassLabel) else None


def _decode(value: Any):
    """Open what an image column holds: encoded bytes, {'bytes', 'path'}, or rows of pixel values 0 to 255."""
    from PIL import Image
    if isinstance(value, dict):
        value = value.get('bytes') or value.get('path')
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, str):
        return Image.open(value)
    if value is None:
        raise ValueError('it is empty')
    pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[0] in _MODES and pixels.shape[2] not in _MODES:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype.kind not in 'iu' or pixels.ndim not in (2, 3) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f'neither encoded bytes nor pixels 0 to 255 ({type(value).__name__} of {pixels.dtype})')
    return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))


# Resolution ----------------------------------------------------------------------------------------------------------


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
        image_column: Column of the images; None detects it.
        label_column: Column of the labels; None detects it.
        needs_labels: Insist on labels. They are delivered anyway where they are known.
        streaming: Read shards as they are needed instead of downloading or converting all splits first; for parquet
            folders, WebDataset folders and the Hub.

    Raises:
        SFormerError: Nothing, or too little, goes by this name; or a split, a column or the preprocessing is wrong.
    """
    configs = [data_config] if isinstance(data_config, dict) else list(data_config)
    size = _check_data_config(configs[0])[0]
    if num_images is not None and num_images < 1:
        raise SFormerError(f'{num_images} images of {name!r} asked for: at least 1 is needed')
    if seed < 0:
        raise SFormerError(f'seed {seed} is negative: seeds are 0 or more')

    columns = dict(image_column=image_column, label_column=label_column, needs_labels=needs_labels)
    folder = Path(name).expanduser()
    known = name in ('dead-leaves', 'digits')
    revision = None
    if known or (name and folder.is_dir()):
        source: Any
        parquet = {} if known else _split_files(folder, 'parquet')
        # archives beside split folders of class folders are what these were unpacked from
        unpacked = not known and any(
            s.lower() in _SPLIT_FOLDERS and _subfolders(folder / s) for s in _subfolders(folder))
        archives = {} if known or parquet or unpacked else _split_files(folder, 'tar')
        if not parquet and not archives:
            if image_column or label_column:
                column = image_column or label_column
                raise SFormerError(f'{name!r} has no columns, so {column!r} cannot be one of them')
            if streaming:
                raise SFormerError(f'{name!r} is read image by image anyway: it can not and need not be streamed')
        if name == 'dead-leaves':
            source = _open_dead_leaves(split, size, num_images or _NUM_GENERATED, seed, needs_labels)
        elif name == 'digits':
            split = _choose_split(name, split, ['train', 'test'], needs_labels)
            source = _Digits(split)
        elif parquet or archives:
            split = _choose_split(name, split, list(parquet or archives), needs_labels)
            kind = 'parquet' if parquet else 'webdataset'
            source = _open_files(name, kind, split, (parquet or archives)[split], columns, streaming)
        else:
            source, split = _open_image_folder(name, folder, split, needs_labels)
    else:
        source, split, revision = _open_hub(name, split, columns, streaming)

    title = f'{name!r}' + (f' (split {split!r})' if split else '')
    preparation: Dict[str, Any] = dict(
        title=title,
        modes=[_MODES[_check_data_config(config)[0][0]] for config in configs],
        transforms=[_create_transform(config, generated=name == 'dead-leaves') for config in configs],
        needs_labels=needs_labels,
    )
    if streaming:
        return _open_stream(name, split, source, revision, num_images, preparation)

    available = len(source)
    if available == 0:
        raise SFormerError(f'{title} has no images')
    if num_images is not None and num_images > available:
        raise SFormerError(f'{num_images} images asked for, but {title} has only {available}')
    if num_images is None or num_images == available:
        indices = np.arange(available)
    else:
        # Sorted, because neighbours are fast to read.
        indices = np.sort(np.random.default_rng(seed).choice(available, num_images, replace=False))

    return ImageData(
        name=name,
        split=split,
        num_images=len(indices),
        fingerprint=_fingerprint(type(source).__name__, split, source.identity(indices), indices.tolist()),
        class_names=source.class_names,
        dataset=_Images(source=source, indices=indices, **preparation),
        revision=revision,
    )


class _StreamSource:
    """A `datasets.IterableDataset` whose columns are known."""

    def __init__(self, table, rows: _Rows, origin: Any, num_rows: Optional[int]):
        import datasets
        features = table.features
        self.table = table.select_columns(rows.columns)
        if isinstance(features[rows.image_column], datasets.Image):
            self.table = self.table.cast_column(rows.image_column, datasets.Image(decode=False))
        self.rows, self.origin, self.num_rows = rows, origin, num_rows
        self.class_names = _class_names(features, rows)


def _open_stream(
        name: str,
        split: Optional[str],
        source: _StreamSource,
        revision: Optional[str],
        num_images: Optional[int],
        preparation: Dict[str, Any],
) -> ImageData:
    title, available = preparation['title'], source.num_rows
    if available == 0:
        raise SFormerError(f'{title} has no images')
    if num_images is not None and available is not None and num_images > available:
        raise SFormerError(f'{num_images} images asked for, but {title} has only {available}')
    limit = None if num_images == available else num_images
    stream = _Stream(source.table, source.rows, limit, **preparation)
    size = available if num_images is None else num_images
    identity = source.origin, source.rows.image_column, source.rows.label_column
    return ImageData(
        name=name,
        split=split,
        num_images=size,
        # of the same local files, that of the same images in memory
        fingerprint=_fingerprint(_Table.__name__, split, identity, None if size is None else list(range(size))),
        class_names=source.class_names,
        dataset=stream,
        revision=revision,
        num_shards=stream.num_shards,
    )


def _check_data_config(data_config: Dict[str, Any]) -> Tuple[Tuple[int, int, int], Sequence[float], Sequence[float]]:
    size = tuple(data_config['input_size'])
    if len(size) != 3 or size[0] not in _MODES:
        raise SFormerError(f'input size {size} is not of an image: (1, H, W) is grey, (3, H, W) is RGB')
    mean = data_config.get('mean', IMAGENET_DEFAULT_MEAN)
    std = data_config.get('std', IMAGENET_DEFAULT_STD)
    for key, value in (('mean', mean), ('std', std)):
        # Three means would silently broadcast a grey image to three channels.
        if len(value) != size[0]:
            raise SFormerError(
                f'the {key} of the preprocessing has {len(value)} entries {tuple(value)}, '
                f'but the model takes {size[0]} channel(s): give {size[0]}')
    return size, mean, std


def _create_transform(data_config: Dict[str, Any], generated: bool):
    _, mean, std = _check_data_config(data_config)
    if not generated:
        return create_transform(**data_config, is_training=False)
    # Generated at the size of the model: nothing to resize or crop.
    from torchvision import transforms
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


def _choose_split(name: str, split: Optional[str], splits: List[str], needs_labels: bool) -> str:
    if split is not None:
        if split not in splits:
            raise SFormerError(f'{name!r} has no split {split!r}, but: {", ".join(splits)}')
        return split
    if len(splits) == 1:
        return splits[0]
    # Calibration never looks at evaluation images, unless told to.
    fitting = [s for s in splits if s in (_EVALUATION_SPLITS if needs_labels else ('train', 'training'))]
    if len(fitting) != 1:
        raise SFormerError(f'choose a split of {name!r}: {", ".join(splits)}')
    return fitting[0]


def _open_dead_leaves(
        split: Optional[str],
        size: Tuple[int, int, int],
        num_images: int,
        seed: int,
        needs_labels: bool,
) -> _DeadLeaves:
    if split is not None:
        raise SFormerError(f"'dead-leaves' has no splits, so not {split!r} either")
    if needs_labels:
        raise SFormerError("'dead-leaves' images have no labels: name a labelled data set")
    return _DeadLeaves(num_images, size, seed)


def _split_files(folder: Path, extension: str) -> Dict[str, List[Path]]:
    """Files by split: `train-00000-of-00002.parquet` and `train.parquet` are of split `train`, and so is
    `imagenet1k-train-0000.tar`."""
    splits: Dict[str, List[Path]] = {}
    for path in sorted(folder.glob(f'*.{extension}')) or sorted((folder / 'data').glob(f'*.{extension}')):
        words = re.split(r'[-._]' if extension == 'tar' else r'[-.]', path.name)[:-1]
        split = words[0]
        if extension == 'tar':  # no convention for the first word
            split = next((word for word in words if word in _SPLIT_FOLDERS), 'train')
        # Numbers alone name no split: `train`, as `datasets` has it.
        splits.setdefault('train' if re.fullmatch(r'[\d_]*', split) else split, []).append(path)
    return splits


def _open_files(
        name: str,
        kind: str,
        split: str,
        files: List[Path],
        columns: Dict[str, Any],
        streaming: bool,
) -> Union[_Table, _StreamSource]:
    """Open parquet or WebDataset files with `datasets`."""
    import datasets
    paths = [glob.escape(os.path.abspath(path)) for path in files]  # `datasets` takes every name for a pattern
    num_rows = None
    try:
        if kind == 'webdataset':
            _check_archives(files)
        with _quiet_progress():
            # Always split 'train' to `datasets`, which does not take every file name prefix for a split.
            table = datasets.load_dataset(kind, data_files=paths, split='train', streaming=streaming)
        if streaming and kind == 'parquet':
            import pyarrow.parquet
            num_rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in files)
    except Exception as e:
        raise SFormerError(f'cannot read the {kind} files of {name!r} (split {split!r}): {_one_line(e)}') from e
    rows = _find_columns(f'{name!r}', table.features, **columns)
    origin = [_file_sample(path) for path in files]
    return _StreamSource(table, rows, origin, num_rows) if streaming else _Table(table, rows, origin)


def _check_archives(files: List[Path]) -> None:
    """Raise SFormerError for an archive that was cut off: where the cut is between two files, readers do not notice."""
    for path in files:
        with open(path, 'rb') as f:
            is_tar = f.read(262)[257:] == b'ustar'  # compressed ones notice a cut by themselves
            f.seek(max(0, path.stat().st_size - 1024))
            if is_tar and f.read() != bytes(1024):
                raise SFormerError(f'{path} has no end-of-archive mark: it was cut off, or never closed by its writer')


def _open_image_folder(
        name: str,
        folder: Path,
        split: Optional[str],
        needs_labels: bool,
) -> Tuple[_Files, Optional[str]]:
    splits = [s for s in _subfolders(folder) if s.lower() in _SPLIT_FOLDERS]
    others = [s for s in _subfolders(folder) if s not in splits]
    if others and split not in splits and not any(_subfolders(folder / s) for s in splits) \
            and all(_holds_images(folder / s) for s in others):
        splits = []  # classes, one of which is called so: CIFAR-100 has trains
    if split is not None and split not in splits and _subfolders(folder / split):
        splits.append(split)  # any folder of class folders will do when it is asked for
    if splits:
        split = _choose_split(name, split, splits, needs_labels)
    elif split is not None:
        raise SFormerError(f'{name!r} has no split {split!r}, and no other: it has no split folders')
    root = folder / split if split else folder
    # Over all splits, so that a class missing from one of them does not shift the labels of the rest.
    roots = [folder / s for s in splits] or [folder]
    class_names = sorted({c for r in roots for c in _subfolders(r)}, key=natural_key) if _subfolders(root) else []
    source = _Files(root, class_names or None)
    if len(source) == 0:
        raise SFormerError(f'no images or parquet files in folder {str(root)!r}')
    if needs_labels and not class_names:
        raise SFormerError(f'the images of {name!r} have no labels: {str(root)!r} has no class folders')
    return source, split


def _open_hub(
        name: str,
        split: Optional[str],
        columns: Dict[str, Any],
        streaming: bool,
) -> Tuple[Union[_Table, _StreamSource], str, Optional[str]]:
    looked_for = f"{name!r} is not a folder, not 'dead-leaves' or 'digits'"
    if name and Path(name).expanduser().exists():
        raise SFormerError(f'{name!r} is a file: name the folder it is in')
    if not re.fullmatch(r'\w[\w.-]*(/[\w.-]+)?', name):
        raise SFormerError(f'{looked_for}, and cannot be a Hugging Face dataset id')
    import datasets
    revision = _hub_revision(name)
    pinned = dict(revision=revision) if revision else {}  # so that what is recorded is what is read
    try:
        with _quiet_progress():
            tables = datasets.load_dataset(name, streaming=True, **pinned) if streaming else datasets.load_dataset(
                name, **pinned)
    except Exception as e:
        raise SFormerError(f'{looked_for}, and the Hugging Face Hub said: {_one_line(e)}') from e
    split = _choose_split(name, split, list(tables), columns['needs_labels'])
    table = tables[split]
    try:
        features = table.features or table._resolve_features().features
    except Exception as e:
        raise SFormerError(f'cannot read {name!r} (split {split!r}): {_one_line(e)}') from e
    rows = _find_columns(f'{name!r}', features, **columns)
    if not streaming:
        # The Hub's fingerprint hashes repository, revision and split; it is the same on every machine.
        return _Table(table, rows, getattr(table, '_fingerprint', None)), split, revision
    table = table if table.features else table._resolve_features()
    sizes = getattr(table.info, 'splits', None) or {}
    num_rows = sizes[split].num_examples if split in sizes else None
    return _StreamSource(table, rows, (name, revision), num_rows or None), split, revision


def _hub_revision(name: str) -> Optional[str]:
    """Commit that `main` of a data set on the Hub is at; None where the Hub can not be asked."""
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


def _find_columns(
        title: str,
        features,
        image_column: Optional[str],
        label_column: Optional[str],
        needs_labels: bool,
) -> _Rows:
    import datasets
    listed = ', '.join(features)
    for column in (image_column, label_column):
        if column is not None and column not in features:
            raise SFormerError(f'{title} has no column {column!r}, but: {listed}')

    if image_column is None:
        image_column = _detect(features, datasets.Image, _IMAGE_COLUMNS)
        if image_column is None:
            raise SFormerError(f'no image column found in {title}: name one of {listed}')
    if label_column is None:
        label_column = _detect(features, datasets.ClassLabel, _LABEL_COLUMNS)
        if label_column is None and needs_labels:
            others = ', '.join(c for c in features if c != image_column)
            raise SFormerError(f'no label column found in {title}: ' + (
                f'name one of {others}' if others else f'its only column is {image_column}'))
        if label_column is not None and not needs_labels and not _is_class_index(features[label_column]):
            label_column = None  # nobody asked for it
    if label_column is not None and not _is_class_index(features[label_column]):
        raise SFormerError(f'column {label_column!r} of {title} holds no class indices: {features[label_column]}')
    return _Rows(image_column, label_column, next((c for c in _KEY_COLUMNS if c in features), None))


def _detect(features, kind: type, names: Sequence[str]) -> Optional[str]:
    """The only column of a type, else the first usual name (among the columns of that type, if there are any)."""
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(typed) == 1:
        return typed[0]
    candidates = typed or list(features)
    return next((column for name in names for column in candidates if column.lower() == name), None)


def _is_class_index(feature) -> bool:
    import datasets
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.lstrip('u').startswith('int')


# Helpers -------------------------------------------------------------------------------------------------------------


def _subfolders(folder: Path) -> List[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))


def _holds_images(folder: Path) -> bool:
    """Whether there are images in a folder itself."""
    extensions = get_img_extensions(as_set=True)
    return any(os.path.splitext(entry.name)[1].lower() in extensions for entry in os.scandir(folder))


def _image_files(folder: Path) -> List[str]:
    """Paths of all images below a folder, relative to it, sorted; none if there is no such folder."""
    extensions = get_img_extensions(as_set=True)
    paths = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith('.')]
        paths += [
            os.path.relpath(os.path.join(root, f), folder) for f in files
            if os.path.splitext(f)[1].lower() in extensions and not f.startswith('.')
        ]
    return sorted(paths, key=natural_key)


def _file_sample(path: Path) -> Tuple[str, int, str]:
    """Name, size, and hash of both ends of a file: a parquet file ends with its schema and the offsets of its data."""
    size = path.stat().st_size
    with open(path, 'rb') as f:
        ends = f.read(65536)
        f.seek(max(0, size - 65536))
        ends += f.read()
    return path.name, size, hashlib.sha256(ends).hexdigest()


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def lost_workers() -> Iterator[None]:
    """Say in one line that a loader worker is lost. torch's signal handler raises wherever the main thread is; where
    that is about to receive a batch, the connection breaks first.

    Raises:
        SFormerError: In the place of the `DataLoader`'s own error.
    """
    try:
        yield
    except (ConnectionError, EOFError) as e:
        raise SFormerError(f'a process that loads images died or hangs: {_one_line(e)}') from e
    except RuntimeError as e:
        if 'DataLoader' not in str(e):
            raise
        raise SFormerError(f'a process that loads images died or hangs: {_one_line(e)}') from e


def _one_line(error: BaseException) -> str:
    # `datasets` wraps what went wrong in errors that do not say it.
    if error.__cause__ is not None and type(error).__name__.startswith('DatasetGeneration'):
        error = error.__cause__
    return ' '.join(str(error).split()) or type(error).__name__


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


# Dead leaves ---------------------------------------------------------------------------------------------------------
#
# The numbers below fit photographs (CIFAR-10 at 32 pixels, ImageNet at 224): mean and contrast of images and their
# spread, saturation, correlation of the channels, gradients and power spectrum.
#
# Only operations that IEEE 754 defines to the last bit are used, and sums of integers: no exp, sin or matrix product,
# whose last bit depends on the machine.

_OVERSAMPLING = 2  # shapes are drawn finer and averaged, as a camera averages over a pixel
_MAX_LEAVES = 800


def dead_leaves(num_images: int, size: Tuple[int, int, int], seed: int = 0) -> Iterator[np.ndarray]:
    """Generate dead-leaves images: occluding discs, rectangles and triangles of radius density p(r) ~ r^-3.

    Image i depends on `seed` and i (and the size) alone, bit for bit on every machine. Lee, Mumford and Huang, IJCV
    2001; Baradad et al., arXiv 2106.05963.

    Args:
        num_images: Images to generate.
        size: (C, H, W) with C 1 (grey) or 3 (RGB).
        seed: Seed, 0 or more.

    Yields:
        uint8 images (H, W, C).

    Raises:
        SFormerError: C is neither 1 nor 3.
    """
    if size[0] not in _MODES:
        raise SFormerError(f'dead leaves are grey (1, H, W) or RGB (3, H, W), not {tuple(size)}')
    return (_dead_leaves_image(index, size, seed) for index in range(num_images))


def _dead_leaves_image(index: int, size: Tuple[int, int, int], seed: int) -> np.ndarray:
    channels, height, width = size
    rng = np.random.default_rng([seed, index])
    leaves = _draw_leaves(rng, height, width)
    ids = _stack_leaves(leaves, height, width)
    image = _develop(rng, _colour(rng, leaves, ids))
    if channels == 1:
        # ITU-R 601 luma in integers, as PIL converts to 'L'.
        rgb = image.astype(np.int32)
        luma = (rgb[..., 0] * 19595 + rgb[..., 1] * 38470 + rgb[..., 2] * 7471 + 0x8000) >> 16
        image = luma.astype(np.uint8)[..., None]
    return image


def _draw_radii(rng: np.random.Generator, num: int, r_min: float, r_max: float) -> np.ndarray:
    """Radii (num,) of density p(r) ~ r^-3 in [r_min, r_max], by inversion."""
    return 1 / np.sqrt(1 / (r_max * r_max) + rng.random(num) * (1 / (r_min * r_min) - 1 / (r_max * r_max)))


def _draw_leaves(rng: np.random.Generator, height: int, width: int) -> Dict[str, np.ndarray]:
    """Draw the leaves of an image, front to back, the last one being the background. Lengths are in pixels.

    Returns:
        (num_leaves,) arrays: radius `r` (circumscribed), centre `x`, `y`, direction `cos`, `sin`, aspect ratio `aspect`
        and `shape` (0 disc, 1 rectangle, 2 triangle).
    """
    short = min(height, width)
    nearness, cover, backdrops, axes = rng.random(4).tolist()
    # Details are finer in a distant scene than in a close-up, but pixels bound them.
    r_min = max(1.6, short * (1 / 40 + (1 / 8 - 1 / 40) * nearness * nearness * nearness))
    r = _draw_radii(rng, _MAX_LEAVES, r_min, max(r_min, float(short)))
    # Stop when the leaves would cover the image 0.3 to 2.5 times: the fewer, the emptier the scene.
    num = 1 + int(np.searchsorted(np.cumsum(r[:-1] * r[:-1]), (0.3 + 2.2 * cover) * height * width / 1.8))
    # Up to three large leaves at the back are the sky, the wall, the ground.
    r = np.concatenate([r[:num], short * (1 + rng.random(int(4 * backdrops)))])
    num = len(r)

    # Centres outside the image, too: otherwise the border would be emptier than the middle.
    x, y = rng.random((2, num)) * (np.array([[width], [height]]) + 2 * r) - r
    dx, dy = _normal(rng, 2, num)
    norm = np.sqrt(dx * dx + dy * dy) + 1e-9
    # Gravity and buildings: part of a scene is horizontal and vertical, to an extent that differs.
    upright = rng.random(num) < axes
    leaves = dict(
        r=r,
        x=x,
        y=y,
        cos=np.where(upright, dx > 0, dx / norm),
        sin=np.where(upright, dx <= 0, dy / norm),
        aspect=0.35 + 0.65 * rng.random(num),
        shape=rng.integers(0, 3, num),
    )
    background = dict(r=max(height, width) / 2, x=width / 2, y=height / 2, cos=1., sin=0., aspect=1., shape=0)
    return {key: np.append(value, background[key]) for key, value in leaves.items()}


def _stack_leaves(leaves: Dict[str, np.ndarray], height: int, width: int) -> np.ndarray:
    """Find the foremost leaf of each point, (oversampling * height, oversampling * width); the last covers the rest."""
    height, width = _OVERSAMPLING * height, _OVERSAMPLING * width
    background = len(leaves['r']) - 1
    ids = np.full((height, width), background, dtype=np.int32)
    xs = np.arange(width, dtype=np.float32) + np.float32(0.5)
    ys = np.arange(height, dtype=np.float32) + np.float32(0.5)
    geometry = [leaves[key][:background].tolist() for key in ('r', 'x', 'y', 'cos', 'sin', 'aspect', 'shape')]
    for i, (r, x, y, cos, sin, aspect, shape) in enumerate(zip(*geometry, strict=True)):
        r, x, y = _OVERSAMPLING * r, _OVERSAMPLING * x, _OVERSAMPLING * y
        x0, x1 = max(int(x - r), 0), min(int(x + r) + 1, width)
        y0, y1 = max(int(y - r), 0), min(int(y + r) + 1, height)
        if x0 >= x1 or y0 >= y1:
            continue
        dx = xs[x0:x1] - x
        dy = (ys[y0:y1] - y)[:, None]
        u = cos * dx + sin * dy  # along the leaf, and across it, stretched to an aspect ratio of one
        v = (cos / aspect) * dy - (sin / aspect) * dx
        if shape == 0:
            inside = u * u + v * v <= r * r
        elif shape == 1:
            inside = np.maximum(np.abs(u), np.abs(v)) <= r * 0.7071067811865476
        else:
            inside = (u >= -0.5 * r) & (u + 1.7320508075688772 * np.abs(v) <= r)
        box = ids[y0:y1, x0:x1]
        inside &= box == background
        box[inside] = i
    return ids


def _colour(rng: np.random.Generator, leaves: Dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Colour and shade the leaves, and average to pixels: linear float32 values (H, W, 3), about 0 to 1."""
    f = np.float32
    height, width = ids.shape[0] // _OVERSAMPLING, ids.shape[1] // _OVERSAMPLING
    num = len(leaves['r'])

    # A palette of 3 to 8 colours: luminance, and two smaller chroma coordinates, red - green and yellow - blue, which
    # correlate (warm against cold). A few images are grey.
    size = int(rng.integers(3, 9))
    of = rng.integers(0, size, num)
    saturation = 0.02 + 0.21 * rng.random()
    if rng.random() < 0.02:
        saturation = 0.
    jitter, palette, cast = _normal(rng, 3, num), _normal(rng, 2, size), _normal(rng, 2) * 0.45
    luminance = 0.46 + 0.2 * ((2 * rng.random(size) - 1)[of] * 1.7320508075688772 + 0.3 * jitter[0])
    warm = saturation * (cast[0] + palette[0][of] + 0.25 * jitter[1])
    other = saturation * (cast[1] + palette[1][of] + 0.25 * jitter[2])
    red_green = 0.01 + 0.8 * warm
    yellow_blue = 0.04 + 0.95 * (0.55 * warm + 0.835 * other)
    yellow = luminance + yellow_blue / 3  # so that the luminance is the mean of R, G and B
    colours = np.stack([yellow + red_green / 2, yellow - red_green / 2, yellow - yellow_blue], axis=1)

    # Shading: every leaf has a gradient, the light a direction (mostly from above), every leaf some of the texture.
    slope_x, slope_y = _normal(rng, 2, num) * 0.12 / leaves['r']
    offset = -(slope_x * leaves['x'] + slope_y * leaves['y'])
    light_x, light_y = (_normal(rng, 2) * 0.08 - np.array([0., 0.05])).tolist()
    roughness = rng.random(num)
    roughness = (0.15 * roughness * roughness).astype(f)
    texture = _texture(rng, height, width)
    xs = (np.arange(ids.shape[1], dtype=f) + f(0.5)) / f(_OVERSAMPLING)
    ys = (np.arange(ids.shape[0], dtype=f) + f(0.5))[:, None] / f(_OVERSAMPLING)
    shade = (slope_x.astype(f)[ids] + f(2 * light_x / width)) * xs
    shade += (slope_y.astype(f)[ids] + f(2 * light_y / height)) * ys
    shade += (offset.astype(f) - f(light_x + light_y))[ids]
    shade += roughness[ids] * texture.repeat(_OVERSAMPLING, axis=0).repeat(_OVERSAMPLING, axis=1)

    image = colours.astype(f)[ids]
    image += shade[..., None]
    image = image[0::2] + image[1::2]
    return (image[:, 0::2] + image[:, 1::2]) * f(0.25)


def _develop(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blur, expose and quantise linear values (H, W, 3) to a uint8 image, as a camera does."""
    f = np.float32
    image = image + f(0.8 * rng.random()) * (_blur(image) - image)

    # Exposure: mean and contrast as photographs have them. One set of images in five spreads twice as much, for dark,
    # bright, flat and harsh ones. Sums are over integers, because the order of a float sum depends on the machine.
    deviation = _normal(rng, 2) * (2. if rng.random() < 0.2 else 1.)
    mean, contrast = 0.46 + 0.105 * float(deviation[0]), max(0.05, 0.2 + 0.065 * float(deviation[1]))
    luminance = (image[..., 0] + image[..., 1] + image[..., 2]) * f(1 / 3)
    levels = (luminance * f(4096)).astype(np.int64)
    mean_now = int(levels.sum()) / levels.size / 4096
    contrast_now = math.sqrt(max(int((levels * levels).sum()) / levels.size / 4096 ** 2 - mean_now * mean_now, 0.))
    gain = min(contrast / max(contrast_now, 1e-3), 3.)
    image += (luminance * f(gain - 1) + f(mean - gain * mean_now))[..., None]
    image += (rng.random(image.shape[:2], dtype=f) - f(0.5))[..., None] * f(0.035 * rng.random())

    # A film curve: straight in the middle, with shoulders instead of clipped shadows and lights.
    image = (image - f(0.5)) * f(1.05)
    power = image * image * f(4)
    power *= power
    image = image / np.sqrt(np.sqrt(power + f(1))) * f(1.04) + f(0.5)
    return np.clip(image * f(255) + f(0.5), 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise over several octaves (H, W), float32: its amplitude falls slowly with frequency, as that of photographs."""
    f = np.float32
    octaves = max(2, min(6, min(height, width).bit_length() - 2))
    step = 1 << (octaves - 1)
    noise = rng.random((-(-height // step) + 1, -(-width // step) + 1), dtype=f) - f(0.5)
    amplitude = 1.
    for _ in range(octaves - 1):
        amplitude *= 0.85
        noise = _blur(noise.repeat(2, axis=0).repeat(2, axis=1))
        noise += (rng.random(noise.shape, dtype=f) - f(0.5)) * f(amplitude)
    return noise[:height, :width] * f(3)


def _blur(image: np.ndarray) -> np.ndarray:
    """Binomial filter (1, 2, 1) / 4 along both axes of (H, W, ...)."""
    f = np.float32
    padded = np.concatenate([image[:1], image, image[-1:]])
    image = (padded[:-2] + padded[2:]) * f(0.25) + image * f(0.5)
    padded = np.concatenate([image[:, :1], image, image[:, -1:]], axis=1)
    return (padded[:, :-2] + padded[:, 2:]) * f(0.25) + image * f(0.5)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Nearly normal numbers of unit variance, as sums of four uniform ones: exact arithmetic, and no far outliers."""
    u = rng.random((4, *shape))
    return (u[0] + u[1] + u[2] + u[3] - 2) * 1.7320508075688772
