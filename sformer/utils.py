"""Small things that several modules need: progress bars, hashes, versions, files written aside."""
import contextlib
import errno
import hashlib
import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Optional

import torch

from .errors import SFormerError

__all__ = ['progress', 'library_versions', 'state_hash', 'file_hash', 'write_aside', 'check_preprocessing']


def progress(items: Iterable, description: str, total: Optional[int] = None) -> Iterator:
    """Iterate with a progress bar on stderr; without one where stderr is no terminal.

    Args:
        items: Any iterable; batches count by their length along dim 0, other items as one.
        description: What is going on.
        total: Number of images or items, if known.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            batch = item[0] if isinstance(item, (tuple, list)) else item
            bar.advance(task, len(batch) if isinstance(batch, torch.Tensor) else 1)


def library_versions() -> Dict[str, str]:
    """Versions of what a result depends on."""
    names = ('sformer', 'torch', 'timm', 'datasets', 'safetensors', 'huggingface_hub')
    versions = {'python': '.'.join(map(str, sys.version_info[:3]))}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def state_hash(state_dict: Dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, independent of its order."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def check_preprocessing(values: Dict[str, Any]) -> None:
    """Check what timm's transforms take without a question: those of mean, std, crop_pct and interpolation that are
    given.

    Raises:
        SFormerError: If a value is of the wrong kind or out of any sensible range; names it.
    """
    from timm.data.transforms import str_to_interp_mode

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    for key, low, high in (('mean', -1e4, 1e4), ('std', 1e-4, 1e4)):
        value = values.get(key)
        if value is None:
            continue
        if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
            raise SFormerError(f'{key} must be a list of numbers, got {value!r}.')
        if not all(low <= v <= high for v in value):
            raise SFormerError(f'{key} must lie in [{low:g}, {high:g}], got {", ".join(map(str, value))}.')
    crop_pct, interpolation = values.get('crop_pct'), values.get('interpolation')
    if crop_pct is not None and not (is_number(crop_pct) and 0.01 <= crop_pct <= 1):
        raise SFormerError(f'crop_pct must lie in [0.01, 1], got {crop_pct!r}.')
    if interpolation is not None:
        try:
            str_to_interp_mode(interpolation)
        except (KeyError, ValueError, AttributeError, TypeError):
            raise SFormerError(
                f'unknown interpolation {interpolation!r}: nearest, bilinear, bicubic, lanczos.') from None


@contextlib.contextmanager
def write_aside(directory: Path) -> Iterator[Path]:
    """A temporary folder beside the files of `directory`, which replace them when the block ends without an error.

    Whatever happens in the block or while they are replaced, the files that were there survive it, and folders that
    were not there are gone again.
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
        with tempfile.TemporaryDirectory(dir=directory, prefix='.writing-') as name:
            new, old = Path(name, 'new'), Path(name, 'old')
            new.mkdir()
            old.mkdir()
            yield new
            for path in new.iterdir():
                path.chmod(0o666 & ~_umask())  # safetensors writes files that only the owner can read
                with open(path, 'rb') as f:
                    os.fsync(f.fileno())
            _replace_all(new, old, directory)
    except BaseException:
        for d in created:
            with contextlib.suppress(OSError):
                d.rmdir()
        raise


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
    from filelock import FileLock
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
