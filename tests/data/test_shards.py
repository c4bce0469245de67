"""Parquet files and archives: whole, replaced, damaged."""
import io
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from image_helpers import RGB, all_images, encoded, error_of

from sformer import SFormerError
from sformer.data import UnreadableImageError, open_images

POINTER = (b'version https://git-lfs.github.com/spec/v1\n'
           b'oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n')


def test_parquet_folder(write_parquet):
    folder = write_parquet()
    write_parquet('set/test-00000-of-00002.parquet', num=4)
    write_parquet('set/test-00001-of-00002.parquet', num=3)
    train, test = open_images(folder, data_config=RGB), open_images(folder, data_config=RGB, needs_labels=True)
    assert (train.split, len(train), test.split, len(test)) == ('train', 6, 'test', 7)
    assert test.class_names == ['ant', 'bee', 'cow'] and test.name == folder
    x, y = all_images(test, 3)
    assert y.tolist() == [0, 1, 2, 0, 0, 1, 2]
    levels = torch.tensor([0, 10, 20, 30, 0, 10, 20]) / 255
    assert torch.allclose(x.mean((1, 2, 3)), (levels - 0.5) / 0.25, atol=1e-5)
    assert torch.equal(x, all_images(test, 2, workers=1)[0])


def test_parquet_in_data_subfolder_with_an_awkward_name(write_parquet):
    folder = write_parquet('my [1] set/data/validation.parquet')
    images = open_images(str(Path(folder).parent), data_config=RGB)
    assert images.split == 'validation' and len(all_images(images)[0]) == 6


def test_file_replaced_in_place_is_read_anew(write_parquet):
    """With the same name and time, as `rsync -t` and archives leave it."""
    folder = write_parquet()
    path = next(Path(folder).iterdir())
    before = path.stat()
    first = open_images(folder, data_config=RGB)
    assert all_images(first)[0].mean() < 0
    write_parquet(images=[{'bytes': encoded(200), 'path': None}] * 6)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = open_images(folder, data_config=RGB)
    assert all_images(second)[0].mean() > 0 and second.fingerprint != first.fingerprint
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_unchanged_file_is_converted_once(write_parquet):
    folder = write_parquet()
    for _ in range(2):
        open_images(folder, data_config=RGB)
    assert len(list(Path(datasets.config.HF_DATASETS_CACHE).rglob('*.arrow'))) == 1


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('content, problem', [
    (POINTER, 'is a Git-LFS pointer, not the file itself: git lfs pull'),
    (b'', 'is empty'),
    (b'not parquet at all', 'is not a parquet file, or was cut off'),
    (b'PAR1' + bytes(100) + b'PAR1', 'is damaged: '),
])
def test_shard_that_is_none_is_named(write_parquet, content, problem, streaming):
    folder = write_parquet('set/train-0.parquet')
    path = Path(folder, 'train-1.parquet')
    path.write_bytes(content)
    assert error_of(folder, streaming=streaming).startswith(
        f"cannot read the parquet files of {folder!r} (split 'train'): {path} {problem}")
    archive = path.with_name('train-1.tar')
    shutil.rmtree(folder)
    archive.parent.mkdir()
    if content in (POINTER, b''):
        archive.write_bytes(content)
        assert error_of(folder).endswith(f'{archive} {problem}')


def test_broken_link_to_a_shard_is_named(write_parquet):
    folder = write_parquet('set/train-0.parquet')
    path = Path(folder, 'train-1.parquet')
    path.symlink_to('nowhere')
    assert error_of(folder).endswith(f'{path} is a broken link')


@pytest.mark.parametrize('streaming', [False, True])
def test_damage_inside_a_shard_names_the_file(write_parquet, streaming):
    for i in range(3):
        folder = write_parquet(f'set/train-{i}.parquet')
    path = Path(folder, 'train-1.parquet')
    content = bytearray(path.read_bytes())
    content[4:1000] = bytes(996)
    path.write_bytes(content)
    with pytest.raises(SFormerError, match=r'^cannot read .*train-1\.parquet'):
        all_images(open_images(folder, data_config=RGB, streaming=streaming))


@pytest.mark.parametrize('streaming', [False, True])
def test_damage_inside_an_archive_names_the_file(tmp_path, streaming):
    """`tarfile` takes a damaged header for the end."""
    for shard in range(2):
        with tarfile.open(tmp_path / f'train-{shard}.tar', 'w') as tar:
            for i in range(4):
                for suffix, data in (('png', encoded(i)), ('cls', b'1')):
                    info = tarfile.TarInfo(f'{shard}{i}.{suffix}')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    assert len(all_images(open_images(str(tmp_path), data_config=RGB, streaming=streaming))[0]) == 8
    path = tmp_path / 'train-1.tar'
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[2].offset
    content[offset:offset + 100] = bytes([255]) * 100
    path.write_bytes(content)
    with pytest.raises(SFormerError, match=f'^cannot read .*train-1.tar is damaged: no file begins at byte {offset}'):
        all_images(open_images(str(tmp_path), data_config=RGB, streaming=streaming))


@pytest.mark.parametrize('streaming', [False, True])
def test_files_without_rows(write_parquet, streaming):
    folder = write_parquet('set/train-0.parquet')
    path = Path(folder, 'train-0.parquet')
    datasets.Dataset.from_parquet(str(path)).select([]).to_parquet(path.with_name('train-1.parquet'))
    assert len(open_images(folder, data_config=RGB, streaming=streaming)) == 6, 'one of two is nothing strange'
    path.unlink()
    assert error_of(folder, streaming=streaming).endswith(f'no row in {path.with_name("train-1.parquet")}')


def test_images_that_are_pointers_or_empty(write_parquet, tmp_path):
    for content, problem in ((POINTER, 'a Git-LFS pointer, not the file itself: git lfs pull'), (b'', 'empty')):
        folder = tmp_path / problem[:5]
        folder.mkdir()
        (folder / 'a.jpg').write_bytes(content)
        with pytest.raises(UnreadableImageError, match=f'image 0 .*: it is {problem}$'):
            all_images(open_images(str(folder), data_config=RGB))
    folder = write_parquet(num=1, images=[{'bytes': POINTER, 'path': None}])
    with pytest.raises(UnreadableImageError, match='it is a Git-LFS pointer'):
        all_images(open_images(folder, data_config=RGB))
