"""The evaluation loop: chunks of images through networks, counts to a journal, counts of all processes to results."""
import contextlib
import copy
import math
import sys
import time
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..benchmarks import Benchmark, resolve_benchmark
from ..checkpoints import state_hash
from ..data import Batch, ImageData, Plan, lost_workers, open_images
from ..distributed import Group
from ..errors import SFormerError, UncalibratedError
from ..layers import is_calibrated, named_neurons, source_of, uncalibrated
from ..utils import check_preprocessing, library_versions
from .firing import FiringRates
from .journal import Journal
from .metrics import ChunkScore, PairScore, summarize, summarize_pair

__all__ = ['evaluate', 'evaluate_all']

AMP_DTYPES = {
    'bfloat16': torch.bfloat16, 'bf16': torch.bfloat16, 'float16': torch.float16, 'fp16': torch.float16,
    'half': torch.float16,
}


def evaluate(
        model: nn.Module,
        dataset: str,
        split: Optional[str] = None,
        *,
        source: Union[bool, nn.Module] = True,
        **options: Any,
) -> Dict[str, Any]:
    """Evaluate a classifier on a labelled dataset, an SFormer side by side with its source.

    Under torchrun, every process calls this and all get the same result, whose counts are those of one process.

    Args:
        model: SFormer or any timm classifier.
        dataset: `digits`, a folder of parquet files, of WebDataset archives or of images, or a Hugging Face dataset id.
        split: Split of the dataset.
        source: Source network to compare with; True takes the weights of the SFormer with its neurons bypassed,
            False compares with nothing.
        **options: As for `evaluate_all`.

    Returns:
        Percentages `top1`, `top5`, expected calibration error `ece` [%], negative log-likelihood `nll` [nats]; the same
        of the source as `source_top1` ...; `agreement` (equal predictions, in percent), `relative_logit_error` (norm of
        the difference over norm of the source's logits); `firing_rate` in [0, 1] and `firing_rates` per site;
        `seconds` of the model alone, averaged over processes, and `images_per_second` of all of them together; what was
        measured, and how.

    Raises:
        UncalibratedError: If an SFormer has default thresholds.
        SFormerError: If the dataset can't be used, its labels do not fit the model, or logits are NaN.
    """
    return evaluate_all([model], dataset, split, sources=[source], **options)[0]


