"""What every export begins with: a copy of a model in integers, and what its file will say of the model."""
import copy
from pathlib import Path
from typing import TypedDict, Unpack

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..conversion import Images, calibration_batches
from ..conversion.record import library_versions
from ..conversion.sources import weights_tag
from ..data import requested
from ..errors import SFormerError
from ..files import Json, may_write, state_hash
from ..layers import named_neurons, unwrapped
from ..neurons import MAX_BYTE_LEVEL, ScaleAndFire
from .integer import MAX_WEIGHT_ERROR, IntegerReport, to_integer_

__all__ = ['METADATA', 'Rounding', 'check_output', 'integer_copy', 'plain_values', 'slow_neurons']

BATCH_SIZE = 16
METADATA = 'sformer'  # key of what is recorded in a file
KINDS = {'.onnx': 'graph', '.safetensors': 'file of tensors'}


class Rounding(TypedDict, total=False):
    """How weights become int8, and what is recorded of it, as of `export_onnx`."""
    split: str | None
    num_images: int
    seed: int
    image_column: str | None
    max_error: float
    portable: bool
    command: str | None


def integer_copy(
        model: nn.Module,
        calibration: Images | None = None,
        **options: Unpack[Rounding],
) -> tuple[nn.Module, list[IntegerReport], Json]:
    """A copy of a calibrated SFormer with int8 weights, on the CPU; what became of each layer; what a file says.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If options mean nothing.
    """
    split, image_column = options.get('split'), options.get('image_column')
    max_error, portable = options.get('max_error', MAX_WEIGHT_ERROR), options.get('portable', True)
    if calibration is None and (split or image_column):
        raise SFormerError('split and image_column are of images to round weights for: name them (calibration).')
    if not max_error >= 0:
        raise SFormerError(f'max_error is a relative error, 0 or more, not {max_error}.')
    model = unwrapped(model)
    network = copy.deepcopy(model).eval().to('cpu', torch.float32)
    batches = images = None
    if calibration is not None:
        wanted = requested(calibration, split=split, num_images=options.get('num_images', 128),
                           seed=options.get('seed', 0), image_column=image_column)
        read, images, _ = calibration_batches(network, wanted, BATCH_SIZE, 'Rounding')
        batches = list(read)
        images = dict(images, num_images=sum(map(len, batches)))
    reports = to_integer_(network, max_error, batches, portable)
    floating = [report.name for report in reports if not report.integer]
    return network, reports, dict(
        _record_of(model), max_error=max_error, portable=portable, calibration=images, command=options.get('command'),
        floating=floating)


def _record_of(model: nn.Module) -> Json:
    """What a file says of the model that it was made of."""
    conversion = getattr(model, 'conversion', None)
    return dict(
        recipe=getattr(conversion, 'recipe', None),
        pretrained_cfg=plain_values(dict(getattr(model, 'pretrained_cfg', None) or {}, tag=weights_tag(model) or None)),
        input_size=list(resolve_input_data_config(model)['input_size']), num_classes=getattr(model, 'num_classes', 0),
        param_count=sum(p.numel() for p in model.parameters()),
        weights_sha256=state_hash(model.state_dict()), versions=library_versions(),
        levels=sorted({neuron.config.levels for _, neuron in named_neurons(model) if isinstance(neuron, ScaleAndFire)}))


def slow_neurons(model: nn.Module) -> bool:
    """Whether a model has neurons that engines take longer for than for those of recipe `fast`: thresholds that follow
    tokens, or a softmax with levels of more than a byte."""
    return any(neuron.token or int(neuron.levels[-1]) > MAX_BYTE_LEVEL
               for _, neuron in named_neurons(model) if isinstance(neuron, ScaleAndFire))


def plain_values(values: Json) -> Json:
    """Of a dictionary, what JSON can say."""
    return {key: value for key, value in values.items() if isinstance(value, (str, int, float, bool, list, tuple))}


def check_output(path: str | Path, suffix: str, overwrite: bool = False) -> Path:
    """Where a file will be written: what a link points to. Raises SFormerError if none can be."""
    path = Path(path)
    if path.suffix != suffix:
        raise SFormerError(f'{path} is no name for a {KINDS[suffix]}, which ends in {suffix}.')
    return may_write(path, KINDS[suffix], overwrite=overwrite)
