"""Batches of images, for one process or for one of many, read by worker processes or not."""
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..errors import SFormerError, UnreadableImageError
from ..files import Json
from .origins import Origin, TableStream
from .preprocessing import Preprocessor, Read, one_line

__all__ = ['Batch', 'ImageData', 'ChosenImages', 'Plan', 'Stream', 'lost_workers', 'readers_of_shard']


@dataclass
class Batch:
    """Some images of one chunk.

    Args:
        chunk: Shard, and number of the chunk in its shard. Data that are not streamed are one shard, 0.
        start: Position of the first image in the shard.
        num: Images that were read, delivered or not.
        images: Normalised float32 images (B, C, H, W), one tensor per preprocessing; none if B is 0.
        labels: Accepted classes (B, L), int64; -1 fills up.
        skipped: Images without a label in this benchmark.
        bad: Names of unreadable images and what is wrong with them.
        ends_chunk: Whether this is the last batch of its chunk.
        ends_shard: Whether this is the last batch of its shard.
        decode_seconds: Time of the process that read and decoded the images.
        preprocess_seconds: Time of that process for resizing, cropping and normalising.
    """
    chunk: tuple[int, int]
    start: int
    num: int
    images: list[torch.Tensor]
    labels: torch.Tensor
    skipped: int = 0
    bad: list[str] = field(default_factory=list)
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
    done: set[tuple[int, int]] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)


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
        dataset: What is delivered: the chosen images of an origin, or a stream.
        revision: Commit of a data set on the Hub.
        num_shards: Shards of a stream, else 1.
        image_column: Column of the images, None where there are no columns.
        label_column: Column of the labels, None where there are none.
        passed_over: Paths, relative to a folder of images, of what is in it and is no image with a label: other files,
            hidden ones, images beside class folders; sorted.
    """
    name: str
    split: str | None
    num_images: int | None
    fingerprint: str | None
    class_names: list[str] | None
    dataset: 'ChosenImages | Stream' = field(repr=False, compare=False)
    revision: str | None = None
    num_shards: int = 1
    image_column: str | None = None
    label_column: str | None = None
    passed_over: list[str] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        if self.num_images is None:
            raise TypeError(f'{self.name!r} is streamed and does not say how many images it has')
        return self.num_images

    @property
    def streamed(self) -> bool:
        return isinstance(self.dataset, Stream)

    def label_with(self, labels: Callable[[int, str | None], Sequence[int]]) -> None:
        """Have batches deliver other labels than those of the data.

        Args:
            labels: From the label of an image and its key (its file name, where it has one) to the classes that count
                as right; none to skip the image.
        """
        self.dataset.preprocessor.labels = labels

    def batches(
            self,
            batch_size: int,
            workers: int = 0,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Deliver all images once, in order. At most a few batches per worker are in memory.

        Args:
            batch_size: Images per batch; the last batch (of each shard of a stream) may be smaller.
            workers: Worker processes, 0 to read in this one. A stream, whose order several would change, has one.

        Yields:
            Normalised float32 images (B, C, H, W), and int64 labels (B,) or None.

        Raises:
            SFormerError: An image cannot be read, or has no label although labels are needed; a worker died.
        """
        plan = Plan(batch_size, batch_size, workers=min(workers, 1) if self.streamed else workers)
        for batch in self.planned(plan):
            if batch.bad:
                raise UnreadableImageError(batch.bad[0])
            if batch.images:
                yield batch.images[0], batch.labels[:, 0] if self.dataset.origin.labelled else None

    def planned(self, plan: Plan, timeout: float = 0., pin_memory: bool = False) -> Iterator[Batch]:
        """Deliver the chunks of one rank that are not done, each image once.

        Args:
            plan: Who takes what.
            timeout: Seconds after which a worker that delivers nothing is given up; 0 waits for ever.
            pin_memory: Whether to deliver in page-locked memory.

        Raises:
            SFormerError: A worker died or hangs; an image has no label.
        """
        if isinstance(self.dataset, Stream):
            sampler, workers = None, plan.workers
        else:
            sampler = _pieces(len(self), plan)
            workers = min(plan.workers, len(sampler))  # more would only cost memory
        loader = DataLoader(
            self.dataset.planned(plan),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),  # else the loader advances the user's global generator
        )
        with lost_workers():
            for batch in _watched(iter(loader), timeout):
                if isinstance(batch, SFormerError):
                    raise batch
                yield batch


