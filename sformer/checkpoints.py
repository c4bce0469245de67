"""Weights and records as files: read, checked, hashed, and written aside before they take the place of others."""
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Union

import timm
import torch
import torch.nn as nn
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict

from .errors import SFormerError

__all__ = [
    'state_hash', 'file_hash', 'read_safetensors', 'load_source_weights_', 'check_weights', 'write_aside', 'write_json',
    'restore', 'locked', 'first_line', 'content_problem',
]

_LFS_POINTER = b'version https://git-lfs.github.com/spec/'
_ASIDE = '.writing-'  # folders that `write_aside` writes to


def state_hash(state_dict: Dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, independent of its order."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, (tuple, list)):  # weights of quantised layers are packed
            for i, part in enumerate(value):
                add(f'{name}.{i}', part)
        elif isinstance(value, torch.Tensor):
            tensor = (value.dequantize() if value.is_quantized else value).detach().cpu().contiguous()
            digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f'{name} {value}\n'.encode())

    for name in sorted(state_dict):
        add(name, state_dict[name])
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def load_source_weights_(
        model: nn.Module,
        path: Union[str, Path],
        allow_pickle: bool = False,
        filter_fn: Optional[Callable[[Dict[str, Any], nn.Module], Dict[str, Any]]] = None,
) -> None:
    """Load a checkpoint of exactly this architecture, in place.

    Args:
        model: Model to load it into.
        path: Checkpoint.
        allow_pickle: Load a pickled one, with torch's `weights_only` unpickler.
        filter_fn: Adapts the state dict to the model, as timm's filters resize embeddings.

    Raises:
        SFormerError: If the file is missing, damaged, pickled, of another architecture, or has NaN or infinity in it.
    """
    path = Path(path)
    if not path.is_file():
        raise SFormerError(f'no checkpoint at {path}.')
    _check_content(path)
    if path.suffix == '.safetensors' or is_safetensors(path):
        state = read_safetensors(path)
    elif not allow_pickle:
        raise SFormerError(
            f'{path} is not a safetensors file. A pickled checkpoint can run code when it is opened, so it is refused; '
            f'--allow-pickle (allow_pickle=True) loads it with torch\'s weights_only unpickler.')
    else:
        try:
            with warnings.catch_warnings(action='ignore'):
                state = timm.models.load_state_dict(str(path), weights_only=True)
        except Exception as e:  # torch's own message ends in advice to unpickle without protection
            raise SFormerError(
                f'{path} cannot be unpickled safely: it is damaged, or holds more than tensors. Save the state dict '
                f'as safetensors.') from e
    state = clean_state_dict(state)  # DataParallel and torch.compile put prefixes before names
    if filter_fn is not None:
        state = filter_fn(state, model)
    expected = model.state_dict()
    wrong = [f'{k} is missing' for k in expected if k not in state]
    wrong += [f'{k} is not part of the model' for k in state if k not in expected]
    for k, v in expected.items():
        if k in state and not isinstance(state[k], torch.Tensor):
            wrong.append(f'{k} is no tensor')
        elif k in state and state[k].is_floating_point() != v.is_floating_point():
            wrong.append(f'{k} holds {str(state[k].dtype).removeprefix("torch.")} values')
        elif k in state and state[k].shape != v.shape:
            wrong.append(f'{k} is {tuple(state[k].shape)} instead of {tuple(v.shape)}')
    if wrong:
        name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', 'the model')
        raise SFormerError(
            f'{path} is not a checkpoint of {name} with these arguments: {"; ".join(wrong[:3])}'
            f'{f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""}.')
    model.load_state_dict(state)
    check_weights(model, str(path))


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: the length of a JSON header, then the header."""
    with open(path, 'rb') as f:
        start = f.read(9)
    return len(start) == 9 and int.from_bytes(start[:8], 'little') < path.stat().st_size and start[8:] == b'{'


def read_safetensors(path: Path) -> Dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        SFormerError: If it is truncated or corrupted, or a Git-LFS pointer.
    """
    try:
        _check_content(path)
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as e:
        raise SFormerError(f'{path} is truncated or corrupted: {first_line(e)}.') from e


