"""`sformer export`."""
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SFormerError
from .arguments import command_line
from .options import MAX_IMAGES, MAX_IMG_SIZE, MAX_SEED, ColumnOptions, Dataset, Given, unfolded
from .source_options import KINDS_OF_SOURCE, NeuronOptions, SourceOptions, convert_source, options_of_conversion

__all__ = ['export']

WEIGHT_ERROR = 0.03  # of `to_integer_`; a test holds them together


class FileFormat(str, Enum):
    onnx = 'onnx'
    safetensors = 'safetensors'


@unfolded
def export(
        model: Annotated[str, typer.Argument(
            help=f'Folder of an SFormer, hf-hub:ID, or name of one with weights; to convert first: {KINDS_OF_SOURCE}')],
        output: Annotated[Path, typer.Argument(help='File to write: .onnx or .safetensors')],
        neurons: NeuronOptions,
        source: SourceOptions,
        columns: ColumnOptions,
        given: Given,
        format: Annotated[FileFormat | None, typer.Option(
            help='onnx, a graph for engines, or safetensors, plain tensors for whoever builds hardware; goes by the '
                 'suffix')] = None,
        max_error: Annotated[float, typer.Option(
            min=0, help='Relative error of int8 weights beyond which a layer stays in floating point')
        ] = WEIGHT_ERROR,
        calibration: Annotated[str | None, typer.Option(
            help='Round weights such that errors cancel on images of this kind, and fit thresholds to them: '
                 f'dead-leaves, {Dataset}')] = None,
        split: Annotated[str | None, typer.Option(help='Split of these images')] = None,
        num_images: Annotated[int | None, typer.Option(
            min=1, max=MAX_IMAGES, help='Number of these images  [default: 128; to fit thresholds 256]')] = None,
        seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of the choice of these images')] = 0,
        image_size: Annotated[tuple[int, int] | None, typer.Option(
            min=1, max=MAX_IMG_SIZE, help="Height and width of images of a detector, if not its own")] = None,
        portable: Annotated[bool, typer.Option(
            help='Products that every processor sums exactly, or 8-bit weights everywhere, which want VNNI')] = True,
        spikes: Annotated[bool, typer.Option(
            '--spikes', help='Also give where it spikes, per block and token, for `sformer page`')] = False,
        uint8_input: Annotated[bool, typer.Option(
            '--uint8-input', help='Let the graph take bytes as decoders give them, (batch, height, width, channels), '
                                  'RGB, and normalise them')] = False,
        overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace a file that is there')] = False,
) -> None:
    """Write an SFormer with int8 levels and int8 weights: as ONNX, for OpenVINO and ONNX Runtime, or as tensors.

    A source is converted first, and so is an SFormer where an option says how neurons fire.
    """
    from ..data import ImageRequest
    from ..execution.onnx import writable
    from ..execution.prepared import check_output, slow_neurons
    from ..layers import named_neurons
    from ..tasks import ExportOptions, task_of
    if format is None:
        format = FileFormat.safetensors if output.suffix == '.safetensors' else FileFormat.onnx
    if format == FileFormat.onnx:
        writable(output, overwrite)
    else:
        check_output(output, '.safetensors', overwrite)
        given = {*given, 'format'}
    task = task_of(model)
    converts = bool(given & options_of_conversion())
    network = None if converts else task.open(model)
    if network is None or not any(True for _ in named_neurons(network)):
        # calibration images of a detector fit its thresholds, and round no weights
        task.check_options('convert', model, given)
        task.check_options('export', model, given - {'calibration', 'split', 'num_images', 'seed', 'image_column'})
        network = convert_source(task, model, ImageRequest(
            dataset=calibration or 'dead-leaves', split=split, num_images=num_images or 256, seed=seed,
            image_column=columns.image_column), neurons, source)
        for line in task.remarks(network):
            print(line)
    else:
        task.check_options('export', model, given)
        if calibration is None and given & {'num_images', 'seed'}:
            raise SFormerError('--num-images and --seed are of images to round weights for: name them (--calibration).')
    reports = task.export(network, output, ExportOptions(
        max_error=max_error, portable=portable, overwrite=overwrite, command=command_line(), calibration=calibration,
        split=split, num_images=num_images or 128, seed=seed, image_column=columns.image_column, image_size=image_size,
        spikes=spikes, format=format.value, uint8_input=uint8_input))
    whole = [report for report in reports if report.integer]
    of = 'products with int8 weights' if calibration else 'int8 weights'
    print(f'{model} -> {output}: {output.stat().st_size / 2 ** 20:.1f} MiB, {len(whole)} of {len(reports)} layers in '
          f'integers, largest error of {of} {max((r.error for r in whole), default=0):.4f}')
    for report in reports:
        if not report.integer:
            print(f'  {report.name} stays in floating point: {report.reason}')
    if format == FileFormat.onnx:
        if slow_neurons(network):
            print('thresholds follow tokens, or softmax levels are no bytes: engines are faster with the recipe fast '
                  '(sformer benchmark measures it).')
        print_verdict()


def print_verdict() -> None:
    """Say so if integers gain little on this processor, by the engine that would be taken."""
    from ..execution.engines import find_engine
    from ..execution.processor import int8_verdict
    try:
        verdict = int8_verdict(find_engine())
    except SFormerError:  # no engine is here: the file is for another machine
        return
    if verdict:
        print(verdict)
