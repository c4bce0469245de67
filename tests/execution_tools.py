"""Which networks tests export: a few kinds of neurons by default, every fire function and family slowly."""
import pytest
from layer_tools import FAMILIES

from sformer import SFNConfig

FAST = dict(token_scale=False, attention_fire='byte')
FEW_CONFIGS = [SFNConfig(), SFNConfig.recipe('fast'), SFNConfig(127, **FAST)]
MORE_CONFIGS = [
    SFNConfig(127), SFNConfig(8), SFNConfig(20, fire='quarter_square'), SFNConfig(100, **FAST),
    SFNConfig(18, fire='widening'),
    SFNConfig(127, token_scale=False, attention_fire='uniform'), SFNConfig(32, token_scale=False, silence=0.03),
    SFNConfig(32, silence=0.03, **FAST), SFNConfig(8, silence=0.03), SFNConfig(40, silence=0.03),
    SFNConfig(40, silence=0.03, keys_rest=True), SFNConfig(32, silence=0.03, keys_rest=True, **FAST),
    SFNConfig(9, token_scale=False, fire='density'), SFNConfig(12, fire='density', attention_fire='density'),
    SFNConfig(8, fire='density', initial_potential=0.), SFNConfig(7, fire='power2', attention_fire='power2'),
    SFNConfig(6, dead_zone=0.8), SFNConfig(9, fire='quadratic', initial_potential=0.),
    SFNConfig(3, fire='quartic', initial_potential=0.3)]

# family, config and number of blocks; exporting each takes seconds
NETWORKS = [
    *(('vit', config, 1) for config in FEW_CONFIGS), ('eva02', SFNConfig(), 1),
    *(pytest.param(*network, marks=pytest.mark.slow) for network in (
        *(('vit', config, 1) for config in MORE_CONFIGS),
        *((family, config, 2) for family in FAMILIES for config in (SFNConfig(), SFNConfig(127, **FAST)))))]
