"""The record of a conversion: how a model came about, as it is saved beside its weights."""
import contextlib
import dataclasses
import sys
from importlib import metadata
from types import UnionType
from typing import get_args, get_origin

import torch.nn as nn

from ..errors import SFormerError
from ..files import Json
from ..neurons import FitConfig

__all__ = [
    'Conversion', 'CalibrationRecord', 'RECORD_VERSION', 'REASONS', 'COMPENSATED', 'BALANCED', 'CONCENTRATED',
    'RECONSTRUCTED', 'DISTILLED', 'FINE_TUNED', 'ADAPTED', 'library_versions', 'set_record_',
]

RECORD_VERSION = 4

# why weights are not those of the source any more
COMPENSATED = 'compensated'  # they make up for what neurons leave out
BALANCED = 'balanced'  # transforms that make less noise are folded in
CONCENTRATED = 'concentrated'  # the residual stream is in another basis
RECONSTRUCTED = 'reconstructed'  # trained block by block to give what those of the source give
DISTILLED = 'distilled'  # trained to follow the source
FINE_TUNED = 'fine-tuned'  # other values, which nothing recorded
ADAPTED = 'adapted'  # other names, shapes or dtypes
REASONS = (COMPENSATED, BALANCED, CONCENTRATED, RECONSTRUCTED, DISTILLED, FINE_TUNED, ADAPTED)


@dataclasses.dataclass(frozen=True)
class CalibrationRecord:
    """Images that thresholds were fitted on.

    Args:
        name: Name of the data set; None where the caller gave batches.
        split: Split of it.
        seed: Seed of the choice or the generation of images.
        fingerprint: Hash of what identifies the images.
        num_images: How many there were.
        local_copy: Whether a copy of the data set of this name was read.
    """
    name: str | None = None
    split: str | None = None
    seed: int | None = None
    fingerprint: str | None = None
    num_images: int = 0
    local_copy: bool = False


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Record of a conversion. How the neurons fire is not in here: the neurons say so, and `model_args` of a config.

    Args:
        source: timm architecture of the source.
        source_tag: Tag of its pretrained weights.
        source_sha256: State hash of the source.
        source_weights: Where its published weights are from: `org/name@commit` or a URL; None for other weights.
        global_pool: Pooling that the head was fitted to.
        recipe: Name of the recipe that neurons and their fit are of; None if of none.
        fit: How thresholds were fitted.
        calibration: Images that they were fitted on.
        versions: Versions of libraries.
        command: Command line that converted, if one did.
        changed: Why the weights are not those of the source any more, some of `REASONS`; empty if they are.
            `conversion.changed` says so of a model as it is now.
        distillation: How they were trained to follow it, in words; None if they were not.
        weights_sha256: SHA-256 of the file of weights.
        zoo_entry: Line of a table of conversions that this one is of, as `scripts/publish_zoo.py` has one.
        state_sha256: State hash of the weights that this record speaks of.
        layout_sha256: Hash of their names, shapes and dtypes.
        origins: Where what is known of the source is from, in words, as of `sources.Source`.
    """
    source: str
    source_tag: str | None = None
    source_sha256: str | None = None
    source_weights: str | None = None
    global_pool: str | None = None
    recipe: str | None = None
    fit: FitConfig = FitConfig()
    calibration: CalibrationRecord = CalibrationRecord()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    command: str | None = None
    changed: tuple[str, ...] = ()
    distillation: str | None = None
    weights_sha256: str | None = None
    zoo_entry: str | None = None
    state_sha256: str | None = None
    layout_sha256: str | None = None
    origins: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> Json:
        """The record as JSON data, with its version."""
        return dict(dataclasses.asdict(self), version=RECORD_VERSION, changed=[*self.changed])

    @classmethod
    def from_dict(cls, data: Json) -> 'Conversion':
        """The inverse of `to_dict`.

        Raises:
            SFormerError: If it is of another version, or not as it was written; names the field.
        """
        values = dict(data)
        version = values.pop('version', 1)
        if version == 2 and isinstance(values.get('changed', False), bool):
            values['changed'] = _reasons_of_version_2(values)
        elif version == 3:
            said = values.pop('normalisation', None)
            values['origins'] = dict(mean=said, std=said) if said else {}
        elif version != RECORD_VERSION:
            raise SFormerError(f'the record of the conversion has version {version!r}, this sformer reads '
                               f'{RECORD_VERSION}: convert the source again.')
        try:
            if isinstance(values.get('changed'), list):  # as JSON has it
                values['changed'] = tuple(values['changed'])
            fit = FitConfig(**values.pop('fit', {}))
            calibration = CalibrationRecord(**values.pop('calibration', {}))
            record = cls(fit=fit, calibration=calibration, **values)
        except (TypeError, ValueError) as e:
            raise SFormerError(f'the record of the conversion is not as sformer wrote it: {e}') from None
        for owner in (record, calibration):
            for field in dataclasses.fields(owner):
                value = getattr(owner, field.name)
                if not _is_of(value, field.type):
                    raise SFormerError(f'the record of the conversion is not as sformer wrote it: {field.name} is '
                                       f'{value!r}.')
        return record


def _reasons_of_version_2(values: Json) -> tuple[str, ...]:
    """Why weights have moved, by a record that only says whether."""
    if not values.get('changed'):
        return ()
    fit = values.get('fit')
    compensates = isinstance(fit, dict) and fit.get('compensate')
    said = (COMPENSATED,) * bool(compensates) + (DISTILLED,) * bool(values.get('distillation'))
    return said or (FINE_TUNED,)


def _is_of(value: object, kind: object) -> bool:
    """Whether a value is of the type that a field is annotated with; a bool is no number."""
    if isinstance(kind, UnionType):
        return any(_is_of(value, other) for other in get_args(kind))
    if get_origin(kind) is tuple:
        return type(value) is tuple and all(reason in REASONS for reason in value)
    if get_origin(kind) is dict:
        return type(value) is dict and all(_is_of(v, get_args(kind)[1]) for v in value.values())
    return type(value) is kind


def set_record_(model: nn.Module, record: Conversion | None) -> None:
    """Let a model carry the record of its conversion, as `model.conversion`."""
    vars(model)['conversion'] = record


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ('sformer', 'torch', 'timm', 'datasets', 'safetensors', 'huggingface_hub')
    versions = {'python': '.'.join(map(str, sys.version_info[:3]))}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
