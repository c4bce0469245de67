"""The evaluation loop: chunks of images through networks, to one record of counts per chunk."""
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ..data import Batch, ImageData, Plan, lost_workers
from ..errors import SFormerError
from .activity import Activity
from .figures import CLASSIFICATION
from .journal import ChunkRecord, Journal
from .launch import Group
from .metrics import Scored
from .networks import Network, Subject, device_of
from .schema import Score
from .settings import AMP_DTYPES, EvaluationConfig

__all__ = ['Loop']


class Loop:
    """One process's share of an evaluation.

    Args:
        images: Labelled images.
        plan: Which of them this process takes.
        networks: What runs on each batch.
        subjects: Whose logits are scored.
        config: Precision, memory and errors.
        group: Processes of this run.
        journal: Where to record finished chunks.
    """

    def __init__(self, images: ImageData, plan: Plan, networks: Sequence[Network], subjects: Sequence[Subject],
                 config: EvaluationConfig, group: Group, journal: Journal | None = None):
        self.images = images
        self.plan = plan
        self.group = group
        self.config = config
        self.networks = networks
        self.subjects = subjects
        self.journal = journal
        # of a stream, nobody knows which images come first: the first ones of each shard
        self.activity_images = -(-config.activity_images // images.num_shards)
        self.batch_size = plan.batch_size
        self.device = device_of(networks[0].model)
        self.wall = self.wait = 0.
        self.done = 0
        self.seen = self.hits = self.num_bad = 0
        self.bad: str | None = None  # the last image that could not be read

    def already(self, records: list[ChunkRecord]) -> None:
        """Take over what earlier runs counted."""
        self.done = sum(r['num'] for r in records)
        if records and self.group.is_main:
            print(f'resuming after {self.done} of {self.images.num_images or "?"} images', file=sys.stderr)
            self.seen = self.done
            self.hits = sum(sum(r['networks'][0]['top1']) for r in records)
            self.num_bad = sum(len(r['bad']) for r in records)

    def run(self) -> list[ChunkRecord]:
        """Records of the chunks of this process.

        Raises:
            SFormerError: If images cannot be read or do not fit into memory, or logits or labels are out of range.
        """
        begin = time.perf_counter()
        records: list[ChunkRecord] = []
        chunks: dict[tuple[int, int], _Chunk] = {}  # workers deliver chunks in turns
        with _bar(self.group.is_main, self.images.num_images, self.done) as bar, lost_workers():
            for batch in self._batches():
                chunk = chunks.setdefault(batch.chunk, _Chunk(batch.chunk, len(self.networks), self.subjects))
                self.num_bad += len(batch.bad)
                self.bad = batch.bad[-1] if batch.bad else self.bad
                self._check_bad(self.num_bad)
                if len(batch.labels):
                    self._forward(batch, chunk)
                chunk.add(batch)
                self.seen += batch.num
                self.hits += chunk.last_hits
                seen, hits, num_bad = self.group.tick(self.seen, self.hits, self.num_bad)
                self._check_bad(num_bad)
                bar(seen, hits)
                if batch.ends_chunk:
                    record = chunks.pop(batch.chunk).record(self.group.world_size)
                    records.append(record)
                    if self.journal is not None:
                        self.journal.add(record)
        self.wall = time.perf_counter() - begin
        return records

    def _batches(self) -> Iterator[Batch]:
        batches = self.images.planned(self.plan, self.config.timeout, pin_memory=self.device.type == 'cuda')
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _check_bad(self, number: int) -> None:
        limit = self.config.max_bad
        if number > limit and self.bad is not None:  # a rank that can name one says so
            raise SFormerError(self.bad + (f' (--max-bad {limit} is exceeded)' if limit else ''))

    def _forward(self, batch: Batch, chunk: '_Chunk') -> None:
        """Networks on a batch, once each; then what each subject makes of their logits."""
        counting = batch.start < self.activity_images
        inputs: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        logits = []
        for i, network in enumerate(self.networks):
            dtype = next((p.dtype for p in network.model.parameters()), torch.float32)
            key = network.transform, dtype
            if key not in inputs:
                inputs[key] = batch.images[network.transform].to(self.device, dtype, non_blocking=True)
            start = time.perf_counter()
            logits.append(self._logits(network, inputs[key], chunk.activity.get(i) if counting else None))
            chunk.seconds[i] += time.perf_counter() - start
        if counting:
            chunk.activity_images += len(batch.labels)
        for i, subject in enumerate(self.subjects):
            labels = self._labels(subject, batch.labels, logits[subject.network])
            mine = self._compared(subject, logits[subject.network], batch)
            expected = None
            if subject.source is not None:
                expected = self._compared(subject, logits[subject.source], batch)
                chunk.score(subject.source, i).add(Scored(expected, labels))
            chunk.score(subject.network, i).add(Scored(mine, labels, expected))

    def _logits(self, network: Network, x: torch.Tensor, activity: Activity | None) -> torch.Tensor:
        """float32 logits (B, C) on the CPU; halves batches that do not fit into memory, if it may. Counts spikes."""
        amp = self.config.amp
        while True:
            attempt = Activity()  # layers before the one that did not fit are not to be counted twice
            try:
                with torch.autocast(self.device.type, AMP_DTYPES[amp]) if amp else contextlib.nullcontext(), \
                        attempt.observe(network.model) if activity is not None else contextlib.nullcontext():
                    out = [network(part, eager=activity is not None) for part in x.split(self.batch_size)]
                if activity is not None:
                    activity.add(attempt)
                return torch.cat([o.float().cpu() for o in out])
            except RuntimeError as e:
                from accelerate.utils.memory import should_reduce_batch_size
                if not should_reduce_batch_size(e):
                    raise
                size = min(self.batch_size, len(x))
                if not self.config.retry or size == 1:
                    hint = 'even one image does not fit' if size == 1 else 'choose a smaller --batch-size, or --retry'
                    raise SFormerError(f'out of memory with batches of {size}: {hint}.') from e
            self.batch_size = size // 2
            print(f'out of memory: batches of {self.batch_size} from now on', file=sys.stderr)
            if self.device.type != 'cpu':
                torch.accelerator.empty_cache()

    def _labels(self, subject: Subject, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        name, label_map = self.images.name, subject.benchmark.label_map
        classes = logits.shape[1] if label_map is None else len(label_map)
        if labels.max() >= classes:
            raise SFormerError(
                f'{name} has label {int(labels.max())}, the model has {classes} classes: '
                f'this is not the data set that it was trained for.')
        return labels if label_map is None else torch.tensor(label_map)[labels]

    def _compared(self, subject: Subject, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        if not torch.isfinite(logits).all():
            shard = f' of shard {batch.chunk[0]}' if self.images.num_shards > 1 else ''
            raise SFormerError(
                f'NaN or infinite logits on images {batch.start} to {batch.start + batch.num - 1}{shard} of '
                f'{self.images.name}.')
        classes = subject.benchmark.classes
        return logits if classes is None else logits[:, classes]


class _Chunk:
    """Counts of a chunk that is under way."""

    def __init__(self, chunk: tuple[int, int], num_networks: int, subjects: Sequence[Subject]):
        self.chunk, self.subjects = chunk, subjects
        # a source that subjects share may be scored on the classes of each
        self.scores: list[dict[int, Score]] = [{} for _ in range(num_networks)]
        self.activity = {s.network: Activity() for s in subjects if s.spiking}
        self.seconds = [0.] * num_networks
        self.num = self.count = self.skipped = self.activity_images = 0
        self.bad: list[str] = []
        self.ends_shard = False
        self.decode = self.preprocess = 0.
        self.last_hits = 0
        self._hits = 0

    def score(self, network: int, subject: int) -> Score:
        """What a network scores as one of a subject."""
        return self.scores[network].setdefault(subject, CLASSIFICATION.score())

    def add(self, batch: Batch) -> None:
        """Count what was delivered; the scores of the batch have been added."""
        self.num += batch.num
        self.count += len(batch.labels)
        self.skipped += batch.skipped
        self.bad += batch.bad
        self.ends_shard |= batch.ends_shard
        self.decode += batch.decode_seconds
        self.preprocess += batch.preprocess_seconds
        hits = sum(self.score(0, 0).values['top1'] or ())
        self.last_hits, self._hits = hits - self._hits, hits

    def record(self, world_size: int) -> ChunkRecord:
        """All counts."""
        activity = [self.activity[s.network].counts if s.spiking else None for s in self.subjects]
        return ChunkRecord(
            chunk=list(self.chunk), num=self.num, count=self.count, skipped=self.skipped, bad=self.bad,
            ends_shard=self.ends_shard,
            networks=[self.score(s.network, i).record() for i, s in enumerate(self.subjects)],
            sources=[None if s.source is None else self.score(s.source, i).record()
                     for i, s in enumerate(self.subjects)],
            activity=activity if any(activity) else None, activity_images=self.activity_images,
            seconds=[self.seconds[s.network] for s in self.subjects],
            source_seconds=[None if s.source is None else self.seconds[s.source] for s in self.subjects],
            decode=self.decode, preprocess=self.preprocess, world_size=world_size)


@contextlib.contextmanager
def _bar(shown: bool, total: int | None, done: int) -> Iterator[Callable[[int, int], None]]:
    """A function that takes images and hits of all processes and shows them, with the rate, if stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda seen, hits: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[rate]}'),
               TextColumn('{task.fields[accuracy]}'), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task('Evaluating', total=total, completed=done, rate='', accuracy='')
        begin = time.monotonic()

        def step(seen: int, hits: int) -> None:
            if seen:
                progress.update(
                    task, completed=seen, rate=f'{(seen - done) / (time.monotonic() - begin):.1f} images/s',
                    accuracy=f'top-1 {100 * hits / seen:.2f} %')
        yield step
