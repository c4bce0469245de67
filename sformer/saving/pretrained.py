"""Weights for `pretrained=True`: where they are, which neurons go with them, and what is recorded of both.

What a folder, a file or a repository holds comes with its own neurons. The published weights of a source get neurons
that are fitted on first use. What is cached of those is the neurons alone (steps, levels, centres: kilobytes to
megabytes), keyed by the revision of the source's weights, the recipe and the version of this package. The weights stay
where the Hub's client caches them, so a second call costs what loading the source costs.
"""
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import load_model_config_from_hf

from ..conversion import convert
from ..conversion.record import Conversion
from ..conversion.repositories import hub_errors, redact, split_revision
from ..conversion.sources import create_source
from ..errors import SFormerError, alone, first_line
from ..files import Json, locked, state_hash, write_aside
from ..layers import named_neurons
from ..models.sformer import State, is_neuron_key
from ..neurons import SFNConfig, as_config
from .hub import fetch
from .model_config import WEIGHTS_NAME, check_weights_file, conversion_of, read_config

__all__ = ['Pretrained', 'find_pretrained', 'neuron_state', 'RECIPE', 'NAMESPACE_VARIABLE']

_logger = logging.getLogger(__name__)

NAMESPACE_VARIABLE = 'SFORMER_HUB_NAMESPACE'
RECIPE: Json = dict(calibration='dead-leaves', num_images=256, seed=0)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Where timm finds the weights of an SFormer, and what this package adds to them.

    Args:
        cfg: `pretrained_cfg` for timm's builder, of a repository pinned to a commit.
        overlay: `pretrained_cfg_overlay` for it.
        model_args: Arguments of the network that a config beside the weights names.
        neurons: State of the neurons, for weights that have none.
        conversion: Record of the conversion, if it is known.
        fresh: Whether the weights are those of a source, so that the config says how pixels are coded.
    """
    cfg: Any = None
    overlay: Json = dataclasses.field(default_factory=dict)
    model_args: Json = dataclasses.field(default_factory=dict)
    neurons: State | None = None
    conversion: Conversion | None = None
    fresh: bool = False


def find_pretrained(
        variant: str,
        source: str,
        published: dict[str, PretrainedCfg],
        *,
        pretrained: bool = True,
        cfg: Any = None,
        overlay: Json | None = None,
        cache_dir: str | Path | None = None,
        sfn: SFNConfig | Json | None = None,
) -> Pretrained:
    """Find the pretrained weights of an entrypoint, in this order: the folder or the repository that the user named
    (checked here, before timm reads it); weights in the package; a repository or a file of a config overlay; converted
    weights of the namespace in SFORMER_HUB_NAMESPACE; the published weights of the source, with fitted neurons.

    Args:
        variant: Name of the `sformer_*` entrypoint.
        source: timm model that it has the architecture of.
        published: Configs of the entrypoint by tag.
        pretrained: Whether weights are wanted; without, only a config of a folder or a repository is checked.
        cfg: `pretrained_cfg` that timm passed to the entrypoint.
        overlay: `pretrained_cfg_overlay` that it passed.
        cache_dir: Cache of the Hub's client, if not the default one.
        sfn: How neurons are asked to fire.

    Raises:
        SFormerError: If the weights cannot be had, or are not those that their config records.
    """
    overlay = dict(overlay or {})
    where = cfg.get('source') if isinstance(cfg, dict) else None  # a dict that timm read from a config
    if where in ('local-dir', 'hf-hub'):
        return _named(cfg, where, overlay, cache_dir, pretrained)
    given = Pretrained(cfg, overlay)
    if not pretrained:
        return given
    resolved = resolve_pretrained_cfg(variant, cfg, overlay)
    known = published.get(resolved.tag or '')
    if known is not None and known.file and resolved.file == known.file and not resolved.state_dict:
        record = json.loads(Path(known.file).with_suffix('.json').read_text(encoding='utf-8'))
        conversion = Conversion.from_dict(record['conversion'])
        check_firing(f'{variant}.{resolved.tag}', sfn, record['sfn'])
        return dataclasses.replace(given, model_args=dict(sfn=record['sfn']), conversion=conversion)
    if resolved.source or resolved.state_dict or resolved.file or not resolved.hf_hub_id:
        return given  # a folder or a file that the user names
    if known is None or resolved.hf_hub_id != known.hf_hub_id:
        return _converted(variant, resolved.hf_hub_id, overlay, cache_dir, sfn)
    name = f'{variant}.{resolved.tag}'
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if namespace:
        _logger.info(f'{name}: converted weights of {namespace}/{name} ({NAMESPACE_VARIABLE})')
        return _converted(variant, f'{namespace}/{name}', overlay, cache_dir, sfn)
    _logger.info(f'{name}: weights of its source, {resolved.hf_hub_id}')
    hub_id = pinned(name, resolved.hf_hub_id, cache_dir)
    if _bring_neurons(hub_id, cache_dir):
        return Pretrained(cfg, dict(overlay, hf_hub_id=hub_id))
    neurons, conversion = neuron_state(name, f'{source}.{resolved.tag}', hub_id, as_config(SFNConfig, sfn), cache_dir)
    return Pretrained(cfg, dict(overlay, hf_hub_id=hub_id), neurons=neurons, conversion=conversion, fresh=True)


def check_firing(name: str, asked: SFNConfig | Json | None, fitted: Json) -> None:
    """Raise SFormerError if converted weights are to be loaded into other neurons than they were fitted to."""
    if asked is None:
        return
    config = dataclasses.asdict(as_config(SFNConfig, asked))
    there = dataclasses.asdict(as_config(SFNConfig, fitted))
    different = [key for key, value in there.items() if config[key] != value]
    if different:
        raise SFormerError(
            f'{name} was converted with {", ".join(f"{key}={there[key]!r}" for key in different)}, so sfn= can '
            f'ask for nothing else. Its source can be converted with sformer.convert().')


def _named(cfg: Json, where: str, overlay: Json, cache_dir: str | Path | None, pretrained: bool) -> Pretrained:
    """A folder or a repository that timm is about to load; timm has read its config, which is checked here."""
    if where == 'local-dir':
        folder = Path(cfg['file'])
        config = read_config(folder)
        if pretrained:
            check_weights_file(folder, config)
    else:
        repo_id, revision = split_revision(cfg['hf_hub_id'])
        folder = fetch(repo_id, revision, cache_dir, weights=pretrained, config_is_cached=True)
        cfg = dict(cfg, hf_hub_id=f'{repo_id}@{folder.name}')
        config = read_config(folder)
    return Pretrained(cfg, overlay, conversion=conversion_of(config) if pretrained else None)


def _converted(
        variant: str,
        hub_id: str,
        overlay: Json,
        cache_dir: str | Path | None,
        sfn: SFNConfig | Json | None,
) -> Pretrained:
    """As `hf-hub:` does it: weights, neurons and preprocessing are those that the repository's config names."""
    folder = fetch(*split_revision(hub_id), cache_dir=cache_dir)
    config = read_config(folder)
    if config['architecture'] != variant:
        raise SFormerError(f'{hub_id} on the Hub holds a {config["architecture"]}, not a {variant}.')
    directed = sorted({'hf_hub_filename', 'custom_load'} & overlay.keys())
    if directed:
        raise SFormerError(f'pretrained_cfg_overlay sets {", ".join(directed)}, but the weights of an SFormer are '
                           f'its model.safetensors.')
    cfg, _, args = load_model_config_from_hf(f'{split_revision(hub_id)[0]}@{folder.name}', cache_dir)
    check_firing(hub_id, sfn, args.get('sfn', {}))
    return Pretrained(cfg, {key: value for key, value in overlay.items() if key != 'hf_hub_id'}, args,
                      conversion=conversion_of(config))


