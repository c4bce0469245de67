"""`sformer convert`."""
from pathlib import Path
from typing import Annotated

import typer

from .options import MAX_IMAGES, MAX_SEED, ColumnOptions, Dataset, Given, unfolded
from .source_options import KINDS_OF_SOURCE, NeuronOptions, SourceOptions, convert_source

__all__ = ['convert']


@unfolded
def convert(
        source: Annotated[str, typer.Argument(help=f'What to convert: {KINDS_OF_SOURCE}; or the folder of a detector')],
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for the SFormer')],
        neurons: NeuronOptions,
        options: SourceOptions,
        columns: ColumnOptions,
        given: Given,
        calibration: Annotated[str, typer.Option(help=f'dead-leaves (generated images), {Dataset}')] = 'dead-leaves',
        split: Annotated[str | None, typer.Option(help='Split of the calibration data set')] = None,
        num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Number of calibration images')] = 256,
        seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of the choice of calibration images')] = 0,
        overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace a model that is there')] = False,
) -> None:
    """Convert a trained vision transformer into an SFormer, without training."""
    config, _ = neurons.configs()
    from ..data import ImageRequest
    from ..saving import check_vacant
    from ..tasks import task_of
    task = task_of(source)
    task.check_options('convert', source, given)
    check_vacant(output, overwrite)
    images = ImageRequest(
        dataset=calibration, split=split, num_images=num_images, seed=seed, image_column=columns.image_column)
    model = convert_source(task, source, images, neurons, options)
    task.save(model, output, overwrite)
    used = vars(model)['conversion'].calibration
    print(f'{source} -> {task.architecture(model)}: N = {config.levels}, calibrated on {used.num_images} {used.name} '
          f'images, saved to {output}')
    for line in task.remarks(model):
        print(line)
