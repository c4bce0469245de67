"""Options that several commands share, each written once."""
import dataclasses
import functools
import inspect
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import typer

from ..errors import SFormerError
from .arguments import AMP_NAMES, parse_dataset_ids

__all__ = ['unfolded', 'ColumnOptions', 'EvaluationOptions', 'Given', 'RecordOptions']

Given = Set[str]

Dataset = 'digits, cifar10, imagenet-1k ..., an image folder, one of parquet files, NAME=FOLDER or a Hub id'


def unfolded(command: Callable[..., None]) -> Callable[..., None]:
    """Let each field of an argument that is a dataclass be an option of its own.

    So commands share options by sharing the dataclass, whose fields are annotated as arguments of commands are. An
    argument `given` is none: it holds the names of the options that are given.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    counts_given = False
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == 'given':
            counts_given = True
        elif isinstance(parameter.annotation, type) and dataclasses.is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += [
                inspect.Parameter(
                    f.name, inspect.Parameter.KEYWORD_ONLY, annotation=f.type,
                    default=inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default)
                for f in dataclasses.fields(parameter.annotation)]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: object) -> None:
        given = {parameter.name for parameter in parameters if values[parameter.name] not in (parameter.default, [])}
        folded = {name: group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
                  for name, group in groups.items()}
        command(**values, **folded, **({'given': given} if counts_given else {}))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


# What is beyond these is no size at all, and would be no clear error later on
MAX_IMAGES = 10 ** 9
MAX_BATCH_SIZE = 2 ** 16
MAX_IMG_SIZE = 2 ** 14
MAX_SEED = 2 ** 63 - 1
MAX_TIMEOUT = 10 ** 6


# Ranges of preprocessing are those of `data.preprocessing`; a test holds them together
CropPct = Annotated[float | None, typer.Option(min=0.01, max=1, help="Centre crop, if not the model's own")]
Mean = Annotated[list[float] | None, typer.Option(
    min=-1e4, max=1e4, help='Mean of the normalisation, one per channel')]
Std = Annotated[list[float] | None, typer.Option(
    min=1e-4, max=1e4, help='Std of the normalisation, one per channel')]


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Where a table has its images."""
    image_column: Annotated[str | None, typer.Option(help='Column of the images, if it is not found')] = None


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ColumnOptions):
    """What `evaluate` and `compare` are told about data, networks and processes; names as in timm's scripts."""
    dataset: Annotated[str, typer.Option('--dataset', '--data', help=f'{Dataset}; of a detector, one in COCO format')]
    split: Annotated[str | None, typer.Option(help='Split of the data set')] = None
    num_images: Annotated[int | None, typer.Option(
        min=1, max=MAX_IMAGES, help='Random subset of this size')] = None
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images per batch and process')] = 64
    workers: Annotated[int, typer.Option(min=0, max=256, help='Processes that decode images')] = 0
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of the subset')] = 0
    source: Annotated[bool, typer.Option(help='Evaluate source networks alongside')] = True
    source_model: Annotated[str | None, typer.Option(
        help='Compare with this model, or the source inside of this SFormer, not with the one inside: for weights that '
             'have moved since conversion')] = None
    label_column: Annotated[str | None, typer.Option(help='Column of the labels, if it is not found')] = None
    results_file: Annotated[Path | None, typer.Option(help='JSON or CSV file for the results')] = None
    results_format: Annotated[str | None, typer.Option(help='json or csv; goes by the suffix')] = None
    streaming: Annotated[bool | None, typer.Option(help='Read shards as they are needed, no copy on disk')] = None
    benchmark: Annotated[str | None, typer.Option(
        help='imagenet-1k, imagenet-real, imagenet-v2, imagenet-a or imagenet-r')] = None
    by_position: Annotated[bool, typer.Option(
        '--by-position', help='Take label i for class i of the model, whatever names they have')] = False
    img_size: Annotated[int | None, typer.Option(
        min=1, max=MAX_IMG_SIZE, help="Input size, if not the model's own")] = None
    crop_pct: CropPct = None
    interpolation: Annotated[str | None, typer.Option(help='Resize method: bicubic, bilinear ...')] = None
    amp: Annotated[bool, typer.Option('--amp', help='Mixed precision')] = False
    amp_dtype: Annotated[str, typer.Option(help='bfloat16 or float16; "--amp bf16" says both')] = 'bfloat16'
    channels_last: Annotated[bool, typer.Option(
        '--channels-last', help='Use the channels-last memory format')] = False
    torchcompile: Annotated[bool, typer.Option('--torchcompile', help='Compile the networks')] = False
    resume: Annotated[bool, typer.Option(
        '--resume', help='Continue a run that was ended, by its --results-file')] = False
    retry: Annotated[bool, typer.Option('--retry', help='Halve batches that do not fit into memory')] = False
    max_bad: Annotated[int, typer.Option(
        min=0, help='Unreadable images, and annotations of a detector, to leave out before it is an error')] = 0
    device: Annotated[str | None, typer.Option(help='cpu, cuda, ...; an accelerator if there is one')] = None
    engine: Annotated[str | None, typer.Option(
        help='openvino or onnxruntime, for models that `sformer export` wrote; the first that is installed')] = None
    num_processes: Annotated[int | None, typer.Option(
        min=1, help='Processes that have to be running, over all nodes')] = None
    timeout: Annotated[float, typer.Option(
        min=1, max=MAX_TIMEOUT, help='Seconds without progress after which a process counts as lost')] = 600.

    def __post_init__(self) -> None:
        if self.amp_dtype not in AMP_NAMES:
            raise SFormerError(f'--amp-dtype is {" or ".join(AMP_NAMES[:3:2])}, not {self.amp_dtype!r}.')
        if self.source_model and not self.source:
            raise SFormerError('--no-source compares with nothing: leave out --source-model.')
        if self.device is not None and self.device.startswith('meta'):
            raise SFormerError('--device meta has no values to evaluate with; cpu and cuda do.')
        if not 1 <= self.timeout <= MAX_TIMEOUT:  # NaN, which typer may let pass
            raise SFormerError(f'--timeout is a number of seconds, not {self.timeout}.')


class RecordKeywords(TypedDict):
    license: str | None
    base_model: str | None
    dataset_ids: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What `publish` and `card` are told that no record says."""
    license: Annotated[str | None, typer.Option(
        help='Licence of the source weights, if the conversion has none')] = None
    base_model: Annotated[str | None, typer.Option(
        help='Hub id of the source weights, if the conversion has none')] = None
    dataset_id: Annotated[list[str] | None, typer.Option(
        help='NAME=org/dataset: Hub id of a local copy that results name')] = None

    def keywords(self) -> RecordKeywords:
        """As arguments of `sformer.publishing`."""
        return RecordKeywords(
            license=self.license, base_model=self.base_model, dataset_ids=parse_dataset_ids(self.dataset_id))
