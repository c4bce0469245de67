"""The verbs: `evaluate` one model, `evaluate_all` of several; on this process, or on each of a group."""
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from ..conversion import warn_of_changes
from ..conversion.record import library_versions
from ..data import ImageData, Plan, open_request
from ..files import Json
from .figures import CLASSIFICATION
from .journal import ChunkRecord, Journal, check_same
from .labels import resolve_benchmark
from .launch import Group
from .loop import Loop
from .networks import (
    build_networks,
    check_model,
    data_config_of,
    device_of,
    distinct_configs,
    identity,
    network_of,
    prepare_model,
)
from .settings import EvaluationConfig
from .summary import check_complete, finished_shards, peak_memory, result_of

__all__ = ['evaluate', 'evaluate_all']


def evaluate(
        model: nn.Module,
        dataset: str,
        split: str | None = None,
        *,
        source: bool | nn.Module = True,
        **options: Any,
) -> Json:
    """Evaluate a classifier on a labelled data set, an SFormer side by side with its source.

    Under torchrun, every process calls this and all get the same result, whose counts are those of one process. The
    model may be in use by other threads: nothing of it is changed, and its device only if one is named.

    Args:
        model: SFormer or any timm classifier.
        dataset: As in `EvaluationConfig`.
        split: Split of the data set.
        source: Source network to compare with; True takes the one inside of the SFormer, False compares with nothing.
        **options: Other fields of `EvaluationConfig`.

    Returns:
        Percentages `top1`, `top5`, expected calibration error `ece` [%], negative log-likelihood `nll` [nats]; the same
        of the source as `source_top1` ...; `agreement` (equal predictions, in percent), `relative_logit_error` (norm of
        the difference over norm of the source's logits); `activity`, the share of neurons that fire, in [0, 1], and
        `activity_per_site`; `spikes_per_neuron` if levels are sent in `unary`, `binary` or `graded` code; `seconds` of
        the model alone, averaged over processes, and `images_per_second` of all of them together; what was measured,
        and how.

    Raises:
        UncalibratedError: If an SFormer has default thresholds.
        SFormerError: If an option is not usable, the data set cannot be read, its labels do not fit the model, or
            logits are NaN.
    """
    return evaluate_all([model], EvaluationConfig(dataset=dataset, split=split, **options), sources=[source])[0]


def evaluate_all(
        models: Sequence[nn.Module],
        config: EvaluationConfig,
        *,
        sources: bool | Sequence[bool | nn.Module] = True,
        group: Group | None = None,
        journal: Journal | None = None,
) -> list[Json]:
    """Evaluate several classifiers in one pass over the images, each of which is decoded once.

    Args:
        models: SFormers or other timm classifiers.
        config: Images, preprocessing and execution.
        sources: As `source` of `evaluate`, for all or for each of the models. SFormers with the same source network
            share one evaluation of it.
        group: Processes of this run; those of the launcher if None.
        journal: Where to record finished chunks.

    Returns:
        One result per model, as `evaluate` has it.

    Raises:
        UncalibratedError: If an SFormer has default thresholds.
        SFormerError: If the data set cannot be read, its labels do not fit a model, logits are NaN, or images were
            lost.
    """
    each = [sources] * len(models) if isinstance(sources, bool) else list(sources)
    if group is not None:
        return _evaluate(models, each, config, group, journal)
    with Group(config.device, timeout=config.timeout).guard() as group:
        for i, (model, source) in enumerate(zip(models, each, strict=True)):
            if source is True and group.is_main:
                warn_of_changes('the model' if len(models) == 1 else f'model {i + 1}', model)
        return _evaluate(models, each, config, group, journal)


