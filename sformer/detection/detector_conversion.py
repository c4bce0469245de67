"""Conversion of a whole detector: backbone, pyramid, proposals and heads."""
import copy
import dataclasses
import itertools
from collections.abc import Iterator

import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN

from ..conversion import calibrate_, kept_record
from ..conversion.record import CalibrationRecord, Conversion
from ..conversion.sources import check_weights
from ..data import ImageRequest, dead_leaves
from ..data.batches import progress
from ..errors import SFormerError, enough_memory
from ..layers import check_weights_are_parameters, ordinary_, ordinary_tensors, revert_, spiking_
from ..models import set_pixel_range_
from ..neurons import FitConfig, SFNConfig
from .coco import CocoData

__all__ = ['convert_detector', 'image_batches', 'spiking_detector_']

NUM_IMAGES = 64  # if nobody says how many
OBSERVED_BATCH = 8  # images of one size, so that none is padded to another's


def spiking_detector_(detector: nn.Module, sfn: SFNConfig = SFNConfig()) -> nn.Module:
    """Turn a detector into an uncalibrated SFormer, in place.

    Raises:
        UnsupportedLayerError: If a layer has no spiking counterpart; names it, and the detector is unchanged.
    """
    model: FasterRCNN = spiking_(detector, sfn)
    set_pixel_range_(model, model.config.mean, model.config.std)
    model.sfn = sfn
    return model


@ordinary_tensors()
def convert_detector(
        detector: nn.Module,
        calibration: CocoData | str = 'dead-leaves',
        config: SFNConfig = SFNConfig(),
        fit: FitConfig = FitConfig(),
        *,
        num_images: int | None = NUM_IMAGES,
        seed: int = 0,
        name: str | None = None,
        split: str | None = None,
        inplace: bool = False,
        command: str | None = None,
) -> nn.Module:
    """Convert a trained detector into a calibrated single-timestep SFormer, without training.

    Args:
        detector: As of `create_detector`, trained; an SFormer stands for what its weights are without neurons, unless
            they compensate for these.
        calibration: Images, whose annotations are not read, or `dead-leaves` for generated ones.
        config: How neurons fire.
        fit: How their thresholds are fitted.
        num_images: Number of calibration images; all of a data set if None.
        seed: Seed of their choice or generation.
        name: Name of the data set, for the record.
        split: Split of it, for the record.
        inplace: Convert the given detector itself instead of a copy; where that fails it is what it was.
        command: Command line to record.

    Returns:
        The detector in eval mode; `detector.conversion` records how it came about.

    Raises:
        SFormerError: If the weights of the detector or the images are not usable, or neurons have a price of activity.
        UnsupportedLayerError: If a layer has no spiking counterpart.
    """
    if config.silence:
        raise SFormerError('a detector has no price of activity (silence) yet: it needs gradients of one output.')
    check_weights_are_parameters(detector)
    kept = kept_record(detector)
    model: FasterRCNN = revert_(ordinary_(detector if inplace else copy.deepcopy(detector)))
    check_weights(model, 'the detector')
    batches = image_batches(model, calibration, num_images, seed)
    fit = fit.settled(isinstance(calibration, str))
    modes = {module: module.training for module in model.modules()}
    try:
        spiking_detector_(model.eval(), config)
        model.conversion = kept or Conversion(source=model.config.backbone)
        with enough_memory(f'the source is observed on {OBSERVED_BATCH} images at a time.'):
            calibrate_(model, progress(batches, 'Calibrating', len(batches)), fit)
    except BaseException:
        vars(revert_(model)).pop('sfn', None)
        for module, training in modes.items():
            module.training = training
        raise
    record = CalibrationRecord(
        name or 'dead-leaves', split, seed, getattr(calibration, 'fingerprint', None),
        num_images=sum(map(len, batches)))
    model.conversion = dataclasses.replace(model.conversion, calibration=record, command=command)
    return model


def image_batches(
        detector: nn.Module,
        images: CocoData | str = 'dead-leaves',
        num_images: int | None = NUM_IMAGES,
        seed: int = 0,
) -> list[list[torch.Tensor]]:
    """Images as detectors read them, in batches of one size; arguments as of `convert_detector`."""
    if isinstance(images, str):
        found = _generated(detector, ImageRequest(dataset=images, num_images=num_images, seed=seed))
    else:
        found = _drawn(images, ImageRequest(dataset=str(images.file), num_images=num_images, seed=seed))
    groups = [list(group) for _, group in itertools.groupby(found, key=lambda image: image.shape)]
    return [group[i:i + OBSERVED_BATCH] for group in groups for i in range(0, len(group), OBSERVED_BATCH)]


def _drawn(data: CocoData, wanted: ImageRequest) -> Iterator[torch.Tensor]:
    """The images that are wanted, those of one size after one another."""
    every = list(data.images)
    ids = [every[i] for i in wanted.choose(len(every))]
    for id in sorted(ids, key=lambda id: (data.images[id].height, data.images[id].width)):
        yield data.image(id)


def _generated(detector: FasterRCNN, wanted: ImageRequest) -> Iterator[torch.Tensor]:
    for image in dead_leaves(wanted.num_images or NUM_IMAGES, (3, *detector.config.image_size), wanted.seed):
        yield torch.from_numpy(image).permute(2, 0, 1).float() / 255
