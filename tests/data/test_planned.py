"""Delivery of evaluation's images: whoever reads, each image once; and what processes have to hear alike."""
import evaluation_tools
import pytest
import torch

from sformer.data import Plan, open_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    evaluation_tools.use_cache(monkeypatch, tmp_path / 'cache')


@pytest.fixture
def digit_files(tmp_path):
    return lambda *args, **kwargs: evaluation_tools.write_digits(tmp_path, *args, **kwargs)


@pytest.mark.parametrize('workers', [0, 2])
def test_every_image_has_one_reader(digit_files, workers):
    """Whoever reads: the chunks of all ranks and workers together are those of one, batch by batch."""
    config = dict(input_size=(1, 8, 8), mean=(.5,), std=(.5,), interpolation='bilinear', crop_pct=1.)
    for shards, streaming in ((1, False), (1, True), (3, True), (12, True)):
        images = open_images(digit_files(shards, 100 + shards), data_config=config, needs_labels=True,
                             streaming=streaming)

        def batches(world, workers=0, images=images, **kwargs):
            found = {}
            for rank in range(world):
                for batch in images.planned(Plan(4, 8, rank, world, workers, **kwargs)):
                    assert found.setdefault((batch.chunk, batch.start), batch) is batch, 'delivered twice'
            return found
        one = batches(1)
        assert sum(b.num for b in one.values()) == images.num_images == 100 + shards
        for world in ((2,) if workers else (2, 5, 40)):
            other = batches(world, workers)
            assert other.keys() == one.keys()
            assert all(torch.equal(b.images[0], one[k].images[0]) and torch.equal(b.labels, one[k].labels)
                       and (b.ends_chunk, b.ends_shard) == (one[k].ends_chunk, one[k].ends_shard)
                       for k, b in other.items())
        done = {k[0] for k in list(one)[::3]}
        rest = batches(3, done=done, finished={0} if streaming and shards > 1 else set())
        assert {c for c, _ in rest} == {c for c, _ in one} - done - ({
            c for c, _ in one if c[0] == 0} if streaming and shards > 1 else set())


def test_rank_without_chunks_asks_nobody(digit_files):
    config = dict(input_size=(1, 8, 8), mean=(.5,), std=(.5,), interpolation='bilinear', crop_pct=1.)
    images = open_images(digit_files(1, 10), data_config=config, needs_labels=True)
    delivered = [list(images.planned(Plan(4, 8, rank, 3, workers=2), timeout=30.)) for rank in range(3)]
    assert [sum(batch.num for batch in batches) for batches in delivered] == [8, 2, 0]
