"""How neurons fire, and how they are fitted: two frozen configs, each with one owner. They need no torch."""
import dataclasses
import math
from typing import Any, TypeVar

from ..errors import ConfigError, check, check_choice, check_flag, check_integer, check_number
from .levels import MAX_LEVEL, MAX_WIDE_LEVEL, level_integers, max_levels

__all__ = [
    'FIRE_FUNCTIONS', 'SOFTMAX_FIRE_FUNCTIONS', 'ESTIMATORS', 'EFFORTS', 'DEFAULT_RANGE', 'NEURON_TYPES',
    'SCALE_AND_FIRE', 'SEPARATE_BRANCHES', 'RECIPES', 'Fields', 'Recipe', 'SFNConfig', 'FitConfig', 'as_config',
    'recipe_configs', 'recipe_name', 'recipe_of',
]

FIRE_FUNCTIONS = ('uniform', 'widening', 'quarter_square', 'quadratic', 'quartic', 'power2', 'density')
SOFTMAX_FIRE_FUNCTIONS = (*FIRE_FUNCTIONS, 'byte')
ESTIMATORS = ('mse', 'quantile', 'max')
EFFORTS = ('usual', 'high')
# of `FitConfig`, measured on a ViT-S that was trained at scale
GENERATED_FLOOR = 0.75
GENERATED_MARGIN = 1.3
MAX_FLOOR = 0.5
MAX_GROUPS = 64
SCALE_AND_FIRE = 'scale_and_fire'
SEPARATE_BRANCHES = 'separate_branches'  # the same, of which no branch shares its N thresholds with the other
NEURON_TYPES: dict[str, type] = {}  # types of neurons by name, as `register_neuron` fills it
DEFAULT_RANGE = 4.  # uncalibrated neurons fire over +-4: four standard deviations of a LayerNorm output

Fields = dict[str, Any]  # of a config, by name: it says itself which values it takes


