"""MLPs: their linear layers spike, what is left to decide is the range of the activation in between."""
import torch
import torch.nn as nn
from timm.layers import Mlp

from ..neurons import DEFAULT_RANGE, SFNConfig

__all__ = ['SpikingMlp']


class SpikingMlp(Mlp):
    """MLP whose hidden activation is lopsided, as GELU's range of -0.17 ... +10 is.

    `fc1` and `fc2` spike as any linear layer does. The default threshold of the negative branch of `fc2` covers just
    the negative range of the activation function, so that an uncalibrated branch is not wasted either.
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        threshold = self.fc2.neuron.threshold
        if threshold.is_meta or not isinstance(self.norm, nn.Identity):
            return
        with torch.no_grad():
            current = torch.linspace(-DEFAULT_RANGE, DEFAULT_RANGE, 801, dtype=torch.float32)
            low = -self.act(current).min().clamp(max=-1e-3)
        threshold[1] = low / self.fc2.neuron.levels[-1]
