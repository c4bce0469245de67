"""What an SFormer computes, fires and costs: counts at every product, and energy with every constant named."""
from .constants import Constants, constants_table, read_constants
from .energy import energy, traffic, verdicts
from .executed import compare_codings, pixels_of, spike_maps
from .floating import Floating
from .neurobench import neurobench_view
from .operations import Operation, Profile, Site, profile_model, profile_operations

__all__ = [
    'Constants', 'Floating', 'Operation', 'Profile', 'Site', 'compare_codings', 'constants_table', 'energy',
    'neurobench_view', 'pixels_of', 'profile_model', 'profile_operations', 'read_constants', 'spike_maps', 'traffic',
    'verdicts',
]
