"""Configs of firing and of fitting: every value out of its range is named."""
import dataclasses
import math

import pytest

from sformer.neurons import MAX_LEVEL, FitConfig, SFNConfig
from sformer.neurons.config import recipe_configs


@pytest.mark.parametrize('field, value', [
    ('levels', 0), ('levels', 128), ('levels', -1), ('levels', 8.), ('levels', '8'), ('levels', None), ('levels', True),
    ('fire', 'linear'), ('attention_fire', 'softmax'), ('activation_fire', 'gelu'),
    ('initial_potential', -0.1), ('initial_potential', 1.), ('initial_potential', math.nan),
    ('dead_zone', -0.5), ('dead_zone', math.nan), ('dead_zone', math.inf),
    ('scale', 0.), ('scale', -1.), ('scale', math.nan), ('scale', math.inf),
])
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=rf'^{field}\b'):
        SFNConfig(**{field: value})


@pytest.mark.parametrize('field, value', [
    ('estimator', 'kl'), ('estimator', None), ('quantile', 0.), ('quantile', 1.01), ('quantile', math.nan),
    ('quantile', -1), ('quantile', '1'), ('unbiased', 1), ('compensate', 0),
])
def test_fit_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=rf'^{field}\b'):
        FitConfig(**{field: value})


@pytest.mark.parametrize('field', ['initial_potential', 'dead_zone', 'scale'])
@pytest.mark.parametrize('value', ['1', None, True])
def test_config_refuses_what_is_no_number(field, value):
    with pytest.raises(ValueError, match=f'{field} must be a number'):
        SFNConfig(**{field: value})


@pytest.mark.parametrize('field', ['fire', 'attention_fire', 'activation_fire'])
@pytest.mark.parametrize('name, most', [('power2', 7), ('widening', 18), ('quarter_square', 20)])
def test_config_names_fire_functions_that_have_not_so_many_levels(field, name, most):
    SFNConfig(levels=most, **{field: name})
    with pytest.raises(ValueError, match=f'{field}={name} has levels [12], .* so at most {most} of them'):
        SFNConfig(levels=most + 1, **{field: name})


@pytest.mark.parametrize('field', ['fire', 'activation_fire'])
def test_a_byte_without_a_sign_is_for_the_softmax_alone(field):
    assert SFNConfig(attention_fire='byte').softmax_fire == 'byte'
    with pytest.raises(ValueError, match=f"{field} must be one of .*'byte'"):
        SFNConfig(**{field: 'byte'})


def test_fire_functions_that_are_chosen():
    assert [SFNConfig(n).signed_fire for n in (4, 11, 12)] == ['widening', 'widening', 'uniform']
    assert SFNConfig(4, silence=0.01).signed_fire == 'uniform'
    assert [SFNConfig(n).mlp_fire for n in (4, 11, 12)] == ['quarter_square', 'quarter_square', 'uniform']
    assert [SFNConfig(n).gated_fire for n in (4, 32)] == ['quadratic', 'quadratic']
    assert SFNConfig(4, 'density').mlp_fire == SFNConfig(4, 'density').gated_fire == 'density'
    assert SFNConfig(4, activation_fire='uniform').mlp_fire == 'uniform'
    assert [SFNConfig(n).softmax_fire for n in (4, 11, 12)] == ['quartic', 'quartic', 'quadratic']


@pytest.mark.parametrize('config, silent', [
    (dict(levels=8, fire='uniform'), 8.1), (dict(levels=8), 24.1), (dict(levels=4, attention_fire='uniform'), 4.1),
    (dict(levels=4, fire='density', attention_fire='quadratic'), 16.1), (dict(levels=4, fire='density'), 127.1),
])
def test_config_refuses_a_dead_zone_beyond_the_top_level(config, silent):
    with pytest.raises(ValueError, match='dead_zone must not exceed .* nothing would ever fire'):
        SFNConfig(**config, dead_zone=silent)
    SFNConfig(**config, dead_zone=silent - 0.2)


def test_a_recipe_and_what_changes_of_it():
    assert recipe_configs(None) == (SFNConfig(), FitConfig())
    assert recipe_configs(None, SFNConfig(8), dict(estimator='max')) == (SFNConfig(8), FitConfig('max'))
    fast = SFNConfig.recipe('fast'), FitConfig.recipe('fast')
    assert recipe_configs('fast') == fast != recipe_configs(None)
    changed = dataclasses.replace(fast[0], levels=40), dataclasses.replace(fast[1], estimator='quantile')
    assert recipe_configs('fast', dict(levels=40), dict(estimator='quantile')) == changed
    for whole in (dict(config=SFNConfig(8)), dict(fit=FitConfig('max'))):
        with pytest.raises(ValueError, match="recipe='fast' and a whole .* say two things: give the fields"):
            recipe_configs('fast', **whole)


@pytest.mark.parametrize('config, field', [(SFNConfig(), 'levels'), (FitConfig(), 'estimator')])
def test_configs_are_frozen(config, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 3)
    assert type(config)(**dataclasses.asdict(config)) == config


def test_limits_are_valid():
    for levels in (1, MAX_LEVEL):
        SFNConfig(levels=levels, initial_potential=0., dead_zone=0.)
    FitConfig('quantile', 1.)