def content_problem(start: bytes) -> Optional[str]:
    """What is wrong with a file, by its first bytes; None if nothing is known to be."""
    if not start:
        return 'empty'
    if start.startswith(_LFS_POINTER):
        return 'a Git-LFS pointer, not the file itself: git lfs pull'
    return None


def _check_content(path: Path) -> None:
    with open(path, 'rb') as f:
        start = f.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:  # an empty file is a truncated one
        raise SFormerError(f'{path} is {content_problem(start)}')


def check_weights(model: nn.Module, where: str = 'the source network') -> None:
    """Raise SFormerError if a parameter holds NaN or infinity; names it."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SFormerError(f'{name} of {where} has no values: it is on the meta device, or offloaded.')
        if not torch.isfinite(parameter).all():
            raise SFormerError(f'{name} of {where} has NaN or infinite values.')


@contextlib.contextmanager
def write_aside(directory: Path) -> Iterator[Path]:
    """A temporary folder beside the files of `directory`, which replace them when the block ends without an error.

    Whatever happens in the block or while they are replaced, the files that were there survive it, and folders that
    were not there are gone again. A process that is killed leaves its temporary folder behind, for `restore` and until
    the next call removes it.
    """
    directory = Path(directory)
    created = [d for d in (directory, *directory.parents) if not d.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, 'is a file, not a folder', str(directory)) from None
    if not os.access(directory, os.W_OK):
        raise PermissionError(errno.EACCES, 'is read-only for you', str(directory))
    try:
        with _folder_lock(directory) as alone:
            for leftover in directory.glob(f'{_ASIDE}*'):
                with contextlib.suppress(OSError):
                    if alone or time.time() - leftover.stat().st_mtime > 3600:
                        shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(dir=directory, prefix=_ASIDE) as name:
                new, old = Path(name, 'new'), Path(name, 'old')
                new.mkdir()
                old.mkdir()
                yield new
                for path in new.iterdir():
                    path.chmod(0o666 & ~_umask())  # safetensors writes files that only the owner can read
                    with open(path, 'rb') as f:
                        os.fsync(f.fileno())
                _replace_all(new, old, directory)
    except BaseException as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC and e.filename is None:  # of a write, which knows no name
            e.filename = str(directory)
        for d in created:
            with contextlib.suppress(OSError):
                d.rmdir()
        raise


def restore(path: Path, sha256: str) -> bool:
    """Finish or undo what a process that was killed in `write_aside` began: if it left the file of this SHA-256 behind,
    put that in its place.

    Returns:
        Whether the file is now the one of this SHA-256.
    """
    with _folder_lock(path.parent):  # whoever is writing just now may finish first
        if path.is_file() and file_hash(path) == sha256:
            return True
        for leftover in path.parent.glob(f'{_ASIDE}*/*/{path.name}'):
            with contextlib.suppress(OSError):
                if file_hash(leftover) == sha256:
                    os.replace(leftover, path)
                    return True
    return False


@contextlib.contextmanager
def _folder_lock(directory: Path) -> Iterator[bool]:
    """Keep other processes from writing to a folder; False where the file system or the platform cannot.

    The kernel holds the lock on the folder itself: it leaves no file, and ends with the process.
    """
    descriptor = None
    try:
        import fcntl
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        alone = True
    except (ImportError, OSError):
        alone = False
    try:
        yield alone
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _replace_all(new: Path, old: Path, directory: Path) -> None:
    """Move all files of `new` to `directory`, or none of them; `old` holds on to what was there."""
    begun = []
    try:
        for path in sorted(new.iterdir()):
            target = directory / path.name
            if target.exists():
                os.link(target, old / path.name)
            begun.append(path.name)
            os.replace(path, target)
    except BaseException:
        for name in begun:
            if (old / name).exists():
                os.replace(old / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes that ask for the same lock file from working at the same time, where the file system can."""
    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield  # what is written is written aside and renamed, so it is whole at least
        return
    try:
        yield
    finally:
        lock.release()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Any) -> None:
    """Write JSON to `path`, aside first."""
    path = Path(path)
    with write_aside(path.parent) as aside:
        (aside / path.name).write_text(json.dumps(data, indent=2) + '\n', encoding='utf-8')


def first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
