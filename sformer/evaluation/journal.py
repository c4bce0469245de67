"""What has been counted so far, on disk, so that a run that is killed can be resumed.

Every process appends the records of finished chunks to a file of its own, one line of JSON each; a line that was cut
off by the end of its process does not count. Every run has a folder of its own, so runs that write to the same results
file do not disturb one another. On resumption all processes read what they find and tell one another, so
neither the number of processes nor who had which chunk has to be the same, nor need nodes share a file system.
"""
import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypedDict

from ..errors import SFormerError
from ..files import Json
from .launch import Group

__all__ = ['ChunkRecord', 'Journal', 'check_same']

_logger = logging.getLogger(__name__)


class ChunkRecord(TypedDict):
    """What was counted in a chunk of images, as JSON; lists have one entry per subject, None where there is nothing."""
    chunk: list[int]
    num: int
    count: int
    skipped: int
    bad: list[str]
    ends_shard: bool
    networks: list[Json]
    sources: list[Json | None]
    activity: list[Json | None] | None
    activity_images: int
    seconds: list[float]
    source_seconds: list[float | None]
    decode: float
    preprocess: float
    world_size: int


# What tells runs apart; one that differs in anything else is the same run with other options, which cannot go on.
IDENTITY = {'models', 'sources', 'dataset', 'split', 'benchmark'}


class Journal:
    """Records of finished chunks below a folder.

    Args:
        path: Folder; made if it is missing.
        resume: Continue with what is there instead of starting over.
    """

    def __init__(self, path: str | Path, resume: bool = False):
        self.root = self.path = Path(path).expanduser()
        self.resume = resume
        self._file: IO[str] | None = None
        self._synced = 0.

    def open(self, key: Json, group: Group) -> list[Any]:
        """Begin to record; returns the records of earlier runs, one per chunk, as they were added.

        Args:
            key: What results depend on, as plain data. Records of a run with another key are refused.
            group: Processes that record.

        Raises:
            SFormerError: If there are records of another run, or no record can be written.
        """
        self.path = self.root / _line_digest(json.dumps(key, sort_keys=True))
        files = sorted(self.path.glob('*.jsonl'))
        found = self._read(files or sorted(self.root.glob('*/*.jsonl')), key) if self.resume else []
        records: dict[tuple[int, ...], Json] = {}
        for record in (r for rs in group.gather(found) for r in rs):
            records.setdefault(tuple(record['chunk']), record)
        if files and not self.resume:
            _logger.warning(f'{self.path} has records of a run of this kind that has not ended: it starts over. '
                            f'--resume (resume=True) would have gone on.')
            for path in files:
                path.unlink(missing_ok=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            name = f'{group.rank:05d}-{time.time_ns()}-{os.getpid()}.jsonl'
            self._file = open(self.path / name, 'w', encoding='utf-8')
        except OSError as e:
            raise SFormerError(f'{self.path} cannot be written: {e.strerror}.') from e
        self._append(key)
        return [records[chunk] for chunk in sorted(records)]

    def _read(self, files: list[Path], key: Json) -> list[Json]:
        records: list[Json] = []
        for path in files:
            lines = [_parse(line) for line in path.read_text(encoding='utf-8', errors='replace').splitlines()]
            if not lines or lines[0] is None:
                continue  # killed before it began
            different = {k for k in {**key, **lines[0]} if lines[0].get(k) != key.get(k)}
            if different & IDENTITY:
                continue
            if different:
                raise SFormerError(
                    f'{self.path} records another run ({", ".join(sorted(different))} differ): '
                    f'repeat that run, or start over without --resume.')
            records += [line for line in lines[1:] if line is not None]
        return records

    def add(self, record: Mapping[str, object]) -> None:
        """Record a finished chunk."""
        self._append(record)

    def _append(self, data: Mapping[str, object]) -> None:
        text = json.dumps(data)
        assert self._file is not None
        try:
            self._file.write(f'{_line_digest(text)} {text}\n')
            self._file.flush()
            if time.monotonic() - self._synced > 5:  # a kill loses nothing; a power cut, these seconds
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as e:
            raise SFormerError(f'{self.path} cannot be written: {e.strerror}.') from e

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Forget this run: its results have been written."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are in there
            self.root.rmdir()


def check_same(key: Json, group: Group) -> None:
    """Raise SFormerError unless all processes evaluate the same.

    Args:
        key: What results depend on, as plain data.
        group: Processes of the run.
    """
    different = sorted({k for other in group.gather(key) for k in key if other.get(k) != key[k]})
    if different:
        raise SFormerError(f'the processes do not evaluate the same ({", ".join(different)} differ): every node needs '
                           f'the same models, images and options.')


def _line_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parse(line: str) -> Json | None:
    """Data of a line, None if it was cut off."""
    digest, _, text = line.partition(' ')
    return json.loads(text) if digest == _line_digest(text) else None
