"""Weights as int8: outliers split over columns, and errors of rounding fed back to what is rounded later."""
import dataclasses

import torch

from .saturation import MAX_WEIGHT

__all__ = ['IntegerWeights', 'integer_weights', 'rounded']

TARGET_ERROR = 0.015  # of 8 bits: a little more than that of normal weights, the largest at four standard deviations
MAX_SPLIT = 1.125  # columns, as a multiple
DAMPING = 0.01  # of the mean power of a channel
BLOCK = 128  # columns between two corrections of all that follow


@dataclasses.dataclass(frozen=True)
class IntegerWeights:
    """Weights as int8, and what rounding them costs.

    Args:
        weight: (D, C') int8.
        step: What a weight of one stands for, float32 (D,).
        columns: Input channel that each of the C' columns reads, int64; None if C' = C and each reads its own.
        error: Relative error: of the products where moments were given, else of the weights.
    """
    weight: torch.Tensor
    step: torch.Tensor
    columns: torch.Tensor | None
    error: float


def integer_weights(
        weight: torch.Tensor,
        moments: torch.Tensor | None = None,
        limit: int | torch.Tensor = MAX_WEIGHT,
) -> IntegerWeights:
    """Round weights (D, C), with the steps of their input folded in, to int8 with a step per output channel.

    A few input channels with a large step would leave all other weights of a row few levels. Such a channel is read
    by several columns, whose weights share its own: the spikes are the same, and a row's largest weight falls.

    Args:
        weight: Weights, times the step of their input channel.
        moments: Second moments of the levels, (C, C), up to a factor. If given, what rounding a column loses is taken
            back by the columns that come after it, as far as their levels are correlated (GPTQ, arXiv 2210.17323).
        limit: Largest magnitude of an int8 weight, of all or of each input channel, (C,).
    """
    weight = weight.detach().to(torch.float32)
    largest = (weight / limit).abs().amax(0)
    best, parts = rounded(weight, limit=limit), None
    typical = largest.median().clamp_min(torch.finfo(torch.float32).tiny)
    target = TARGET_ERROR * MAX_WEIGHT / float(torch.as_tensor(limit, dtype=torch.float32).mean())
    for factor in (16, 8, 4, 3, 2):
        if best.error <= target:
            break
        trial = (largest / (factor * typical)).ceil().clamp(1, 2 ** 15).to(torch.int64)
        if trial.sum() > MAX_SPLIT * len(trial):
            break
        split = rounded(weight, trial, limit=limit)
        if split.error < best.error:
            best, parts = split, trial
    return best if moments is None else rounded(weight, parts, moments, limit)


def rounded(
        weight: torch.Tensor,
        parts: torch.Tensor | None = None,
        moments: torch.Tensor | None = None,
        limit: int | torch.Tensor = MAX_WEIGHT,
) -> IntegerWeights:
    """Int8 weights in which column c is the sum of `parts[c]` columns, or itself; arguments as above."""
    whole_limit = torch.as_tensor(limit, device=weight.device) * (1 if parts is None else parts)
    step = (weight / whole_limit).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = weight / step[:, None]
    if moments is None:
        whole = scaled.round()
    else:
        whole = _fed_back(scaled, whole_limit.expand(weight.shape[1]), moments)
    error = _relative_error((whole - scaled) * step[:, None], weight, moments)
    columns = None
    if parts is not None:
        columns = torch.arange(len(parts), device=parts.device).repeat_interleave(parts)
        place = torch.arange(len(columns), device=parts.device) - (parts.cumsum(0) - parts)[columns]
        # n = sum over p parts of floor((n + i) / p), i = 0 ... p - 1
        whole = torch.floor((whole[:, columns] + place) / parts[columns])
    return IntegerWeights(whole.to(torch.int8), step, columns, error)


def _fed_back(scaled: torch.Tensor, limit: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Weights (D, C), in steps, rounded column by column to at most `limit` (C,), whose errors the columns that follow
    take back."""
    moments = moments.to(torch.float64)
    damping = (DAMPING * moments.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    damped = moments + damping * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    remaining, whole = scaled.to(torch.float64), torch.empty_like(scaled)
    for start in range(0, len(factor), BLOCK):
        stop = min(start + BLOCK, len(factor))
        block, errors = remaining[:, start:stop].clone(), remaining.new_empty(len(scaled), stop - start)
        for i in range(stop - start):
            column = start + i
            whole[:, column] = block[:, i].round().clamp(-limit[column], limit[column])
            errors[:, i] = (block[:, i] - whole[:, column]) / factor[column, column]
            block[:, i:] -= errors[:, i:i + 1] * factor[column, column:stop]
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    return whole


def _relative_error(difference: torch.Tensor, weight: torch.Tensor, moments: torch.Tensor | None) -> float:
    if moments is None:
        lost, all_of_it = difference.square().sum(), weight.square().sum()
    else:
        moments = moments.to(torch.float32)
        lost, all_of_it = ((difference @ moments) * difference).sum(), ((weight @ moments) * weight).sum()
    return (lost / all_of_it).clamp_min(0).sqrt().item() if all_of_it > 0 else 0.
