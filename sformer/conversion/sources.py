"""Source networks: timm models with trained weights, and the preprocessing that they were trained with."""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors import safe_open
from timm.models import clean_state_dict

from ..data.preprocessing import check_preprocessing
from ..errors import SFormerError, alone, first_line, quiet
from ..files import Json, check_content, is_safetensors, read_safetensors
from ..layers import named_neurons
from ..models import set_pixel_range_

__all__ = [
    'CAME_ALONG', 'LOCATIONS', 'Source', 'check_no_graph', 'check_weights', 'checkpoint_config', 'create_source',
    'label_names_of', 'load_source_weights_', 'set_data_config_', 'set_label_names_',
]

_logger = logging.getLogger(__name__)

Said = dict[str, tuple[Any, str]]  # by a checkpoint: values by key, and where each stands
PREPROCESSING = ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')
NAMES = ('label_names', 'classes', 'class_to_idx')  # of classes, in a checkpoint
CAME_ALONG = 'of the config of its weights'
# of a config of timm: where it finds weights, and how it reads them
LOCATIONS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'custom_load', 'source')


@dataclasses.dataclass(frozen=True)
class Source:
    """A network to convert.

    Args:
        network: timm model in eval mode.
        weights: Where its published weights are from, a Hub id or a URL; None for weights of the user's own.
        normalisation: Where the mean and the std of its config are from, in words; None if they came with its weights.
    """
    network: nn.Module
    weights: str | None = None
    normalisation: str | None = None


def create_source(
        name: str,
        checkpoint: str | Path | None = None,
        allow_pickle: bool = False,
        filter_fn: Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]] | None = None,
        preprocessing: Json | None = None,
        **kwargs: Any,
) -> Source:
    """Create a timm model with trained weights.

    A checkpoint may say how it was trained (`checkpoint_config`); where it says nothing of mean and std, those that
    timm has for the architecture are taken, with a warning: they are those of other weights.

    Args:
        name: Model name, as for `timm.create_model`.
        checkpoint: Weights to load; the published pretrained ones if None.
        allow_pickle: Load a pickled checkpoint, with torch's `weights_only` unpickler.
        filter_fn: Adapts the state dict of a checkpoint to the model.
        preprocessing: How it was trained, as of `set_data_config_`: mean, std, crop_pct, crop_mode, interpolation.
        **kwargs: Passed to `timm.create_model`.

    Raises:
        SFormerError: If there is no such model, its arguments are wrong, the weights cannot be had, or some of its
            parameters would stay random.
    """
    check_no_graph(name)
    if not name.startswith(('hf-hub:', 'local-dir:')) and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f' Did you mean {", ".join(close)}?' if close else " timm.list_models('vit*') lists names."
        if Path(name).is_dir():
            hint = f' A model in a folder is local-dir:{name}.'
        raise SFormerError(f'timm has no model {name!r}.{hint}')
    try:
        model = timm.create_model(name, pretrained=checkpoint is None, **kwargs)
    except SFormerError:
        raise
    except (OSError, RuntimeError) as e:
        if checkpoint is not None:
            raise SFormerError(f'{name} cannot be built with {kwargs}: {first_line(e)}') from e
        raise SFormerError(
            f'the pretrained weights of {name} cannot be loaded ({first_line(e)}). '
            f'Give a checkpoint, or make the Hub reachable.') from e
    except KeyError as e:
        if e.args != ('architecture',):
            raise SFormerError(f'{name} cannot be built with {kwargs}: KeyError: {first_line(e)}') from e
        raise SFormerError(
            f'{name} is no model of timm: its config.json names no architecture. Of a model of transformers, take the '
            f'one that timm has of the same weights.') from e
    except Exception as e:  # timm leaves it to whatever a wrong value breaks first
        raise SFormerError(f'{name} cannot be built with {kwargs}: {type(e).__name__}: {first_line(e)}') from e
    cfg: Json = vars(model)['pretrained_cfg']
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    own = checkpoint or kwargs.get('checkpoint_path') or overlay.get('file')
    if checkpoint is not None:
        load_source_weights_(model, checkpoint, allow_pickle, filter_fn)
    else:
        _check_trained(model, name, kwargs)
    said = checkpoint_config(Path(own), cfg.get('architecture'), allow_pickle) if own else {}
    names, _ = said.pop('label_names', ((), ''))
    if names and len(names) == getattr(model, 'num_classes', 0):
        set_label_names_(model, names)
    given = {key: overlay[key] for key in ('mean', 'std') if overlay.get(key)}
    given |= {key: value for key, value in (preprocessing or {}).items() if value is not None}
    set_data_config_(model, **{**{key: value for key, (value, _) in said.items()}, **given})
    normalisation = _normalisation(model, own or overlay.get('state_dict') and 'the state dict', given, said)
    described = checkpoint is None and not (own or cfg.get('file') or cfg.get('state_dict')) \
        and getattr(model, 'num_classes', 0) == cfg.get('num_classes')  # else these are not the weights that it is of
    return Source(model.eval(), (cfg.get('hf_hub_id') or cfg.get('url') or None) if described else None, normalisation)