@torch.inference_mode()
def _evaluate(
        models: Sequence[nn.Module],
        sources: Sequence[bool | nn.Module],
        config: EvaluationConfig,
        group: Group,
        journal: Journal | None,
) -> list[Json]:
    models = [network_of(model) for model in models]
    sources = [source if isinstance(source, bool) else network_of(source) for source in sources]
    for model in models:
        check_model(model)
    identities = [identity(model) for model in models]
    target = group.device if group.world_size > 1 else None
    if config.device is not None:
        target = torch.device(config.device)
    models = [prepare_model(model, config, target) for model in models]
    device = device_of(models[0])
    data_configs = [data_config_of(model, config) for model in models]
    images = open_request(config, distinct_configs(data_configs))
    benchmarks = [resolve_benchmark(config.benchmark, m, images.name, images.class_names, config.by_position)
                  for m in models]
    if (labels := benchmarks[0].labels) is not None:
        images.label_with(labels)
    key = _key(identities, [s if isinstance(s, bool) else identity(s) for s in sources], images, benchmarks[0].name,
               data_configs, config, device)
    sources = [s if isinstance(s, bool) else prepare_model(s, config, target) for s in sources]
    subjects, networks = build_networks(models, sources, data_configs, benchmarks, config.torchcompile)
    check_same(dict(key, recorded=journal is not None), group)

    # fine enough to share and to resume, coarse enough that records stay small
    chunk_size = config.batch_size * math.ceil(
        min(4096, max(64, (images.num_images or 0) / 1024)) / config.batch_size)
    plan = Plan(config.batch_size, chunk_size, group.rank, group.world_size, config.workers)
    done: list[ChunkRecord] = []
    if journal is not None:
        done = journal.open(key, group)
        plan.done = {(r['chunk'][0], r['chunk'][1]) for r in done}
        plan.finished = finished_shards(done)
    loop = Loop(images, plan, networks, subjects, config, group, journal)
    loop.already(done)
    records = loop.run()
    mine: Json = dict(
        records=records, batch_size=loop.batch_size, wall=loop.wall, wait=loop.wait, memory=peak_memory(device))
    shared = group.gather(mine)
    records = sorted([*done, *(r for s in shared for r in s['records'])], key=lambda r: r['chunk'])
    check_complete(records, images, config.max_bad)
    how = _how(config, images.streamed, group, device, shared)
    return [result_of(subject, images, records, weights_sha256=i['weights_sha256'], **how)
            for subject, i in zip(subjects, identities, strict=True)]


def _key(
        models: list[Json],
        sources: list[bool | Json],
        images: ImageData,
        benchmark: str | None,
        preprocessing: list[Json],
        config: EvaluationConfig,
        device: torch.device,
) -> Json:
    """What the counts of a chunk depend on, as plain data."""
    versions = library_versions()
    key = dict(
        models=models, sources=sources, dataset=images.fingerprint, split=images.split, benchmark=benchmark,
        num_images=images.num_images, batch_size=config.batch_size, num_shards=images.num_shards,
        streaming=images.streamed, by_position=config.by_position, activity_images=config.activity_images,
        preprocessing=preprocessing, amp=config.amp, device=device.type, torchcompile=config.torchcompile,
        figures=[*CLASSIFICATION.score().values],
        **{name: versions.get(name) for name in ('sformer', 'torch', 'timm')})
    return json.loads(json.dumps(key))  # as it is read again


def _how(
        config: EvaluationConfig,
        streamed: bool,
        group: Group,
        device: torch.device,
        shared: list[Json],
) -> Json:
    """How all models were evaluated, from what each process tells of itself."""
    return dict(
        batch_size=min(s['batch_size'] for s in shared), seed=config.seed, workers=config.workers,
        world_size=group.world_size, streaming=streamed,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        amp=config.amp, torchcompile=config.torchcompile, channels_last=config.channels_last,
        versions=library_versions(), wall_seconds=round(max(s['wall'] for s in shared), 3),
        wait_seconds=round(sum(s['wait'] for s in shared) / group.world_size, 3),
        **{key: max(s['memory'][key] for s in shared) for key in shared[0]['memory']})
