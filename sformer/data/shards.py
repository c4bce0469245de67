"""Parquet files and WebDataset archives in a folder: their splits, their identity, and what is wrong with them."""
import hashlib
import re
import tarfile
from pathlib import Path

from ..errors import SFormerError
from ..files import content_problem
from .image_folders import SPLIT_FOLDERS, subfolders
from .preprocessing import one_line

__all__ = ['check_archive', 'check_shards', 'file_sample', 'find_damage', 'find_shards', 'parquet_rows']

_SAMPLE = 65536


def find_shards(folder: Path) -> tuple[str | None, dict[str, list[Path]]]:
    """Find the files of `datasets` in a folder, or in its subfolder `data`.

    Returns:
        'parquet', 'webdataset' or None, and the files by split.
    """
    splits = _files_by_split(folder, 'parquet')
    if splits:
        return 'parquet', splits
    # archives beside split folders of class folders are what these were unpacked from
    if any(s.lower() in SPLIT_FOLDERS and subfolders(folder / s) for s in subfolders(folder)):
        return None, {}
    splits = _files_by_split(folder, 'tar')
    return ('webdataset' if splits else None), splits


def _files_by_split(folder: Path, extension: str) -> dict[str, list[Path]]:
    """Files by split: `train-00000-of-00002.parquet` and `train.parquet` are of split `train`, and so is
    `imagenet1k-train-0000.tar`."""
    splits: dict[str, list[Path]] = {}
    for path in _listed(folder, extension) or _listed(folder / 'data', extension):
        words = re.split(r'[-._]' if extension == 'tar' else r'[-.]', path.name)[:-1]
        split = words[0]
        if extension == 'tar':  # no convention for the first word
            split = next((word for word in words if word in SPLIT_FOLDERS), 'train')
        # Numbers alone name no split: `train`, as `datasets` has it.
        splits.setdefault('train' if re.fullmatch(r'[\d_]*', split) else split, []).append(path)
    return splits


def _listed(folder: Path, extension: str) -> list[Path]:
    # broken links, too: leaving them out would be silent
    return sorted(p for p in folder.glob(f'*.{extension}') if not p.name.startswith('.') and not p.is_dir())


def file_sample(path: Path) -> tuple[str, int, str]:
    """Name, size, and hash of both ends of a file: a parquet file ends with its schema and the offsets of its data."""
    size = path.stat().st_size
    with open(path, 'rb') as f:
        ends = f.read(_SAMPLE)
        f.seek(max(0, size - _SAMPLE))
        ends += f.read()
    return path.name, size, hashlib.sha256(ends).hexdigest()


def check_shards(kind: str, files: list[Path]) -> None:
    """Check the ends of files.

    Raises:
        SFormerError: One is missing, a Git-LFS pointer, empty, of another format, or cut off; names it.
    """
    for path in files:
        if not path.is_file():
            raise SFormerError(f'{path} is ' + ('no file' if path.exists() else 'a broken link'))
        with open(path, 'rb') as f:
            start = f.read(262)
            f.seek(max(0, path.stat().st_size - 1024))
            end = f.read()
        problem = content_problem(start)
        if problem:
            raise SFormerError(f'{path} is {problem}')
        if kind == 'parquet' and (start[:4], end[-4:]) != (b'PAR1', b'PAR1'):
            raise SFormerError(f'{path} is not a parquet file, or was cut off')
        # Compressed archives notice a cut by themselves; where it is between two files, readers of others do not.
        if kind == 'webdataset' and start[257:] == b'ustar' and end != bytes(1024):
            raise SFormerError(f'{path} has no end-of-archive mark: it was cut off, or never closed by its writer')


def check_archive(path: Path) -> None:
    """Check that an uncompressed archive goes on to its end: readers take a damaged header for the end.

    Raises:
        SFormerError: It does not.
    """
    with open(path, 'rb') as f:
        if f.read(262)[257:] != b'ustar':
            return
        f.seek(0)
        archive = tarfile.open(fileobj=f, mode='r:')
        while archive.next():
            archive.members = []  # type: ignore[attr-defined]  # else they pile up
        f.seek(archive.offset)
        if f.read(tarfile.BLOCKSIZE).strip(b'\0'):
            raise SFormerError(f'{path} is damaged: no file begins at byte {archive.offset}, where one should')


def parquet_rows(files: list[Path]) -> int:
    """Number of rows, by the footers of the files.

    Raises:
        SFormerError: A footer is damaged (names the file), or there is not one row.
    """
    import pyarrow.parquet
    num_rows = 0
    for path in files:
        try:
            num_rows += pyarrow.parquet.read_metadata(path).num_rows
        except Exception as e:
            raise SFormerError(f'{path} is damaged: {one_line(e)}') from e
    if num_rows == 0:
        raise SFormerError(f'no row in {files[0]}' + (f' and {len(files) - 1} more' if files[1:] else ''))
    return num_rows


def find_damage(kind: str, files: list[Path]) -> str | None:
    """Read files through, and name the first that cannot be; None if all can. Takes long: for when something failed."""
    import pyarrow.parquet
    for path in files:
        try:
            if kind == 'parquet':
                for _ in pyarrow.parquet.ParquetFile(path).iter_batches():
                    pass
            else:
                with tarfile.open(path) as archive:
                    for member in archive:
                        content = archive.extractfile(member) if member.isfile() else None
                        if content is not None:
                            content.read()
        except Exception as e:
            return f'{path} is damaged: {one_line(e)}'
    return None
