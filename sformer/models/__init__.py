"""Spiking models, and the table of the zoo."""
from .sformer import (
    HEADS,
    PLAIN_MODELS,
    SFormer,
    SFormerBeit,
    SFormerDistilled,
    SFormerEva,
    SFormerMixin,
    head_names,
    is_encoder,
    set_norm_eps_,
    set_pixel_range_,
    source_filter,
    spiking_model_,
    spiking_root,
    state_input_size_,
)

__all__ = [
    'HEADS', 'PLAIN_MODELS', 'SFormer', 'SFormerBeit', 'SFormerDistilled', 'SFormerEva', 'SFormerMixin', 'head_names',
    'is_encoder', 'set_norm_eps_', 'set_pixel_range_', 'source_filter', 'spiking_model_', 'spiking_root',
    'state_input_size_',
]
