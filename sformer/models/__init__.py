"""Spiking models, and the table of the zoo."""
from .sformer import (
    HEADS,
    SPIKING_MODELS,
    SFormer,
    SFormerBeit,
    SFormerDistilled,
    SFormerEva,
    SFormerMixin,
    set_norm_eps_,
    set_pixel_range_,
    spiking_model_,
    state_input_size_,
)

__all__ = [
    'HEADS', 'SPIKING_MODELS', 'SFormer', 'SFormerBeit', 'SFormerDistilled', 'SFormerEva', 'SFormerMixin',
    'set_norm_eps_', 'set_pixel_range_', 'spiking_model_', 'state_input_size_',
]
