"""Layers with weights: their input is spikes, their output a current."""
from typing import Any, Optional

import torch
import torch.nn as nn
from timm.layers import PatchEmbed

from ..neurons import GradedCoding, Neuron, ScaleAndFire, SFNConfig
from . import products
from .table import SpikingLayer, register_spiking

__all__ = ['SpikingLinear', 'SpikingConv2d', 'SpikingPatchEmbed']


@register_spiking(nn.Linear)
class SpikingLinear(SpikingLayer, nn.Linear):
    """Linear layer on spikes, with a step per input channel.

    A channel is a neuron, so its own step costs nothing: it folds into the column of weights that follows.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        bias: Add a bias.
        config: Neurons of the input.

    Shape:
        Input (..., in_features), output (..., out_features). With `fired`, the input is what the neuron fired already.
    """
    spiking_parts = ('neuron',)

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

    def add_neurons(self, config: SFNConfig, activated: bool = False) -> None:
        self.neuron = ScaleAndFire(
            (self.in_features,), config, folds=True, token=True, activated=activated, device=self.weight.device)

    def forward(self, x: torch.Tensor, fired: bool = False) -> torch.Tensor:
        return products.linear(None if fired else self.neuron, x, self.weight, self.bias)


@register_spiking(nn.Conv2d)
class SpikingConv2d(SpikingLayer, nn.Conv2d):
    """Convolution on spikes, one step for the tensor; made by `spiking_` of an `nn.Conv2d`.

    Shape:
        Input (B, C, H, W), output as of `nn.Conv2d`. With `fired`, the input is what the neuron fired already.
    """
    spiking_parts = ('neuron',)
    neuron: Optional[Neuron]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.neuron = None  # as in the layers of this class that peft adds to one that fires

    def add_neurons(self, config: SFNConfig) -> None:
        self.neuron = ScaleAndFire((1,), config, device=self.weight.device)

    def forward(self, x: torch.Tensor, fired: bool = False) -> torch.Tensor:
        if self.neuron is not None and not fired:
            x = self.neuron(x)
        return self._conv_forward(x, self.weight, self.bias)


@register_spiking(PatchEmbed)
class SpikingPatchEmbed(SpikingLayer, PatchEmbed):
    """Patch embedding whose convolution reads 8-bit pixels as graded spikes."""
    proj: Any

    def add_neurons(self, config: SFNConfig) -> None:
        if not isinstance(getattr(self.proj, 'neuron', None), GradedCoding):
            self.proj.neuron = GradedCoding(self.proj.in_channels, device=self.proj.weight.device)
