"""What an SFormer computes, fires and costs: counts at every product, and energy with every constant named."""
from .constants import Constants, constants_table, read_constants
from .energy import energy, traffic, verdicts
from .floating import Floating
from .operations import Operation, Profile, Site, profile_model, profile_operations

__all__ = [
    'Constants', 'Floating', 'Operation', 'Profile', 'Site', 'constants_table', 'energy', 'profile_model',
    'profile_operations', 'read_constants', 'traffic', 'verdicts',
]