class Piece(NamedTuple):
    """A batch to be: images `start` to `stop` of a chunk."""
    chunk: tuple[int, int]
    start: int
    stop: int
    ends_chunk: bool
    ends_shard: bool


def _pieces(num_images: int, plan: Plan) -> list[Piece]:
    """The batches of a rank that are not done."""
    num_chunks = -(-num_images // plan.chunk_size)
    todo = [c for c in range(num_chunks) if (0, c) not in plan.done]
    pieces = []
    for c in todo[plan.rank::plan.world_size]:
        end = min(num_images, (c + 1) * plan.chunk_size)
        for start in range(c * plan.chunk_size, end, plan.batch_size):
            stop = min(end, start + plan.batch_size)
            pieces.append(Piece(
                chunk=(0, c), start=start, stop=stop, ends_chunk=stop == end, ends_shard=stop == num_images))
    return pieces


class ChosenImages(Dataset):
    """The chosen images of an origin by whole batches, so that one worker makes one batch."""

    def __init__(self, origin: Origin, indices: np.ndarray, preprocessor: Preprocessor):
        self.origin = origin
        self.indices = indices
        self.preprocessor = preprocessor

    def planned(self, plan: Plan) -> 'ChosenImages':
        return self  # the sampler knows the plan

    def __getitem__(self, piece: Piece) -> Batch | SFormerError:
        chosen = self.indices[piece.start:piece.stop].tolist()
        reads = [(partial(self.origin.read, i), self.origin.describe(i)) for i in chosen]
        return _make_batch(self.preprocessor, reads, piece.chunk, piece.start, piece.ends_chunk, piece.ends_shard)


class Stream(IterableDataset):
    """The chunks of a stream that are for one rank and one worker of it.

    A reader takes whole shards and reads nothing else. Shards that are left over when all readers have the same number
    are read by several, each of which decodes chunks of its own. So every chunk has exactly one reader:
    `datasets.split_dataset_by_node` would do the same, but with batches, and so last bits of logits, that depend on
    the number of processes.
    """

    def __init__(self, origin: TableStream, preprocessor: Preprocessor, plan: Plan | None = None):
        self.origin = origin
        self.preprocessor = preprocessor
        self.plan = plan

    def planned(self, plan: Plan) -> 'Stream':
        return Stream(self.origin, self.preprocessor, plan)

    def __iter__(self) -> Iterator[Batch | SFormerError]:
        plan, num_shards = self.plan, self.origin.num_shards
        assert plan is not None  # `planned` gave it
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = plan.rank * workers + worker
        for shard in range(num_shards):
            team = readers_of_shard(shard, num_shards, plan.world_size * workers)
            if shard in plan.finished or reader not in team:
                continue
            try:
                yield from self._batches(shard, team.index(reader), len(team))
            except Exception as e:  # the network, or a damaged file
                what = self.origin.describe_shard(shard)
                yield SFormerError(f'cannot read {what} of {self.preprocessor.title}: {one_line(e)}')
                return

    def _batches(self, shard: int, place: int, team_size: int) -> Iterator[Batch | SFormerError]:
        """Batches of a reader's chunks of a shard; reads one row ahead to know which one is the last."""
        plan = self.plan
        assert plan is not None

        def place_of(item: tuple[int, Json]) -> tuple[int, int]:
            chunk, position = divmod(item[0], plan.chunk_size)
            return chunk, position // plan.batch_size

        def make(chunk: int, rows: list[tuple[int, Json]], last: bool) -> Batch | SFormerError:
            reads = [(partial(self.origin.read, row), f'image {i} of shard {shard}') for i, row in rows]
            ends_chunk = last or (rows[-1][0] + 1) % plan.chunk_size == 0
            return _make_batch(
                self.preprocessor, reads, (shard, chunk), rows[0][0], ends_chunk, ends_shard=last)

        waiting = None
        for (chunk, _), rows in itertools.groupby(enumerate(self.origin.shard(shard)), key=place_of):
            if waiting:
                yield make(*waiting, last=False)
            mine = chunk % team_size == place and (shard, chunk) not in plan.done
            waiting = (chunk, list(rows)) if mine else None
        if waiting:
            yield make(*waiting, last=True)


def readers_of_shard(shard: int, num_shards: int, num_readers: int) -> list[int]:
    """Who reads a shard: one reader, or those who share one of the shards that are left over. The i-th of them takes
    chunks i, i + n, i + 2n, ... of it."""
    shared = num_shards % num_readers
    if shard < num_shards - shared:
        return [shard % num_readers]
    return list(range(shard - num_shards + shared, num_readers, shared))


def _make_batch(
        preprocessor: Preprocessor,
        reads: Sequence[tuple[Read, str]],
        chunk: tuple[int, int],
        start: int,
        ends_chunk: bool,
        ends_shard: bool,
) -> Batch | SFormerError:
    """Read images; returns a `Batch`, or an error that is not about one image."""
    times = [0., 0.]
    tensors: list[list[torch.Tensor]] = []
    labels: list[list[int]] = []
    bad, skipped = [], 0
    for read, what in reads:
        sample = preprocessor.prepare(read, what, times)
        if isinstance(sample, UnreadableImageError):
            bad.append(str(sample))
        elif isinstance(sample, SFormerError):
            return sample
        elif sample is None:
            skipped += 1
        else:
            tensors.append(sample[0])
            labels.append(list(sample[1] or [-1]))
    width = max(map(len, labels), default=1)
    filled = [y + [-1] * (width - len(y)) for y in labels]
    images = [torch.stack(x) for x in zip(*tensors, strict=True)]
    accepted = torch.tensor(filled, dtype=torch.int64).reshape(len(labels), width)
    if get_worker_info() is not None:
        try:
            for tensor in (*images, accepted):
                tensor.share_memory_()  # as is done later anyway, by a thread whose errors nobody hears
        except RuntimeError as e:
            return SFormerError(
                f'a process that loads images has no room in shared memory (/dev/shm): {one_line(e)}. Choose a smaller '
                f'--batch-size or fewer --workers, or have more of it (docker run --shm-size).')
    return Batch(
        chunk, start, len(reads), images, accepted, skipped, bad, ends_chunk, ends_shard, decode_seconds=times[0],
        preprocess_seconds=times[1])


def _watched(batches: Any, timeout: float) -> Iterator[Batch | SFormerError]:
    """Deliver what the iterator of a `DataLoader` does; kill its workers if nothing comes for `timeout` seconds (0: for
    ever).

    The loader's own timeout does not help where a worker is stopped, or hangs in a call of the kernel: the loader waits
    for the memory of a batch without one and, when it ends, for a process that takes no signal.
    """
    workers = getattr(batches, '_workers', [])
    late = threading.Event()

    def give_up() -> None:
        late.set()
        for worker in workers:
            worker.kill()

    try:
        try:
            while True:
                with _timer(timeout if workers else 0, give_up):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
        finally:
            if workers:
                batches._shutdown_workers()
    except (RuntimeError, OSError, EOFError) as e:  # at the end, too, where torch's handler tells of workers it missed
        if late.is_set():
            raise SFormerError(f'a process that loads images died or hangs: no batch came for {timeout:g} s') from e
        raise
    finally:
        for worker in workers:
            worker.kill()


@contextlib.contextmanager
def _timer(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call something if the block takes longer than so many seconds; 0 is never."""
    if not seconds:
        yield
        return
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
        raise SFormerError(f'a process that loads images died or hangs: {one_line(e)}') from e
    except RuntimeError as e:
        if 'DataLoader' not in str(e):
            raise
        raise SFormerError(f'a process that loads images died or hangs: {one_line(e)}') from e
