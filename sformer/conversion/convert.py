"""Conversion: source network -> spiking layers -> observation -> fitted neurons -> record."""
import copy
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.data import infer_imagenet_subset, resolve_input_data_config

from ..data import GENERATED, ImageRequest, open_request, requested
from ..data.batches import progress
from ..errors import SFormerError, enough_memory
from ..files import Json
from ..layers import check_weights_are_parameters, named_neurons, ordinary_, ordinary_tensors, revert_
from ..models import is_encoder, spiking_model_, state_input_size_
from ..models.zoo import CUSTOM, ENTRYPOINTS, architecture_of
from ..neurons import FitConfig, SFNConfig, recipe_configs
from .calibration import calibrate_
from .changes import kept_record
from .record import CalibrationRecord, Conversion, set_record_
from .sources import (
    LOCATIONS,
    OF_WEIGHTS,
    Source,
    check_weights,
    create_source,
    label_names_of,
    set_label_names_,
)

__all__ = ['Images', 'all_tokens', 'calibration_batches', 'convert']

_logger = logging.getLogger(__name__)

Images = str | Path | Iterable[torch.Tensor]


@ordinary_tensors()
def convert(
        source: str | nn.Module | Source,
        calibration: Images = 'dead-leaves',
        config: SFNConfig | Json | None = None,
        fit: FitConfig | Json | None = None,
        *,
        recipe: str | None = None,
        split: str | None = None,
        num_images: int | None = 256,
        batch_size: int = 32,
        seed: int = 0,
        image_column: str | None = None,
        label_names: Sequence[str] | None = None,
        inplace: bool = False,
        command: str | None = None,
        **source_kwargs: Any,
) -> nn.Module:
    """Convert a trained timm model into a calibrated single-timestep SFormer, without training.

    Thresholds are fitted to the currents of the source network (arXiv 2510.23383, post-training); no labels are read.

    Args:
        source: timm model, or the name of one, which is created with its pretrained weights, or of weights of one's
            own, as of `create_source`. An SFormer stands for what its weights are without neurons, unless they
            compensate for these.
        calibration: `dead-leaves` (generated images), `digits`, a folder of parquet files, an image folder, a Hugging
            Face data set id, or an iterable of normalised image batches (B, C, H, W), all of which are used.
        config: How neurons fire, as a config or as its fields.
        fit: How their thresholds are fitted, likewise.
        recipe: Name of both (`RECIPES`): `default`, `fast`, `accurate`, `paper`, `few`, `quiet`; fields that are given
            change it.
        split: Split of the calibration data set.
        num_images: Number of calibration images drawn from a named origin of images; all if None.
        batch_size: Images per batch that are read from a named origin of images; thresholds do not depend on it.
        seed: Seed of the choice or the generation of calibration images.
        image_column: Column of the images of a data set, where it is not found.
        label_names: Names of the classes, for the config; those that it has if None or, for weights of one's own that
            have none, those of the calibration data where these have as many.
        inplace: Convert the given model itself instead of a copy; where that fails it is the source network.
        command: Command line to record.
        **source_kwargs: Passed to `create_source` where `source` is a name.

    Returns:
        A timm model in eval mode; `model.conversion` records how it came about.

    Raises:
        SFormerError: If the source, the data set or a value is not usable.
        UnsupportedLayerError: If a layer of the source has no spiking counterpart.
    """
    config, fit = recipe_configs(recipe, config, fit)
    wanted = requested(calibration, split=split, num_images=num_images, seed=seed, image_column=image_column)
    generated = isinstance(calibration, str) and calibration == GENERATED
    if generated and fit.estimator == 'max':
        _logger.warning('thresholds that reach as far as the largest current (fast neurons) are fitted to generated '
                        'images: they are closer to the source if fitted to real ones (calibration).')
    fit = fit.settled(generated)
    if isinstance(source, str):
        source = create_source(source, **source_kwargs)
        inplace = True
    elif source_kwargs:
        raise TypeError(f'{", ".join(source_kwargs)}: only for a source that is given by name.')
    if not isinstance(source, Source):
        source = Source(source)
    check_weights_are_parameters(source.network)
    model = ordinary_(source.network if inplace else copy.deepcopy(source.network))
    kept = kept_record(model)
    if any(True for _ in named_neurons(model)):
        model = revert_(model)  # converting again starts from the network that is inside
    check_weights(model)
    record = kept or _record_of_source(source, model)
    origins = {**record.origins, **source.origins}
    training = model.training
    before = {k: model.__dict__.get(k) for k in ('pretrained_cfg', 'default_cfg', '_model_args')}
    try:
        _name_architecture(model, bool(record.source_weights))
        model = spiking_model_(model, config).eval()
        batches, images, class_names = calibration_batches(model, wanted, batch_size)
        if label_names is not None:
            origins['label_names'] = 'given'
        elif not record.source_weights and are_names_of(model, class_names):
            label_names = class_names
            origins['label_names'] = 'classes of the calibration images'
        if label_names is not None:
            set_label_names_(model, label_names)
        pool = getattr(model, 'global_pool', None)  # of convolutional networks it is a layer
        set_record_(model, dataclasses.replace(
            record, global_pool=pool if isinstance(pool, str) else None, origins=origins))
        with enough_memory('the source is observed on 16 images at a time, whatever the batch size. Choose a smaller '
                           'input (img_size) or a device with more memory.'):
            count = calibrate_(model, batches, fit, None if model.num_classes else all_tokens)
        set_record_(model, dataclasses.replace(
            vars(model)['conversion'], calibration=CalibrationRecord(**images, num_images=count), command=command))
        return model
    except BaseException:
        revert_(model).train(training).__dict__.update({k: v for k, v in before.items() if v is not None})
        raise


