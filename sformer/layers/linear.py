"""Layers with weights: their input is spikes, their output a current."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import PatchEmbed

from ..neurons import DirectCoding, ScaleAndFire, SFNConfig

__all__ = ['SpikingLinear', 'SpikingConv2d', 'SpikingPatchEmbed']


class SpikingLinear(nn.Linear):
    """Linear layer on spikes, a threshold per input channel.

    A channel is a neuron, so its own threshold costs nothing: it folds into the column of weights that follows.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        bias: Add a bias.
        config: Neurons of the input.

    Shape:
        Input (..., in_features), output (..., out_features).
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            config: SFNConfig = SFNConfig(),
            device=None,
            dtype=None,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.add_neurons(config)

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.neuron = ScaleAndFire((self.in_features,), config, device=self.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.neuron(x), self.weight, self.bias)


class SpikingConv2d(nn.Conv2d):
    """Convolution on spikes, one threshold for the tensor.

    Built by `spiking_` from an `nn.Conv2d`, whose parameters it keeps.

    Shape:
        Input (B, C, H, W), output as of `nn.Conv2d`.
    """

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        self.neuron = ScaleAndFire((1,), config, device=self.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.neuron(x), self.weight, self.bias)


class SpikingPatchEmbed(PatchEmbed):
    """Patch embedding whose convolution reads directly coded 8-bit pixels."""

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        if not isinstance(getattr(self.proj, 'neuron', None), DirectCoding):
            self.proj.neuron = DirectCoding(self.proj.in_channels, device=self.proj.weight.device)
