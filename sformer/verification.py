"""Models from elsewhere: is a file what its config says, and what may a config say?

timm builds a model from a `config.json` and the weights beside it. Both may come from the Hub, so neither is trusted:
the weights must be the safetensors file whose SHA-256 the config records, and a config that names other weights, other
code or a loader's own switches is refused. `sformer.models` checks whatever timm loads from a folder or from the Hub.
"""
import contextlib
import errno
import inspect
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Set, Tuple, Union
from urllib.parse import urlsplit

import timm
from timm.models import build_model_with_cfg

from .errors import SFormerError
from .utils import check_preprocessing, file_hash

__all__ = ['WEIGHTS_NAME', 'CONFIG_NAME', 'check_pretrained', 'read_config', 'fetch', 'hub_errors', 'redact']

WEIGHTS_NAME = 'model.safetensors'
CONFIG_NAME = 'config.json'

# where timm finds weights, and how it reads them: a config does not choose, its weights lie beside it
LOCATIONS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'custom_load', 'source')


def factory_arguments() -> Set[str]:
    """Arguments that mean something to timm's factory instead of the network."""
    names = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    return names - {'kwargs'} | {'pruned', 'features_only', 'feature_cls'}


# Configs and weights --------------------------------------------------------------------------------------------------


def check_pretrained(
        pretrained_cfg: Any,
        pretrained: bool = True,
        cache_dir: Union[str, Path, None] = None,
) -> Tuple[Any, Optional[Dict[str, Any]]]:
    """Check the folder or the repository that timm is about to load a model from.

    Args:
        pretrained_cfg: What timm passes to an entrypoint; only a dict that timm read from a config is looked into.
        pretrained: Check the weights, too.
        cache_dir: Cache that timm was told to use.

    Returns:
        The pretrained_cfg; of a repository, pinned to the commit that was checked. The record of the conversion, where
        a config was looked into.

    Raises:
        SFormerError: If the config is not acceptable or the weights are not those that it records; names the file.
    """
    source = pretrained_cfg.get('source') if isinstance(pretrained_cfg, dict) else None
    if source not in ('local-dir', 'hf-hub'):
        return pretrained_cfg, None
    if source == 'local-dir':
        folder = Path(pretrained_cfg['file'])
        config = read_config(folder)
        if pretrained:
            check_weights_file(folder, config)
    else:
        repo_id, revision = split_revision(pretrained_cfg['hf_hub_id'])
        folder = fetch(repo_id, revision, cache_dir, weights=pretrained, config_is_cached=True)
        pretrained_cfg = dict(pretrained_cfg, hf_hub_id=f'{repo_id}@{folder.name}')
        config = read_config(folder)
    return pretrained_cfg, config.get('sformer')


