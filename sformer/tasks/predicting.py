"""Predictions: what a model of any task says of images that nobody has labelled."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from ..conversion import warn_of_changes
from ..data.image_files import ImageSource, image_sources
from ..errors import SFormerError
from ..evaluation.networks import usable_device
from ..evaluation.predictions import Prediction, check_topk
from ..layers import named_neurons, placed, source_view
from .door import task_of
from .task import Look, Task

__all__ = ['Predictor', 'open_predictor', 'predict']


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model, and the source beside it if that is wanted, ready to predict.

    Args:
        task: Its task.
        model: The model, where it will run.
        source: What it is compared with; None for nothing.
    """
    task: Task
    model: nn.Module
    source: nn.Module | None

    def predict(
            self,
            images: ImageSource | Iterable[ImageSource],
            topk: int = 5,
            batch_size: int = 16,
    ) -> Iterator[Prediction]:
        """As the function `predict`."""
        check_topk(topk)
        return self.task.predict(self.model, self.source, image_sources(images), topk, batch_size)

    def look(self, image: ImageSource, prediction: Prediction) -> Look:
        """What there is to see of the prediction for an image."""
        return self.task.look(self.model, self.source, image, prediction)


def open_predictor(
        model: str | Path | nn.Module,
        source: bool | str | Path | nn.Module = False,
        device: str | torch.device | None = None,
        engine: str | None = None,
) -> Predictor:
    """Open what predicts; arguments are those of `predict`."""
    task = task_of(model)
    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    network = model if isinstance(model, nn.Module) else task.open_to_run(str(model), engine)
    other: nn.Module | None = None
    if source is True:
        if not any(True for _ in named_neurons(network)):
            raise SFormerError(f'{name} has no source inside to be compared with: name one (--source-model).')
        warn_of_changes(name, network)
        other = source_view(network)
    elif source is not False:
        named = source if isinstance(source, nn.Module) else task.open(str(source))
        other = task.compared_with(network, named)
    where = usable_device(device or next((p.device for p in network.parameters()), 'cpu'))
    return Predictor(task=task, model=placed(network, where), source=None if other is None else placed(other, where))


def predict(
        model: str | Path | nn.Module,
        images: ImageSource | Iterable[ImageSource],
        topk: int = 5,
        *,
        source: bool | str | Path | nn.Module = False,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        engine: str | None = None,
) -> Iterator[Prediction]:
    """Say what is to be seen in images, one after the other. Of an image that cannot be read, a prediction says why.

    Images are read as they are needed, a batch at a time, however many there are; they are turned as their EXIF
    orientation says.

    Args:
        model: Classifier or detector: the model, the folder of a saved one, `hf-hub:org/name`, a name of timm's, or the
            `.onnx` file that `sformer export` made of a classifier.
        images: One or several: files, folders, patterns such as `photos/*.jpg`, or pictures of Pillow.
        topk: Number of classes per image; of a detector, of detections.
        source: Say beside it what its source says (True), or another model.
        batch_size: Images at a time; a detector takes one.
        device: Where to run; where the model is if None.
        engine: `openvino` or `onnxruntime`, of an `.onnx` file; the first one that is installed if None.

    Returns:
        Predictions in the order of the images, made as they are asked for.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If there is no such model, no such image, or the source reads or gives something else.
    """
    return open_predictor(model, source, device, engine).predict(images, topk, batch_size)
