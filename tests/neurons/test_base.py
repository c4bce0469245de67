"""What all neurons share: state dicts that say what is wrong with them, and buffers that stay float32."""
import copy
import math

import pytest
import torch
import torch.nn as nn
from neuron_tools import rng

from sformer.neurons import GradedCoding, ScaleAndFire, SFNConfig, Spikes

LOW_DTYPES = (torch.bfloat16, torch.float16)


def test_spikes_decode_to_the_current_that_they_stand_for():
    levels, step = torch.tensor([[-2, 3]], dtype=torch.int8), torch.tensor([0.5, 2.])
    assert Spikes(levels, step).decode().tolist() == [[-1., 6.]]
    decoded = Spikes(levels, step, center=torch.tensor([1., -1.])).decode()
    assert decoded.tolist() == [[0., 5.]] and decoded.dtype == torch.float32
    assert Spikes(levels, step, torch.tensor([[2.]]), torch.tensor([1., -1.])).decode().tolist() == [[-1., 11.]]


# dtypes

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_thresholds_are_float32_whatever_the_default_dtype_is(dtype):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        for neuron in (ScaleAndFire((3,), SFNConfig(), center_shape=(3,)), GradedCoding(3)):
            assert {b.dtype for b in neuron.buffers() if b.is_floating_point()} == {torch.float32}
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize('dtype', [torch.float64, *LOW_DTYPES])
def test_thresholds_stay_float32(dtype):
    neuron = ScaleAndFire((5,), SFNConfig(levels=16), center_shape=(5,))
    neuron.set_state(torch.rand(5, generator=rng(0)) + 1.9, center=torch.randn(5, generator=rng(1)))
    coding = GradedCoding(3)
    coding.set_range(torch.tensor([-2.1, -2., -1.8]), torch.tensor([2.2, 2.4, 2.6]))
    model = nn.Sequential(nn.Linear(5, 5), neuron, coding)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('0.')}
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    for key, value in before.items():
        now = model.state_dict()[key]
        assert now.dtype == value.dtype and torch.equal(now, value), key


# state dicts

def stateful(fire_function='uniform'):
    """A calibrated neuron with every kind of buffer, as part of a model."""
    neuron = ScaleAndFire((4,), SFNConfig(levels=3, fire=fire_function), center_shape=(4,))
    neuron.set_state(torch.rand(4, generator=rng(0)) + 0.1, torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]),
                     center=torch.randn(4, generator=rng(1)))
    return nn.ModuleDict({'layer': neuron})


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


BUFFERS = ['calibrated', 'step', 'gain', 'multiplier', 'levels', 'center']


def test_state_dict_round_trip():
    config = SFNConfig(levels=3, fire='uniform')
    model, other = stateful(), nn.ModuleDict({'layer': ScaleAndFire((4,), config, center_shape=(4,))})
    assert sorted(model.state_dict()) == sorted(f'layer.{key}' for key in BUFFERS)
    other.load_state_dict(model.state_dict())
    x = torch.randn(6, 4, generator=rng(2))
    assert other.layer.calibrated and torch.equal(other.layer(x), model.layer(x))


def test_multipliers_are_bytes_in_files_and_levels_two():
    state = stateful().state_dict()
    assert state['layer.multiplier'].dtype == torch.uint8 and state['layer.levels'].dtype == torch.int16
    assert state['layer.multiplier'].tolist() == [[1, 2, 3, 4], [4, 3, 2, 1]]
    state['layer.multiplier'] = state['layer.multiplier'].float()
    state['layer.multiplier'][0, 1] = 2.5
    with pytest.raises(RuntimeError, match=r'layer\.multiplier is not an integer'):
        stateful().load_state_dict(state)


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('key', BUFFERS)
def test_incomplete_state_names_what_is_missing(key, strict):
    model = stateful()
    state = model.state_dict()
    del state[f'layer.{key}']
    with pytest.raises(RuntimeError, match=rf'incomplete.*layer\.{key}'):
        model.load_state_dict(state, strict=strict)


