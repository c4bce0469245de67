"""From counts to results."""
import json
from types import SimpleNamespace

import pytest
import timm
import torch

from sformer.evaluation.figures import CLASSIFICATION
from sformer.evaluation.labels import Benchmark
from sformer.evaluation.metrics import Scored
from sformer.evaluation.networks import Subject
from sformer.evaluation.summary import result_of
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