def read_config(folder: Path) -> Dict[str, Any]:
    """Read and check the `config.json` of an SFormer.

    Raises:
        SFormerError: If there is none, it is none of timm's, of no SFormer, or tries to direct the loader.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise SFormerError(f'{folder} holds no SFormer: there is no {CONFIG_NAME}.')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        architecture = config['architecture']
        for key in ('model_args', 'pretrained_cfg', 'sformer'):
            if not isinstance(config.get(key, {}), dict):
                raise TypeError(f'{key} is {config[key]!r}')
        for key in ('recipe', 'calibration', 'versions'):
            if not isinstance(config.get('sformer', {}).get(key, {}), dict):
                raise TypeError(f'sformer.{key} is {config["sformer"][key]!r}')
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise SFormerError(f'{path} is not a timm config: {str(e).splitlines()[0].rstrip(".")}.') from e
    if not isinstance(architecture, str) or not architecture.startswith('sformer') or not timm.is_model(architecture):
        raise SFormerError(f'{path}: architecture {architecture!r} is not an SFormer of this version.')
    cfg, args = config.get('pretrained_cfg', config), config.get('model_args', {})
    directed = [key for key in LOCATIONS if cfg.get(key)]
    if directed:
        raise SFormerError(f'{path}: pretrained_cfg sets {", ".join(directed)}, but weights are the {WEIGHTS_NAME} '
                           f'beside it. Not loaded.')
    directed = sorted(factory_arguments() & args.keys())
    if directed:
        raise SFormerError(f'{path}: model_args sets {", ".join(directed)}, which is no argument of a network. '
                           f'Not loaded.')
    source = args.get('source')
    if source is not None and not (isinstance(source, str) and source.isidentifier() and timm.is_model(source)):
        raise SFormerError(f'{path}: source {source!r} is not the name of a timm architecture.')
    try:
        check_preprocessing(cfg)
    except SFormerError as e:
        raise SFormerError(f'{path}: {e}') from None
    for key, value in args.items():  # a network of that size would only be noticed when memory is gone
        if isinstance(value, int) and value > (1000 if key == 'depth' else 10 ** 6):
            raise SFormerError(f'{path}: model_args sets {key} to {value}, which no vision transformer has.')
    # timm's own defaults where a config is silent
    default = cfg.get('num_classes', config.get('num_classes', 1000))
    classes = {str(values.get('num_classes', default)) for values in (config, cfg, args)}
    if len(classes) > 1:  # timm would take this for a wish and start with a random head
        raise SFormerError(f'{path} contradicts itself about num_classes: {", ".join(sorted(classes))}.')
    return config


def check_weights_file(folder: Path, config: Dict[str, Any]) -> None:
    """Raise SFormerError unless a folder holds safetensors weights, and those that its config records."""
    from .conversion import read_safetensors
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise SFormerError(f'{folder} holds no SFormer: there is no {WEIGHTS_NAME}.')
    expected = config.get('sformer', {}).get('weights_sha256')
    if expected is not None and file_hash(path) == expected:
        return
    read_safetensors(path)  # a damaged file says so itself
    if expected is not None:
        raise SFormerError(f'{path} is not the file that {CONFIG_NAME} belongs to (SHA-256 differs).')


# The Hub --------------------------------------------------------------------------------------------------------------


def split_revision(name: str) -> Tuple[str, Optional[str]]:
    """`org/name@revision` -> `('org/name', 'revision')`."""
    repo_id, at, revision = name.partition('@')
    if not repo_id or (at and not revision) or '@' in revision:
        raise SFormerError(f'{name!r} does not name a repository; org/name or org/name@revision does.')
    return repo_id, revision or None


def fetch(
        repo_id: str,
        revision: Optional[str] = None,
        cache_dir: Union[str, Path, None] = None,
        weights: bool = True,
        config_is_cached: bool = False,
) -> Path:
    """Download and check an SFormer: its config, and the weights of the same commit.

    Args:
        repo_id: `org/name`.
        revision: Branch, tag or commit; the main branch if None.
        cache_dir: Cache to use; the Hub client's own if None.
        weights: Fetch the weights, too.
        config_is_cached: The config was downloaded a moment ago.

    Returns:
        Folder of the files; its name is the commit.

    Raises:
        SFormerError: If there is no such model, it can't be had, or it is not what it says; names the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RemoteEntryNotFoundError
    where = f'{repo_id}@{revision}' if revision else repo_id

    def get(name: str, revision: Optional[str], **kwargs: Any) -> Path:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', 'Not enough free disk space')  # the error that follows says so
                return Path(hf_hub_download(
                    repo_id, name, revision=revision, cache_dir=cache_dir, library_name='timm',
                    library_version=timm.__version__, **kwargs))
        except RemoteEntryNotFoundError:
            reason = ' Pickled weights are not loaded.' if name == WEIGHTS_NAME else ''
            raise SFormerError(f'{where} on the Hub holds no SFormer: there is no {name}.{reason}') from None

    with hub_errors(where):
        path = None
        if config_is_cached:
            with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
                path = get(CONFIG_NAME, revision, local_files_only=True)
        folder = (path or get(CONFIG_NAME, revision)).parent
        config = read_config(folder)
        if weights:
            get(WEIGHTS_NAME, folder.name)
            try:
                check_weights_file(folder, config)
            except SFormerError:
                with contextlib.suppress(ValueError):  # offline: nothing better can be had
                    get(WEIGHTS_NAME, folder.name, force_download=True)  # a damaged cache, or a damaged transfer
                try:
                    check_weights_file(folder, config)
                except SFormerError as e:
                    raise SFormerError(f'{where} on the Hub, downloaded twice: {e}') from None
    return folder


