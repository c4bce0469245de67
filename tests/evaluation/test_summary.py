"""From counts to results."""
import json
from types import SimpleNamespace

import pytest
import timm
import torch

from sformer import SFormerError
from sformer.evaluation.figures import CLASSIFICATION
from sformer.evaluation.labels import Benchmark
from sformer.evaluation.metrics import Scored
from sformer.evaluation.networks import Subject
from sformer.evaluation.summary import check_complete, finished_shards, result_of
from sformer.files import state_hash


def test_what_was_measured(coarse, result):
    json.dumps(result)
    assert result['model'] == 'sformer_tiny' and result['batch_size'] == 64 and result['seed'] == 0
    assert result['weights_sha256'] == state_hash(coarse.state_dict())
    assert result['param_count'] == pytest.approx(0.1022)
    assert result['seconds'] > 0 and result['images_per_second'] == pytest.approx(540 / result['seconds'], rel=0.05)
    assert result['versions']['timm'] == timm.__version__


def test_speed_after_a_resumption_on_other_processes():
    score = CLASSIFICATION.score()
    score.add(Scored(torch.eye(10), torch.arange(10)[:, None]))
    record = dict(count=10, skipped=0, bad=[], networks=[score.record()], seconds=[8.], decode=4., preprocess=2.)
    config = dict(input_size=(1, 8, 8), crop_pct=1., interpolation='bilinear')
    subject = Subject(torch.nn.Identity(), 0, None, Benchmark(None), False, 0, config)
    images = SimpleNamespace(name='x', split=None, fingerprint='', revision=None, passed_over=[])
    result = result_of(subject, images, [dict(record, world_size=8), dict(record, world_size=1)])
    assert (result['seconds'], result['decode_seconds'], result['images_per_second']) == (9., 4.5, 2.22)


def chunk(shard, place, ends=False, **counts):
    return {**dict(chunk=[shard, place], num=4, count=4, bad=[], ends_shard=ends), **counts}


COMPLETE = [chunk(0, 0), chunk(1, 0, ends=True), chunk(0, 1, ends=True)]


@pytest.mark.parametrize('records, message', [
    ([*COMPLETE, COMPLETE[1]], r'chunk \(1, 0\) was counted twice'),
    ([*COMPLETE[:2], COMPLETE[0], COMPLETE[2]], r'chunk \(0, 0\) was counted twice'),
    (COMPLETE[:2], r'shards \[0\] were not counted to their end'),
    (COMPLETE[1:], r'shards \[0\] were not counted to their end'),  # its last chunk is there, and not its first
    ([*COMPLETE[:2], chunk(0, 1, ends=True, num=3)], 'counted 11 images, expected 12'),
    ([*COMPLETE[:2], chunk(0, 1, ends=True, bad=['one', 'two'])], r'one \(2 unreadable images, --max-bad 1\)'),
    ([chunk(0, 0, ends=True, num=12, count=0)], 'not one image has a label'),
])
def test_every_image_is_counted_once(records, message):
    images = SimpleNamespace(name='x', num_images=12)
    check_complete(COMPLETE, images, 0)
    check_complete([*COMPLETE[:2], chunk(0, 1, ends=True, bad=['one'])], images, 1)
    check_complete(COMPLETE[1:2], SimpleNamespace(name='x', num_images=None), 0)
    with pytest.raises(SFormerError, match=f'x: {message}|{message}'):
        check_complete(records, images, 1)


def test_a_shard_is_finished_when_all_of_its_chunks_are():
    assert finished_shards(COMPLETE) == {0, 1}
    assert finished_shards(COMPLETE[:2]) == finished_shards(COMPLETE[1:]) == {1}
