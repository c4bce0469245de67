"""Spikes that meet tables of weights in the forward of a layer, as queries meet those of relative positions.

What is taken of a table depends on the size of an image, so weights become whole numbers where they are met.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn

from ..neurons import Spikes
from .saturation import MAX_WEIGHT

__all__ = ['Compute', 'IntegerTables', 'TableProduct', 'TableWeights', 'integer_form']

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TableWeights(NamedTuple):
    """Weights of a table with the steps of input channels folded in, (..., C): numbers times a step, (..., 1)."""
    numbers: torch.Tensor
    step: torch.Tensor


class TableProduct:
    """How the spikes of a neuron meet a table, called as `products.meet_table` does; a neuron has it as its `meet`."""
    integer: 'IntegerTables | None' = None  # how they do in integers, if they do

    def weights(self, folded: torch.Tensor) -> TableWeights:
        """Weights in the form in which they are multiplied."""
        raise NotImplementedError

    def sums(self, levels: torch.Tensor, numbers: torch.Tensor, compute: Compute) -> torch.Tensor:
        """Sums of products of levels and weights, exact."""
        raise NotImplementedError

    def __call__(self, spikes: Spikes, table: torch.Tensor, compute: Compute) -> torch.Tensor:
        """Product, by a function linear in both, of spikes (B, ..., C) with a table (..., C)."""
        numbers, step = self.weights(table.detach().to(torch.float32) * spikes.step)
        one = step.new_ones(1, *spikes.levels.shape[1:-1], 1)
        out = self.sums(spikes.levels, numbers, compute) * compute(one, step)
        if spikes.token_scale is not None:
            out = out * spikes.token_scale
        return out.to(table.dtype)


class IntegerTables(TableProduct):
    """Tables of int8 with a step per output channel. Sums over the channels of a head are exact in float32, which every
    engine computes them in, too."""

    @property
    def integer(self) -> 'IntegerTables':  # type: ignore[override]
        return self

    def weights(self, folded: torch.Tensor) -> TableWeights:
        step = (folded / MAX_WEIGHT).abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return TableWeights((folded / step).round(), step)

    def sums(self, levels: torch.Tensor, numbers: torch.Tensor, compute: Compute) -> torch.Tensor:
        return compute(levels.to(torch.float32), numbers)


def integer_form(neuron: nn.Module) -> IntegerTables | None:
    """How the spikes of a neuron meet tables in integers; None if they do not."""
    meet = getattr(neuron, 'meet', None)
    return meet.integer if isinstance(meet, TableProduct) else None
