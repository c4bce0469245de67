"""Activity, the share of neurons that send a spike, and spikes per neuron by the coding of a level."""
import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn

from ..layers import shared_copy
from ..layers.watch import watch_levels
from ..neurons import count_spikes

__all__ = ['Activity', 'activity']

_COUNTS = ('total', 'fired', 'unary', 'binary')


class Activity:
    """Running counts of spikes per neuron site, in integers.

    Pixels are graded spikes and always fire, so the patch embedding is left out.

    Args:
        counts: Per site `total` neurons, those that `fired` a level k other than 0, and the spikes that send their
            levels in `unary` code, |k|, and in `binary` code, the number of set bits of |k|.
    """

    def __init__(self, counts: dict[str, dict[str, int]] | None = None) -> None:
        self.counts: dict[str, dict[str, int]] = {name: dict(site) for name, site in (counts or {}).items()}

    @contextlib.contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """Count the spikes of all forward passes inside of the context, whoever calls the model."""
        with watch_levels(model, lambda name, levels: self._add(name, firing_counts(levels))):
            yield

    def add(self, other: 'Activity') -> None:
        """Add the counts of other images."""
        for name, site in other.counts.items():
            self._add(name, site)

    def _add(self, name: str, site: dict[str, int]) -> None:
        counts = self.counts.setdefault(name, dict.fromkeys(_COUNTS, 0))
        for key in _COUNTS:
            counts[key] += site[key]

    def per_site(self) -> dict[str, float]:
        """Activity per site, in [0, 1]."""
        return {name: site['fired'] / site['total'] for name, site in self.counts.items()}

    def mean(self) -> float | None:
        """Activity of all neurons of the model taken together, in [0, 1]; None if none was counted."""
        return self._per_neuron('fired')

    def spikes_per_neuron(self) -> dict[str, float] | None:
        """Mean number of spikes per neuron of the model in `unary`, `binary` and `graded` code; None if none was
        counted. In graded code one spike carries k, so its figure is the activity."""
        figures = {code: self._per_neuron(key) for code, key in
                   (('unary', 'unary'), ('binary', 'binary'), ('graded', 'fired'))}
        return {code: figure for code, figure in figures.items() if figure is not None} or None

    def _per_neuron(self, key: str) -> float | None:
        total = sum(site['total'] for site in self.counts.values())
        return sum(site[key] for site in self.counts.values()) / total if total else None


def firing_counts(levels: torch.Tensor) -> dict[str, int]:
    spikes = count_spikes(levels)
    return dict(total=levels.numel(), fired=spikes['graded'], unary=spikes['unary'], binary=spikes['binary'])


@torch.inference_mode()
def activity(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Activity per site of an SFormer: the share of its neurons that send a spike, in [0, 1].

    Args:
        model: SFormer. It may be in use by another thread meanwhile.
        images: Normalised images (B, C, H, W).
    """
    counts, model = Activity(), shared_copy(model)
    with counts.observe(model):
        model(images)
    return counts.per_site()
