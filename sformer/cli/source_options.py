"""What `convert` and `export` are told of a source and of the neurons that it gets."""
import dataclasses
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..neurons import FitConfig, SFNConfig, recipe_configs
from .arguments import command_line, parse_kwargs, parse_names
from .options import MAX_BATCH_SIZE, CropPct, Mean, Std

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageRequest
    from ..tasks import Task

__all__ = ['NeuronOptions', 'SourceOptions', 'KINDS_OF_SOURCE', 'convert_source', 'options_of_conversion']

KINDS_OF_SOURCE = 'name of a timm model, checkpoint of its training, folder or hf-hub:ID of timm or transformers'


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What the source is, where its files do not say so."""
    checkpoint: Annotated[Path | None, typer.Option(
        help='Weights of the timm model that is named, in a file; its published ones if not given')] = None
    model_kwargs: Annotated[list[str] | None, typer.Option(help='key=value ... for timm.create_model')] = None
    label_names: Annotated[list[str] | None, typer.Option(
        help='Names of the classes, or a text file of them, one per line, or a JSON file')] = None
    mean: Mean = None
    std: Std = None
    crop_pct: CropPct = None
    interpolation: Annotated[str | None, typer.Option(help='Resize method: bicubic, bilinear ...')] = None
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images per batch')] = 32


@dataclass(frozen=True, kw_only=True)
class NeuronOptions:
    """How neurons fire and how their thresholds are fitted: a recipe, and what is to be other than it says."""
    recipe: Annotated[str, typer.Option(
        help='default (63 levels), fast (int8 engines), accurate (127), paper (32), few (8) or quiet (few spikes)'
    )] = 'default'
    levels: Annotated[int | None, typer.Option(
        help='Thresholds N per branch, 1 to 127  [default: 63, or of the recipe]')] = None
    fire: Annotated[str | None, typer.Option(
        help='auto (by N), uniform, widening, quarter_square, quadratic, quartic, power2 or density')] = None
    attention_fire: Annotated[str | None, typer.Option(
        help='Fire function of the softmax: auto (by N), quadratic, quartic, byte, ...')] = None
    activation_fire: Annotated[str | None, typer.Option(
        help='Fire function after an activation function: auto (by N), quarter_square, uniform, ...')] = None
    initial_potential: Annotated[float | None, typer.Option(
        help='Membrane potential before the input, as a share of the distance to the next level: 0.5 rounds, 0 is the '
             'paper\'s floor  [default: 0.5]')] = None
    dead_zone: Annotated[float | None, typer.Option(help='No spike below this many thresholds')] = None
    scale: Annotated[float | None, typer.Option(help='Scaling factor lambda on top of all thresholds')] = None
    token_scale: Annotated[bool | None, typer.Option(
        help='Let thresholds follow each token where the factor is free after the product  [default: they do, but of '
             'fast]')] = None
    silence: Annotated[float | None, typer.Option(
        help='Price of activity: the higher, the fewer neurons fire; 0.003 to 0.1 are usual')] = None
    keys_rest: Annotated[bool | None, typer.Option(
        '--keys-rest', help='With --silence: let keys that are silent in a row of attention count as the mean of all '
        'values')] = None
    lateral: Annotated[int | None, typer.Option(
        help='Groups in which the channels of a site fire, each of which takes up what those before left out; 4 or 8 '
             'are usual  [default: 0, none]')] = None
    lateral_zone: Annotated[float | None, typer.Option(
        help='No lateral spike for less than this share of the distance between two levels  [default: 0.125]')] = None
    lateral_cost: Annotated[float | None, typer.Option(
        help='No lateral spikes where they take more than so many times the weights of the layer  [default: 2]'
    )] = None
    estimator: Annotated[str | None, typer.Option(
        help='Threshold estimator: mse, quantile or max  [default: mse, of fast max]')] = None
    quantile: Annotated[float | None, typer.Option(
        help='Share of currents that the quantile estimator covers  [default: 0.999]')] = None
    floor: Annotated[float | None, typer.Option(
        help='Quantile of the firing ranges behind attention and activation functions that none is below  [default: 0, '
             'with generated images 0.75]')] = None
    margin: Annotated[float | None, typer.Option(
        help='Factor on these ranges  [default: 1, with generated images and max 1.3]')] = None
    unbiased: Annotated[bool | None, typer.Option(
        help='Let spikes carry what rounding and clipping would take from the signal  [default: they do]')] = None
    compensate: Annotated[bool | None, typer.Option(
        '--compensate', help='Let weights make up for what neurons leave out: closer to the source, whose weights they '
        'are no longer')] = None
    balance: Annotated[bool | None, typer.Option(
        '--balance', help='Write queries, keys and values such that neurons make the least noise or, with --silence, '
        'the fewest spikes: the same function by other weights')] = None
    concentrate: Annotated[bool | None, typer.Option(
        '--concentrate', help='For classifiers, as in --silence 0.02 --balance --concentrate: write the residual '
        'stream such that few channels carry most of it, by other weights of the same function')] = None
    effort: Annotated[str | None, typer.Option(
        help='usual, or high: train the weights of each block, without labels, to give what that of the source gives, '
             'which takes minutes  [default: usual]')] = None

    def configs(self) -> tuple[SFNConfig, FitConfig]:
        """How neurons fire and how they are fitted, as `sformer.convert` takes both.

        Raises:
            ConfigError: If a value is out of its range.
        """
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        fields = {field.name for field in dataclasses.fields(FitConfig)}
        fit = {name: values.pop(name) for name in fields & values.keys()}
        return recipe_configs(values.pop('recipe'), values, fit)


def convert_source(
        task: 'Task',
        source: str,
        images: 'ImageRequest',
        neurons: NeuronOptions,
        options: SourceOptions,
) -> 'nn.Module':
    """An SFormer of a source.

    Raises:
        SFormerError: If the source, the images or an option cannot be used.
    """
    config, fit = neurons.configs()
    from ..tasks import ConversionOptions
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    values.update(model_kwargs=parse_kwargs(options.model_kwargs), label_names=parse_names(options.label_names))
    return task.convert(source, images, config, fit, command_line(), ConversionOptions(**values))


def options_of_conversion() -> Set[str]:
    """Names of the options of sources and neurons."""
    return {field.name for kind in (NeuronOptions, SourceOptions) for field in dataclasses.fields(kind)}
