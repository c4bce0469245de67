"""What is counted per chunk of images, and what follows from the counts.

Counts are integers. Sums of real numbers are taken in float64 with `math.fsum`, which rounds once, so they depend on
neither order nor batch. Chunks hold the same images whoever evaluates them, and so the result of many processes is
that of one, to the last bit.
"""
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..data import ImageData
from .activity import Activity
from .journal import ChunkRecord
from .networks import Subject

__all__ = [
    'Counted', 'Scored', 'agreeing', 'calibration_error', 'column_sums', 'confidences', 'differences', 'likelihood',
    'percent', 'relative_error', 'reliability',
]

ECE_BINS = 15  # of the calibration error, as in Guo et al., arXiv 1706.04599


class Scored:
    """What figures are counted of on a batch.

    Args:
        logits: (B, C), float32 on the CPU.
        labels: Accepted classes (B, L), -1 where there are fewer.
        expected: Logits of the source; None without one, and of the source itself.
    """

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor, expected: torch.Tensor | None = None):
        self.logits = logits
        self.labels = labels
        self.expected = expected

    @functools.cached_property
    def hits(self) -> torch.Tensor:
        """Whether each of the first five predictions is right, (B, 5)."""
        first = self.logits.topk(min(5, self.logits.shape[1])).indices
        return (first[:, :, None] == self.labels[:, None, :]).any(-1)

    @functools.cached_property
    def log_p(self) -> torch.Tensor:
        return self.logits.double().log_softmax(1)

    @property
    def source(self) -> torch.Tensor:
        assert self.expected is not None  # what is asked for has one
        return self.expected.double()


class Counted:
    """What was counted of one network on all images.

    Args:
        subject: The model.
        images: Images that were counted.
        records: All chunks.
        side: `networks` for the model, `sources` for its source.
    """

    def __init__(
            self,
            subject: Subject,
            images: ImageData,
            records: Sequence[ChunkRecord],
            side: Literal['networks', 'sources'] = 'networks',
    ):
        self.subject = subject
        self.images = images
        self.records = records
        self.side = side
        self.num = sum(record['count'] for record in records)

    def totals(self, key: str) -> list[Any]:
        """What each chunk has of a figure."""
        counts = [record[self.side][self.subject.index] for record in self.records]
        return [count[key] for count in counts if count is not None]

    def sums(self, key: str) -> list[float] | None:
        """What a figure counts, over all images; None where it means nothing."""
        totals = self.totals(key)
        return None if None in totals else column_sums([total for total in totals if total])

    def percent(self, key: str) -> float:
        """Share of images that a figure counts."""
        sums = self.sums(key)
        assert sums is not None
        return percent(sums[0], self.num)

    def seconds(self, key: Literal['decode', 'preprocess']) -> float:
        """Seconds, averaged over the processes that worked at the same time; a resumed run may have had others.

        Args:
            key: Of the records.
        """
        return sum(r[key] / r['world_size'] for r in self.records)

    @functools.cached_property
    def network_seconds(self) -> float:
        key: Literal['seconds', 'source_seconds'] = 'seconds' if self.side == 'networks' else 'source_seconds'
        spent = [record[key][self.subject.index] for record in self.records]
        return sum(s / r['world_size'] for s, r in zip(spent, self.records, strict=True) if s is not None)

    @functools.cached_property
    def activity(self) -> Activity:
        found = Activity()
        for record in self.records:
            if record['activity']:
                found.add(Activity(record['activity'][self.subject.index]))
        return found


def column_sums(rows: list[Any]) -> list[Any]:
    """Sum of each column, rounded once; of rows that are numbers, the only one. Whole numbers stay whole."""
    columns = zip(*(row if isinstance(row, list) else [row] for row in rows), strict=True)
    return [sum(column) if isinstance(column[0], int) else math.fsum(column) for column in columns]


def percent(n: float, count: int) -> float:
    return round(100 * n / count, 4)


# Counted by images ----------------------------------------------------------------------------------------------------


def likelihood(batch: Scored) -> torch.Tensor | None:
    """Negative log-likelihood [nats]; None with several labels per image."""
    if batch.labels.shape[1] > 1:
        return None
    return -batch.log_p.gather(1, batch.labels)[:, 0]


def confidences(batch: Scored) -> torch.Tensor:
    """Confidence of the prediction and whether it is right, (B, 2)."""
    return torch.stack([batch.log_p.amax(1).exp(), batch.hits[:, 0].double()], 1)


def agreeing(batch: Scored) -> torch.Tensor:
    return batch.logits.argmax(1) == batch.source.argmax(1)


def differences(batch: Scored) -> torch.Tensor:
    """Squared norms of the difference of logits and of those of the source, (B, 2)."""
    difference = (batch.logits.double() - batch.source).square().sum(1)
    return torch.stack([difference, batch.source.square().sum(1)], 1)


# What follows ---------------------------------------------------------------------------------------------------------


def reliability(rows: list[list[float]]) -> list[list[float]]:
    """Images, hits and the sum of confidences per bin of confidence, from rows of `confidences`."""
    bins: list[list[list[float]]] = [[] for _ in range(ECE_BINS)]
    for row in rows:
        bins[min(ECE_BINS - 1, max(0, math.ceil(row[0] * ECE_BINS) - 1))].append(row)
    return [[len(found), sum(right for _, right in found), math.fsum(confidence for confidence, _ in found)]
            for found in bins]


def calibration_error(chunks: list[list[list[float]]], num: int) -> float:
    """Expected calibration error [%] over images, from `reliability` of each chunk."""
    gaps = []
    for index in range(ECE_BINS):
        hits = sum(bins[index][1] for bins in chunks)
        gaps.append(abs(hits - math.fsum(bins[index][2] for bins in chunks)))
    return round(100 * math.fsum(gaps) / num, 4)


def relative_error(sums: list[float] | None) -> float | None:
    """Norm of a difference over the norm of what was expected, from sums of their squares."""
    if not sums or not sums[1]:
        return None
    return round(math.sqrt(sums[0] / sums[1]), 6)