@torch.inference_mode()
def evaluate_all(
        models: Sequence[nn.Module],
        dataset: str,
        split: Optional[str] = None,
        *,
        sources: Union[bool, Sequence[Union[bool, nn.Module]]] = True,
        num_images: Optional[int] = None,
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
        firing_images: int = 512,
        image_column: Optional[str] = None,
        label_column: Optional[str] = None,
        streaming: bool = False,
        benchmark: Optional[str] = None,
        img_size: Optional[int] = None,
        crop_pct: Optional[float] = None,
        interpolation: Optional[str] = None,
        amp: Optional[str] = None,
        channels_last: bool = False,
        torchcompile: bool = False,
        retry: bool = False,
        max_bad: int = 0,
        device: Union[str, torch.device, None] = None,
        timeout: float = 600.,
        group: Optional[Group] = None,
        journal: Optional[Journal] = None,
) -> List[Dict[str, Any]]:
    """Evaluate several classifiers in one pass over the images, each of which is decoded once.

    Args:
        models: SFormers or other timm classifiers.
        dataset: As for `evaluate`.
        split: Split of the dataset.
        sources: As `source` of `evaluate`, for all or for each of the models. SFormers with the same source weights
            share one evaluation of their source.
        num_images: Size of a random subset (of a stream: the first ones); all images if None.
        batch_size: Images per batch and process.
        workers: Processes per process that decode images.
        seed: Seed of the subset.
        firing_images: Firing rates are counted on the first this many images, in whole batches.
        image_column: Name of the image column, if it can't be detected.
        label_column: Name of the label column, if it can't be detected.
        streaming: Read shards as they are needed, without a copy on disk.
        benchmark: One of `sformer.benchmarks.BENCHMARKS`; None for the dataset's own labels.
        img_size: Height and width of the input; position embeddings are resampled by timm.
        crop_pct: Centre crop, instead of the model's own.
        interpolation: Resize method, instead of the model's own.
        amp: Mixed precision: `bfloat16` or `float16`.
        channels_last: Use the channels-last memory format.
        torchcompile: Compile networks.
        retry: Halve batches that do not fit into memory.
        max_bad: Unreadable images that are left out, with their names in the result, before it is an error.
        device: Device to move the models to; where they are if None (one process), else one device per process.
        timeout: Seconds after which a rank or a worker that gives no sign of life is lost.
        group: Processes of this run; those of the launcher if None.
        journal: Where to record finished chunks.

    Returns:
        One result per model, as `evaluate` has it.

    Raises:
        UncalibratedError: If an SFormer has default thresholds.
        SFormerError: If the dataset can't be used, its labels do not fit a model, logits are NaN, or images were lost.
    """
    if group is None:
        arguments = {key: value for key, value in locals().items() if key != 'group'}
        with Group(device, timeout=timeout).guard() as group:
            return evaluate_all(**arguments, group=group)
    group.begin()
    if amp is not None and amp not in AMP_DTYPES:
        raise SFormerError(f'mixed precision is bfloat16 or float16, not {amp!r}.')
    if max_bad < 0 or batch_size < 1 or workers < 0:
        raise SFormerError('batch_size must be 1 or more, max_bad and workers 0 or more.')
    for model in models:
        _check_model(model)
    hashes = [state_hash(model.state_dict()) for model in models]
    if isinstance(sources, bool):
        sources = [sources] * len(models)
    target = torch.device(device) if device is not None else group.device if group.world_size > 1 else None
    models = [_prepare(model, img_size, target, channels_last) for model in models]
    sources = [s if isinstance(s, bool) else _prepare(s, img_size, target, channels_last) for s in sources]
    configs = [_data_config(model, img_size, crop_pct, interpolation) for model in models]
    distinct = [c for i, c in enumerate(configs) if c not in configs[:i]]
    images = open_images(
        dataset, split, data_config=distinct, num_images=num_images, seed=seed, image_column=image_column,
        label_column=label_column, needs_labels=True, streaming=streaming)
    benchmarks = [resolve_benchmark(benchmark, model, dataset, images.class_names) for model in models]
    if (labels := benchmarks[0].labels) is not None:
        images.label_with(labels)
    subjects, networks = _networks(models, sources, configs, distinct, benchmarks, torchcompile)

    size = images.num_images
    # fine enough to share and to resume, coarse enough that records stay small
    chunk_size = batch_size * math.ceil(min(4096, max(64, (size or 0) / 1024)) / batch_size)
    plan = Plan(batch_size, chunk_size, group.rank, group.world_size, workers)
    from importlib import metadata
    key = dict(
        models=hashes, sources=[s if isinstance(s, bool) else state_hash(s.state_dict()) for s in sources],
        dataset=images.fingerprint, split=images.split, benchmark=benchmarks[0].name, num_images=size,
        batch_size=batch_size, num_shards=images.num_shards, streaming=streaming, firing_images=firing_images,
        preprocessing=repr(configs), amp=amp, device=_device_of(models[0]).type, torchcompile=torchcompile,
        torch=metadata.version('torch'), timm=metadata.version('timm'))
    different = sorted({k for other in group.gather(key, 'key') for k in key if other[k] != key[k]})
    if different:
        raise SFormerError(f'the processes do not evaluate the same ({", ".join(different)} differ): every node needs '
                           f'the same models, images and options.')
    done: List[Dict[str, Any]] = []
    if journal is not None:
        done = journal.open(key, group)
        plan.done = {(r['chunk'][0], r['chunk'][1]) for r in done}
        plan.finished = _finished(done)
    run = _Run(images, plan, group, networks, subjects, journal, amp, retry, max_bad, firing_images, timeout)
    run.already(done)
    records = run.run()
    shared = group.gather(dict(records=records, batch_size=run.batch_size, wall=run.wall, wait=run.wait,
                               memory=_peak_memory(_device_of(models[0]))), 'records')
    records = sorted([*done, *(r for s in shared for r in s['records'])], key=lambda r: r['chunk'])
    _check_complete(records, images, max_bad)

    common = dict(
        batch_size=min(s['batch_size'] for s in shared), seed=seed, workers=workers, world_size=group.world_size,
        streaming=streaming, device=_device_name(_device_of(models[0])), amp=amp, torchcompile=torchcompile,
        channels_last=channels_last, versions=library_versions(),
        wall_seconds=round(max(s['wall'] for s in shared), 3),
        wait_seconds=round(sum(s['wait'] for s in shared) / group.world_size, 3),
        **{key: max(s['memory'][key] for s in shared) for key in shared[0]['memory']})
    return [
        dict(_result(subject, images, records), weights_sha256=digest, **common)
        for subject, digest in zip(subjects, hashes, strict=True)]