def check_no_graph(name: str) -> None:
    """Raise SFormerError for the file of a graph, which few commands take for a model."""
    if name.endswith('.onnx'):
        raise SFormerError(f'{name} is a graph, as sformer export writes it; what is wanted here is the model that it '
                           f'was exported of.')


def _check_trained(model: nn.Module, name: str, kwargs: Json) -> None:
    """Raise SFormerError if timm has left parameters of a pretrained model random, as it does without a word where the
    number of classes is another one."""
    cfg: Json = vars(model)['pretrained_cfg']
    given, classes = getattr(model, 'num_classes', 0), cfg.get('num_classes')
    if kwargs.get('checkpoint_path') or given == classes:
        return  # all of them were loaded, or timm has refused
    if given:
        raise SFormerError(
            f'num_classes={given}, but the pretrained weights of {name} are of {classes} classes: its '
            f'{cfg.get("classifier")} would be random. Give a checkpoint that has one, or leave '
            f'num_classes out.')
    architecture = name.partition('.')[0]
    if timm.is_model(architecture):
        published = dict(timm.create_model(architecture, device='meta').named_parameters())
        new = [parameter for parameter, _ in model.named_parameters() if parameter not in published]
        if new:
            more = f' and {len(new) - 1} more' if len(new) > 1 else ''
            raise SFormerError(f'the pretrained weights of {name} have no {new[0]}{more}, which would be random with '
                               f'these arguments: {kwargs}.')


def checkpoint_config(
        path: Path,
        architecture: str | None,
        allow_pickle: bool = False,
) -> Said:
    """What a checkpoint says of the preprocessing that its network was trained with, values as of `set_data_config_`,
    and of the names of its classes (`label_names`), each with where it stands.

    It says so as `mean`, `std` ... or in a `pretrained_cfg`: in the metadata of a safetensors file, in the entries of a
    pickled checkpoint or in the `args` of timm's training, or in timm's `config.json` of this architecture beside it.
    Names may be torchvision's, too: a list `classes`, or numbers by name in `class_to_idx`.
    """
    places = [('its metadata', _said_beside_weights(path, allow_pickle))]
    with contextlib.suppress(OSError, ValueError, RecursionError):
        config = json.loads((path.parent / 'config.json').read_text(encoding='utf-8'))
        if isinstance(config, dict) and config.get('architecture') == architecture:
            places.append(('config.json beside it', config))
    said: Said = {}
    for where, values in places:
        nested = values.get('pretrained_cfg')
        for content in (values, nested if isinstance(nested, dict) else {}):
            for key in PREPROCESSING:  # timm's training has empty ones for what was not asked for
                if content.get(key) not in (None, '', [], ()):
                    said.setdefault(key, (content[key], where))
            names = next((names for names in map(content.get, NAMES) if names), None)
            if isinstance(names, (list, tuple, dict)):
                said.setdefault('label_names', (_in_their_order(names), where))
    return {key: found for key, found in said.items() if found[0] is not None}


def _in_their_order(names: Sequence[object] | dict[object, object]) -> list[str] | None:
    """Names of classes in their order, of a list, of names by number or of numbers by name; None if they are none."""
    if isinstance(names, dict):
        if all(isinstance(number, int) for number in names.values()):
            names = {number: name for name, number in names.items()}
        names = [names.get(i, names.get(str(i))) for i in range(len(names))]
    texts = [name for name in names if isinstance(name, str) and name.strip()]
    return texts if len(texts) == len(names) else None


def _said_beside_weights(path: Path, allow_pickle: bool) -> Json:
    """What a checkpoint holds beside its weights."""
    if is_safetensors(path):
        with safe_open(path, framework='pt') as f:
            return {key: _value(text) for key, text in (f.metadata() or {}).items()}
    if not allow_pickle:
        return {}
    with alone, torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location='cpu', weights_only=True)
    if not isinstance(content, dict):
        return {}
    args = content.get('args')
    return {**(vars(args) if isinstance(args, argparse.Namespace) else {}),
            **{key: content[key] for key in (*PREPROCESSING, *NAMES, 'pretrained_cfg') if key in content}}


