"""Every config of the package: what it refuses, by the name of the field, and by one kind of error."""
import dataclasses
import importlib
import inspect
import json
import math
import pkgutil

import numpy as np
import pytest

import sformer
from sformer import EvaluationConfig, FitConfig, SFNConfig, SFormerError
from sformer.conversion.distillation import DistillConfig
from sformer.detection import DetectorConfig, TrainingConfig
from sformer.errors import ConfigError

NEEDED = {EvaluationConfig: dict(dataset='digits'), DetectorConfig: dict(backbone='test_vit2', categories={1: 'x'})}
FREE = {'device'}  # torch says what it is


def configs():
    for module in pkgutil.walk_packages(sformer.__path__, 'sformer.'):
        if module.name != 'sformer.__main__':
            for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                if name.endswith('Config') and kind.__module__ == module.name:
                    yield kind


def fields():
    return [(kind, field.name) for kind in configs() for field in dataclasses.fields(kind)
            if field.init and field.name not in FREE]


def test_all_of_them_are_known():
    assert {*configs()} == {SFNConfig, FitConfig, DistillConfig, EvaluationConfig, TrainingConfig, DetectorConfig}
    for kind in configs():
        config = kind(**NEEDED.get(kind, {}))
        assert dataclasses.replace(config) == config
        json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize('kind, name', fields(), ids=lambda v: getattr(v, '__name__', v))
@pytest.mark.parametrize('value', [object(), [None], math.nan], ids=['object', 'list', 'nan'])
def test_a_field_that_is_nonsense(kind, name, value):
    with pytest.raises(ConfigError, match=rf'\b{name}\b|no benchmark|unknown interpolation') as caught:
        kind(**{**NEEDED.get(kind, {}), name: value})
    assert isinstance(caught.value, SFormerError) and isinstance(caught.value, ValueError)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind, values, message', [
    (DistillConfig, dict(learning_rate=-1), r'learning_rate must be a number in \[0, 1\], got -1\.$'),
    (DistillConfig, dict(price=-0.1), 'price must be a number of at least 0, got -0.1'),
    (DistillConfig, dict(features=math.inf), 'features must be a number of at least 0, got inf'),
    (DistillConfig, dict(max_norm=0), 'max_norm must be a number above 0, got 0'),
    (DistillConfig, dict(amp=1), 'amp must be True or False, got 1'),
    (TrainingConfig, dict(epochs=-3), 'epochs must be an integer of at least 1, got -3'),
    (TrainingConfig, dict(epochs=2.), 'epochs must be an integer of at least 1, got 2.0'),
    (TrainingConfig, dict(batch_size=0), 'batch_size must be an integer of at least 1, got 0'),
    (TrainingConfig, dict(lr=-1e-3), r'lr must be a number in \[0, 100\], got -0.001'),
    (TrainingConfig, dict(weight_decay='0'), "weight_decay must be a number of at least 0, got '0'"),
    (TrainingConfig, dict(trained_blocks=-1), 'trained_blocks must be an integer of at least 0, got -1'),
    (TrainingConfig, dict(seed=-1), 'seed must be an integer from 0 to 9223372036854775807, got -1'),
    (EvaluationConfig, dict(dataset='digits', seed=2 ** 70), 'seed must be an integer from 0 to'),
    (EvaluationConfig, dict(dataset='digits', streaming='no'), "streaming must be True or False, got 'no'"),
    (DetectorConfig, dict(backbone='test_vit2', categories={'one': 'x'}), "categories .* not {'one': 'x'}"),
    (SFNConfig, dict(neuron='leaky'), "neuron must be one of scale_and_fire, separate_branches, got 'leaky'"),
], ids=str)
def test_values_that_cannot_be(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**values)


def test_numbers_of_numpy_become_plain():
    config = SFNConfig(levels=np.int64(8), scale=np.float32(0.5))
    assert json.loads(json.dumps(dataclasses.asdict(config)))['levels'] == 8
    assert (type(config.levels), config.scale) == (int, 0.5) and type(config.scale) is float
