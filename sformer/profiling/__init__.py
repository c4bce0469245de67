"""What an SFormer computes, fires and costs: counts at every product, and energy with every constant named."""
from .energy import Constants, energy, verdicts
from .operations import Operation, Site, profile_operations

__all__ = ['Constants', 'Operation', 'Site', 'energy', 'profile_operations', 'verdicts']
