"""MLPs and gates: their layers with weights spike, and so do both operands where two activations are multiplied."""
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models._features_fx import register_notrace_module
from timm.models.gemma4_vit import Gemma4GatedMlp
from timm.models.vitamin import GeGluMlp
from torchvision.ops import SqueezeExcitation

from ..neurons import SFNConfig, new_neuron
from . import products
from .linear import SpikingLinear
from .meeting import MeetingMixin
from .multiplying import GATE, Product
from .table import SpikingLayer, register_spiking

__all__ = ['SpikingMlp', 'SpikingGluMlp', 'SpikingSwiGLU', 'SpikingSqueezeExcitation']


@register_spiking(Mlp)
class SpikingMlp(SpikingLayer, Mlp):
    """MLP whose second layer fires as suits what comes from an activation function.

    Shape:
        Input and output (..., C).
    """
    def add_neurons(self, config: SFNConfig) -> None:
        _add_fc2_neuron(self, config, config.mlp_fire)


def _add_fc2_neuron(mlp: 'SpikingMlp | SpikingGateMixin', config: SFNConfig, fire_function: str) -> None:
    """Let `fc2` fire by the distribution of what an activation function leaves; a filter may have left it as it is, and
    a norm turns its input into what linear layers read elsewhere."""
    if isinstance(mlp.norm, nn.Identity):
        _read_gated(mlp.fc2, config, fire_function)


def _read_gated(layer: nn.Module, config: SFNConfig, fire_function: str) -> None:
    if isinstance(layer, SpikingLinear):
        layer.add_neurons(config, fire_function)
        layer.neuron.unbounded = True


class SpikingGateMixin(SpikingLayer):
    """Gate (after its activation function) and value spike before their product, with a step per channel.

    Shape:
        Input and output (B, L, C).
    """
    spiking_parts = ('gate_neuron', 'value_neuron')
    fc2: nn.Linear
    act: nn.Module
    norm: nn.Module
    drop1: nn.Module
    drop2: nn.Module

    def add_neurons(self, config: SFNConfig) -> None:
        shape, device = (self.fc2.in_features,), self.fc2.weight.device
        self.gate_neuron = new_neuron(shape, config, token=True, device=device)
        self.value_neuron = new_neuron(shape, config, token=True, device=device)
        _add_fc2_neuron(self, config, config.gated_fire)

    def gate_and_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Currents of the gate, before its activation function, and of the value."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.gate_and_value(x)
        x = products.multiply(self.gate_neuron, self.act(gate), self.value_neuron, value)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

    def multiplies(self) -> list[Product]:
        return [Product(GATE, (self.gate_neuron, self.value_neuron), torch.mul)]


@register_spiking(GluMlp)
class SpikingGluMlp(SpikingGateMixin, GluMlp):  # type: ignore[misc]
    """Gated MLP with packed weights."""

    def gate_and_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.fc1(x).chunk(2, dim=self.chunk_dim)
        return (second, first) if self.gate_last else (first, second)


@register_spiking(SwiGLU)
class SpikingSwiGLU(SpikingGateMixin, SwiGLU):  # type: ignore[misc]
    """Gated MLP with separate weights."""

    def gate_and_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fc1_g(x), self.fc1_x(x)


@register_spiking(SqueezeExcitation)
class SpikingSqueezeExcitation(SpikingLayer, SqueezeExcitation):
    """Gate per channel, made of the mean over all places, that spikes before it multiplies the value.

    Shape:
        Input and output (B, C, H, W).
    """
    spiking_parts = ('gate_neuron', 'value_neuron')
    fc2: nn.Conv2d
    _scale: Callable[[torch.Tensor], torch.Tensor]

    def add_neurons(self, config: SFNConfig) -> None:
        shape, device = (self.fc2.out_channels, 1, 1), self.fc2.weight.device
        self.gate_neuron = new_neuron(shape, config, device=device)
        self.value_neuron = new_neuron(shape, config, device=device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return products.multiply(self.gate_neuron, self._scale(input), self.value_neuron, input)

    def multiplies(self) -> list[Product]:
        return [Product(GATE, (self.gate_neuron, self.value_neuron), torch.mul)]


class _MetGateMixin(MeetingMixin):
    """A gated MLP with a forward of timm's own: gate and value spike before their product, with a step per channel.

    Shape:
        Input and output (B, L, C).
    """
    gate_functions = (F.gelu,)
    reader: str  # path of the layer that reads the product

    def add_neurons(self, config: SFNConfig) -> None:
        layer = self.get_submodule(self.reader)
        assert isinstance(layer, nn.Linear)
        self.add_gate((layer.in_features,), config)
        _read_gated(layer, config, config.gated_fire)


@register_notrace_module
@register_spiking(GeGluMlp)
class SpikingGeGluMlp(_MetGateMixin, GeGluMlp):  # type: ignore[misc]
    """ViTamin's gated MLP."""
    reader = 'w2'


@register_notrace_module
@register_spiking(Gemma4GatedMlp)
class SpikingGemma4GatedMlp(_MetGateMixin, Gemma4GatedMlp):  # type: ignore[misc]
    """Gemma's gated MLP."""
    reader = 'down_proj.linear'