def redact(text: str, token: Optional[str] = None) -> str:
    """Text without access tokens."""
    from huggingface_hub import get_token
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, '***')
    return re.sub(r'\bhf_[A-Za-z0-9]{8,}', '***', text)


@contextlib.contextmanager
def hub_errors(where: str, token: Optional[str] = None) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into one clear line without secrets.

    Args:
        where: Repository, with or without a revision.
        token: Access token in use, if it is not the one that the Hub client finds.

    Raises:
        SFormerError: For every error of the Hub, of the connection or of the disk.
    """
    from huggingface_hub import errors
    http_error: Any = errors.HfHubHTTPError.__mro__[1]  # httpx's own, whichever httpx the client uses
    xet_error: Any = getattr(errors, 'XetDownloadError', OSError)
    try:
        with _progress_on_terminals():
            yield
    except (http_error, OSError, ValueError, RuntimeError, errors.EntryNotFoundError, xet_error) as e:
        raise SFormerError(redact(' '.join(_explain(e, where, http_error).split()), token)) from None


@contextlib.contextmanager
def _progress_on_terminals() -> Iterator[None]:
    """The client draws progress bars into files, too; this package does not."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _explain(e: BaseException, where: str, http_error: Any) -> str:
    from huggingface_hub import constants, errors
    chain = [e]  # the client wraps what happened, once or twice
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)

    def find(kind: Any) -> Any:
        return next((cause for cause in chain if isinstance(cause, kind)), None)

    login = 'hf auth login, or HF_TOKEN'
    if find(errors.HFValidationError):
        return f'{where!r} is not a name that the Hub allows: {find(errors.HFValidationError)}'
    if find(errors.GatedRepoError):
        return f'{where} is gated: ask for access on its page, and be logged in ({login}).'
    if find(errors.RevisionNotFoundError):
        return f'{where}: there is no such revision on the Hub.'
    if find(errors.HfHubHTTPError):
        cause = find(errors.HfHubHTTPError)
        status, said = cause.response.status_code, cause.server_message or cause.response.reason_phrase
        if status == 401 and 'credentials' in str(said):
            return f'{where}: the Hub does not accept the access token ({login}).'
        if status in (401, 404):
            return (f'{where}: there is no such repository on the Hub, or it is private and no access token that may '
                    f'read it is at hand ({login}).')
        if status == 403:
            return f'{where}: the access token does not permit this ({said}).'
        if status >= 500 or status == 429:
            return f'{where}: the Hub is not able to answer just now ({status} {said}). Try again later.'
        return f'{where}: the Hub refuses ({status} {said}).'
    if find(errors.OfflineModeIsEnabled):
        return f'{where} is not in the local cache, and the Hub client is in offline mode (HF_HUB_OFFLINE).'
    if find(http_error):
        host, cause = urlsplit(constants.ENDPOINT).hostname, find(http_error)
        return f'{where}: the connection to {host} failed ({str(cause) or type(cause).__name__}). Try again.'
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno is not None:
            what = 'the disk is full' if cause.errno == errno.ENOSPC else cause.strerror
            return f'{where}: {what}{f" ({cause.filename})" if cause.filename else ""}.'
    return f'{where}: {str(e) or type(e).__name__}'