# Preparation ---------------------------------------------------------------------------------------------------------


@dataclass
class _Network:
    """Something that maps images to logits. Several subjects may share one."""
    model: nn.Module
    transform: int
    compiled: Optional[Any] = None
    bypass: bool = False

    def __call__(self, x: torch.Tensor, eager: bool = False) -> torch.Tensor:
        if self.compiled is not None and not eager:
            return self.compiled(x)
        with bypass_neurons(self.model) if self.bypass else contextlib.nullcontext():
            return self.model(x)


@dataclass
class _Subject:
    """A model whose result is wanted: indices of networks, and how it is scored."""
    model: nn.Module
    network: int
    source: Optional[int]
    benchmark: Benchmark
    spiking: bool
    index: int
    data_config: Dict[str, Any]


def _check_model(model: nn.Module) -> None:
    if any(True for _ in named_neurons(model)) and not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; its accuracy would mean nothing. Use sformer.convert().')
    if not getattr(model, 'num_classes', 1):
        raise SFormerError('the model has no classes to predict (num_classes=0).')


@torch.inference_mode(False)  # parameters that are made in inference mode could not be trained afterwards
def _prepare(
        model: nn.Module,
        img_size: Optional[int],
        device: Optional[torch.device],
        channels_last: bool,
) -> nn.Module:
    if img_size is not None or channels_last:
        model = copy.deepcopy(model)
    if img_size is not None:
        try:
            model.set_input_size(img_size=(img_size, img_size))
        except (AttributeError, AssertionError, ValueError, RuntimeError) as e:
            raise SFormerError(f'the model can not take images of {img_size} pixels: {e}') from e
    if device is not None:
        model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _data_config(
        model: nn.Module,
        img_size: Optional[int],
        crop_pct: Optional[float],
        interpolation: Optional[str],
) -> Dict[str, Any]:
    """Preprocessing of a model as timm resolves it, with the user's overrides."""
    check_preprocessing(dict(crop_pct=crop_pct, interpolation=interpolation))
    try:
        return resolve_input_data_config(
            model, args=dict(img_size=img_size, crop_pct=crop_pct, interpolation=interpolation))
    except (ValueError, AssertionError) as e:
        raise SFormerError(f'the preprocessing does not fit the model: {e}') from e


def _networks(
        models: Sequence[nn.Module],
        sources: Sequence[Union[bool, nn.Module]],
        configs: Sequence[Dict[str, Any]],
        distinct: List[Dict[str, Any]],
        benchmarks: Sequence[Benchmark],
        torchcompile: bool,
) -> Tuple[List[_Subject], List[_Network]]:
    networks: List[_Network] = []
    subjects: List[_Subject] = []
    known: Dict[Any, int] = {}

    def add(network: _Network) -> int:
        if torchcompile:
            plain = source_of(network.model) if network.bypass else network.model
            network.compiled = torch.compile(plain)
        networks.append(network)
        return len(networks) - 1

    for model, source, config, benchmark in zip(models, sources, configs, benchmarks, strict=True):
        transform = distinct.index(config)
        spiking = any(True for _ in named_neurons(model))
        index = add(_Network(model, transform))
        reference = None
        if isinstance(source, nn.Module):
            reference = add(_Network(source, transform))
        elif source and spiking:
            key = _source_key(model), transform
            if len(models) == 1 or key not in known:
                known[key] = add(_Network(model, transform, bypass=True))
            reference = known[key]
        subjects.append(_Subject(model, index, reference, benchmark, spiking, len(subjects), config))
    return subjects, networks


def _source_key(model: nn.Module) -> Tuple[str, str]:
    """What identifies the source inside of an SFormer: its weights and its layers."""
    source = source_of(model)
    return state_hash(source.state_dict()), repr(source)


# The loop ------------------------------------------------------------------------------------------------------------


