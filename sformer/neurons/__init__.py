"""Spiking neurons: the mathematics of thresholds, levels and steps, and how they are fitted to observed currents.

No timm, no files: currents are tensors, and everything here works on any of them. A neuron type is a subclass of
`Neuron` with `encode`, `statistics` and `fit`. Configs need no torch: whoever wants no more than them does not wait for
it.
"""
import importlib
from typing import TYPE_CHECKING

from .config import (
    DEFAULT_RANGE,
    FIRE_FUNCTIONS,
    NEURON_TYPES,
    RECIPES,
    SOFTMAX_FIRE_FUNCTIONS,
    FitConfig,
    Recipe,
    SFNConfig,
    as_config,
    recipe_configs,
    recipe_name,
)
from .levels import MAX_BYTE_LEVEL, MAX_LEVEL, MAX_WIDE_LEVEL, max_levels

if TYPE_CHECKING:
    from .base import Float32Buffers, Neuron, Spikes
    from .coding import CODINGS, count_levels, count_spikes, spikes_in
    from .functional import (
        fire,
        firing_boundaries,
        integrate_and_fire,
        level_values,
        multi_threshold,
        straight_through,
    )
    from .graded import GradedCoding, PatchCoding
    from .lateral import LateralScaleAndFire
    from .registry import new_neuron, register_neuron
    from .scale_and_fire import ScaleAndFire
    from .shared import SharedScaleAndFire
    from .statistics import CurrentStatistics
else:
    _MODULES = ('base', 'coding', 'functional', 'graded', 'lateral', 'registry', 'scale_and_fire', 'shared',
                'statistics')

    def __getattr__(name: str) -> object:
        for module in _MODULES if name in __all__ else ():
            found = importlib.import_module(f'.{module}', __name__)
            if name in found.__all__:
                return getattr(found, name)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

__all__ = [
    'MAX_LEVEL', 'MAX_BYTE_LEVEL', 'MAX_WIDE_LEVEL', 'FIRE_FUNCTIONS', 'SOFTMAX_FIRE_FUNCTIONS', 'DEFAULT_RANGE',
    'SFNConfig', 'FitConfig', 'as_config', 'RECIPES', 'Recipe', 'recipe_configs', 'recipe_name',
    'integrate_and_fire', 'multi_threshold', 'max_levels', 'level_values', 'firing_boundaries', 'fire',
    'straight_through', 'Float32Buffers', 'Neuron', 'Spikes', 'ScaleAndFire', 'SharedScaleAndFire',
    'LateralScaleAndFire', 'GradedCoding', 'PatchCoding', 'CurrentStatistics', 'register_neuron', 'new_neuron',
    'NEURON_TYPES', 'CODINGS', 'count_levels', 'count_spikes', 'spikes_in',
]
