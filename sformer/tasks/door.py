"""Which task a model is of, and the door to models of all tasks."""
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.nn as nn

from ..conversion.places import named_place
from ..errors import SFormerError
from ..execution.exported import read_exported
from ..files import Json
from ..saving.model_config import CONFIG_NAME
from .task import Task

__all__ = ['load_model', 'one_task', 'open_model', 'register_task', 'save_model', 'task_named', 'task_of', 'tasks']

_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make a task known to commands and cards."""
    _TASKS[task.name] = task
    return task


def task_named(name: str) -> Task:
    """A task by its name."""
    return _TASKS[name]


def tasks() -> Iterator[Task]:
    """All tasks, the one of what no other claims last."""
    yield from sorted(_TASKS.values(), key=lambda task: (not task.key, task.key))


def task_of(
        model: str | Path | nn.Module,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
) -> Task:
    """The task of a model.

    Args:
        model: The model, its name, or its folder.
        revision: Branch, tag or commit of a model on the Hub.
        cache_dir: Cache to use; the Hub client's own if None.

    Raises:
        SFormerError: If it is on the Hub, and its config cannot be had; or a graph is damaged, or of another
            origin.
    """
    if isinstance(model, nn.Module):
        return next(task for task in tasks() if task.owns(model) or not task.key)
    name = str(model)
    known = next((task for task in tasks() if name in task.names()), None)
    if known and not Path(name).is_dir():
        return known
    if name.endswith('.onnx') and Path(name).is_file():
        _, config = read_exported(name)
    else:
        config = _config(name, revision, cache_dir)
    return next(task for task in tasks() if task.key in config or not task.key)


def _config(name: str, revision: str | None, cache_dir: str | Path | None) -> Json:
    """The config in a folder or a repository; nothing where there is none, of which whoever reads it says what is
    wrong."""
    place = named_place(f'{name}@{revision}' if revision and '@' not in name else name, cache_dir)
    path = place.find(CONFIG_NAME, optional=False) if place else None
    try:
        config = json.loads(path.read_text(encoding='utf-8')) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def one_task(names: Sequence[str]) -> Task:
    """The task that models have in common.

    Raises:
        SFormerError: If they have none, so that no figure compares them; or a config on the Hub cannot be had.
    """
    found = {name: task_of(name) for name in names}
    first = found[names[0]]
    for name, task in found.items():
        if task is not first:
            raise SFormerError(f'{names[0]} is a {first.noun}, {name} is a {task.noun}: nothing compares them.')
    return first


def open_model(name: str, verb: str | None = None) -> nn.Module:
    """A model by its folder, `local-dir:` or `hf-hub:` name, or name of a timm model with weights.

    Args:
        name: Its name.
        verb: Command that it is for, if only some tasks have it.

    Raises:
        SFormerError: If there is no such model, its weights can't be loaded, or the command does not take it.
    """
    task = task_of(name)
    if verb:
        task.check_verb(verb, name)
    return task.open(name)


def load_model(
        path: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: object,
) -> nn.Module:
    """Load a saved model of any task, in eval mode.

    Args:
        path: Folder written by `save_model`, or `hf-hub:org/name`, or `hf-hub:org/name@revision`.
        revision: Branch, tag or commit of a model on the Hub.
        cache_dir: Cache to use; the Hub client's own if None.
        **kwargs: Of a classifier, passed to `timm.create_model`.

    Returns:
        The model; of an SFormer, `model.conversion` is the record of its conversion.

    Raises:
        SFormerError: If the model is not there or incomplete, its weights are damaged or not those that the config
            records, or the config tries to direct the loader.
    """
    return task_of(path, revision, cache_dir).load(path, revision, cache_dir, **kwargs)


def save_model(model: nn.Module, directory: str | Path, overwrite: bool = False) -> Path:
    """Save a model of any task as a folder: `model.safetensors`, and `config.json` with the record of its conversion.

    Both files are written aside and renamed: until they are complete the old model is the one that is there.

    Args:
        model: Calibrated SFormer, or a detector.
        directory: Folder to write to.
        overwrite: Replace a model that is there already.

    Returns:
        The folder.

    Raises:
        UncalibratedError: If the thresholds were never fitted.
        SFormerError: If the folder holds a model, can't be written to, or the model can't be rebuilt from a config.
    """
    return task_of(model).save(model, directory, overwrite)
