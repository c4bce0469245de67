"""Is a folder the SFormer that its `config.json` says, and what may such a config say?

timm builds a model from a `config.json` and the weights beside it. Both may come from elsewhere, so neither is trusted:
the weights must be the safetensors file whose SHA-256 the config records, and a config that names other weights, other
code or a loader's own switches is refused.
"""
import dataclasses
import json
from pathlib import Path

import timm

from ..conversion.checkpoints import factory_arguments
from ..conversion.record import Conversion
from ..conversion.sources import LOCATIONS
from ..data.preprocessing import check_preprocessing
from ..errors import SFormerError, first_line
from ..files import Json, file_hash, read_safetensors, restore
from ..neurons import SFNConfig

__all__ = [
    'WEIGHTS_NAME', 'CONFIG_NAME', 'read_config', 'check_firing_config', 'check_weights_file', 'conversion_of',
]

WEIGHTS_NAME = 'model.safetensors'
CONFIG_NAME = 'config.json'

# of SFNConfig: models that were saved before have them as by default
LATER_FIELDS = {'silence', 'neuron', 'lateral', 'lateral_zone', 'lateral_cost', 'keys_rest'}


def read_config(folder: Path) -> Json:
    """Read and check the `config.json` of an SFormer.

    Raises:
        SFormerError: If there is none, it is none of timm's or of no SFormer, or tries to direct the loader.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise SFormerError(f'{folder} holds no SFormer: there is no {CONFIG_NAME}.')
    config, architecture = _read(path)
    if not isinstance(architecture, str) or not architecture.startswith('sformer') or not timm.is_model(architecture):
        raise SFormerError(f'{path}: architecture {architecture!r} is not an SFormer of this version.')
    cfg, args = config.get('pretrained_cfg', config), config.get('model_args', {})
    directed = [key for key in LOCATIONS if cfg.get(key)]  # a config does not choose: its weights lie beside it
    if directed:
        raise SFormerError(f'{path}: pretrained_cfg sets {", ".join(directed)}, but weights are the {WEIGHTS_NAME} '
                           f'beside it. Not loaded.')
    _check_arguments(args, path, converted=bool(config.get('sformer')))
    try:
        check_preprocessing(cfg)
    except SFormerError as e:
        raise SFormerError(f'{path}: {e}') from None
    # timm's own defaults where a config is silent
    default = cfg.get('num_classes', config.get('num_classes', 1000))
    classes = {str(values.get('num_classes', default)) for values in (config, cfg, args)}
    if len(classes) > 1:  # timm would take this for a wish and start with a random head
        raise SFormerError(f'{path} contradicts itself about num_classes: {", ".join(sorted(classes))}.')
    return config


def _read(path: Path) -> tuple[Json, object]:
    """A config of timm that may hold the record of a conversion, and the architecture that it names."""
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        architecture = config['architecture']
        for key in ('model_args', 'pretrained_cfg', 'sformer'):
            if not isinstance(config.get(key, {}), dict):
                raise TypeError(f'{key} is {config[key]!r}')
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        said = 'it names no architecture' if isinstance(e, KeyError) else first_line(e)
        raise SFormerError(f'{path} is not a timm config: {said}.') from e
    try:
        if config.get('sformer'):
            Conversion.from_dict(config['sformer'])
    except SFormerError as e:
        raise SFormerError(f'{path}: {e}') from None
    return config, architecture


def _check_arguments(args: Json, path: Path, converted: bool) -> None:
    """Raise SFormerError if the arguments of a network in a config are none, or none that a network should have."""
    directed = sorted(factory_arguments() & args.keys())
    if directed:
        raise SFormerError(f'{path}: model_args sets {", ".join(directed)}, which is no argument of a network. '
                           f'Not loaded.')
    sfn = args.get('sfn') or {}
    if converted and isinstance(sfn, dict):
        check_firing_config(sfn, path)
    source = args.get('source')
    if source is not None and not (isinstance(source, str) and source.isidentifier() and timm.is_model(source)):
        raise SFormerError(f'{path}: source {source!r} is not the name of a timm architecture.')
    for key, value in args.items():  # a network of that size would only be noticed when memory is gone
        if isinstance(value, int) and value > (1000 if key == 'depth' else 10 ** 6):
            raise SFormerError(f'{path}: model_args sets {key} to {value}, which no vision transformer has.')


def check_firing_config(sfn: Json, path: Path) -> None:
    """Raise SFormerError if a config leaves out how its neurons fire: they would fire as those of the default do."""
    missing = [field.name for field in dataclasses.fields(SFNConfig) if field.name not in {*sfn, *LATER_FIELDS}]
    if missing:
        raise SFormerError(f'{path} does not say how its neurons fire: sfn lacks {", ".join(missing)}. '
                           f'Convert the source again.')


def conversion_of(config: Json) -> Conversion | None:
    """Record of the conversion in a config; None if it has none."""
    return Conversion.from_dict(config['sformer']) if config.get('sformer') else None


def check_weights_file(folder: Path, config: Json) -> None:
    """Raise SFormerError unless a folder holds safetensors weights, and those that its config records.

    A save that was killed between its two files is finished here.
    """
    path = folder / WEIGHTS_NAME
    # beside the record of a conversion, where a network need not be converted
    expected = config.get('weights_sha256') or config.get('sformer', {}).get('weights_sha256')
    if expected is not None and ((path.is_file() and file_hash(path) == expected) or restore(path, expected)):
        return
    if not path.is_file():
        raise SFormerError(f'{folder} holds no SFormer: there is no {WEIGHTS_NAME}.')
    read_safetensors(path)  # a damaged file says so itself
    if expected is not None:
        raise SFormerError(f'{path} is not the file that {CONFIG_NAME} belongs to (SHA-256 differs).')
