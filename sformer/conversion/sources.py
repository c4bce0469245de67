"""Source networks: timm models with trained weights, and the preprocessing that they were trained with.

Every command opens sources here, of whatever kind: names of timm, checkpoints, folders, repositories on the Hub.
"""
import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from ..data.preprocessing import check_preprocessing
from ..errors import SFormerError, first_line
from ..files import Json
from ..layers import named_neurons
from ..models import HEADS, set_norm_eps_, set_pixel_range_, source_filter
from ..models.sformer import State
from .checkpoints import Checkpoint, names_in_order, read_checkpoint, read_file, said_of
from .places import named_place, place_of
from .preprocessors import PREPROCESSING

__all__ = [
    'CAME_ALONG', 'LOCATIONS', 'OF_WEIGHTS', 'Source', 'check_no_graph', 'check_weights', 'create_source',
    'label_names_of', 'load_checkpoint_', 'set_data_config_', 'set_label_names_', 'weights_tag',
]

_logger = logging.getLogger(__name__)

CAME_ALONG = 'of the config of its weights'
# of a config of timm: where it finds weights, and how it reads them
LOCATIONS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'custom_load', 'source')
WEIGHT_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin', '.ckpt')  # no tag of a model of timm
# of a config of timm: what it says of its weights
OF_WEIGHTS = ('tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


@dataclasses.dataclass(frozen=True)
class Source:
    """A network to convert.

    Args:
        network: timm model in eval mode.
        weights: Where its published weights are from, a Hub id or a URL; None for weights of the user's own.
        origins: Where what is known of it is from, in words: `architecture`, `weights`, `num_classes`, `label_names`,
            `img_size`, `mean`, `std` ...; what is not in here came with its weights.
    """
    network: nn.Module
    weights: str | None = None
    origins: dict[str, str] = dataclasses.field(default_factory=dict)


def create_source(
        name: str,
        checkpoint: str | Path | None = None,
        preprocessing: Json | None = None,
        **kwargs: Any,
) -> Source:
    """Create a timm model with trained weights.

    A checkpoint may say how it was trained; where it says nothing of mean and std, those that timm has for the
    architecture are taken, with a warning: they are those of other weights.

    Args:
        name: Model name, as for `timm.create_model`; or weights that say what they are of: a checkpoint of timm's
            training, a folder that timm, transformers or open_clip wrote, `hf-hub:org/name`.
        checkpoint: Weights to load, in a file; the published pretrained ones if None.
        preprocessing: How it was trained, as of `set_data_config_`: mean, std, crop_pct, crop_mode, interpolation.
        **kwargs: Passed to `timm.create_model`.

    Raises:
        SFormerError: If there is no such model, its arguments are wrong, the weights cannot be had, or some of its
            parameters would stay random.
    """
    check_no_graph(name)
    given = {key: value for key, value in (preprocessing or {}).items() if value is not None}
    if checkpoint is not None:
        _check_name(name)
        return _of_checkpoint(read_file(Path(checkpoint), name, kwargs), kwargs, given)
    if not name.startswith('hf-hub:') and Path(name).is_file():
        return _of_checkpoint(read_file(Path(name), None, kwargs), kwargs, given)
    place = named_place(name, kwargs.get('cache_dir'))
    if place is not None:
        place, config = place_of(place)
        if 'architecture' not in config:
            return _of_checkpoint(read_checkpoint(place, config, kwargs), kwargs, given)
        if place.folder is not None:
            name = f'local-dir:{place.folder}'
    else:
        _check_name(name)
    return _of_timm(name, kwargs, given)


def check_no_graph(name: str) -> None:
    """Raise SFormerError for the file of a graph, which few commands take for a model."""
    if name.endswith('.onnx'):
        raise SFormerError(f'{name} is a graph, as sformer export writes it; what is wanted here is the model that it '
                           f'was exported of.')


def _check_name(name: str) -> None:
    """Raise SFormerError if timm has no model of a name."""
    if timm.is_model(name):
        return
    if Path(name).suffix in WEIGHT_SUFFIXES:
        raise SFormerError(f'there is no file {name}.')
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f' Did you mean {", ".join(close)}?' if close else " timm.list_models('vit*') lists names."
    if '/' in name or '\\' in name:
        hint = f' {name} is no folder and no file, either.'
        if re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*(@.+)?', name):
            hint = f' A model on the Hub is hf-hub:{name}.'
    raise SFormerError(f'timm has no model {name!r}.{hint}')


def _of_checkpoint(checkpoint: Checkpoint, kwargs: Json, given: Json) -> Source:
    """The network of a checkpoint."""
    asked = {key: value for key, value in kwargs.items() if key != 'cache_dir'}
    model: Any = _created(checkpoint.architecture, {**checkpoint.arguments, **asked})
    load_checkpoint_(model, checkpoint, resized=asked.keys())
    cfg = model.pretrained_cfg
    for key in (*LOCATIONS, *OF_WEIGHTS, 'label_names', 'label_descriptions'):
        cfg.pop(key, None)
    said = dict(checkpoint.said)
    names, names_from = said.pop('label_names', ((), ''))
    origins = {**checkpoint.origins, **dict.fromkeys(asked, 'given')}
    if names and len(names) == model.num_classes:
        set_label_names_(model, names)
        origins['label_names'] = names_from
    set_data_config_(model, **{**{key: value for key, (value, _) in said.items()}, **given})
    origins.update(_preprocessing_origins(model, given, {key: where for key, (_, where) in said.items()},
                                          f'default of {checkpoint.architecture}, nothing in the file says otherwise'))
    origins.setdefault('img_size', f'default of {checkpoint.architecture}')
    _warn_of_defaults(model, checkpoint.path, origins, given, said)
    return Source(model.eval(), checkpoint.weights, origins)


def _of_timm(name: str, kwargs: Json, given: Json) -> Source:
    """A network that timm knows the weights of, by its name or by a config that lies beside them."""
    model: Any = _created(name, kwargs, pretrained=True)
    cfg = model.pretrained_cfg
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    own = kwargs.get('checkpoint_path') or overlay.get('file')
    _check_trained(model, name, kwargs)
    said = said_of(Path(own), cfg.get('architecture')) if own else {}
    names, names_from = said.pop('label_names', ((), ''))
    origins: dict[str, str] = {}
    if names and len(names) == model.num_classes:
        set_label_names_(model, names)
        origins['label_names'] = names_from
    given = {**{key: overlay[key] for key in ('mean', 'std') if overlay.get(key)}, **given}
    set_data_config_(model, **{**{key: value for key, (value, _) in said.items()}, **given})
    default = f'default of {cfg.get("architecture")}, nothing in the file says otherwise' \
        if own or overlay.get('state_dict') else None
    origins.update(_preprocessing_origins(model, given, {key: where for key, (_, where) in said.items()}, default))
    if default:
        _warn_of_defaults(model, str(own or 'the state dict'), origins, given, said)
    described = not (own or cfg.get('file') or cfg.get('state_dict')) \
        and model.num_classes == cfg.get('num_classes')  # else these are not the weights that the config is of
    return Source(model.eval(), (cfg.get('hf_hub_id') or cfg.get('url') or None) if described else None, origins)


def _created(name: str, kwargs: Json, pretrained: bool = False) -> nn.Module:
    """A timm model.

    Raises:
        SFormerError: If timm cannot build it, or has no weights for it.
    """
    arguments = {key: value for key, value in kwargs.items() if key != 'norm_eps'}
    try:
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except SFormerError:
        raise
    except (OSError, RuntimeError) as e:
        if not pretrained:
            raise SFormerError(f'{name} cannot be built with {arguments}: {first_line(e)}') from e
        raise SFormerError(
            f'the pretrained weights of {name} cannot be loaded ({first_line(e)}). '
            f'Give a checkpoint, or make the Hub reachable.') from e
    except Exception as e:  # timm leaves it to whatever a wrong value breaks first
        raise SFormerError(f'{name} cannot be built with {arguments}: {type(e).__name__}: {first_line(e)}') from e
    if kwargs.get('norm_eps') is not None:
        set_norm_eps_(model, kwargs['norm_eps'])
    return model


def _check_trained(model: Any, name: str, kwargs: Json) -> None:
    """Raise SFormerError if timm has left parameters of a pretrained model random, as it does without a word where the
    number of classes is another one."""
    classes = model.pretrained_cfg.get('num_classes')
    if kwargs.get('checkpoint_path') or model.num_classes == classes:
        return  # all of them were loaded, or timm has refused
    if model.num_classes:
        raise SFormerError(
            f'num_classes={model.num_classes}, but the pretrained weights of {name} are of {classes} classes: its '
            f'{model.pretrained_cfg.get("classifier")} would be random. Give a checkpoint that has one, or leave '
            f'num_classes out.')
    architecture = name.partition('.')[0]
    if timm.is_model(architecture):
        published = dict(timm.create_model(architecture, device='meta').named_parameters())
        new = [parameter for parameter, _ in model.named_parameters() if parameter not in published]
        if new:
            more = f' and {len(new) - 1} more' if len(new) > 1 else ''
            raise SFormerError(f'the pretrained weights of {name} have no {new[0]}{more}, which would be random with '
                               f'these arguments: {kwargs}.')


def _preprocessing_origins(
        model: Any,
        given: Json,
        said: dict[str, str],
        default: str | None,
) -> dict[str, str]:
    """Where the preprocessing in the config of a model is from; what came with its weights (no default) is left out."""
    origins = {key: 'given' if key in given else said.get(key, default)
               for key in PREPROCESSING if key in given or key in said or model.pretrained_cfg.get(key)}
    return {key: where for key, where in origins.items() if where is not None}


def _warn_of_defaults(model: Any, where: str, origins: dict[str, str], given: Json, said: Json) -> None:
    """Say so if the mean or the std of a model are those that timm has for other weights."""
    unsaid = [key for key in ('mean', 'std') if key not in given and key not in said]
    if unsaid:
        values = ' and '.join(f'{key} {tuple(model.pretrained_cfg[key])}' for key in unsaid)
        _logger.warning(f'{where} does not say which mean and std it was trained with: {values} are taken, '
                        f'{origins[unsaid[0]]}. --mean and --std (preprocessing) say otherwise.')


def set_data_config_(
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        interpolation: str | None = None,
) -> None:
    """Override the preprocessing that a model was trained with, where a value is given."""
    given = dict(mean=mean, std=std, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
    values = {key: value for key, value in given.items() if value is not None}
    in_chans = getattr(model, 'in_chans', 3)
    for key, value in (('mean', mean), ('std', std)):
        if value is not None and len(value) != in_chans:
            raise SFormerError(f'{key} needs {in_chans} values for {in_chans} channels, got {len(value)}.')
    check_preprocessing(values)
    cfg = vars(model)['pretrained_cfg']
    cfg.update(values)
    if any(True for _ in named_neurons(model)):
        set_pixel_range_(model, cfg['mean'], cfg['std'])


def set_label_names_(model: nn.Module, names: Sequence[str]) -> None:
    """Name the classes of a model, in its config.

    Raises:
        SFormerError: If there are more or fewer names than classes, or one of them is empty.
    """
    count, cfg = getattr(model, 'num_classes', 0), getattr(model, 'pretrained_cfg', None)
    if isinstance(names, str) or names_in_order(names) is None:
        raise SFormerError('names of classes (label_names) are a list of texts, none of them empty.')
    if len(names) != count:
        raise SFormerError(f'{len(names)} names of classes (label_names) for a model of {count}.')
    if cfg is not None:
        cfg['label_names'] = [*names]
        cfg.pop('label_descriptions', None)


def label_names_of(model: nn.Module) -> list[str] | None:
    """Names of a model's classes that its config states; None if it has none."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    names = names_in_order(names) if isinstance(names, (list, tuple, dict)) else None
    return names if names and len(names) == getattr(model, 'num_classes', 0) else None


def weights_tag(model: nn.Module) -> str:
    """timm's tag of the weights that a model's config is of or, of an SFormer, that its source had; else empty."""
    tag = (getattr(model, 'pretrained_cfg', None) or {}).get('tag')
    return tag or getattr(getattr(model, 'conversion', None), 'source_tag', None) or ''


def load_checkpoint_(model: nn.Module, checkpoint: Checkpoint, resized: Collection[str] = ()) -> None:
    """Load a checkpoint of exactly this architecture, in place, by timm's own filter of its names.

    Args:
        model: Model to load it into.
        checkpoint: The checkpoint.
        resized: Arguments that the user asked for: to `img_size` and `patch_size` among them embeddings are resized, as
            timm does it.

    Raises:
        SFormerError: If it is of another architecture, or has NaN or infinity in it.
    """
    expected = model.state_dict()
    state = checkpoint.state
    kept = [] if 'patch_size' in resized else ['patch_embed.proj.weight']
    if not {'img_size', 'patch_size'} & {*resized} and 'register_tokens' not in state:
        kept.append('pos_embed')
    fits = all(isinstance(value, torch.Tensor) for value in state.values()) and not any(
        _wrong_tensor(name, state[name], expected) for name in kept if name in state)
    unread = []
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if fits and isinstance(architecture, str) and timm.is_model(architecture):
        try:
            state = source_filter(architecture, type(model))(dict(state), model)
        except (RuntimeError, ValueError, KeyError, AttributeError, AssertionError) as e:
            unread = [f'timm cannot read it ({first_line(e)})']
    absent = [part for part in HEADS if not any(name.startswith(f'{part}.') for name in expected)]
    state = {name: tensor for name, tensor in state.items() if name.partition('.')[0] not in absent}
    missing = [f'{_their_name(checkpoint, name)} is missing' for name in expected if name not in state]
    foreign = [f'{name} is not part of the model' for name in state if name not in expected]
    wrong = [*unread, *missing[:2], *foreign[:1], *missing[2:], *foreign[1:]]  # a prefix shows in the first of both
    wrong += [line for name in expected if name in state for line in _wrong_tensor(name, state[name], expected)]
    if wrong:
        raise SFormerError(
            f'{checkpoint.path} is not a checkpoint of {checkpoint.architecture} with these arguments: '
            f'{"; ".join(wrong[:3])}{f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""}.')
    model.load_state_dict(state)
    check_weights(model, checkpoint.path)


def _wrong_tensor(name: str, value: object, expected: State) -> list[str]:
    """What is wrong with a tensor of a checkpoint, a line or none."""
    if name not in expected:
        return []
    if not isinstance(value, torch.Tensor):
        return [f'{name} is no tensor']
    if value.is_floating_point() != expected[name].is_floating_point():
        return [f'{name} holds {str(value.dtype).removeprefix("torch.")} values']
    if value.shape != expected[name].shape:
        return [f'{name} is {tuple(value.shape)} instead of {tuple(expected[name].shape)}']
    return []


def _their_name(checkpoint: Checkpoint, name: str) -> str:
    """What a checkpoint calls what timm calls `name`."""
    theirs = checkpoint.family.from_timm(name) if checkpoint.family else []
    return ', '.join(theirs) or name


def check_weights(model: nn.Module, where: str = 'the source network') -> None:
    """Raise SFormerError if a parameter holds NaN or infinity; names it."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SFormerError(f'{name} of {where} has no values: it is on the meta device, or offloaded.')
        if not torch.isfinite(parameter).all():
            raise SFormerError(f'{name} of {where} has NaN or infinite values.')
