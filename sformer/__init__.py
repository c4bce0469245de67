"""SFormer: timm vision transformers as single-timestep spiking transformers, training-free.

Importing the package registers the `sformer_*` models with timm.
"""
import sys as _sys
from importlib import metadata as _metadata
from pathlib import Path as _Path


def _is_command_line() -> bool:
    """Whether this process is `sformer ...` or `python -m sformer ...`, whose commands import what they need by
    themselves, so that `sformer --help` does not wait for torch."""
    if _sys.argv[:1] == ['-m']:  # as long as Python looks for the module
        words = _sys.orig_argv
        return '-m' in words and words[words.index('-m') + 1] == 'sformer'
    script = _Path(_sys.argv[0] if _sys.argv else '')
    return script.stem == 'sformer' and script.parent == _Path(_sys.executable).parent


if not _is_command_line():
    from .calibration import bypass_neurons
    from .conversion import convert
    from .errors import SFormerError, UncalibratedError, UnsupportedLayerError
    from .evaluation import evaluate, firing_rates
    from .hub import load_model, save_model
    from .layers import named_neurons, spiking_
    from .models import SFormer, is_calibrated, source_of
    from .neurons import SFNConfig

__version__ = _metadata.version('sformer')
__all__ = [
    'convert', 'evaluate', 'save_model', 'load_model', 'firing_rates', 'is_calibrated', 'source_of',
    'SFNConfig', 'SFormer', 'spiking_', 'named_neurons', 'bypass_neurons',
    'SFormerError', 'UncalibratedError', 'UnsupportedLayerError',
]
