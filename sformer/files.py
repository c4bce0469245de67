"""Files: hashed, read, checked, locked, written aside before they take the place of others; PNGs that carry values."""
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import SFormerError, first_line

__all__ = [
    'Json', 'state_hash', 'file_hash', 'is_safetensors', 'read_safetensors', 'check_content', 'content_problem',
    'may_write', 'holds', 'written_to', 'write_aside', 'write_file', 'write_json', 'restore', 'locked', 'png_bytes',
    'png_values',
]

Json = dict[str, Any]  # an object of JSON: as it was read, or as it will be written

_LFS_POINTER = b'version https://git-lfs.github.com/spec/'
_ASIDE = '.writing-'  # folders that `write_aside` writes to
_CHUNK = 'sformer'  # text chunk of a PNG that holds its values


def state_hash(state_dict: dict[str, torch.Tensor]) -> str:
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


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: the length of a JSON header, then the header."""
    with open(path, 'rb') as f:
        start = f.read(9)
    return len(start) == 9 and int.from_bytes(start[:8], 'little') < path.stat().st_size and start[8:] == b'{'


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        SFormerError: If it is truncated or corrupted, or a Git-LFS pointer.
    """
    try:
        check_content(path)
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as e:
        raise SFormerError(f'{path} is truncated or corrupted: {first_line(e)}.') from e


def content_problem(start: bytes) -> str | None:
    """What is wrong with a file, by its first bytes; None if nothing is known to be."""
    if not start:
        return 'empty'
    if start.startswith(_LFS_POINTER):
        return 'a Git-LFS pointer, not the file itself: git lfs pull'
    return None


def check_content(path: Path) -> None:
    with open(path, 'rb') as f:
        start = f.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:  # an empty file is a truncated one
        raise SFormerError(f'{path} is {content_problem(start)}')


def may_write(
        path: str | Path,
        kind: str,
        own: Callable[[Path], bool] | None = None,
        *,
        files: Iterable[str] | None = None,
        overwrite: bool | None = None,
) -> Path:
    """May I write here? Every output of every command asks this, before there is anything to write.

    Args:
        path: A file, or a folder for `files`; there may be something already.
        kind: What will be written, in words.
        own: Tells a file that may be replaced, since it is of this kind and written here; none may if None.
        files: Names of the files in the folder.
        overwrite: Whether whatever is there may be replaced; None where nobody can ask for that.

    Returns:
        Where it is written to, as of `written_to`.

    Raises:
        SFormerError: If something else is there, or nothing can be written.
    """
    link, path = Path(path), written_to(path)
    folder = path.parent if files is None else path
    if link.is_symlink() and not folder.exists():
        raise SFormerError(f'{link} is a link to {os.readlink(link)}, which does not exist.')
    _check_folder(folder)
    for target in [path] if files is None else [folder / name for name in files]:
        _check_target(target, kind)
        if overwrite or not target.exists() or own and own(target):
            continue
        what = f'{target} is there already' if files is None else f'{folder} holds a {kind} already'
        if own:
            what = f'{target} is there and holds no {kind}'
        remedy = ', which would take its place. Name another' if overwrite is None else \
            '; --overwrite (overwrite=True) replaces it'
        raise SFormerError(f'{what}{remedy}.')
    return path


def written_to(path: str | Path) -> Path:
    """The file that is written: where a link leads, so that the link stays; `~` stands for the home folder."""
    try:
        path = Path(path).expanduser()
    except RuntimeError as e:
        raise SFormerError(f'{path} cannot be found: {e}') from e
    return path.resolve() if path.is_symlink() else path


def holds(*keys: str) -> Callable[[Path], bool]:
    """A test whether a file is a JSON object with these keys, or empty."""
    def own(path: Path) -> bool:
        try:
            text = path.read_text(encoding='utf-8')
            found = json.loads(text) if text else dict.fromkeys(keys)
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(found, dict) and {*keys} <= {*found}
    return own


def _check_folder(folder: Path) -> None:
    """Raise SFormerError if nothing can be written to a folder, which is made if it is missing."""
    absolute = folder.absolute()
    for parent in (absolute, *absolute.parents):
        if parent.is_symlink() and not parent.exists():
            raise SFormerError(f'{parent} is a link to {os.readlink(parent)}, which does not exist.')
        if parent.exists():
            break
    if not parent.is_dir():
        where = '' if parent == absolute else f'{folder} cannot be written: '
        raise SFormerError(f'{where}{parent} is a file, not a folder.')
    if not os.access(parent, os.W_OK):
        raise SFormerError(f'{folder} cannot be written: {parent} is read-only for you.')


def _check_target(path: Path, kind: str) -> None:
    """Raise SFormerError if something is there that no file can replace, whoever wrote it."""
    if path.is_dir():
        raise SFormerError(f'{path} is a folder.')
    if path.exists() and not path.is_file():
        raise SFormerError(f'{path} is no regular file, and {kind} would take its place. Name another.')
    if path.exists() and not os.access(path, os.W_OK):
        raise SFormerError(f'{path} is read-only for you.')


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
                usual = Path(name, 'usual')
                new.mkdir()
                old.mkdir()
                usual.touch()  # shows the mode of a new file: who asks for the umask sets it, for all threads
                yield new
                for path in new.iterdir():
                    path.chmod(usual.stat().st_mode)  # safetensors writes files that only the owner can read
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
def locked(path: Path, busy: str = '') -> Iterator[None]:
    """Keep other processes that ask for the same lock file from working at the same time, where the file system can.

    Args:
        path: The lock file.
        busy: What is to be said where another process has it; if nothing, it is waited for.

    Raises:
        SFormerError: If another process has it, and that is to be said.
    """
    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire(timeout=0 if busy else -1)
    except Timeout:
        raise SFormerError(busy) from None
    except (OSError, NotImplementedError):
        yield  # what is written is written aside and renamed, so it is whole at least
        return
    try:
        yield
    finally:
        lock.release()


def write_file(path: Path, content: bytes) -> None:
    """Write a file, aside first; of a link, the file that it leads to."""
    path = written_to(path)
    with write_aside(path.parent) as aside:
        (aside / path.name).write_bytes(content)


def write_json(path: Path, data: Any) -> None:
    """Write JSON as `write_file` does."""
    write_file(path, (json.dumps(data, indent=2) + '\n').encode())


def png_bytes(image: Image.Image, values: dict[str, Any]) -> bytes:
    """An image as a PNG that carries values as JSON in a text chunk, and nothing that changes from one drawing to the
    next."""
    out, text = io.BytesIO(), PngInfo()
    text.add_text(_CHUNK, json.dumps(values, sort_keys=True))
    image.convert('RGB').save(out, 'PNG', pnginfo=text)
    return out.getvalue()


def png_values(path: Path) -> dict[str, Any] | None:
    """Values that a PNG of `png_bytes` carries; None if it is no such file."""
    try:
        with Image.open(path, formats=['PNG']) as image:
            values = json.loads(image.info[_CHUNK])
    except (OSError, SyntaxError, KeyError, ValueError, TypeError, RecursionError, Image.DecompressionBombError):
        return None
    return values if isinstance(values, dict) else None