def pinned(name: str, hub_id: str, cache_dir: str | Path | None = None) -> str:
    """Download the published weights of a source, and name the commit that they are of: `org/name@commit`.

    Raises:
        SFormerError: If they are neither cached nor can be downloaded; says what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    repo_id, revision = split_revision(hub_id)
    with hub_errors(repo_id):
        try:
            path = hf_hub_download(repo_id, WEIGHTS_NAME, revision=revision, cache_dir=cache_dir, library_name='timm')
        except LocalEntryNotFoundError as e:
            raise SFormerError(
                f'the weights of {name} are not in the cache and cannot be downloaded: {redact(first_line(e))}. Where '
                f'there is a connection, `hf download {repo_id} model.safetensors` puts them into the cache of the '
                f'Hub client (HF_HOME).') from e
    return f'{repo_id}@{Path(path).parent.name}'


def _bring_neurons(hub_id: str, cache_dir: str | Path | None) -> bool:
    """Whether the weights of a source have neurons already, as on a mirror that holds converted ones."""
    from huggingface_hub import hf_hub_download
    repo_id, commit = split_revision(hub_id)
    path = hf_hub_download(repo_id, WEIGHTS_NAME, revision=commit, cache_dir=cache_dir, library_name='timm')
    try:
        with safe_open(path, framework='pt') as f:
            return any(is_neuron_key(key) for key in f.keys())  # noqa: SIM118
    except SafetensorError:
        return False  # timm will say so


def neuron_state(
        name: str,
        source: str,
        hub_id: str,
        config: SFNConfig = SFNConfig(),
        cache_dir: str | Path | None = None,
) -> tuple[State, Conversion]:
    """Neurons of a zoo entry, from the cache or fitted to its source on generated images.

    Processes that ask for the same neurons at once fit them once: the first one holds a lock, the others wait for it
    and then read what it wrote. A file under its final name is complete; one that was damaged is fitted again.

    Args:
        name: Entry of the zoo with its tag.
        source: timm model with its tag.
        hub_id: Hub repository of the source's weights, and their commit: `org/name@commit`.
        config: Neurons.
        cache_dir: Cache folder of the Hub's client, if not the default one.

    Raises:
        SFormerError: If the source cannot be loaded.
    """
    folder, key = cache_folder(cache_dir), cache_key(hub_id, config)
    path = folder / f'{name}-{key[:16]}.safetensors'
    with contextlib.suppress(FileNotFoundError, SFormerError):
        cached = _read_neurons(path, key)
        _logger.info(f'{name}: neurons of {path}')
        return cached
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix('.lock')):
        try:
            cached = _read_neurons(path, key)
            _logger.info(f'{name}: neurons of {path}, which another process has just written')
            return cached
        except FileNotFoundError:
            why = ''
        except SFormerError as e:
            why = f' again, as {e}'
        _logger.warning(
            f'{name}: fitting neurons to {source} on {RECIPE["num_images"]} generated images{why or ", this once"}')
        state, conversion = fit_to_source(source, hub_id, config, cache_dir)
        _write_neurons(path, key, state, conversion)
        return state, conversion


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Folder of cached neurons, beside the repositories that the Hub's client caches."""
    from huggingface_hub import constants
    return Path(cache_dir or constants.HF_HOME) / 'sformer'