def _value(text: str) -> object:
    """What a text of metadata says: as JSON has it, or Python; else the text itself."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # of lists in lists
            return read(text)
    return text


def _normalisation(
        model: nn.Module,
        own: str | Path | None,
        given: Json,
        said: Said,
) -> str | None:
    """Where the mean and the std of a network are from, in words, None where its config came with its weights; warns
    where they are those that timm has for other weights."""
    cfg = vars(model)['pretrained_cfg']
    default = f'timm\'s default for {cfg.get("architecture")}' if own else CAME_ALONG
    origins = {key: 'given' if key in given else f'of the checkpoint ({said[key][1]})' if key in said else default
               for key in ('mean', 'std')}
    if own and default in origins.values():
        values = ' and '.join(f'{key} {tuple(cfg[key])}' for key in origins if origins[key] == default)
        _logger.warning(f'{own} does not say which mean and std it was trained with: {values} are taken, {default}. '
                        f'--mean and --std (preprocessing) say otherwise.')
    if {*origins.values()} == {CAME_ALONG}:
        return None
    return origins['mean'] if len({*origins.values()}) == 1 else f'mean {origins["mean"]}, std {origins["std"]}'


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
    if isinstance(names, str) or _in_their_order(names) is None:
        raise SFormerError('names of classes (label_names) are a list of texts, none of them empty.')
    if len(names) != count:
        raise SFormerError(f'{len(names)} names of classes (label_names) for a model of {count}.')
    if cfg is not None:
        cfg['label_names'] = [*names]
        cfg.pop('label_descriptions', None)


def label_names_of(model: nn.Module) -> list[str] | None:
    """Names of a model's classes that its config states; None if it has none."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    names = _in_their_order(names) if isinstance(names, (list, tuple, dict)) else None
    return names if names and len(names) == getattr(model, 'num_classes', 0) else None


def load_source_weights_(
        model: nn.Module,
        path: str | Path,
        allow_pickle: bool = False,
        filter_fn: Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Load a checkpoint of exactly this architecture, in place.

    Args:
        model: Model to load it into.
        path: Checkpoint.
        allow_pickle: Load a pickled one, with torch's `weights_only` unpickler.
        filter_fn: Adapts the state dict to the model, as timm's filters resize embeddings.

    Raises:
        SFormerError: If the file is missing, damaged, pickled, of another architecture, or has NaN or infinity in it.
    """
    path = Path(path)
    if not path.is_file():
        raise SFormerError(f'no checkpoint at {path}.')
    check_content(path)
    if path.suffix == '.safetensors' or is_safetensors(path):
        state = read_safetensors(path)
    elif not allow_pickle:
        raise SFormerError(
            f'{path} is not a safetensors file. A pickled checkpoint can run code when it is opened, so it is refused; '
            f'--allow-pickle (allow_pickle=True) loads it with torch\'s weights_only unpickler.')
    else:
        try:
            with quiet():
                state = timm.models.load_state_dict(str(path), weights_only=True)
        except Exception as e:  # torch's own message ends in advice to unpickle without protection
            raise SFormerError(
                f'{path} cannot be unpickled safely: it is damaged, or holds more than tensors. Save the state dict '
                f'as safetensors.') from e
    state = clean_state_dict(state)  # DataParallel and torch.compile put prefixes before names
    if filter_fn is not None:
        state = filter_fn(state, model)
    expected = model.state_dict()
    missing = [f'{k} is missing' for k in expected if k not in state]
    foreign = [f'{k} is not part of the model' for k in state if k not in expected]
    wrong = [*missing[:2], *foreign[:1], *missing[2:], *foreign[1:]]  # a prefix shows in the first of both
    for k, v in expected.items():
        if k in state and not isinstance(state[k], torch.Tensor):
            wrong.append(f'{k} is no tensor')
        elif k in state and state[k].is_floating_point() != v.is_floating_point():
            wrong.append(f'{k} holds {str(state[k].dtype).removeprefix("torch.")} values')
        elif k in state and state[k].shape != v.shape:
            wrong.append(f'{k} is {tuple(state[k].shape)} instead of {tuple(v.shape)}')
    if wrong:
        name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', 'the model')
        raise SFormerError(
            f'{path} is not a checkpoint of {name} with these arguments: {"; ".join(wrong[:3])}'
            f'{f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""}.')
    model.load_state_dict(state)
    check_weights(model, str(path))


def check_weights(model: nn.Module, where: str = 'the source network') -> None:
    """Raise SFormerError if a parameter holds NaN or infinity; names it."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SFormerError(f'{name} of {where} has no values: it is on the meta device, or offloaded.')
        if not torch.isfinite(parameter).all():
            raise SFormerError(f'{name} of {where} has NaN or infinite values.')
