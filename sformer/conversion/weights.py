"""Files of weights: what they hold, whatever they are wrapped in, without running code of theirs."""
import argparse
import ast
import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import SFormerError, first_line, quiet
from ..files import Json, check_content, is_safetensors, read_safetensors
from ..models.sformer import State

__all__ = ['Weights', 'read_weights']

INDEX = '.index.json'  # of a file of weights in parts
# where a training keeps weights; averaged ones first, as timm does, since they are what it validates
NESTED = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'module')
PREFIXES = ('module.', '_orig_mod.', 'model.')  # of DataParallel, torch.compile, Lightning


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file holds.

    Args:
        state: State dict.
        kept_as: Name of the entry that held it; '' if the file is nothing else.
        entries: What else is in the file: metadata of safetensors, entries of a pickled training and its `args`.
    """
    state: State
    kept_as: str
    entries: Json


def read_weights(path: Path, find: Callable[[str], Path | None] | None = None) -> Weights:
    """Read a file of weights: safetensors, by whatever name, or a pickle of tensors, or the index of several.

    Args:
        path: The file.
        find: Finds a file that lies beside it, by its name; None where there is none.

    Raises:
        SFormerError: If it is missing or damaged, or would run code.
    """
    if not path.is_file():
        raise SFormerError(f'no checkpoint at {path}.')
    if path.name.endswith(INDEX):
        return _read_parts(path, find or (lambda name: path.parent / name))
    check_content(path)
    if path.suffix == '.safetensors' or is_safetensors(path):
        state = read_safetensors(path)
        with safe_open(path, framework='pt') as f:
            entries = {key: _value(text) for key, text in (f.metadata() or {}).items()}
        return Weights(_without_prefix(state), '', entries)
    return _unpickled(path)


def _read_parts(index: Path, find: Callable[[str], Path | None]) -> Weights:
    try:
        names = sorted({*json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()})
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError('its parts do not lie beside it')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SFormerError(f'{index} is no index of weights in parts: {first_line(e)}.') from e
    state: State = {}
    for name in names:
        part = find(name)
        if part is None or not part.is_file():
            raise SFormerError(f'{index} names {name}, which is not there.')
        state.update(read_weights(part).state)
    return Weights(state, '', {})


def _unpickled(path: Path) -> Weights:
    """Weights in a pickle, by torch's unpickler of tensors, which besides them knows timm's `args` and nothing else."""
    try:
        with quiet(), torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # torch's own message ends in advice to unpickle without protection
        raise SFormerError(
            f'{path} cannot be unpickled safely: it is damaged, or holds more than tensors{_code_in(path)}. Save the '
            f'state dict as safetensors.') from e
    kept_as = ''
    entries: Json = {}
    while isinstance(content, dict) and (name := next((n for n in NESTED if isinstance(content.get(n), dict)), None)):
        entries.update({key: value for key, value in content.items() if key != name})
        kept_as = name
        content = content[name]
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        what = f'entries are {", ".join(map(str, [*content][:5]))}' if isinstance(content, dict) and content else \
            f'content is a {type(content).__name__}'
        raise SFormerError(f'{path} holds no state dict: its {what}.')
    args = entries.pop('args', None)
    if isinstance(args, argparse.Namespace):
        entries = {**vars(args), **entries}
    return Weights(_without_prefix(content), kept_as, entries)


def _code_in(path: Path) -> str:
    """What a pickle wants to be run, in words."""
    with contextlib.suppress(Exception):  # of a file that is none of torch's
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {'argparse.Namespace'}
        return f' ({", ".join(sorted(names)[:3])})' if names else ''
    return ''


def _without_prefix(state: State) -> State:
    """A state dict without what wrappers put before all of its names."""
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _value(text: str) -> object:
    """What a text of metadata says: as JSON has it, or Python; else the text itself."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # of lists in lists
            return read(text)
    return text
