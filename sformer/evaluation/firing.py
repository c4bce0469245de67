"""Firing rates: the share of neurons that send a spike."""
import contextlib
from typing import Dict, Iterator, Optional

import torch
import torch.nn as nn

from ..layers import named_neurons
from ..neurons import ScaleAndFire

__all__ = ['FiringRates', 'firing_rates']


class FiringRates:
    """Running firing rate per neuron site: the share of neurons that send a spike of whatever level.

    Pixels are coded directly and always fire, so the patch embedding is left out.
    """

    def __init__(self, fired: Optional[Dict[str, int]] = None, total: Optional[Dict[str, int]] = None) -> None:
        self.fired: Dict[str, int] = dict(fired or {})
        self.total: Dict[str, int] = dict(total or {})

    @contextlib.contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """Count the spikes of all forward passes inside of the context."""
        def hook(name):
            def count(neuron, args, out):
                self.fired[name] = self.fired.get(name, 0) + int(torch.count_nonzero(out))
                self.total[name] = self.total.get(name, 0) + out.numel()
            return count

        handles = [neuron.register_forward_hook(hook(name))
                   for name, neuron in named_neurons(model) if isinstance(neuron, ScaleAndFire)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, other: 'FiringRates') -> None:
        """Add the counts of other images."""
        for name in other.total:
            self.fired[name] = self.fired.get(name, 0) + other.fired[name]
            self.total[name] = self.total.get(name, 0) + other.total[name]

    def per_site(self) -> Dict[str, float]:
        """Firing rate per site, in [0, 1]."""
        return {name: self.fired[name] / self.total[name] for name in self.fired}

    def mean(self) -> Optional[float]:
        """Firing rate of all neurons of the model taken together."""
        total = sum(self.total.values())
        return sum(self.fired.values()) / total if total else None


@torch.inference_mode()
def firing_rates(model: nn.Module, images: torch.Tensor) -> Dict[str, float]:
    """Firing rate per site of an SFormer on normalised images (B, C, H, W), in [0, 1]."""
    rates = FiringRates()
    with rates.observe(model):
        model(images)
    return rates.per_site()
