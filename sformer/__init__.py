"""SFormer: timm vision transformers as single-timestep spiking transformers, training-free.

Importing the package registers the `sformer_*` models with timm, and detectors with torchvision; its names are loaded
when they are asked for. The command `sformer`, whose help and usage errors wait for none of that, registers models when
it imports `sformer.saving`, and detectors with `sformer.detection`.
"""
import importlib
import importlib.util
from importlib import metadata as _metadata
from typing import TYPE_CHECKING, Any, List

from .cli.failure import is_command as _is_command  # first of all: from here on Ctrl-C ends in a line
from .errors import SFormerError, UncalibratedError, UnsupportedLayerError

if TYPE_CHECKING:
    from .conversion import calibrate_, convert, source_of
    from .evaluation import EvaluationConfig, activity, evaluate, evaluate_all
    from .execution import export_onnx, export_safetensors, load_onnx, to_integer_, to_spikes_
    from .layers import is_calibrated, named_neurons, source_view, spiking_
    from .models import SFormer
    from .neurons import FitConfig, SFNConfig
    from .profiling import neurobench_view
    from .tasks import load_model, predict, save_model
else:
    _WINGS = ('neurons', 'layers', 'models', 'conversion', 'execution', 'saving', 'evaluation', 'profiling', 'tasks')

    def __getattr__(name: str) -> Any:
        for wing in _WINGS if name in __all__ else ():
            found = importlib.import_module(f'.{wing}', __name__)
            if name in found.__all__:
                return getattr(found, name)
        if not name.startswith('_') and importlib.util.find_spec(f'{__name__}.{name}'):
            return importlib.import_module(f'.{name}', __name__)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def __dir__() -> List[str]:
        return sorted({*globals(), *__all__})

__version__ = _metadata.version('sformer')
__all__ = [
    'convert', 'predict', 'evaluate', 'evaluate_all', 'activity', 'save_model', 'load_model', 'spiking_',
    'calibrate_', 'to_integer_', 'to_spikes_', 'export_onnx', 'export_safetensors', 'load_onnx', 'is_calibrated',
    'named_neurons', 'source_of', 'source_view', 'neurobench_view', 'SFNConfig', 'FitConfig', 'EvaluationConfig',
    'SFormer', 'SFormerError', 'UncalibratedError', 'UnsupportedLayerError',
]

if not _is_command():
    from . import detection, saving  # noqa: F401  register what they have
