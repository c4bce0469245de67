"""Spiking neurons: the mathematics of thresholds, levels and steps, and how they are fitted to observed currents.

No timm, no files: currents are tensors, and everything here works on any of them. A neuron type is a subclass of
`Neuron` with `encode`, `statistics` and `fit`.
"""
from .base import Float32Buffers, Neuron, Spikes
from .coding import CODINGS, count_levels, count_spikes, spikes_in
from .config import (
    DEFAULT_RANGE,
    FIRE_FUNCTIONS,
    RECIPES,
    SOFTMAX_FIRE_FUNCTIONS,
    FitConfig,
    Recipe,
    SFNConfig,
    as_config,
    recipe_configs,
    recipe_name,
)
from .functional import (
    MAX_BYTE_LEVEL,
    MAX_LEVEL,
    MAX_WIDE_LEVEL,
    fire,
    firing_boundaries,
    integrate_and_fire,
    level_values,
    max_levels,
    multi_threshold,
    straight_through,
)
from .graded import GradedCoding
from .scale_and_fire import ScaleAndFire
from .statistics import CurrentStatistics

__all__ = [
    'MAX_LEVEL', 'MAX_BYTE_LEVEL', 'MAX_WIDE_LEVEL', 'FIRE_FUNCTIONS', 'SOFTMAX_FIRE_FUNCTIONS', 'DEFAULT_RANGE',
    'SFNConfig', 'FitConfig', 'as_config', 'RECIPES', 'Recipe', 'recipe_configs', 'recipe_name',
    'integrate_and_fire', 'multi_threshold', 'max_levels', 'level_values', 'firing_boundaries', 'fire',
    'straight_through', 'Float32Buffers', 'Neuron', 'Spikes', 'ScaleAndFire', 'GradedCoding', 'CurrentStatistics',
    'CODINGS', 'count_levels', 'count_spikes', 'spikes_in',
]
