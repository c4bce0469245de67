"""Batches: named errors, and who reads what."""
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from image_helpers import GREY, RGB, all_images, encoded

from sformer.data import open_images
from sformer.data.delivery import Plan, readers_of_shard
from sformer.errors import SFormerError


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    all_images(open_images('digits', data_config=GREY, num_images=20))
    all_images(open_images('dead-leaves', data_config=GREY, num_images=2))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_are_named(write_parquet, image_folder, workers):
    whole = encoded(100)
    for damaged in (whole[:50], b'no image', None):
        images = [{'bytes': whole, 'path': None}] * 3 + [damaged and {'bytes': damaged, 'path': None}]
        folder = write_parquet(num=4, images=images)
        with pytest.raises(SFormerError) as info:
            all_images(open_images(folder, data_config=RGB), 2, workers)
        assert str(info.value).startswith(f"cannot read image 3 of {folder!r} (split 'train'): ")
        assert '\n' not in str(info.value)

    file = image_folder / 'train' / 'class9' / 'b.JPG'
    file.write_bytes(file.read_bytes()[:400])
    images = open_images(str(image_folder), data_config=RGB)
    with pytest.raises(SFormerError) as info:
        all_images(images, 2, workers)
    path = os.path.join('class9', 'b.JPG')
    assert str(info.value).startswith(f"cannot read image 3 ('{path}') of {str(image_folder)!r} (split 'train'): ")
    # The index is that of the data, not of the subset.
    subset = open_images(str(image_folder), data_config=RGB, num_images=5, seed=1)
    assert 3 in subset.dataset.indices.tolist() and subset.dataset.indices.tolist() != [0, 1, 2, 3, 4]
    with pytest.raises(SFormerError, match='^cannot read image 3 '):
        all_images(subset, 1, workers)



@pytest.mark.parametrize('readers, at_most', [(4, 1.2), (32, 2.5), (14, 1.)])
def test_readers_share_shards(readers, at_most):
    """Fourteen shards, as ImageNet's validation images have them: not everybody reads everything."""
    teams = [readers_of_shard(shard, 14, readers) for shard in range(14)]
    assert all(team and set(team) <= set(range(readers)) for team in teams)
    assert sum(map(len, teams)) / 14 <= at_most
    assert {reader for team in teams for reader in team} == set(range(readers)), 'nobody is idle'


def test_stream_is_delivered_once_and_in_order(write_parquet):
    for i in range(3):
        folder = write_parquet(f'set/train-{i}.parquet', num=4 + i)
    images = open_images(folder, data_config=RGB, streaming=True)
    expected = [0, 1, 2, 0] + [0, 1, 2, 0, 1] + [0, 1, 2, 0, 1, 2]
    for workers in (0, 2):
        assert all_images(images, 4, workers)[1].tolist() == expected
    few = open_images(folder, data_config=RGB, streaming=True, num_images=6)
    assert (len(few), few.num_shards) == (6, 1) and all_images(few, 4)[1].tolist() == expected[:6]


@pytest.mark.parametrize('ends', ['late', 'early'])
def test_stopped_worker_is_given_up(ends, monkeypatch):
    """A process that takes no signal: neither the next batch nor the end waits for it."""
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 1.)  # for which torch waits at the end
    images = open_images('digits', data_config=GREY, num_images=1000)
    batches = images.planned(Plan(1, 100, workers=2), timeout=1.)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGSTOP)
    begin = time.monotonic()
    if ends == 'late':
        with pytest.raises(SFormerError, match='a process that loads images died or hangs: no batch came for 1 s'):
            list(batches)
    batches.close()
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()
    assert time.monotonic() - begin < 25


def test_full_shared_memory_is_named(monkeypatch):
    def share_memory_(tensor):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)')
    monkeypatch.setattr(torch.Tensor, 'share_memory_', share_memory_)
    images = open_images('digits', data_config=GREY, num_images=10)
    with pytest.raises(SFormerError, match=r'no room in shared memory \(/dev/shm\).*--workers.*docker run --shm-size'):
        all_images(images, 5, workers=1)