@dataclasses.dataclass(frozen=True)
class SFNConfig:
    """How the scale-and-fire neurons of a model fire. The neurons own it; a saved model has it in `model_args`.

    Args:
        levels: Number of thresholds N per branch, 1 to 127 (to 7 for `power2`, 18 for `widening`, 20 for
            `quarter_square`). Up to 63 cost engines nothing: every processor multiplies them by 8-bit weights.
        fire: Fire function of signed currents, one of `uniform`, `widening`, `quarter_square`, `quadratic`, `quartic`,
            `power2`, `density`. `auto` is `widening` with up to 11 levels, which few levels have to reach far with, and
            `uniform` with more, and with `silence`, which wants low levels.
        attention_fire: Fire function of the softmax numerators, whose levels may have 14 bits. `auto` is `quartic`
            (levels i^4 up to N^4) with up to 11 levels and `quadratic` (i^2 up to N^2) with more; both follow the
            distribution of numerators closely enough that nothing has to be fitted there. With `silence` it is
            `quarter_square` with up to 20 levels, which takes far fewer unary spikes. `byte` has the levels 1 to 255,
            whatever `levels` is: as many as engines multiply in 8 bits.
        activation_fire: Fire function of currents that come from an activation function (`fc2` of an MLP), of which few
            are large and most nearly nothing. Where `fire` is `auto` or `uniform`, `auto` is `quarter_square` with up
            to 11 levels and, of products of a gate and a value (SwiGLU), whose tails are heavier, `quadratic`; in all
            other cases, and with `silence`, what `fire` is.
        initial_potential: Membrane potential before the input, as a share of the distance to the next level, in
            [0, 1): 1/2 rounds, 0 is the paper's floor.
        dead_zone: No spike below this many thresholds; 0 leaves the first boundary where it is.
        scale: The paper's scaling factor lambda, one number on top of every fitted threshold.
        token_scale: Let thresholds follow each token, where the factor is free after the product: inputs of linear
            layers (a factor per token), queries and keys (per token and head). The largest potential of a token then
            fires the top level, so that outlier tokens do not clip and the others do not pay for them.
        silence: Price of activity, 0 for none. Potentials for which spikes would cost more than they bring are silent:
            the squared relative error of the network's output plus this price times its activity is least. From 0.003
            (few losses) to 0.1 are usual.
        keys_rest: Let keys that are silent in a row of attention count as the mean of all values of the image, instead
            of as none, where neurons have a price of activity: a query then needs few of them. Rows of a mask stay.
        lateral: Number of groups in which the channels of a linear layer's input, of queries, keys and values fire, 0
            for none. What a group leaves out is fed back to those that fire after it, so that errors cancel in what
            follows (`neurons.lateral`): for few levels and for silence, at the price of lateral spikes and of the
            operations that they cause.
        lateral_zone: No lateral spike for less than this share of the mean distance between two levels.
        lateral_cost: No lateral spikes where feedback weights are more than so many times the weights of the layer: in
            a ViT with 8 groups they are 0.11 times those of `fc1`, 0.15 of `qkv`, 0.44 of `proj` and 1.75 of `fc2`.
        neuron: Type of the neurons, by the name that `register_neuron` gave it. `separate_branches` are scale-and-fire
            neurons whose branches share no thresholds, wherever they are.

    Raises:
        ConfigError: If a value is out of its range; the message names it.
    """
    levels: int = 63
    fire: str = 'auto'
    attention_fire: str = 'auto'
    activation_fire: str = 'auto'
    initial_potential: float = 0.5
    dead_zone: float = 0.
    scale: float = 1.
    token_scale: bool = True
    silence: float = 0.
    keys_rest: bool = False
    lateral: int = 0
    lateral_zone: float = 0.125
    lateral_cost: float = 2.
    neuron: str = SCALE_AND_FIRE

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> 'SFNConfig':
        """How neurons of a recipe (`RECIPES`) fire, single fields changed.

        Raises:
            ConfigError: If there is no such recipe, or a value is out of its range.
        """
        return cls(**{**recipe_of(name).config, **changes})

    def __post_init__(self) -> None:
        check_integer(self, 'levels', 1, MAX_LEVEL)
        for name in ('fire', 'activation_fire', 'attention_fire'):
            names = SOFTMAX_FIRE_FUNCTIONS if name == 'attention_fire' else FIRE_FUNCTIONS
            check_choice(self, name, ('auto', *names))
            value = getattr(self, name)
            if value == 'auto':
                continue
            most = max_levels(value)
            if self.levels > most:
                few = ', '.join(map(str, level_integers(value, 4)))
                raise ConfigError(f'{name}={value} has levels {few} ... {level_integers(value, most)[-1]}, so at most '
                                  f'{most} of them, got levels={self.levels}.')
        check_number(self, 'initial_potential', 0, math.nextafter(1, 0), 'in [0, 1)')
        check_number(self, 'dead_zone', 0)
        for name, value, limit in (
                ('fire', self.signed_fire, MAX_LEVEL), ('activation_fire', self.mlp_fire, MAX_LEVEL),
                ('attention_fire', self.softmax_fire, MAX_WIDE_LEVEL)):
            top = limit if value == 'density' else level_integers(value, self.levels, limit)[-1]
            check(self.dead_zone <= top,
                  f'dead_zone must not exceed {top}, the top level of {name}={value} with {self.levels} levels, or '
                  f'nothing would ever fire, got {self.dead_zone!r}.')
        check_number(self, 'scale', 1e-3, 1e3)
        check_flag(self, 'token_scale')
        check_number(self, 'silence', 0, 1e6)
        check_flag(self, 'keys_rest')
        check(self.silence > 0 or not self.keys_rest, 'keys_rest says what silent keys count as: give a price of '
                                                      'activity (silence), or leave it out.')
        check_integer(self, 'lateral', 0, MAX_GROUPS)
        check(self.lateral != 1, 'lateral=1 is one group, which has nobody to feed back to: 0 is none, 2 or more are '
                                 'groups.')
        check_number(self, 'lateral_zone', 0, 1)
        check_number(self, 'lateral_cost', 0)
        types = [*dict.fromkeys((SCALE_AND_FIRE, SEPARATE_BRANCHES, *NEURON_TYPES))]
        check(isinstance(self.neuron, str) and self.neuron in types,
              f'neuron must be one of {", ".join(types)}, got {self.neuron!r}: '
              f'sformer.neurons.register_neuron registers a type of your own.')
        check(not self.lateral or self.neuron in (SCALE_AND_FIRE, SEPARATE_BRANCHES),
              f'lateral spikes are sent by scale-and-fire neurons, not by {self.neuron}.')

    @property
    def signed_fire(self) -> str:
        """Fire function of signed currents, by name."""
        if self.fire != 'auto':
            return self.fire
        return 'widening' if self.levels <= 11 and not self.silence else 'uniform'

    @property
    def mlp_fire(self) -> str:
        """Fire function of what comes from an activation function, by name."""
        if self.activation_fire != 'auto':
            return self.activation_fire
        few = self.levels <= 11 and not self.silence
        return 'quarter_square' if few and self.fire in ('auto', 'uniform') else self.signed_fire

    @property
    def gated_fire(self) -> str:
        """Fire function of products of a gate and a value, by name."""
        if self.activation_fire != 'auto':
            return self.activation_fire
        return 'quadratic' if self.fire in ('auto', 'uniform') and not self.silence else self.signed_fire

    @property
    def softmax_fire(self) -> str:
        """Fire function of the softmax numerators, by name."""
        if self.attention_fire != 'auto':
            return self.attention_fire
        if self.silence and self.levels <= max_levels('quarter_square'):
            return 'quarter_square'
        return 'quartic' if self.levels ** 4 <= MAX_WIDE_LEVEL else 'quadratic'


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How thresholds are fitted to observed currents. The record of a conversion owns it; a model does not need it.

    Args:
        estimator: `mse` (least squared error under the observed distribution), `quantile` (top-p, the paper's) or
            `max`.
        quantile: The p of `quantile`: the share of a branch's currents that its firing range covers.
        floor: Quantile of the firing ranges of all channels that come from attention or an activation function, each
            times the norm of its weights: no channel's is smaller, as what calibration images leave quiet may speak on
            others. None for 0.75 of generated images, else 0.5 with `max`, which knows no more of a channel than was
            seen, and 0, which is none.
        margin: Factor on the firing ranges of the same channels. None for 1 or, where `max` is fitted to generated
            images, 1.3.
        unbiased: Let each spike carry a little more than its threshold, so that the projection of a neuron's output on
            its input is the input. Rounding and clipping shrink a signal by some per cent with few levels, and shrunken
            signals add up along the network.
        compensate: Let weights make up for what neurons leave out, as far as the neurons beside them know of it. This
            is no training, but the weights are no longer those of the source.
        balance: Write queries, keys and values of attention such that neurons make the least noise or, with a price of
            activity, such that few of them carry most. What the network computes stays but for rounding; the weights
            that do so are no longer those of the source.
        concentrate: Write the residual stream of a vision transformer with a linear classifier such that few channels
            carry most of it, for neurons with a price of activity. What the classifier says stays but for rounding;
            features before it are in another basis, and the weights are no longer those of the source.
        effort: `usual`, or `high`: weights are trained, block by block and without labels, such that each gives what
            that of the source gives. It takes minutes, and the weights are no longer those of the source.

    Raises:
        ConfigError: If a value is out of its range; the message names it.
    """
    estimator: str = 'mse'
    quantile: float = 0.999
    floor: float | None = None
    margin: float | None = None
    unbiased: bool = True
    compensate: bool = False
    balance: bool = False
    concentrate: bool = False
    effort: str = 'usual'

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> 'FitConfig':
        """How neurons of a recipe (`RECIPES`) are fitted, single fields changed.

        Raises:
            ConfigError: If there is no such recipe, or a value is out of its range.
        """
        return cls(**{**recipe_of(name).fit, **changes})

    def settled(self, generated: bool = False) -> 'FitConfig':
        """The same with the floor and the margin that suit images, generated or not, where none is given."""
        floor, margin = self.floor, self.margin
        if floor is None:
            floor = GENERATED_FLOOR if generated else MAX_FLOOR if self.estimator == 'max' else 0.
        if margin is None:
            margin = GENERATED_MARGIN if generated and self.estimator == 'max' else 1.
        return dataclasses.replace(self, floor=floor, margin=margin)

    def __post_init__(self) -> None:
        check_choice(self, 'estimator', ESTIMATORS)
        check_number(self, 'quantile', math.ulp(0.), 1, 'in (0, 1]')
        if self.floor is not None:
            check_number(self, 'floor', 0, 1)
        if self.margin is not None:
            check_number(self, 'margin', 1e-3, 1e3)
        check_flag(self, 'unbiased')
        check_flag(self, 'compensate')
        check_flag(self, 'balance')
        check_flag(self, 'concentrate')
        check_choice(self, 'effort', EFFORTS)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Neurons, and how they are fitted, by one name.

    Args:
        summary: For whom it is, in a line.
        config: Fields of `SFNConfig` that are not as they are by default.
        fit: Fields of `FitConfig` likewise.
    """
    summary: str
    config: Fields = dataclasses.field(default_factory=dict)
    fit: Fields = dataclasses.field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    'default': Recipe('close to the source, in integers as fast as fewer levels'),
    'fast': Recipe('for int8 engines: one threshold for all tokens, a softmax of bytes',
                   dict(token_scale=False, attention_fire='byte'), dict(estimator='max')),
    'accurate': Recipe('closest to the source; weights of 7 bits where engines multiply', dict(levels=127)),
    'paper': Recipe('32 levels per branch, as in arXiv 2510.23383', dict(levels=32)),
    'few': Recipe('few levels: short spike trains', dict(levels=8)),
    'quiet': Recipe('few spikes: neurons are silent where a spike costs more than it brings',
                    dict(levels=16, silence=0.008)),
}


