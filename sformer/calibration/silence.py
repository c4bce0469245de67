"""Where a network may be silent: how much each site matters to the output, and so what a spike on it is worth.

A potential h that is silent instead of fired costs `w h^2`, where w is the mean squared gradient of the output; a spike
costs its price. So silence is worth it for |h| < q with `w q^2 = price`: one price for the whole network puts silence
where it is cheapest, without a search (a Lagrangian over all neurons).
"""
import math
from typing import Any, Callable, List

import torch
import torch.nn as nn

from ..errors import SFormerError
from ..neurons import ScaleAndFire

__all__ = ['Sensitivity', 'set_quiet_']

TINY = 1e-30  # what the output does not depend on is silent at any price


class Sensitivity(nn.Module):
    """Stands where a neuron is, lets currents pass, and sums up the squared gradients that come back.

    Attributes:
        squares: Sums per element of the neuron's step, float64, (*shape).
        count: Currents that passed.
    """

    def __init__(self, neuron: ScaleAndFire):
        super().__init__()
        self.neuron, self.count = neuron, 0
        self.squares = torch.zeros(neuron.step.shape, dtype=torch.float64, device=neuron.step.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += x.numel()
        # a node of its own, which has the gradient of this site alone; the first one of a path starts it
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        x.register_hook(self._add)
        return x

    def _add(self, gradient: torch.Tensor) -> None:
        rest = [d for d, n in enumerate((1,) * (gradient.ndim - self.squares.ndim) + self.squares.shape) if n == 1]
        self.squares += gradient.double().square().sum(rest, keepdim=True).view(self.squares.shape)


def set_quiet_(
        sites: List[Sensitivity],
        batches: List[Any],
        outputs: Callable[[Any], torch.Tensor],
) -> None:
    """Set the magnitude below which each neuron is silent, by the price of activity in its config.

    The squared gradient of all outputs together is estimated without bias by that of a sum of them with random signs
    (Hutchinson).

    Args:
        sites: Where neurons are in the network that `outputs` runs.
        batches: Images, or whatever the network reads.
        outputs: Output of the source network on a batch, with a graph.

    Raises:
        SFormerError: If the output is no tensor.
    """
    generator, power, images = torch.Generator().manual_seed(0), 0., 0
    with torch.inference_mode(False), torch.enable_grad():
        for batch in batches:
            out = outputs(batch)
            if not isinstance(out, torch.Tensor):
                raise SFormerError(f'a price of activity (silence) needs an output that is one tensor, got a '
                                   f'{type(out).__name__}: let forward_fn return it.')
            power += out.detach().double().square().sum().item()
            images += len(out)
            signs = torch.randint(0, 2, out.shape, generator=generator) * 2 - 1
            out.backward(signs.to(out))
    if not math.isfinite(power):
        return  # whoever observes the network next says where
    total = sum(site.count for site in sites)
    for site in sites:
        # squared relative error of the output per squared error of one neuron
        weight = site.squares / (site.count / site.squares.numel()) * (images / power)
        # activity counts each of `total / images` neurons alike
        quiet = (site.neuron.config.silence / (total / images) / weight.clamp_min(TINY)).sqrt()
        # the strongest key of a row, whose numerator is 1, fires whatever it costs: rows are divided by their spike sum
        site.neuron.set_quiet(quiet if site.neuron.signed else quiet.clamp_max(1.))
