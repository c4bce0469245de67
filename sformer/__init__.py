"""SFormer: timm vision transformers as single-timestep spiking transformers, training-free.

Importing the package registers the `sformer_*` models with timm.
"""
from importlib import metadata as _metadata

from .calibration import bypass_neurons
from .conversion import convert
from .errors import SFormerError, UncalibratedError, UnsupportedLayerError
from .evaluation import EvaluationConfig, activity, evaluate, evaluate_all
from .hub import load_model, save_model
from .layers import named_neurons, spiking_
from .models import SFormer, is_calibrated, source_of
from .neurons import SFNConfig

__version__ = _metadata.version('sformer')
__all__ = [
    'convert', 'evaluate', 'evaluate_all', 'EvaluationConfig', 'activity', 'save_model', 'load_model', 'is_calibrated',
    'source_of',
    'SFNConfig', 'SFormer', 'spiking_', 'named_neurons', 'bypass_neurons',
    'SFormerError', 'UncalibratedError', 'UnsupportedLayerError',
]
