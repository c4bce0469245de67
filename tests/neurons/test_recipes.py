"""Recipes: one table of neurons and their fit."""
import pytest

from sformer import FitConfig, SFNConfig
from sformer.neurons import RECIPES, recipe_configs, recipe_name


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_known_by_its_configs(name):
    config, fit = recipe_configs(name)
    assert (config, fit) == (SFNConfig.recipe(name), FitConfig.recipe(name))
    assert recipe_name(config, fit) == name


def test_what_recipes_are():
    assert SFNConfig() == SFNConfig.recipe('default') and SFNConfig().levels == 63
    fast = SFNConfig.recipe('fast')
    assert (fast.levels, fast.token_scale, fast.softmax_fire) == (63, False, 'byte')
    assert FitConfig.recipe('fast').estimator == 'max'
    assert [SFNConfig.recipe(name).levels for name in ('accurate', 'paper', 'few')] == [127, 32, 8]
    assert SFNConfig.recipe('quiet').silence > 0


def test_fields_change_a_recipe():
    config, fit = recipe_configs('fast', dict(levels=31), dict(unbiased=False))
    assert config == SFNConfig.recipe('fast', levels=31) and fit == FitConfig.recipe('fast', unbiased=False)
    assert recipe_name(config, fit) is None
    assert recipe_configs(None, SFNConfig(5), None) == (SFNConfig(5), FitConfig())


def test_mistakes():
    with pytest.raises(ValueError, match="no recipe 'slow': there are default, fast, accurate, paper, few, quiet"):
        SFNConfig.recipe('slow')
    with pytest.raises(ValueError, match='say two things'):
        recipe_configs('fast', SFNConfig())
    with pytest.raises(ValueError, match='levels must be an integer'):
        SFNConfig.recipe('fast', levels=0)


def test_generated_images_get_room():
    assert FitConfig().settled() == FitConfig(floor=0., margin=1.) == FitConfig(floor=0., margin=1.).settled(True)
    assert FitConfig().settled(True) == FitConfig(floor=0.75, margin=1.)
    assert FitConfig.recipe('fast').settled(True) == FitConfig('max', floor=0.75, margin=1.3)


def test_mistakes_of_a_fit():
    with pytest.raises(ValueError, match=r'floor must be a number in \[0, 1\]'):
        FitConfig(floor=1.5)