def cache_key(hub_id: str, config: SFNConfig) -> str:
    """Hash of what the neurons of a source depend on: its commit, the recipe, the version of this package."""
    parts = dict(source=hub_id, version=metadata.version('sformer'), recipe=RECIPE, config=dataclasses.asdict(config))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write_neurons(path: Path, key: str, state: State, conversion: Conversion) -> None:
    about = dict(format='pt', key=key, sha256=state_hash(state), conversion=json.dumps(conversion.to_dict()))
    try:
        with write_aside(path.parent) as aside:
            save_file(state, aside / path.name, metadata=about)
    except (OSError, SafetensorError) as e:  # the neurons are at hand, so this is no reason to fail
        _logger.warning(f'{path} cannot be written ({e}): the next call will fit these neurons again')


def _read_neurons(path: Path, key: str) -> tuple[State, Conversion]:
    """Neurons of a file in the cache.

    Raises:
        FileNotFoundError: If there is none.
        SFormerError: If it is not as it was written.
    """
    try:
        with safe_open(path, framework='pt') as f:
            about = f.metadata() or {}
            state = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        if about.get('key') != key or about.get('sha256') != state_hash(state):
            raise ValueError('its hash is another')
        return state, Conversion.from_dict(json.loads(about['conversion']))
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, SFormerError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SFormerError(f'{path} is damaged ({first_line(e)})') from None


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Let tensors be float32 where nothing says otherwise. torch has one default for all threads, and promotion goes by
    it, so there is no other way; while somebody has changed it, others wait."""
    with alone:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def fit_to_source(
        source: str,
        hub_id: str,
        config: SFNConfig,
        cache_dir: str | Path | None,
) -> tuple[State, Conversion]:
    """Neurons that are fitted to a source on generated images, arguments as of `neuron_state`."""
    published = timm.get_pretrained_cfg(source)
    has_classes = published is not None and published.num_classes > 0
    # whatever the caller has set for models of its own: neurons are the same on all machines
    with alone, torch.random.fork_rng(devices=[]), float32_by_default(), torch.device('cpu'), \
            torch.autocast('cpu', enabled=False), torch.inference_mode(False):
        network: Any = create_source(
            source, cache_dir=cache_dir, pretrained_cfg_overlay=dict(hf_hub_id=hub_id)).network
        if not has_classes:  # one of no meaning: the neurons before it serve whoever adds their own
            network.reset_classifier(1)
        model = convert(network, config=config, inplace=True, **RECIPE)
    state = {f'{name}.{key}': value.clone()
             for name, neuron in named_neurons(model) for key, value in neuron.state_dict().items()}
    conversion: Conversion = dataclasses.replace(vars(model)['conversion'], source_weights=hub_id)
    if not has_classes:
        weights = {k: v for k, v in model.state_dict().items() if k not in state and not k.startswith('head.')}
        conversion = dataclasses.replace(conversion, source_sha256=state_hash(weights))
    return state, conversion
