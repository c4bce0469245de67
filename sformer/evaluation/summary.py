"""From the records of all chunks to the result of a model."""
import contextlib
import sys
from typing import Any, Dict, Optional, Sequence, Set

import torch

from ..data import ImageData
from ..errors import SFormerError
from ..execution import EngineNetwork
from .activity import Activity
from .journal import ChunkRecord
from .metrics import summarize, summarize_pair
from .networks import Subject

__all__ = ['check_complete', 'finished_shards', 'peak_memory', 'result_of']


MAX_PASSED_OVER = 100  # of the files that are passed over in a folder; an archive of macOS has one for each image


def finished_shards(records: Sequence[ChunkRecord]) -> Set[int]:
    """Shards of which every chunk is done."""
    last = {r['chunk'][0]: r['chunk'][1] for r in records if r['ends_shard']}
    done = {tuple(r['chunk']) for r in records}
    return {s for s, c in last.items() if all((s, i) in done for i in range(c + 1))}


def check_complete(records: Sequence[ChunkRecord], images: ImageData, max_bad: int) -> None:
    """Raise SFormerError unless every image was counted once."""
    chunks = [tuple(r['chunk']) for r in records]
    twice = next((c for c in chunks if chunks.count(c) > 1), None) if len(set(chunks)) < len(chunks) else None
    if twice is not None:
        raise SFormerError(f'{images.name}: chunk {twice} was counted twice.')
    open_shards = {c[0] for c in chunks} - finished_shards(records)
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


def result_of(subject: Subject, images: ImageData, records: Sequence[ChunkRecord]) -> Dict[str, Any]:
    """Result of one model: what was evaluated on what, its figures and those of its source, and seconds."""
    i, model, config = subject.index, subject.model, subject.data_config
    count = sum(r['count'] for r in records)
    score: Dict[str, Any] = summarize([r['networks'][i] for r in records], count)
    result: Dict[str, Any] = dict(
        model=(getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        dataset=images.name, split=images.split, dataset_fingerprint=images.fingerprint,
        dataset_revision=images.revision,
        image_column=getattr(images, 'image_column', None), label_column=getattr(images, 'label_column', None),
        benchmark=subject.benchmark.name, num_images=count,
        skipped_images=sum(r['skipped'] for r in records), bad_images=[name for r in records for name in r['bad']],
        num_passed_over=len(images.passed_over), passed_over=images.passed_over[:MAX_PASSED_OVER],
        top1=score['top1'], top1_err=round(100 - score['top1'], 4),
        top5=score['top5'], top5_err=round(100 - score['top5'], 4), nll=score['nll'], ece=score['ece'])
    if subject.source is not None:
        source = summarize([r['sources'][i] for r in records], count)
        result.update({f'source_{key}': value for key, value in source.items()})
        result.update(summarize_pair([r['pairs'][i] for r in records], count))
    if subject.spiking:
        activity = Activity()
        for counts in (r['activity'][i] for r in records if r['activity']):
            activity.add(Activity(counts))
        result.update(
            activity=activity.mean(), activity_per_site=activity.per_site(),
            spikes_per_neuron=activity.spikes_per_neuron(),
            activity_images=sum(r['activity_images'] for r in records))
    seconds = _sum_seconds(records, 'seconds', i)
    result.update(
        param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 4),
        img_size=config['input_size'][-1], crop_pct=config['crop_pct'], interpolation=config['interpolation'],
        seconds=round(seconds, 3), images_per_second=round(count / seconds, 2) if seconds else None,
        decode_seconds=round(_sum_seconds(records, 'decode'), 3),
        preprocess_seconds=round(_sum_seconds(records, 'preprocess'), 3))
    if isinstance(model, EngineNetwork):
        result.update(model.describe())
    if subject.source is not None:
        result['source_seconds'] = round(_sum_seconds(records, 'source_seconds', i), 3)
    return result


def _sum_seconds(records: Sequence[ChunkRecord], key: str, index: Optional[int] = None) -> float:
    """Seconds, averaged over the processes that worked at the same time; a resumed run may have had others."""
    return sum((r[key] if index is None else r[key][index]) / r['world_size'] for r in records)


def peak_memory(device: torch.device) -> Dict[str, float]:
    """Peak memory of this process [MiB]."""
    peak = {}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource
        unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10
        peak['peak_memory_mib'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    if device.type == 'cuda':
        peak['peak_device_memory_mib'] = round(torch.cuda.max_memory_allocated(device) / 2 ** 20, 1)
    return peak
