"""`sformer predict`."""
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SFormerError
from .options import MAX_BATCH_SIZE

if TYPE_CHECKING:
    from ..evaluation.predictions import Finding, Prediction
    from ..tasks import Look

__all__ = ['predict']


def predict(
        model: Annotated[str, typer.Argument(
            help='Folder of a model, hf-hub:ID, name of one with weights, or ONNX file of `sformer export`')],
        images: Annotated[list[str], typer.Argument(help="Images, folders of images, or patterns: 'photos/*.jpg'")],
        topk: Annotated[int, typer.Option(min=1, help='Classes per image; of a detector, detections')] = 5,
        output: Annotated[Path | None, typer.Option(
            '--output', '-o', help='CSV or JSON file for the predictions; or PNG: the images, where they make the '
                                   'network spike, and the classes')] = None,
        source: Annotated[bool, typer.Option('--source', help='Beside it, what its source says')] = False,
        source_model: Annotated[str | None, typer.Option(help='Beside it, what this model says')] = None,
        batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images at a time')] = 16,
        device: Annotated[str | None, typer.Option(help='cpu, cuda, ...; an accelerator if there is one')] = None,
        engine: Annotated[str | None, typer.Option(
            help='openvino or onnxruntime, for an ONNX file; the first that is installed')] = None,
        overwrite: Annotated[bool, typer.Option(
            '--overwrite', help='Replace a file that is there; one of this command is replaced anyway')] = False,
) -> None:
    """Say what is to be seen in images. One that cannot be read is a row that says why."""
    from ..files import write_file
    from ..publishing.plots import need_pages
    from ..publishing.prediction_files import check_predictions_file, writing_predictions
    from ..publishing.prediction_plots import check_room, plot_predictions
    if output:
        check_predictions_file(output, overwrite, images)
    draws = output is not None and output.suffix.lower() == '.png'
    if draws:
        need_pages()
    from ..evaluation.networks import usable_device
    from ..tasks import open_predictor
    chosen = None if model.endswith('.onnx') and device is None else usable_device(device)
    predictor = open_predictor(model, source_model or source, chosen, engine)
    failed = number = 0
    drawn: list[tuple[Prediction, Look | None]] = []
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(writing_predictions(output, model, topk)) if output and not draws else None
        for prediction in predictor.predict(images, topk, batch_size):
            number += 1
            failed += prediction.error is not None
            if write:
                write(prediction)
            if draws:
                check_room(number)
                drawn.append((prediction, None if prediction.error else predictor.look(prediction.image, prediction)))
            if output is None or prediction.error:
                print_prediction(prediction)
    if named := predictor.task.origin_of_names(predictor.model):
        print(f'names of classes: {named}', file=sys.stderr)
    if output and draws:
        write_file(output, plot_predictions(drawn, model))
    if output:
        print(f'{number} images: {output}')
    if failed:
        raise SFormerError(f'{failed} of {number} images cannot be read.')


def print_prediction(prediction: 'Prediction') -> None:
    """A line of an image and, if it is compared with one, of its source."""
    print(f'{prediction.image}: {prediction.error or words_of(prediction.found)}')
    if prediction.source is not None:
        print(f'{"  source:":>{len(prediction.image) + 1}} {words_of(prediction.source)}')


def words_of(found: 'tuple[Finding, ...]') -> str:
    """Names and probabilities, in a line."""
    words = []
    for finding in found:
        box = '' if finding.box is None else f' at {", ".join(f"{side:.0f}" for side in finding.box)}'
        words.append(f'{finding.name} {finding.probability:.3f}{box}')
    return ', '.join(words) or 'nothing found'
