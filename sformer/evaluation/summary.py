"""From the records of all chunks to the result of a model."""
import contextlib
import sys
from collections.abc import Sequence

import torch

from ..data import ImageData
from ..errors import SFormerError
from .figures import CLASSIFICATION
from .journal import ChunkRecord
from .metrics import Counted
from .networks import Subject
from .schema import SOURCE, Result

__all__ = ['check_complete', 'finished_shards', 'peak_memory', 'result_of']


def finished_shards(records: Sequence[ChunkRecord]) -> set[int]:
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


def result_of(subject: Subject, images: ImageData, records: Sequence[ChunkRecord], **how: object) -> Result:
    """Result of one model: what was evaluated on what, its figures and those of its source, and seconds.

    Args:
        subject: The model.
        images: Images that were counted.
        records: All chunks.
        **how: How it was measured, by the keys of a result.
    """
    counted = {'': Counted(subject, images, records)}
    if subject.source is not None:
        counted[SOURCE] = Counted(subject, images, records, 'sources')
    return CLASSIFICATION.make(counted, **how)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process [MiB]."""
    peak = {}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource
        unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10
        peak['peak_memory_mib'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    if device.type == 'cuda':
        peak['peak_device_memory_mib'] = round(torch.cuda.max_memory_allocated(device) / 2 ** 20, 1)
    return peak
