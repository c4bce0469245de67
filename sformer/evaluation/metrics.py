"""What is counted per chunk of images, and what follows from the counts.

Counts are integers. Sums of real numbers are taken in float64 with `math.fsum`, which rounds once, so they depend on
neither order nor batch. Chunks hold the same images whoever evaluates them, and so the result of many processes is
that of one, to the last bit.
"""
import math
from typing import Any, Dict, List, Optional

import torch

__all__ = ['ChunkScore', 'PairScore', 'summarize', 'summarize_pair']

ECE_BINS = 15  # of the calibration error, as in Guo et al., arXiv 1706.04599


class ChunkScore:
    """Counts of one network on one chunk."""

    def __init__(self):
        self.top1 = self.top5 = 0
        self.nll: List[float] = []
        self.confidence: List[float] = []
        self.right: List[bool] = []

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Score a batch.

        Args:
            logits: (B, C), float32 on the CPU.
            labels: Accepted classes (B, L), -1 where there are fewer.
        """
        hits = (logits.topk(min(5, logits.shape[1])).indices[:, :, None] == labels[:, None, :]).any(-1)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.any(1).sum())
        log_p = logits.double().log_softmax(1)
        self.confidence += log_p.amax(1).exp().tolist()
        self.right += hits[:, 0].tolist()
        if labels.shape[1] == 1:
            self.nll += (-log_p.gather(1, labels)[:, 0]).tolist()

    def record(self) -> Dict[str, Any]:
        """Counts, for JSON. `bins` has images, hits and the sum of confidences per bin of confidence."""
        bins: List[List[Any]] = [[0, 0, []] for _ in range(ECE_BINS)]
        for confidence, right in zip(self.confidence, self.right, strict=True):
            b = bins[min(ECE_BINS - 1, max(0, math.ceil(confidence * ECE_BINS) - 1))]
            b[0] += 1
            b[1] += right
            b[2].append(confidence)
        return dict(
            top1=self.top1, top5=self.top5, nll=math.fsum(self.nll) if len(self.nll) == len(self.right) else None,
            bins=[[n, hits, math.fsum(values)] for n, hits, values in bins])


class PairScore:
    """Comparison of a network with its source on one chunk."""

    def __init__(self):
        self.agree = 0
        self.difference: List[float] = []
        self.norm: List[float] = []

    def add(self, logits: torch.Tensor, expected: torch.Tensor) -> None:
        """Compare logits (B, C) with those of the source."""
        self.agree += int((logits.argmax(1) == expected.argmax(1)).sum())
        self.difference += (logits.double() - expected.double()).square().sum(1).tolist()
        self.norm += expected.double().square().sum(1).tolist()

    def record(self) -> Dict[str, Any]:
        return dict(agree=self.agree, difference=math.fsum(self.difference), norm=math.fsum(self.norm))


def percent(n: int, count: int) -> float:
    return round(100 * n / count, 4)


def summarize(records: List[Dict[str, Any]], count: int) -> Dict[str, Optional[float]]:
    """Accuracies [%], mean negative log-likelihood [nats] (None with several labels per image) and expected
    calibration error [%] from the records of `ChunkScore` over `count` images."""
    losses = [r['nll'] for r in records]
    gaps = []
    for b in range(ECE_BINS):
        hits, confidence = sum(r['bins'][b][1] for r in records), math.fsum(r['bins'][b][2] for r in records)
        gaps.append(abs(hits - confidence))
    return dict(
        top1=percent(sum(r['top1'] for r in records), count), top5=percent(sum(r['top5'] for r in records), count),
        nll=None if None in losses else round(math.fsum(losses) / count, 6),
        ece=round(100 * math.fsum(gaps) / count, 4))


def summarize_pair(records: List[Dict[str, Any]], count: int) -> Dict[str, Optional[float]]:
    """Agreement [%] and relative logit error from the records of `PairScore`."""
    norm = math.fsum(r['norm'] for r in records)
    return dict(
        agreement=percent(sum(r['agree'] for r in records), count),
        relative_logit_error=round(math.sqrt(math.fsum(r['difference'] for r in records) / norm), 6) if norm else None)
