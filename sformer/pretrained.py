"""Weights for `pretrained=True`: converted ones from the Hub, or those of the source with neurons fitted on first use.

What is cached is the neurons alone (thresholds, levels, centres: kilobytes to megabytes), keyed by the revision of
the source's weights, the recipe and the version of this package. The weights stay where the Hub's client caches
them, so a second call costs what loading the source costs.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import timm
import torch

from .errors import SFormerError
from .neurons import SFNConfig
from .utils import locked

__all__ = ['resolve_weights', 'neuron_state', 'RECIPE', 'NAMESPACE_VARIABLE']

_logger = logging.getLogger(__name__)

NAMESPACE_VARIABLE = 'SFORMER_HUB_NAMESPACE'
RECIPE = dict(calibration='dead-leaves', num_images=256, batch_size=32, seed=0)

State = Dict[str, torch.Tensor]
Record = Dict[str, Any]


def resolve_weights(
        variant: str,
        source: str,
        kwargs: Dict[str, Any],
) -> Tuple[Dict[str, Any], Optional[Callable[[], Tuple[State, Record]]], Optional[Record]]:
    """Where the pretrained weights of an entrypoint come from.

    Args:
        variant: Name of the `sformer_*` entrypoint.
        source: timm model that it has the architecture of.
        kwargs: What `timm.create_model` passed to the entrypoint.

    Raises:
        SFormerError: If the weights can't be had, or are not those that their config records.

    Returns:
        kwargs that name a commit of what is on the Hub; a function that returns the neurons to go with the weights of
        a source network, or None where the weights are converted ones; the record of their conversion, if it is known.
    """
    from timm.models._builder import resolve_pretrained_cfg

    from .models import default_cfgs
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    published = default_cfgs[variant].cfgs.get(cfg.tag)
    if published is not None and published.file and cfg.file == published.file and not cfg.state_dict:
        record = json.loads(Path(cfg.file).with_suffix('.json').read_text(encoding='utf-8'))
        return kwargs, None, record['conversion']  # weights in the package
    if cfg.source or cfg.state_dict or cfg.file or not cfg.hf_hub_id:
        return kwargs, None, None  # a folder or a file that the user names
    cache_dir = kwargs.get('cache_dir')
    name = f'{variant}.{cfg.tag}'
    if published is None or cfg.hf_hub_id != published.hf_hub_id:
        return _converted(variant, cfg.hf_hub_id, kwargs)
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if namespace:
        _logger.info(f'{name}: converted weights of {namespace}/{name} ({NAMESPACE_VARIABLE})')
        return _converted(variant, f'{namespace}/{name}', kwargs)
    _logger.info(f'{name}: weights of its source, {cfg.hf_hub_id}')
    sfn = kwargs.get('sfn')
    config = sfn if isinstance(sfn, SFNConfig) else SFNConfig(**(sfn or {}))
    hub_id = pinned(name, cfg.hf_hub_id, cache_dir)
    fitted = functools.partial(neuron_state, name, f'{source}.{cfg.tag}', hub_id, config, cache_dir)
    return dict(kwargs, pretrained_cfg_overlay=dict(overlay, hf_hub_id=hub_id)), fitted, None


def _converted(
        variant: str,
        hub_id: str,
        kwargs: Dict[str, Any],
) -> Tuple[Dict[str, Any], None, Record]:
    """As `hf-hub:` does it: weights, neurons and preprocessing are those that the repository's config names."""
    from timm.models._hub import load_model_config_from_hf

    from .verification import fetch, read_config, split_revision
    cache_dir, overlay = kwargs.get('cache_dir'), dict(kwargs.get('pretrained_cfg_overlay') or {})
    folder = fetch(*split_revision(hub_id), cache_dir=cache_dir)
    config = read_config(folder)
    if config['architecture'] != variant:
        raise SFormerError(f'{hub_id} on the Hub holds a {config["architecture"]}, not a {variant}.')
    directed = sorted({'hf_hub_filename', 'custom_load'} & overlay.keys())
    if directed:
        raise SFormerError(f'pretrained_cfg_overlay sets {", ".join(directed)}, but the weights of an SFormer are '
                           f'its model.safetensors.')
    cfg, _, args = load_model_config_from_hf(f'{split_revision(hub_id)[0]}@{folder.name}', cache_dir)
    overlay.pop('hf_hub_id', None)
    return {**args, **kwargs, 'pretrained_cfg': cfg, 'pretrained_cfg_overlay': overlay}, None, config.get('sformer', {})


