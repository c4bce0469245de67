"""`sformer convert`."""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..neurons import FitConfig, SFNConfig, recipe_configs
from .arguments import check_source, command_line, parse_kwargs, parse_names
from .options import MAX_BATCH_SIZE, MAX_IMAGES, MAX_SEED, ColumnOptions, CropPct, Dataset, Given, Mean, Std, unfolded

__all__ = ['convert']


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

    def configs(self) -> tuple[SFNConfig, FitConfig]:
        """How neurons fire and how they are fitted, as `sformer.convert` takes both.

        Raises:
            ConfigError: If a value is out of its range.
        """
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        fields = {field.name for field in dataclasses.fields(FitConfig)}
        fit = {name: values.pop(name) for name in fields & values.keys()}
        return recipe_configs(values.pop('recipe'), values, fit)


@unfolded
def convert(
        source: Annotated[str, typer.Argument(help='timm model to convert, or folder of a detector')],
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for the SFormer')],
        neurons: NeuronOptions,
        columns: ColumnOptions,
        given: Given,
        checkpoint: Annotated[Path | None, typer.Option(
            help='Weights of the source (safetensors); its published ones if not given')] = None,
        model_kwargs: Annotated[list[str] | None, typer.Option(help='key=value ... for timm.create_model')] = None,
        label_names: Annotated[list[str] | None, typer.Option(
            help='Names of the classes, or a text file of them, one per line')] = None,
        calibration: Annotated[str, typer.Option(help=f'dead-leaves (generated images), {Dataset}')] = 'dead-leaves',
        split: Annotated[str | None, typer.Option(help='Split of the calibration data set')] = None,
        num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Number of calibration images')] = 256,
        seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of the choice of calibration images')] = 0,
        batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images per batch')] = 32,
        mean: Mean = None,
        std: Std = None,
        crop_pct: CropPct = None,
        interpolation: Annotated[str | None, typer.Option(help='Resize method: bicubic, bilinear ...')] = None,
        allow_pickle: Annotated[bool, typer.Option('--allow-pickle', help='Load a pickled checkpoint')] = False,
        overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace a model that is there')] = False,
) -> None:
    """Convert a trained timm model into an SFormer, without training."""
    config, fit = neurons.configs()
    check_source(source)
    from ..data import ImageRequest
    from ..saving import check_vacant
    from ..tasks import ConversionOptions, task_of
    task = task_of(source)
    task.check_options('convert', source, given)
    check_vacant(output, overwrite)
    wanted = ImageRequest(
        dataset=calibration, split=split, num_images=num_images, seed=seed, image_column=columns.image_column)
    options = ConversionOptions(
        checkpoint=checkpoint, model_kwargs=parse_kwargs(model_kwargs), label_names=parse_names(label_names), mean=mean,
        std=std, crop_pct=crop_pct, interpolation=interpolation, allow_pickle=allow_pickle, batch_size=batch_size)
    model = task.convert(source, wanted, config, fit, command_line(), options)
    task.save(model, output, overwrite)
    used = vars(model)['conversion'].calibration
    print(f'{source} -> {task.architecture(model)}: N = {config.levels}, calibrated on {used.num_images} {used.name} '
          f'images, saved to {output}')
    for line in task.remarks(model):
        print(line)