def test_state_without_neurons_loads_where_it_may():
    model = stateful()
    before = state_of(model)
    model.load_state_dict({}, strict=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


BROKEN_STATE = [
    ('step', math.nan), ('step', math.inf), ('step', 0.), ('step', -0.1), ('center', math.nan), ('center', math.inf),
    ('multiplier', 0), ('multiplier', 43), ('multiplier', 255),
]


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('key, value', BROKEN_STATE)
def test_broken_state_names_the_key_and_changes_nothing(key, value, strict):
    model = stateful()
    before, state = state_of(model), state_of(model)
    state[f'layer.{key}'].view(-1)[-1] = value
    with pytest.raises(RuntimeError, match=rf'layer\.{key} (is|must)'):
        model.load_state_dict(state, strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('key, shape', [
    ('step', (5,)), ('step', (2, 4)), ('multiplier', (1, 4)), ('levels', (4,)), ('levels', (0,)), ('center', (1,)),
])
def test_state_of_another_shape_names_the_key(key, shape):
    model = stateful()
    state = model.state_dict()
    state[f'layer.{key}'] = torch.ones(shape, dtype=state[f'layer.{key}'].dtype)
    with pytest.raises(RuntimeError, match=rf'layer\.{key} has shape'):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize('fire_function, levels, message', [
    ('uniform', [1, 2, 4], 'not the levels of uniform'),
    ('quadratic', [1, 2, 3], 'not the levels of quadratic'),
    ('density', [1, 3, 3], 'increase'),
    ('density', [3, 2, 4], 'increase'),
    ('density', [0, 1, 2], 'increase'),
    ('density', [1, 2, 128], 'increase'),
    ('uniform', [1., 2.5, 3.], 'integer'),
])
def test_wrong_levels_name_the_key(fire_function, levels, message):
    model = stateful(fire_function)
    state = model.state_dict()
    state['layer.levels'] = torch.tensor(levels)
    with pytest.raises(RuntimeError, match=rf'layer\.levels.*{message}'):
        model.load_state_dict(state, strict=False)


def test_density_loads_levels_of_its_own():
    model = stateful('density')
    state = state_of(model)
    state['layer.levels'] = torch.tensor([2, 9, 127], dtype=torch.int16)
    state['layer.multiplier'].fill_(1)
    model.load_state_dict(state)
    assert model.layer.encode(torch.full((1, 4), 1e3)).levels.tolist() == [[127] * 4]


def test_multipliers_are_checked_against_the_levels_that_come_with_them():
    model = stateful('density')
    state = state_of(model)
    state['layer.levels'] = torch.tensor([2, 9, 127], dtype=torch.int16)  # 127 times a multiplier of 2 has no int8
    with pytest.raises(RuntimeError, match=r'layer\.multiplier must lie in \[1, 1\]'):
        model.load_state_dict(state)
    state['layer.levels'] = torch.tensor([1, 2, 4], dtype=torch.int16)
    state['layer.multiplier'].fill_(31)
    model.load_state_dict(state)
    state['layer.levels'] = torch.tensor([1, 2, 3], dtype=torch.int16)
    state['layer.multiplier'].fill_(42)
    model.load_state_dict(state)
    assert model.layer.encode(torch.full((1, 4), 1e3)).levels.tolist() == [[126] * 4]


def test_assigned_state_is_float32_too():
    neuron, other = ScaleAndFire((4,)), ScaleAndFire((4,))
    other.set_state(torch.full((4,), 0.3))
    neuron.load_state_dict({k: v.bfloat16() if v.is_floating_point() else v for k, v in other.state_dict().items()},
                           assign=True)
    assert neuron.step.dtype == torch.float32 and neuron.calibrated


def test_refused_state_changes_nothing():
    neuron = ScaleAndFire((4,))
    before = copy.deepcopy(neuron.state_dict())
    state = dict(before, step=torch.zeros(4), calibrated=torch.tensor(True))
    with pytest.raises(RuntimeError, match='dead'):
        neuron.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in neuron.state_dict().items())
