"""Where a model lies and how it comes back: folders, the Hub, the weights of the zoo, and timm's registry."""
from . import entrypoints as _entrypoints  # noqa: F401  registers with timm
from .folders import check_vacant, load_classifier, open_classifier, save_classifier, weights_of, write_model
from .model_config import CONFIG_NAME, WEIGHTS_NAME

__all__ = [
    'CONFIG_NAME', 'WEIGHTS_NAME', 'check_vacant', 'load_classifier', 'open_classifier', 'save_classifier',
    'weights_of', 'write_model',
]