def recipe_of(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ConfigError: If there is none.
    """
    check(name in RECIPES, f'no recipe {name!r}: there are {", ".join(RECIPES)}.')
    return RECIPES[name]


def recipe_name(config: SFNConfig, fit: FitConfig) -> str | None:
    """Name of the recipe that configs are of, the fit `settled` or not; None if they are of none."""
    for name in RECIPES:
        wanted = FitConfig.recipe(name)
        if SFNConfig.recipe(name) == config and fit in (wanted, wanted.settled(), wanted.settled(generated=True)):
            return name
    return None


Config = TypeVar('Config', SFNConfig, FitConfig)


def as_config(kind: type[Config], value: Config | Fields | None) -> Config:
    """A config that is given as one, as its fields, or as None for the default one."""
    return value if isinstance(value, kind) else kind(**(value or {}))  # type: ignore[arg-type]


def recipe_configs(
        recipe: str | None,
        config: SFNConfig | Fields | None = None,
        fit: FitConfig | Fields | None = None,
) -> tuple[SFNConfig, FitConfig]:
    """How neurons fire and how they are fitted, by a recipe, whose single fields configs change that are given as such.

    Raises:
        ConfigError: If there is no such recipe, a whole config is given beside one, or a value is out of its range.
    """
    if recipe is None:
        return as_config(SFNConfig, config), as_config(FitConfig, fit)
    for whole in (config, fit):
        check(whole is None or isinstance(whole, dict),
              f'recipe={recipe!r} and a whole {type(whole).__name__} say two things: give the fields that change, or '
              f'{type(whole).__name__}.recipe({recipe!r}, ...) alone.')
    return SFNConfig.recipe(recipe, **(config or {})), FitConfig.recipe(recipe, **(fit or {}))  # type: ignore[arg-type]