class _Run:
    """One process's share of an evaluation."""

    def __init__(self, images: ImageData, plan: Plan, group: Group, networks: List[_Network],
                 subjects: List[_Subject], journal: Optional[Journal], amp: Optional[str], retry: bool, max_bad: int,
                 firing_images: int, timeout: float):
        self.images, self.plan, self.group = images, plan, group
        self.networks, self.subjects, self.journal = networks, subjects, journal
        self.amp, self.retry, self.max_bad, self.timeout = amp, retry, max_bad, timeout
        # of a stream, nobody knows which images come first: the first ones of each shard
        self.firing_images = -(-firing_images // images.num_shards)
        self.batch_size = plan.batch_size
        self.device = _device_of(networks[0].model)
        self.wall = self.wait = 0.
        self.seen = self.hits = 0  # of all processes, as far as told

    def already(self, records: List[Dict[str, Any]]) -> None:
        """Take over what earlier runs counted."""
        self.done = sum(r['num'] for r in records)
        if records and self.group.is_main:
            print(f'resuming after {self.done} of {self.images.num_images or "?"} images', file=sys.stderr)
            self.group.add('images', self.done)
            self.group.add('hits', sum(r['networks'][0]['top1'] for r in records))
            self.group.add('bad', sum(len(r['bad']) for r in records))

    def run(self) -> List[Dict[str, Any]]:
        """Records of the chunks of this process."""
        training = [(n.model, n.model.training) for n in self.networks]
        begin = time.perf_counter()
        records: List[Dict[str, Any]] = []
        chunks: Dict[Tuple[int, int], _Chunk] = {}  # workers deliver chunks in turns
        try:
            for network in self.networks:
                network.model.eval()
            with _bar(self.group, self.images.num_images, self.done) as bar, lost_workers():
                for batch in self._batches():
                    self.group.tick()
                    chunk = chunks.setdefault(batch.chunk, _Chunk(batch.chunk, self.networks, self.subjects))
                    self._check_bad(batch)
                    if len(batch.labels):
                        self._forward(batch, chunk)
                    chunk.add(batch)
                    bar(batch.num, chunk.last_hits)
                    if batch.ends_chunk:
                        record = dict(chunks.pop(batch.chunk).record(), world_size=self.group.world_size)
                        records.append(record)
                        if self.journal is not None:
                            self.journal.add(record)
        finally:
            for model, mode in training:
                model.train(mode)
        if chunks:
            raise SFormerError(f'{self.images.name}: chunks {sorted(chunks)} were not read to their end.')
        self.wall = time.perf_counter() - begin
        return records

    def _batches(self) -> Iterator[Batch]:
        batches = self.images.planned(self.plan, self.timeout, pin_memory=self.device.type == 'cuda')
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _check_bad(self, batch: Batch) -> None:
        if batch.bad and self.group.add('bad', len(batch.bad)) > self.max_bad:
            also = f' (--max-bad {self.max_bad} is exceeded)' if self.max_bad else ''
            raise SFormerError(f'{batch.bad[-1]}{also}')

    def _forward(self, batch: Batch, chunk: '_Chunk') -> None:
        """Networks on a batch, once each; then what each subject makes of their logits."""
        counting = batch.start < self.firing_images
        inputs: Dict[Any, torch.Tensor] = {}
        logits = []
        for i, network in enumerate(self.networks):
            dtype = next((p.dtype for p in network.model.parameters()), torch.float32)
            key = network.transform, dtype
            if key not in inputs:
                inputs[key] = batch.images[network.transform].to(self.device, dtype, non_blocking=True)
            rates = next((chunk.rates[j] for j, s in enumerate(self.subjects) if s.network == i and s.spiking), None)
            start = time.perf_counter()
            logits.append(self._logits(network, inputs[key], rates if counting else None))
            chunk.seconds[i] += time.perf_counter() - start
        if counting:
            chunk.firing_images += len(batch.labels)
        for i, subject in enumerate(self.subjects):
            labels = self._labels(subject, batch.labels, logits[subject.network])
            mine = self._compared(subject, logits[subject.network], batch)
            chunk.scores[subject.network].setdefault(i, ChunkScore()).add(mine, labels)
            if subject.source is not None:
                expected = self._compared(subject, logits[subject.source], batch)
                chunk.scores[subject.source].setdefault(i, ChunkScore()).add(expected, labels)
                chunk.pairs[i].add(mine, expected)

    def _logits(self, network: _Network, x: torch.Tensor, rates: Optional[FiringRates]) -> torch.Tensor:
        """float32 logits (B, C) on the CPU; halves batches that do not fit into memory, if it may. Counts spikes."""
        while True:
            attempt = FiringRates()  # layers before the one that did not fit are not to be counted twice
            try:
                with torch.autocast(self.device.type, AMP_DTYPES[self.amp]) if self.amp else contextlib.nullcontext(), \
                        attempt.observe(network.model) if rates is not None else contextlib.nullcontext():
                    out = [network(part, eager=rates is not None) for part in x.split(self.batch_size)]
                if rates is not None:
                    rates.add(attempt)
                return torch.cat([o.float().cpu() for o in out])
            except RuntimeError as e:
                from accelerate.utils.memory import should_reduce_batch_size
                if not should_reduce_batch_size(e):
                    raise
                size = min(self.batch_size, len(x))
                if not self.retry or size == 1:
                    hint = 'even one image does not fit' if size == 1 else 'choose a smaller --batch-size, or --retry'
                    raise SFormerError(f'out of memory with batches of {size}: {hint}.') from e
            self.batch_size = size // 2
            print(f'out of memory: batches of {self.batch_size} from now on', file=sys.stderr)
            if self.device.type != 'cpu':
                torch.accelerator.empty_cache()

    def _labels(self, subject: _Subject, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        name, label_map = self.images.name, subject.benchmark.label_map
        classes = logits.shape[1] if label_map is None else len(label_map)
        if labels.max() >= classes:
            raise SFormerError(
                f'{name} has label {int(labels.max())}, the model has {classes} classes: '
                f'this is not the dataset that it was trained for.')
        return labels if label_map is None else torch.tensor(label_map)[labels]

    def _compared(self, subject: _Subject, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        if not torch.isfinite(logits).all():
            shard = f' of shard {batch.chunk[0]}' if self.images.num_shards > 1 else ''
            raise SFormerError(
                f'NaN or infinite logits on images {batch.start} to {batch.start + batch.num - 1}{shard} of '
                f'{self.images.name}.')
        classes = subject.benchmark.classes
        return logits if classes is None else logits[:, classes]


class _Chunk:
    """Counts of a chunk that is under way."""

    def __init__(self, chunk: Tuple[int, int], networks: List[_Network], subjects: List[_Subject]):
        self.chunk, self.subjects = chunk, subjects
        # a source that subjects share may be scored on the classes of each
        self.scores: List[Dict[int, ChunkScore]] = [{} for _ in networks]
        self.pairs = [PairScore() for _ in subjects]
        self.rates = [FiringRates() for _ in subjects]
        self.seconds = [0.] * len(networks)
        self.num = self.count = self.skipped = self.firing_images = 0
        self.bad: List[str] = []
        self.ends_shard = False
        self.decode = self.preprocess = 0.
        self.last_hits = 0
        self._hits = 0

    def add(self, batch: Batch) -> None:
        self.num += batch.num
        self.count += len(batch.labels)
        self.skipped += batch.skipped
        self.bad += batch.bad
        self.ends_shard |= batch.ends_shard
        self.decode += batch.decode_seconds
        self.preprocess += batch.preprocess_seconds
        hits = self.scores[0][0].top1 if self.scores[0] else 0
        self.last_hits, self._hits = hits - self._hits, hits

    def record(self) -> Dict[str, Any]:
        empty = ChunkScore()
        firing = [dict(fired=r.fired, total=r.total) if r.total else None for r in self.rates]
        return dict(
            chunk=list(self.chunk), num=self.num, count=self.count, skipped=self.skipped, bad=self.bad,
            ends_shard=self.ends_shard,
            networks=[self.scores[s.network].get(i, empty).record() for i, s in enumerate(self.subjects)],
            sources=[None if s.source is None else self.scores[s.source].get(i, empty).record()
                     for i, s in enumerate(self.subjects)],
            pairs=[None if s.source is None else p.record() for s, p in zip(self.subjects, self.pairs, strict=True)],
            firing=firing if any(firing) else None, firing_images=self.firing_images,
            seconds=[self.seconds[s.network] for s in self.subjects],
            source_seconds=[None if s.source is None else self.seconds[s.source] for s in self.subjects],
            decode=self.decode, preprocess=self.preprocess)


@contextlib.contextmanager
def _bar(group: Group, total: Optional[int], done: int) -> Iterator[Any]:
    """A function that takes images and hits of this process, and shows rate and accuracy of all processes on the
    main one's terminal, if it has one."""
    counts = [0, 0]
    told = [time.monotonic()]

    def tell() -> Tuple[int, int]:
        seen, hits = group.add('images', counts[0]), group.add('hits', counts[1])
        counts[:], told[0] = [0, 0], time.monotonic()
        return seen, hits

    if not (group.is_main and sys.stderr.isatty()):
        def step(num: int, hits: int) -> None:
            counts[0] += num
            counts[1] += hits
            if group.world_size > 1 and time.monotonic() - told[0] > 0.5:
                tell()
        yield step
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[rate]}'),
               TextColumn('{task.fields[accuracy]}'), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task('Evaluating', total=total, completed=done, rate='', accuracy='')
        begin = time.monotonic()

        def step(num: int, hits: int) -> None:
            counts[0] += num
            counts[1] += hits
            if time.monotonic() - told[0] > 0.1:
                seen, right = tell()
                progress.update(
                    task, completed=seen, rate=f'{(seen - done) / (time.monotonic() - begin):.1f} images/s',
                    accuracy=f'top-1 {100 * right / seen:.2f} %')
        yield step


# Results -------------------------------------------------------------------------------------------------------------


def _finished(records: List[Dict[str, Any]]) -> set:
    """Shards of which every chunk is done."""
    last = {r['chunk'][0]: r['chunk'][1] for r in records if r['ends_shard']}
    done = {tuple(r['chunk']) for r in records}
    return {s for s, c in last.items() if all((s, i) in done for i in range(c + 1))}


def _check_complete(records: List[Dict[str, Any]], images: ImageData, max_bad: int) -> None:
    """Raise SFormerError unless every image was counted once."""
    chunks = [tuple(r['chunk']) for r in records]
    twice = next((c for c in chunks if chunks.count(c) > 1), None) if len(set(chunks)) < len(chunks) else None
    if twice is not None:
        raise SFormerError(f'{images.name}: chunk {twice} was counted twice.')
    open_shards = {c[0] for c in chunks} - _finished(records)
    if open_shards:
        raise SFormerError(f'{images.name}: shards {sorted(open_shards)} were not counted to their end.')
    num = sum(r['num'] for r in records)
    if images.num_images is not None and num != images.num_images:
        raise SFormerError(f'{images.name}: counted {num} images, expected {images.num_images}.')
    bad = [name for r in records for name in r['bad']]
    if len(bad) > max_bad:
        raise SFormerError(f'{bad[0]} ({len(bad)} unreadable images, --max-bad {max_bad}).')
    if not sum(r['count'] for r in records):
        raise SFormerError(f'{images.name}: not one image has a label and can be read.')


def _result(subject: _Subject, images: ImageData, records: List[Dict[str, Any]]) -> Dict[str, Any]:
    i, model, count = subject.index, subject.model, sum(r['count'] for r in records)
    score = summarize([r['networks'][i] for r in records], count)
    config = subject.data_config
    result: Dict[str, Any] = dict(
        model=(getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        dataset=images.name, split=images.split, dataset_fingerprint=images.fingerprint,
        dataset_revision=images.revision, benchmark=subject.benchmark.name, num_images=count,
        skipped_images=sum(r['skipped'] for r in records), bad_images=[name for r in records for name in r['bad']],
        top1=score['top1'], top1_err=round(100 - score['top1'], 4),
        top5=score['top5'], top5_err=round(100 - score['top5'], 4), nll=score['nll'], ece=score['ece'])
    if subject.source is not None:
        source = summarize([r['sources'][i] for r in records], count)
        result.update({f'source_{key}': value for key, value in source.items()})
        result.update(summarize_pair([r['pairs'][i] for r in records], count))
    if subject.spiking:
        rates = FiringRates()
        for firing in (r['firing'][i] for r in records if r['firing']):
            rates.add(FiringRates(**firing))
        result.update(firing_rate=rates.mean(), firing_rates=rates.per_site(),
                      firing_images=sum(r['firing_images'] for r in records))
    def total(key: str, index: Optional[int] = None) -> float:
        """Seconds, averaged over the processes that worked at the same time; a resumed run may have had others."""
        return sum((r[key] if index is None else r[key][index]) / r['world_size'] for r in records)

    seconds = total('seconds', i)
    result.update(
        param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 4),
        img_size=config['input_size'][-1], crop_pct=config['crop_pct'], interpolation=config['interpolation'],
        seconds=round(seconds, 3), images_per_second=round(count / seconds, 2) if seconds else None,
        decode_seconds=round(total('decode'), 3), preprocess_seconds=round(total('preprocess'), 3))
    if subject.source is not None:
        result['source_seconds'] = round(total('source_seconds', i), 3)
    return result


def _peak_memory(device: torch.device) -> Dict[str, float]:
    """Peak memory of this process [MiB]."""
    peak = {}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource
        unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10
        peak['peak_memory_mib'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    if device.type == 'cuda':
        peak['peak_device_memory_mib'] = round(torch.cuda.max_memory_allocated(device) / 2 ** 20, 1)
    return peak


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device('cpu'))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
