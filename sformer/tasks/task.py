"""A task: what its models are, and what commands and cards ask of it. A file in this folder fills it in.

Nothing outside of such files asks which task a model is of: it asks the task.
"""
import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Protocol

import torch
import torch.nn as nn

from ..data import ImageRequest
from ..data.image_files import ImageSource
from ..errors import SFormerError
from ..evaluation import Journal
from ..evaluation.launch import Group
from ..evaluation.predictions import Prediction
from ..evaluation.schema import Result
from ..execution.integer import MAX_WEIGHT_ERROR, IntegerReport
from ..files import Json
from ..layers import named_neurons
from ..neurons import FitConfig, SFNConfig
from ..profiling.executed import CodingsCompared

__all__ = ['OPTIONS', 'ConversionOptions', 'Description', 'EvaluationRequest', 'ExportOptions', 'Look', 'Task']

Inputs = torch.Tensor | list[torch.Tensor]  # a batch, as models of a task read it
Maps = tuple[torch.Tensor | None, dict[str, torch.Tensor] | None]


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of `sformer convert` that only some tasks take."""
    checkpoint: Path | None = None
    model_kwargs: Json = field(default_factory=dict)
    label_names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How `sformer export` writes a model: the first ones are as of `export_onnx`, the others only some tasks take."""
    max_error: float = MAX_WEIGHT_ERROR
    portable: bool = True
    overwrite: bool = False
    command: str | None = None
    calibration: str | None = None
    split: str | None = None
    num_images: int = 128
    seed: int = 0
    image_column: str | None = None
    image_size: tuple[int, int] | None = None
    spikes: bool = False
    format: str = 'onnx'
    uint8_input: bool = False


# command -> options that only some tasks take; the others say something to each
OPTIONS: Mapping[str, tuple[str, ...]] = {
    'convert': (*(option.name for option in fields(ConversionOptions)), 'image_column'),
    'evaluate': ('batch_size', 'workers', 'image_column', 'label_column', 'streaming', 'benchmark', 'img_size',
                 'crop_pct', 'interpolation', 'amp', 'amp_dtype', 'channels_last', 'torchcompile', 'retry', 'engine'),
    'export': ('calibration', 'split', 'num_images', 'seed', 'image_column', 'image_size', 'spikes', 'format',
               'uint8_input'),
    'profile': ('batch_size', 'execute', 'image_column'),
}


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What `sformer evaluate` is asked for.

    Args:
        images: On which images.
        group: Processes of this run.
        source: Whether sources are evaluated alongside.
        source_model: Name of another model to compare with; its own source if None.
        by_position: Whether classes of the images are those of the models by their position, whatever their names.
        max_bad: How much may be left out that is not usable, before it is an error.
        results_file: Where results will be written to.
        results_format: `json` or `csv`; '' where none are written, and on processes but the main one.
        resume: Whether this run goes on where another ended.
        new_journal: Makes a journal for a pass over the images; None if nothing is recorded.
        options: Those of `OPTIONS`; what the task does not take is as by default.
    """
    images: ImageRequest
    group: Group
    source: bool
    source_model: str | None
    by_position: bool
    max_bad: int
    results_file: Path | None
    results_format: str
    resume: bool
    new_journal: Callable[[], Journal | None]
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What there is to see of a prediction.

    Args:
        pixels: The image as a network reads it, (3, H, W) in [0, 1].
        drawn: Title -> the same with what was found drawn over it; the image alone where nothing is drawn.
        spikes: Spikes per neuron at each patch, (rows, columns); None where a network has no patches, or no neurons.
        limits: Which of them the ends of a scale stand for.
        unit: What these are, in words.
    """
    pixels: torch.Tensor
    drawn: Mapping[str, torch.Tensor]
    spikes: torch.Tensor | None
    limits: tuple[float, float] = (0., 1.)
    unit: str = ''


