"""SFormer: timm vision transformers as single-timestep spiking transformers, training-free.

Importing the package registers the `sformer_*` models with timm, and detectors with torchvision.
"""
from importlib import metadata as _metadata

from . import cli as _cli  # noqa: F401  Ctrl-C ends in a line; before anything that is slow
from . import detection as _detection  # noqa: F401  registers with torchvision
from .conversion import calibrate_, convert, source_of
from .errors import SFormerError, UncalibratedError, UnsupportedLayerError
from .evaluation import EvaluationConfig, activity, evaluate, evaluate_all
from .execution import export_onnx, load_onnx, to_integer_, to_spikes_
from .layers import is_calibrated, named_neurons, source_view, spiking_
from .models import SFormer
from .neurons import FitConfig, SFNConfig
from .profiling import neurobench_view
from .saving import entrypoints as _entrypoints  # noqa: F401  registers with timm
from .saving import load_model, save_model

__version__ = _metadata.version('sformer')
__all__ = [
    'convert', 'evaluate', 'evaluate_all', 'activity', 'save_model', 'load_model', 'spiking_', 'calibrate_',
    'to_integer_', 'to_spikes_', 'export_onnx', 'load_onnx', 'is_calibrated', 'named_neurons', 'source_of',
    'source_view', 'neurobench_view', 'SFNConfig', 'FitConfig', 'EvaluationConfig', 'SFormer',
    'SFormerError', 'UncalibratedError', 'UnsupportedLayerError',
]
