"""Spiking counterparts of timm layers, and the table that maps one to the other."""
from . import attention, linear, mlp
from .attention import SpikingAttention
from .linear import SpikingConv2d, SpikingLinear, SpikingPatchEmbed
from .mlp import SpikingMlp
from .registry import FLOATING_LAYERS, SPIKING_LAYERS, named_neurons, spiking_

__all__ = [
    'attention', 'linear', 'mlp',
    'SpikingAttention', 'SpikingConv2d', 'SpikingLinear', 'SpikingMlp', 'SpikingPatchEmbed',
    'FLOATING_LAYERS', 'SPIKING_LAYERS', 'named_neurons', 'spiking_',
]
