"""Options of an evaluation: what is refused, before anything is read."""
import dataclasses
from pathlib import Path

import pytest

from sformer import EvaluationConfig, SFormerError, evaluate


@pytest.mark.parametrize('options, message', [
    (dict(batch_size=0), 'batch_size must be an integer of at least 1, got 0'),
    (dict(batch_size=1.5), 'batch_size must be .* got 1.5'),
    (dict(batch_size=1e20), 'batch_size must be .* got 1e.20'),
    (dict(num_images=0), 'num_images must be an integer of at least 1, got 0'),
    (dict(num_images=10 ** 20), 'num_images must be'),
    (dict(workers=-1), 'workers must be an integer of at least 0, got -1'),
    (dict(activity_images=-1), 'activity_images must be'),
    (dict(max_bad=-1), 'max_bad must be'),
    (dict(max_bad=True), 'max_bad must be .* got True'),
    (dict(img_size=0), 'img_size must be'),
    (dict(timeout=0), r'timeout must be a number of seconds in \(0, 1e\+07\], got 0'),
    (dict(timeout=1e20), 'timeout must be'),
    (dict(timeout=float('nan')), 'timeout must be .* got nan'),
    (dict(amp='int3'), "amp is bfloat16 or float16, not 'int3'"),
    (dict(benchmark='imagenet-z'), "no benchmark 'imagenet-z', but: imagenet-1k, "),
    (dict(crop_pct=2.), 'crop_pct must lie'),
    (dict(interpolation='cubist'), "unknown interpolation 'cubist'"),
    (dict(dataset=3), 'dataset must be a name or a path, got 3'),
], ids=str)
def test_values_that_cannot_be(options, message):
    with pytest.raises(SFormerError, match=message) as e:
        EvaluationConfig(**{'dataset': 'digits', **options})
    assert '\n' not in str(e.value)


def test_misspelt_option(model):
    with pytest.raises(TypeError, match='firing_images'):
        evaluate(model, 'digits', firing_images=3)


def test_config_is_a_value():
    config = EvaluationConfig(dataset=Path('some') / 'folder', num_images=3)
    assert config.dataset == 'some/folder' and config == EvaluationConfig(dataset='some/folder', num_images=3)
    assert dataclasses.replace(config, batch_size=2).batch_size == 2
    with pytest.raises(SFormerError):
        dataclasses.replace(config, batch_size=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