def pinned(name: str, hub_id: str, cache_dir: Optional[str] = None) -> str:
    """Download the published weights of a source, and name the commit that they are of: `org/name@commit`.

    Raises:
        SFormerError: If they are neither cached nor can be downloaded; says what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from .verification import WEIGHTS_NAME, hub_errors, redact, split_revision
    repo_id, revision = split_revision(hub_id)
    with hub_errors(repo_id):
        try:
            path = hf_hub_download(repo_id, WEIGHTS_NAME, revision=revision, cache_dir=cache_dir, library_name='timm')
        except LocalEntryNotFoundError as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
            raise SFormerError(
                f'the weights of {name} are not in the cache and can not be downloaded: {redact(reason)}. Where '
                f'there is a connection, `hf download {repo_id} model.safetensors` puts them into the cache of the '
                f'Hub client (HF_HOME).') from e
    return f'{repo_id}@{Path(path).parent.name}'


def neuron_state(
        name: str,
        source: str,
        hub_id: str,
        config: SFNConfig = SFNConfig(),
        cache_dir: Optional[str] = None,
) -> Tuple[State, Record]:
    """Neurons of a zoo entry, from the cache or fitted to its source on generated images.

    Processes that ask for the same neurons at once fit them once: the first one holds a lock, the others wait for it
    and then read what it wrote. A file under its final name is complete.

    Args:
        name: Entry of the zoo with its tag.
        source: timm model with its tag.
        hub_id: Hub repository of the source's weights, and their commit: `org/name@commit`.
        config: Neurons.
        cache_dir: Cache folder of the Hub's client, if not the default one.

    Raises:
        SFormerError: If the source can't be loaded.
    """
    folder, key = cache_folder(cache_dir), cache_key(hub_id, config)
    path = folder / f'{name}-{key[:16]}.safetensors'
    cached = _read(path, key)
    if cached is not None:
        _logger.info(f'{name}: neurons of {path}')
        return cached
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix('.lock')):
        cached = _read(path, key)
        if cached is not None:
            _logger.info(f'{name}: neurons of {path}, which another process has just written')
            return cached
        _logger.warning(f'{name}: fitting neurons to {source} on {RECIPE["num_images"]} generated images, this once')
        state, record = _fit(source, hub_id, config, cache_dir)
        _write(path, key, state, record)
        return state, record


def _write(path: Path, key: str, state: State, record: Record) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from .utils import write_aside
    try:
        with write_aside(path.parent) as aside:
            save_file(state, aside / path.name, metadata=dict(format='pt', key=key, conversion=json.dumps(record)))
    except (OSError, SafetensorError) as e:  # the neurons are at hand, so this is no reason to fail
        _logger.warning(f'{path} can not be written ({e}): the next call will fit these neurons again')


def cache_folder(cache_dir: Optional[str] = None) -> Path:
    """Folder of cached neurons, beside the repositories that the Hub's client caches."""
    from huggingface_hub import constants
    return Path(cache_dir or constants.HF_HOME) / 'sformer'


def cache_key(hub_id: str, config: SFNConfig) -> str:
    """Hash of what the neurons of a source depend on: its commit, the recipe, the version of this package."""
    from importlib import metadata
    parts = dict(source=hub_id, version=metadata.version('sformer'), recipe=RECIPE, config=dataclasses.asdict(config))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> Optional[Tuple[State, Record]]:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework='pt') as f:
            if (f.metadata() or {}).get('key') != key:
                return None
            state = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            return state, json.loads(f.metadata()['conversion'])
    except (OSError, SafetensorError):
        return None


def _fit(source: str, hub_id: str, config: SFNConfig, cache_dir: Optional[str]) -> Tuple[State, Record]:
    from .conversion import convert, create_source
    from .layers import named_neurons
    from .utils import state_hash
    has_classes = timm.get_pretrained_cfg(source).num_classes > 0
    # whatever the caller has set for models of its own: neurons are the same on all machines
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device('cpu'), torch.autocast('cpu', enabled=False), \
            torch.inference_mode(False):
        torch.set_default_dtype(torch.float32)
        try:
            # a source without a classifier gets one of no meaning: the neurons before it serve whoever adds their own
            kwargs = {} if has_classes else dict(num_classes=1)
            model = create_source(
                source, cache_dir=cache_dir, pretrained_cfg_overlay=dict(hf_hub_id=hub_id), **kwargs)
            model = convert(model, config=config, inplace=True, **RECIPE)
        finally:
            torch.set_default_dtype(default)
    state = {f'{name}.{key}': buffer.detach().clone()
             for name, neuron in named_neurons(model) for key, buffer in neuron.named_buffers(recurse=False)}
    record: Any = model.conversion
    record['source_weights'] = hub_id
    if not has_classes:
        weights = {k: v for k, v in model.state_dict().items() if k not in state and not k.startswith('head.')}
        record['source_sha256'] = state_hash(weights)
    return state, record
