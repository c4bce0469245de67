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
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch

from .errors import SFormerError
from .neurons import SFNConfig

__all__ = ['resolve_weights', 'neuron_state', 'explain_download', 'RECIPE', 'NAMESPACE_VARIABLE']

_logger = logging.getLogger(__name__)

NAMESPACE_VARIABLE = 'SFORMER_HUB_NAMESPACE'
RECIPE = dict(calibration='dead-leaves', num_images=256, batch_size=32, seed=0)

State = Dict[str, torch.Tensor]
Record = Dict[str, Any]


def resolve_weights(
        variant: str,
        source: str,
        kwargs: Dict[str, Any],
) -> Tuple[Dict[str, Any], Optional[Callable[[], Tuple[State, Record]]]]:
    """Where the pretrained weights of an entrypoint come from.

    Args:
        variant: Name of the `sformer_*` entrypoint.
        source: timm model that it has the architecture of.
        kwargs: What `timm.create_model` passed to the entrypoint.

    Raises:
        SFormerError: If the namespace does not have the model, or its weights are not those that its config records.

    Returns:
        Overlay for the pretrained config, and a function that returns the neurons to go with the weights of a source
        network, or None where the weights must be converted ones.
    """
    from timm.models._builder import resolve_pretrained_cfg

    from .models import default_cfgs
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    name = f'{variant}.{cfg.tag}'
    published = default_cfgs[variant].cfgs.get(cfg.tag)
    if cfg.source or cfg.state_dict or cfg.file or cfg.url or not published or not published.hf_hub_id \
            or cfg.hf_hub_id != published.hf_hub_id:
        return {}, None  # a folder, a file or a repository that the user or the package names
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if namespace:
        from .verification import fetch
        _logger.info(f'{name}: converted weights of {namespace}/{name} ({NAMESPACE_VARIABLE})')
        commit = fetch(f'{namespace}/{name}', cache_dir=kwargs.get('cache_dir')).name
        return dict(hf_hub_id=f'{namespace}/{name}@{commit}'), None
    _logger.info(f'{name}: weights of its source, {cfg.hf_hub_id}')
    sfn = kwargs.get('sfn')
    config = sfn if isinstance(sfn, SFNConfig) else SFNConfig(**(sfn or {}))
    return {}, functools.partial(
        neuron_state, name, f'{source}.{cfg.tag}', cfg.hf_hub_id, config, kwargs.get('cache_dir'))


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
        hub_id: Hub repository of the source's weights.
        config: Neurons.
        cache_dir: Cache folder of the Hub's client, if not the default one.

    Raises:
        SFormerError: If the source can't be loaded.
    """
    from filelock import FileLock

    from .utils import write_aside
    folder, key = cache_folder(cache_dir), cache_key(hub_id, config, cache_dir)
    path = folder / f'{name}-{key[:16]}.safetensors'
    cached = _read(path, key)
    if cached is not None:
        _logger.info(f'{name}: neurons of {path}')
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix('.lock')):
        cached = _read(path, key)
        if cached is not None:
            _logger.info(f'{name}: neurons of {path}, which another process has just written')
            return cached
        _logger.warning(f'{name}: fitting neurons to {source} on {RECIPE["num_images"]} generated images, this once')
        state, record = _fit(source, config, cache_dir)
        with write_aside(folder) as aside:
            from safetensors.torch import save_file
            metadata = dict(format='pt', key=key, conversion=json.dumps(record))
            save_file(state, aside / path.name, metadata=metadata)
        return state, record


def cache_folder(cache_dir: Optional[str] = None) -> Path:
    """Folder of cached neurons, beside the repositories that the Hub's client caches."""
    from huggingface_hub import constants
    return Path(cache_dir or constants.HF_HOME) / 'sformer'


def cache_key(hub_id: str, config: SFNConfig, cache_dir: Optional[str] = None) -> str:
    """Hash of what the neurons of a source depend on: its revision, the recipe, the version of this package."""
    from importlib import metadata

    from huggingface_hub import try_to_load_from_cache
    repo_id, _, revision = hub_id.partition('@')
    path = try_to_load_from_cache(repo_id, 'model.safetensors', cache_dir=cache_dir, revision=revision or None)
    commit = Path(path).parent.name if isinstance(path, str) else 'unknown'
    parts = dict(source=hub_id, commit=commit, version=metadata.version('sformer'), recipe=RECIPE,
                 config=dataclasses.asdict(config))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def explain_download(variant: str) -> Iterator[None]:
    """Say what to do about weights that are neither cached nor can be downloaded.

    Raises:
        SFormerError: In the place of the Hub client's errors.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        yield
    except (LocalEntryNotFoundError, HfHubHTTPError) as e:
        from timm.models import get_pretrained_cfg
        hub_id = getattr(get_pretrained_cfg(variant), 'hf_hub_id', None)
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
        hint = f' Where there is a connection, `hf download {hub_id} model.safetensors` puts them into the cache of '\
            f'the Hub client (HF_HOME).' if hub_id else ''
        raise SFormerError(f'the weights of {variant} are not in the cache and can not be downloaded: {reason}.{hint}'
                           ) from e


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


def _fit(source: str, config: SFNConfig, cache_dir: Optional[str]) -> Tuple[State, Record]:
    from .conversion import convert, create_source
    from .layers import named_neurons
    with torch.random.fork_rng():
        model = create_source(source, cache_dir=cache_dir)
        model = convert(model, config=config, inplace=True, **RECIPE)
    state = {f'{name}.{key}': buffer.detach().clone()
             for name, neuron in named_neurons(model) for key, buffer in neuron.named_buffers(recurse=False)}
    record: Any = model.conversion
    return state, record
