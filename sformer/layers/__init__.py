"""Spiking counterparts of layers, the table that maps one to the other, and the verb that applies it."""
from . import adapters as _adapters  # noqa: F401  whoever adapts a spiking layer reads its spikes
from . import by_hand as _by_hand  # noqa: F401  which fills the table
from . import hierarchical as _hierarchical  # noqa: F401  likewise
from .attention import SpikingAttention, SpikingAttentionMixin
from .embedding import SpikingPatchEmbed
from .linear import SpikingConv2d, SpikingConvMixin, SpikingConvTranspose2d, SpikingLinear
from .mlp import SpikingGluMlp, SpikingMlp, SpikingSqueezeExcitation, SpikingSwiGLU
from .multiplying import Multiplying, Product, named_products
from .padding import present, valid_tokens
from .products import AttentionProduct, MixedProduct, ScoreProduct, ValueProduct
from .spiking import (
    check_weights_are_parameters,
    is_calibrated,
    named_neurons,
    ordinary_,
    ordinary_tensors,
    placed,
    revert_,
    shared_copy,
    source_view,
    spiking_,
    uncalibrated,
    unwrapped,
    without_neurons,
)
from .table import (
    FLOATING_LAYERS,
    SPIKING_LAYERS,
    SpikingLayer,
    constant_modules,
    register_floating,
    register_spiking,
)
from .windows import WindowedMixin, token_grid, windowed_

__all__ = [
    'Product', 'Multiplying', 'named_products', 'ScoreProduct', 'ValueProduct', 'MixedProduct',
    'AttentionProduct', 'SpikingAttention', 'SpikingAttentionMixin', 'SpikingConv2d', 'SpikingConvMixin',
    'SpikingConvTranspose2d', 'SpikingGluMlp', 'SpikingLayer', 'SpikingLinear', 'SpikingMlp', 'SpikingPatchEmbed',
    'SpikingSqueezeExcitation', 'SpikingSwiGLU', 'WindowedMixin', 'token_grid', 'windowed_', 'present', 'valid_tokens',
    'FLOATING_LAYERS', 'SPIKING_LAYERS', 'constant_modules', 'register_floating', 'register_spiking',
    'check_weights_are_parameters', 'is_calibrated', 'named_neurons', 'ordinary_', 'ordinary_tensors', 'placed',
    'revert_', 'shared_copy', 'source_view', 'spiking_', 'uncalibrated', 'unwrapped', 'without_neurons',
]
