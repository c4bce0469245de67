"""What errors of currents cost a network, and so what neurons of a site feed back to one another.

To second order an error e of the current at a site costs the output `e' H e` with `H = E[g g']`, where g is the
gradient of an output: the weights that follow, LayerScale, what queries look at and everything further down are in it,
in whatever layer. Of a network that is this layer alone, it is `W' W`.
"""
import torch

from ..neurons import LateralScaleAndFire
from .silence import Sensitivity

__all__ = ['ErrorCost', 'cost_bytes']


def cost_bytes(neuron: LateralScaleAndFire) -> int:
    """Memory that an `ErrorCost` of a neuron takes."""
    return 4 * neuron.step.numel() * neuron.step.shape[-1]


class ErrorCost(Sensitivity):
    """Stands where a neuron is, lets currents pass, and sums up outer products of the gradients that come back.

    Attributes:
        cost: Sum of `g g'`, float32 (C, C), or one per head, (H, C, C).
    """

    def __init__(self, neuron: LateralScaleAndFire):
        super().__init__(neuron)
        channels = neuron.step.shape[-1]
        self.cost = torch.zeros(*neuron.heads, channels, channels, device=neuron.step.device)

    def _add(self, current: torch.Tensor, gradient: torch.Tensor) -> None:
        g = gradient.to(torch.float32)
        if self.cost.ndim == 2:
            g = g.flatten(0, -2)
        else:  # (B, H, L, C)
            g = g.transpose(0, 1).flatten(1, 2)
        self.cost += g.mT @ g