def _record_of_source(source: Source, model: nn.Module) -> Conversion:
    """What a record says of a source network. A tag is of published weights, and timm's config has one for all."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return Conversion(
        source=cfg.get('architecture') or type(model).__name__, source_weights=source.weights,
        source_tag=cfg.get('tag') or None if source.weights else None)


def all_tokens(network: Any, batch: torch.Tensor) -> torch.Tensor:
    """Run a network without a classifier, whose output is all of its tokens, not what pooling leaves of them."""
    if is_encoder(network):
        return network(batch)
    tokens = network.forward_features(batch)
    network.forward_head(tokens)
    return tokens


def _name_architecture(model: nn.Module, published: bool) -> None:
    """Point a model's config at the `sformer_*` entrypoint that rebuilds it; away from the source's weights, of which
    it says something only where they are the published ones."""
    cfg = dict(getattr(model, 'pretrained_cfg', None) or {})
    if not cfg:
        return
    source = cfg['architecture']
    if source not in ENTRYPOINTS:
        cfg['architecture'] = architecture_of(source)
    if cfg['architecture'] == CUSTOM and source != CUSTOM:
        vars(model)['_model_args'] = dict(getattr(model, '_model_args', {}), source=source)
    for key in (*LOCATIONS, *(() if published else OF_WEIGHTS)):
        cfg.pop(key, None)
    in_chans = getattr(model, 'in_chans', 3)
    for key in ('mean', 'std'):  # a network built for other channels than the cfg's has no statistics of its own
        if key in cfg and len(cfg[key]) != in_chans:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * in_chans
    vars(model).update(pretrained_cfg=cfg, default_cfg=cfg)
    state_input_size_(model, getattr(model, '_model_args', {}).get('img_size'))


def are_names_of(model: nn.Module, class_names: Sequence[str] | None) -> bool:
    """Whether names of the classes of calibration data may be those of a model: it has as many and says none. Numbers
    are no names, and a thousand are ImageNet's, which every data set spells in its own way."""
    if class_names is None or label_names_of(model) or infer_imagenet_subset(model):
        return False
    return len({*class_names}) == getattr(model, 'num_classes', 0) and not all(name.isdigit() for name in class_names)


def calibration_batches(
        model: nn.Module,
        wanted: ImageRequest | Iterable[torch.Tensor],
        batch_size: int,
        description: str = 'Calibrating',
) -> tuple[Iterable[torch.Tensor], Json, list[str] | None]:
    """Batches to observe, what a record says of them, and names of their classes.

    Args:
        model: Model that reads them.
        wanted: Which images; or normalised batches of them.
        batch_size: Images per batch that are read, if there are no batches yet.
        description: What is being done, for people.
    """
    data_config = resolve_input_data_config(model)
    if not isinstance(wanted, ImageRequest):
        return _checked(wanted, data_config['input_size']), {}, None
    images = open_request(wanted, data_config)
    if images.passed_over:
        more = ' ...' if len(images.passed_over) > 3 else ''
        _logger.warning(f'{images.name}: {len(images.passed_over)} files or folders are no images and were passed over '
                        f'({", ".join(images.passed_over[:3])}{more})')
    batches = (batch for batch, _ in progress(images.batches(batch_size), description, images.num_images))
    return batches, dict(
        name=images.name, split=images.split, seed=wanted.seed, fingerprint=images.fingerprint), images.class_names


def _checked(batches: Iterable[object], input_size: tuple[int, int, int]) -> Iterable[torch.Tensor]:
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != input_size[0]:
            shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            expected = ', '.join(map(str, input_size))
            raise SFormerError(f'calibration batches must be tensors (B, {expected}), got {shape}.')
        if len(images):
            yield images
