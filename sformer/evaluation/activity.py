"""Activity, the share of neurons that send a spike, and spikes per neuron by the coding of a level."""
import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn

from ..layers import shared_copy
from ..layers.watch import watch_spikes
from ..neurons import Spikes
from ..neurons.coding import count_all_spikes

__all__ = ['Activity', 'activity']

_COUNTS = ('total', 'fired', 'unary', 'binary', 'lateral')


class Activity:
    """Running counts of spikes per neuron site, in integers.

    Pixels are graded spikes and always fire, so the patch embedding is left out.

    Args:
        counts: Per site `total` neurons, those that `fired` a level k other than 0, and the spikes that send their
            levels in `unary` code, |k|, and in `binary` code, the number of set bits of |k|, those among them by which
            neurons told one another what they left out; and of these in graded code, `lateral`.
    """

    def __init__(self, counts: dict[str, dict[str, int]] | None = None) -> None:
        self.counts: dict[str, dict[str, int]] = {name: dict(site) for name, site in (counts or {}).items()}

    @contextlib.contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """Count the spikes of all forward passes inside of the context, whoever calls the model."""
        with watch_spikes(model, lambda name, spikes: self._add(name, firing_counts(spikes))):
            yield

    def add(self, other: 'Activity') -> None:
        """Add the counts of other images."""
        for name, site in other.counts.items():
            self._add(name, site)

    def _add(self, name: str, site: dict[str, int]) -> None:
        counts = self.counts.setdefault(name, dict.fromkeys(_COUNTS, 0))
        for key in _COUNTS:
            counts[key] += site.get(key, 0)  # of a journal that knew no lateral spikes

    def per_site(self) -> dict[str, float]:
        """Activity per site, in [0, 1]."""
        return {name: site['fired'] / site['total'] for name, site in self.counts.items()}

    def mean(self) -> float | None:
        """Activity of all neurons of the model taken together, in [0, 1]; None if none was counted."""
        total = sum(site['total'] for site in self.counts.values())
        return sum(site['fired'] for site in self.counts.values()) / total if total else None

    def spikes_per_neuron(self) -> dict[str, float] | None:
        """Mean number of spikes per neuron of the model in `unary`, `binary` and `graded` code; None if none was
        counted. In graded code one spike carries k, so its figure is the activity, plus that of `lateral` spikes where
        there are some, which are in all of them."""
        total = sum(site['total'] for site in self.counts.values())
        if not total:
            return None
        sums = {key: sum(site[key] for site in self.counts.values()) for key in _COUNTS}
        spikes = dict(unary=sums['unary'], binary=sums['binary'], graded=sums['fired'] + sums['lateral'])
        if sums['lateral']:
            spikes['lateral'] = sums['lateral']
        return {code: count / total for code, count in spikes.items()}


def firing_counts(spikes: Spikes) -> dict[str, int]:
    counts = count_all_spikes(spikes)
    fired = int(spikes.levels.count_nonzero())
    return dict(total=spikes.levels.numel(), fired=fired, unary=counts['unary'], binary=counts['binary'],
                lateral=counts['graded'] - fired)


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
