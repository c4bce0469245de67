"""What an SFormer is compared with: spiking networks of several timesteps and quantised networks, of the same source,
fitted to the same images, with neurons at the same sites."""
from .comparison import COMPARISON, Comparison
from .counting import profile_steps
from .quantised import Quantiser, quantised, quantised_twin, twin_bits
from .rows import comparison_rows
from .stepped import IntegrateAndFire, MultiStep, MultiThreshold, integrate_and_fire_network, multi_threshold_network
from .toolkits import nncf_int8, torchao_int8

__all__ = [
    'COMPARISON', 'Comparison', 'IntegrateAndFire', 'MultiStep', 'MultiThreshold', 'Quantiser', 'comparison_rows',
    'integrate_and_fire_network', 'multi_threshold_network', 'nncf_int8', 'profile_steps', 'quantised',
    'quantised_twin', 'torchao_int8', 'twin_bits',
]
