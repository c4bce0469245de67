"""Checkpoints that people have, read into one form: weights by names that timm reads, the timm model that they are of,
and what is said of head, classes, image size and normalisation, each with where it is said.

Kinds: a training of timm (`model_best.pth.tar`), a state dict in a file, a folder or repository of transformers
(`save_pretrained`) or of open_clip. Folders and repositories of timm are timm's own to read.
"""
import contextlib
import dataclasses
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import build_model_with_cfg

from ..errors import SFormerError, first_line
from ..files import Json
from ..models.sformer import State
from .families import family_of, open_clip
from .places import CONFIG, OPEN_CLIP_CONFIG, Place
from .preprocessors import PREPROCESSING, preprocessing_of
from .renaming import Family, without_logits
from .weights import Weights, read_weights

__all__ = [
    'Checkpoint', 'factory_arguments', 'names_in_order', 'read_checkpoint', 'read_file', 'said_of',
]

WEIGHT_FILES = (
    'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
OPEN_CLIP_FILES = ('open_clip_model.safetensors', 'open_clip_pytorch_model.bin')
OTHERS = {'tf_model.h5': 'TensorFlow', 'flax_model.msgpack': 'Flax'}
NAMES = ('label_names', 'classes', 'class_to_idx')  # of classes, in a checkpoint
ARCHITECTURE = ('architecture', 'arch', 'model')
# arguments of timm -> what its training calls them
ARGUMENTS = {'num_classes': 'num_classes', 'in_chans': 'in_chans', 'img_size': 'img_size', 'global_pool': 'gp'}
# where an image tower may lie, and what position embeddings and classifiers are called there
POSITIONS = ('visual.trunk.pos_embed', 'visual.positional_embedding', 'visual.pos_embed', 'pos_embed')
HEAD_NAMES = ('visual.head.proj.weight', 'visual.trunk.head.weight', 'visual.proj')

Said = dict[str, tuple[Any, str]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is known of weights.

    Args:
        path: Where they lie, for people.
        state: State dict, by names that timm's filter for the model reads.
        architecture: timm model that they are of.
        arguments: Arguments that build it, and `norm_eps`.
        said: Preprocessing as of `set_data_config_`, and `label_names`: values, and where they are said.
        origins: Where the rest is from: `architecture`, `weights`, `num_classes`, `img_size`.
        family: Whose names the file has; None if they are timm's.
        weights: `org/name@commit` on the Hub; None for files of the user's own.
    """
    path: str
    state: State
    architecture: str
    arguments: Json
    said: Said
    origins: dict[str, str]
    family: Family | None = None
    weights: str | None = None


def read_checkpoint(place: Place, config: Json, asked: Json, weights: Path | None = None) -> Checkpoint:
    """A folder or repository that transformers or open_clip has written.

    Args:
        place: Where it is, as of `place_of`.
        config: Its config.
        asked: Arguments that the user gives.
        weights: Its file of weights, if the user names one.

    Raises:
        SFormerError: If it is of an unknown kind, or has no weights that can be read.
    """
    with _about(place.name):
        if 'model_cfg' in config:
            return _of_open_clip(place, config, asked)
        return _of_transformers(place, config, asked, weights)


@contextlib.contextmanager
def _about(name: str):
    """Errors begin with what they are about."""
    try:
        yield
    except SFormerError as e:
        raise e if name in str(e) else SFormerError(f'{name}: {e}') from e.__cause__
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise SFormerError(f'{name}: its config is not as it should be: {type(e).__name__}: {first_line(e)}.') from e


def _of_transformers(place: Place, config: Json, asked: Json, path: Path | None) -> Checkpoint:
    family_of(config, (), CONFIG)  # before gigabytes are fetched
    path, weights = (path, read_weights(path)) if path else _weights_in(place, WEIGHT_FILES)
    state = without_logits(weights.state) if asked.get('num_classes') == 0 else weights.state
    family = family_of(config, state, CONFIG)
    own = family.config(config)
    architecture, arguments = family.build(own, {family.own_name(name) for name in state})
    processor, where = _preprocessor(place)
    said: Said = {key: (value, where) for key, value in preprocessing_of(processor).items()}
    size, from_size = said.pop('img_size', (None, ''))
    grid = _grid(own['image_size'], own['patch_size'])
    state = family.to_timm(state)
    origins = dict(architecture=f'a {family.title} of {CONFIG}', weights=path.name,
                   img_size=f'image_size of {CONFIG}',
                   num_classes=f'{"" if "head.weight" in state else "no "}classifier in {path.name}')
    arguments['num_classes'] = state['head.weight'].shape[0] if 'head.weight' in state else 0
    names = config.get('id2label')
    names = names_in_order(names) if isinstance(names, dict) else None
    if names and not all(name == f'LABEL_{i}' for i, name in enumerate(names)):
        said['label_names'] = (names, f'id2label of {CONFIG}')
    if size is not None and family.follows_size:
        arguments['img_size'] = size
        origins['img_size'] = f'size of {from_size}'
    if family.follows_size and 'pos_embed' in state:
        new = _grid(asked.get('img_size', arguments['img_size']), own['patch_size'])
        state = _resized(state, grid, new, family.antialias)
    return Checkpoint(
        place.name, state, architecture, arguments, said, origins, family,
        f'{place.repo_id}@{place.revision}' if place.repo_id else None)


def _of_open_clip(place: Place, config: Json, asked: Json) -> Checkpoint:
    path, weights = _weights_in(place, OPEN_CLIP_FILES + WEIGHT_FILES)
    architecture, arguments = open_clip(config)
    if not timm.is_model(architecture):
        raise SFormerError(f'timm has no {architecture!r}, which {OPEN_CLIP_CONFIG} names.')
    preprocess = config.get('preprocess_cfg') or {}
    said: Said = {key: (preprocess[key], f'preprocess_cfg of {OPEN_CLIP_CONFIG}')
                  for key in ('mean', 'std', 'interpolation') if preprocess.get(key)}
    if preprocess.get('resize_mode') == 'squash':
        said.update(crop_pct=(1.0, OPEN_CLIP_CONFIG), crop_mode=('squash', OPEN_CLIP_CONFIG))
    origins = dict(architecture=OPEN_CLIP_CONFIG, weights=path.name, img_size=f'image_size of {OPEN_CLIP_CONFIG}')
    checkpoint = Checkpoint(place.name, weights.state, architecture, arguments, said, origins,
                            weights=f'{place.repo_id}@{place.revision}' if place.repo_id else None)
    return _completed(checkpoint, asked)


def _weights_in(place: Place, names: Sequence[str]) -> tuple[Path, Weights]:
    for name in names:
        path = place.find(name)
        if path is not None:
            return path, read_weights(path, place.find)
    other = next((kind for name, kind in OTHERS.items() if place.find(name)), None)
    if other:
        raise SFormerError(f'{place.name} has weights of {other} alone, which are not read here: let transformers load '
                           f'and save them.')
    raise SFormerError(f'{place.name} has no {" or ".join(name for name in names if "index" not in name)}.')


def _preprocessor(place: Place) -> tuple[Json, str]:
    """How images are prepared, as transformers writes it, and the name of the file."""
    for name in ('preprocessor_config.json', 'processor_config.json'):
        found = place.read(name)
        if found:
            return found.get('image_processor', found), name
    return {}, ''


def _grid(size: Any, patch: Any) -> tuple[int, int]:
    height, width = (edge // step for edge, step in zip(to_2tuple(size), to_2tuple(patch), strict=True))
    return height, width


def _resized(state: State, old: tuple[int, int], new: tuple[int, int], antialias: bool) -> State:
    """A state dict whose position embeddings are resized as transformers does it."""
    if old == new:
        return state
    positions = state['pos_embed']
    return dict(state, pos_embed=resample_abs_pos_embed(
        positions, new, old, num_prefix_tokens=positions.shape[1] - math.prod(old), antialias=antialias))


def _classifier_in(state: State, architecture: str) -> str | None:
    """Name of the weights that give logits, if there are some: what open_clip or timm calls them."""
    config: Any = timm.get_pretrained_cfg(architecture)
    own = config.classifier
    names = (*HEAD_NAMES, *(f'{name}.weight' for name in ([own] if isinstance(own, str) else own or ())))
    return next((name for name in names if isinstance(state.get(name), torch.Tensor)), None)


def read_file(path: Path, architecture: str | None, asked: Json) -> Checkpoint:
    """A file of weights: a training of timm, or a state dict.

    Args:
        path: The file.
        architecture: timm model that it is of; None where the file says so itself.
        asked: Arguments that the user gives.

    Raises:
        SFormerError: If it cannot be read, or nothing says what it is of.
    """
    beside = Place(str(path), path.parent)
    config = beside.read(CONFIG) if path.is_file() and (path.parent / CONFIG).is_file() else None
    if architecture is None and config and config.get('model_type') and 'architecture' not in config:
        return read_checkpoint(beside, config, asked, path)
    weights = read_weights(path)
    entries = weights.entries
    named = next(((entries[key], f'{key} in {path.name}') for key in ARCHITECTURE
                  if isinstance(entries.get(key), str)), None)
    if named is None and config and isinstance(config.get('architecture'), str):
        named = config['architecture'], f'{CONFIG} beside {path.name}'
        entries = {'model_kwargs': config.get('model_args'), **entries}
    found, where = (architecture, 'given') if architecture else named or ('', '')
    if not found:
        raise SFormerError(
            f'{path} does not say which timm model it is of{_looks(weights.state)}. Name it: sformer convert NAME '
            f'--checkpoint {path}.')
    if not timm.is_model(found):
        raise SFormerError(f'{path} is of {found!r} ({where}), which is no model of timm.')
    found = found.partition('.')[0]  # the tag is of published weights, which these are not
    # whoever names the model has said how it is built
    arguments, origins = ({}, {}) if architecture else _arguments(entries, path)
    kept_as = f'{weights.kept_as} in {path.name}' if weights.kept_as else path.name
    return _completed(Checkpoint(
        str(path), weights.state, found, arguments, said_of(path, found, entries),
        dict(origins, architecture=where, weights=kept_as)), asked)


def _arguments(entries: Json, path: Path) -> tuple[Json, dict[str, str]]:
    """Arguments of its model that a training of timm records, and where.

    Raises:
        SFormerError: If one of them is of the factory, which could load something else.
    """
    given = entries.get('model_kwargs')
    arguments = dict(given) if isinstance(given, dict) else {}
    directed = sorted(factory_arguments() & arguments.keys())
    if directed:
        raise SFormerError(f'{path}: model_kwargs sets {", ".join(directed)}, which is no argument of a network.')
    origins = {key: f'model_kwargs in {path.name}' for key in arguments}
    size = entries.get('input_size')
    if isinstance(size, (list, tuple)) and len(size) == 3:
        entries = dict(entries, in_chans=size[0], img_size=tuple(size[1:]))
    for argument, name in ARGUMENTS.items():
        value = entries.get(name)
        if value is not None and argument not in arguments:
            arguments[argument] = value
            origins[argument] = f'{name} in {path.name}'
    return arguments, origins


def _completed(checkpoint: Checkpoint, asked: Json) -> Checkpoint:
    """A checkpoint with what its tensors say of its classifier, its channels and the size of its images, where nothing
    else says so."""
    arguments, origins = dict(checkpoint.arguments), dict(checkpoint.origins)
    state, file = checkpoint.state, checkpoint.origins['weights']
    known = {*arguments, *asked}
    if 'num_classes' not in known:
        head = _classifier_in(state, checkpoint.architecture)
        # open_clip keeps its projection as columns
        arguments['num_classes'] = state[head].shape[-1 if head == 'visual.proj' else 0] if head else 0
        origins['num_classes'] = f'{"" if head else "no "}classifier in {file}'
    patches = state.get('patch_embed.proj.weight')
    if 'in_chans' not in known and isinstance(patches, torch.Tensor) and patches.ndim == 4:
        arguments['in_chans'] = patches.shape[1]
    positions = next((state[name] for name in POSITIONS if isinstance(state.get(name), torch.Tensor)), None)
    if 'img_size' not in known and positions is not None:
        # the releases of DINOv2 have a position for the class token that timm adds to it
        count = positions.shape[-2] - ('register_tokens' in state)
        size = _size_of(count, checkpoint.architecture, {**arguments, **asked})
        if size:
            arguments['img_size'] = size
            origins['img_size'] = f'position embeddings in {file}'
    return dataclasses.replace(checkpoint, arguments=arguments, origins=origins)


def _size_of(count: int, architecture: str, arguments: Json) -> int | None:
    """The size of square images that a model with these arguments has `count` positions for; None if there is none,
    which loading says more of."""
    try:
        with torch.device('meta'):
            model: Any = timm.create_model(architecture, **{k: v for k, v in arguments.items() if k != 'norm_eps'})
        prefix = model.pos_embed.shape[1] - model.patch_embed.num_patches
        step = model.patch_embed.patch_size
    except Exception:  # building it says what is wrong
        return None
    side = math.isqrt(max(count - prefix, 0))
    fits = side and side * side + prefix == count and step[0] == step[1]
    return side * step[0] if fits else None


def _looks(state: State) -> str:
    """How large the network of a state dict is, in words, as far as names of timm show it."""
    patches = state.get('patch_embed.proj.weight')
    if not isinstance(patches, torch.Tensor) or patches.ndim != 4:
        return ''
    depth = len({name.split('.')[1] for name in state if name.startswith('blocks.')})
    return f' ({depth} blocks of {patches.shape[0]} channels, patches of {patches.shape[-1]} pixels)'


def factory_arguments() -> set[str]:
    """Arguments that mean something to timm's factory instead of the network."""
    names = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    return names - {'kwargs'} | {'pruned', 'features_only', 'feature_cls'}


def said_of(path: Path, architecture: str | None, entries: Json | None = None) -> Said:
    """What a file of weights says of the preprocessing that its network was trained with, and of the names of its
    classes (`label_names`), each with where it stands.

    It says so as `mean`, `std` ... or in a `pretrained_cfg`: in its metadata, in the entries of a pickled checkpoint or
    in the `args` of timm's training, or in timm's `config.json` of this architecture beside it. Names may be
    torchvision's, too: a list `classes`, or numbers by name in `class_to_idx`.
    """
    places = [(path.name, read_weights(path).entries if entries is None else entries)]
    with contextlib.suppress(OSError, ValueError, RecursionError):
        config = json.loads((path.parent / CONFIG).read_text(encoding='utf-8'))
        if isinstance(config, dict) and config.get('architecture') == architecture:
            places.append((f'{CONFIG} beside {path.name}', config))
    said: Said = {}
    for where, values in places:
        nested = values.get('pretrained_cfg')
        for content in (values, nested if isinstance(nested, dict) else {}):
            for key in PREPROCESSING:  # timm's training has empty ones for what was not asked for
                if content.get(key) not in (None, '', [], ()):
                    said.setdefault(key, (content[key], where))
            names = next((names for names in map(content.get, NAMES) if names), None)
            if isinstance(names, (list, tuple, dict)):
                said.setdefault('label_names', (names_in_order(names), where))
    return {key: found for key, found in said.items() if found[0] is not None}


def names_in_order(names: Sequence[object] | dict[object, object]) -> list[str] | None:
    """Names of classes in their order, of a list, of names by number or of numbers by name; None if they are none.

    Raises:
        SFormerError: If two names have one number.
    """
    if isinstance(names, dict):
        if all(isinstance(number, int) for number in names.values()):
            by_number: dict[object, object] = {}
            for name, number in names.items():
                if number in by_number:
                    raise SFormerError(
                        f'classes {by_number[number]!r} and {name!r} have one number, {number}: each needs its own.')
                by_number[number] = name
            names = by_number
        names = [names.get(i, names.get(str(i))) for i in range(len(names))]
    texts = [name for name in names if isinstance(name, str) and name.strip()]
    return texts if len(texts) == len(names) else None
