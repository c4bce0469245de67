"""One request for images, checked once, by whatever reads images."""
import dataclasses

import pytest
import torch

from sformer import EvaluationConfig, SFormerError, convert
from sformer.data import ImageRequest, open_images, open_request, requested
from sformer.errors import ConfigError
from sformer.execution import export_onnx

GREY = dict(input_size=(1, 8, 8), mean=(0.5,), std=(0.5,), interpolation='bilinear', crop_pct=1.)


@pytest.mark.parametrize('field, value', [
    ('dataset', 5), ('split', 3), ('num_images', 0), ('num_images', 1.5), ('num_images', True), ('seed', -1),
    ('seed', None), ('image_column', ['img']), ('label_column', 0), ('streaming', 'no'), ('needs_labels', 1)])
def test_values_that_cannot_be(field, value):
    with pytest.raises(ConfigError, match=f'^{field} must be'):
        ImageRequest(**{'dataset': 'digits', field: value})
    if field != 'needs_labels':
        with pytest.raises(ConfigError, match=f'^{field} must be'):
            EvaluationConfig(**{'dataset': 'digits', field: value})


def test_the_same_images_whoever_asks():
    request = ImageRequest(dataset='digits', split='train', num_images=20, seed=3)
    asked = open_images('digits', 'train', data_config=GREY, num_images=20, seed=3)
    images = open_request(request, GREY)
    assert images.fingerprint == asked.fingerprint
    assert torch.equal(next(images.batches(20))[0], next(asked.batches(20))[0])
    other = open_request(dataclasses.replace(request, seed=4), GREY)
    assert other.fingerprint != images.fingerprint


def test_choice():
    chosen = ImageRequest(dataset='x', num_images=5, seed=1).choose(100)
    assert len({*chosen}) == 5 and [*chosen] == sorted(chosen) and chosen.max() < 100
    assert [*ImageRequest(dataset='x').choose(3)] == [0, 1, 2]
    with pytest.raises(SFormerError, match="5 images asked for, but 'x' has only 4"):
        ImageRequest(dataset='x', num_images=5).choose(4)
    with pytest.raises(SFormerError, match="mine has no images"):
        ImageRequest(dataset='x').choose(0, 'mine')


def test_batches_have_no_columns(model, tmp_path):
    """Of `convert` and of an export alike, before any work."""
    batches = [torch.zeros(2, 1, 8, 8)]
    assert requested(batches, image_column=None) is batches
    for call in (lambda: convert(model, batches, image_column='img'),
                 lambda: export_onnx(model, tmp_path / 'm.onnx', batches, image_column='img')):
        with pytest.raises(SFormerError, match="image_column='img' is of a named data set, and batches were given"):
            call()
    with pytest.raises(ConfigError, match='num_images must be an integer of at least 1, got 0'):
        convert(model, 'digits', num_images=0)
