"""Tasks, and the one door through which models of all of them are opened, loaded and saved.

A task is a file in this folder that registers it.
"""
import importlib as _importlib
import pkgutil as _pkgutil

from .door import load_model, one_task, open_model, register_task, save_model, task_named, task_of, tasks
from .predicting import Predictor, open_predictor, predict
from .task import OPTIONS, ConversionOptions, Description, EvaluationRequest, ExportOptions, Look, Task

for _found in _pkgutil.iter_modules(__path__):
    _importlib.import_module(f'{__name__}.{_found.name}')

__all__ = [
    'OPTIONS', 'ConversionOptions', 'Description', 'EvaluationRequest', 'ExportOptions', 'Look', 'Predictor', 'Task',
    'load_model', 'one_task', 'open_model', 'open_predictor', 'predict', 'register_task', 'save_model', 'task_named',
    'task_of', 'tasks',
]