class Recorded(Protocol):
    """What a task may say on a card, as of `publishing.model_record.ModelRecord`."""
    load_name: str
    input_size: list[int]
    num_classes: int
    conversion: Json
    built: Json


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the config of a model says of it.

    Args:
        config: The config, as read and checked.
        architecture: Name of what the model is built by.
        input_size: (C, H, W).
        num_classes: Number of classes.
        built: What else it is built of, of its task.
    """
    config: Json
    architecture: str
    input_size: Sequence[int]
    num_classes: int
    built: Json = field(default_factory=dict)


class Task(abc.ABC):
    """What models of a task are, and what is done with them.

    Verbs copy, or open models of their own, and change nothing of a model that they are handed.

    Attributes:
        name: Its name.
        noun: What one of its models is called.
        title: What a card calls it.
        key: What the config in the folder of a model has, and in those of other tasks has not; '' for the task of what
            no other claims.
        verbs: Commands of its own, beside those that every task has.
        options: Of `OPTIONS`, what it takes.
        heading: Of `names` in `sformer list`.
        library: What loads its models, for the Hub.
        metric: What results are compared by, for the Hub.
        source_is_base: Whether its source has the weights of the base model of a card; else it was trained from them.
    """
    name: ClassVar[str]
    noun: ClassVar[str]
    title: ClassVar[str]
    key: ClassVar[str]
    verbs: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    heading: ClassVar[str] = ''
    library: ClassVar[str] = 'sformer'
    metric: ClassVar[str]
    source_is_base: ClassVar[bool] = False

    # what its models are

    def names(self) -> Sequence[str]:
        """Names of its models that are found without a folder, but for those that timm has."""
        return ()

    @abc.abstractmethod
    def owns(self, model: nn.Module) -> bool:
        """Whether a model is one of its own; asked of the task that claims what is left last."""

    @abc.abstractmethod
    def architecture(self, model: nn.Module) -> str:
        """Name of what a model is built by."""

    @abc.abstractmethod
    def load(
            self,
            path: str | Path,
            revision: str | None = None,
            cache_dir: str | Path | None = None,
            **kwargs: object,
    ) -> nn.Module:
        """A saved model, from a folder or the Hub, in eval mode."""

    def open(self, name: str) -> nn.Module:
        """A model by its folder or its name, in eval mode."""
        return self.load(name)

    def open_to_run(self, name: str, engine: str | None = None) -> nn.Module:
        """A model as `open` has it, or one that was exported, to be run only; `engine` is of exported ones.

        Raises:
            SFormerError: If an engine is named, and the model is none that was exported.
        """
        if engine:
            raise SFormerError('--engine is for models that `sformer export` wrote, which end in .onnx.')
        return self.open(name)

    @abc.abstractmethod
    def save(self, model: nn.Module, directory: str | Path, overwrite: bool = False) -> Path:
        """Save a model as a folder."""

    # verbs

    @abc.abstractmethod
    def convert(
            self,
            source: str,
            images: ImageRequest,
            config: SFNConfig,
            fit: FitConfig,
            command: str,
            options: ConversionOptions,
    ) -> nn.Module:
        """Open a source by its name or folder, and convert it."""

    @abc.abstractmethod
    def evaluate(self, names: Sequence[str], request: EvaluationRequest) -> list[Result]:
        """Open models and evaluate them: a result for each."""

    @abc.abstractmethod
    def predict(
            self,
            model: nn.Module,
            source: nn.Module | None,
            images: Iterable[ImageSource],
            topk: int,
            batch_size: int,
    ) -> Iterator[Prediction]:
        """What a model, and its source if there is one, says of each image; as many classes, or objects, as `topk`."""

    def origin_of_names(self, model: nn.Module) -> str:
        """Where the names of what a model predicts are from, in words; empty where its config has them."""
        return ''

    @abc.abstractmethod
    def compared_with(self, model: nn.Module, source: nn.Module) -> nn.Module:
        """The network that a model is compared with, of another model that is taken for its source.

        Raises:
            SFormerError: If it reads or gives something else.
        """

    def look(self, model: nn.Module, source: nn.Module | None, image: ImageSource, prediction: Prediction) -> Look:
        """What there is to see of the prediction for an image.

        Raises:
            SFormerError: If nothing is drawn of models of this task.
        """
        raise SFormerError(f'nothing is drawn of what a {self.noun} predicts.')

    @abc.abstractmethod
    def export(self, model: nn.Module, output: Path, options: ExportOptions) -> list[IntegerReport]:
        """Write a model as an option says: what became of each layer."""

    @abc.abstractmethod
    def batches(self, model: nn.Module, images: ImageRequest, batch_size: int) -> tuple[Iterable[Inputs], Json]:
        """Batches of images as a model reads them, and what a record says of them. A task that does not take a batch
        size has batches of its own."""

    # what a profile has beside counts

    def executed(self, model: nn.Module, images: Inputs) -> CodingsCompared | None:
        """What running images through bit planes showed, as of `compare_codings`; None where that is not done."""
        return None

    def maps(self, model: nn.Module, image: torch.Tensor) -> Maps:
        """An image in [0, 1], and where a model spikes on it, as of `spike_maps`; None where nothing is drawn."""
        return None, None

    # what is said of results

    @abc.abstractmethod
    def summary(self, result: Result) -> list[str]:
        """Lines that say what an evaluation found."""

    # what a card says

    @abc.abstractmethod
    def describe(self, folder: Path, model: nn.Module) -> Description:
        """What the config in the folder of a model says of it.

        Raises:
            SFormerError: If there is none, or it is not as it was written.
        """

    @abc.abstractmethod
    def hub_task(self, built: Json) -> tuple[str, str]:
        """Identifier and name of the task on the Hub, by what `Description.built` says."""

    @abc.abstractmethod
    def source_in_words(self, built: Json, source: str) -> str:
        """What was converted; `source` is what it has its weights from."""

    @abc.abstractmethod
    def recipe(self, record: Recorded) -> list[tuple[str, object]]:
        """Rows of what a model reads and gives, of its `publishing.model_record.ModelRecord`."""

    @abc.abstractmethod
    def usage(self, record: Recorded) -> str:
        """Python that loads and runs a model."""

    def card_rows(self, result: Result) -> list[list[str]]:
        """Rows that the schema of results does not have: a label, the figure of the source if there is one, and the
        own one."""
        return []

    def picture_title(self, picture: Json) -> str:
        """What is to be seen in a picture, by what its PNG carries."""
        return str(picture['image'])

    # what is refused

    def remarks(self, model: nn.Module) -> list[str]:
        """What else is to be said of a model that was converted."""
        return []

    def check_options(self, verb: str, name: str, given: Iterable[str]) -> None:
        """Raise SFormerError for the first option that is given and says nothing to a model of this task."""
        given = {*given}
        for option in OPTIONS[verb]:
            if option in given and option not in self.options.get(verb, ()):
                raise SFormerError(f'{name} is a {self.noun}: leave out --{option.replace("_", "-")}.')

    def check_verb(self, verb: str, name: str) -> None:
        """Raise SFormerError if a command takes no models of this task."""
        if verb not in self.verbs:
            raise SFormerError(f'{name} is a {self.noun}, which sformer {verb} does not take.')

    def check_converted(self, model: nn.Module, name: str | Path) -> None:
        """Raise SFormerError if a model has no neurons."""
        if not any(True for _ in named_neurons(model)):
            raise SFormerError(f'{name} holds a {self.noun} without neurons: sformer convert makes an SFormer of it.')
