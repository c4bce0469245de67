"""The Hugging Face Hub: fetching a checked SFormer from it."""
import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

import timm

from ..conversion.repositories import hub_errors, split_revision
from ..errors import SFormerError
from ..files import Json
from .model_config import CONFIG_NAME, WEIGHTS_NAME, check_weights_file, read_config

__all__ = ['fetch', 'locate']


def locate(
        name: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        weights: bool = True,
        read: Callable[[Path], Json] = read_config,
) -> Path:
    """Folder of a model, which is fetched if it is on the Hub.

    Args:
        name: A folder, `local-dir:FOLDER`, `hf-hub:org/name` or `hf-hub:org/name@revision`.
        revision: Branch, tag or commit of a model on the Hub.
        cache_dir: Cache to use; the Hub client's own if None.
        weights: As of `fetch`, like `read`.
        read: Reads and checks the config in a folder.

    Raises:
        SFormerError: If a revision is named twice, or of a folder; or as `fetch` raises.
    """
    if name.startswith('hf-hub:'):
        repo_id, tag = split_revision(name.removeprefix('hf-hub:'))
        if tag and revision and tag != revision:
            raise SFormerError(f'{name} names one revision and revision={revision!r} another.')
        return fetch(repo_id, tag or revision, cache_dir, weights, read=read)
    if revision:
        raise SFormerError(f'{name} is a folder; only a model on the Hub has revisions.')
    return Path(name.removeprefix('local-dir:'))


def fetch(
        repo_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        weights: bool = True,
        config_is_cached: bool = False,
        read: Callable[[Path], Json] = read_config,
) -> Path:
    """Download and check an SFormer: its config, and the weights of the same commit.

    Args:
        repo_id: `org/name`.
        revision: Branch, tag or commit; the main branch if None.
        cache_dir: Cache to use; the Hub client's own if None.
        weights: Fetch the weights, too.
        config_is_cached: The config was downloaded a moment ago.
        read: Reads and checks the config in a folder.

    Returns:
        Folder of the files; its name is the commit.

    Raises:
        SFormerError: If there is no such model, it can't be had, or it is not what it says; names the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RemoteEntryNotFoundError
    where = f'{repo_id}@{revision}' if revision else repo_id

    def get(name: str, revision: str | None, cached: bool = False, again: bool = False) -> Path:
        try:
            # The error that follows says so. For good, as threads that download at once share their filters.
            warnings.filterwarnings('ignore', 'Not enough free disk space')
            return Path(hf_hub_download(
                repo_id, name, revision=revision, cache_dir=cache_dir, library_name='timm',
                library_version=timm.__version__, local_files_only=cached, force_download=again))
        except RemoteEntryNotFoundError:
            reason = ' Pickled weights are not loaded.' if name == WEIGHTS_NAME else ''
            raise SFormerError(f'{where} on the Hub holds no SFormer: there is no {name}.{reason}') from None

    with hub_errors(where):
        path = None
        if config_is_cached:
            with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
                path = get(CONFIG_NAME, revision, cached=True)
        folder = (path or get(CONFIG_NAME, revision)).parent
        config = read(folder)
        if weights:
            get(WEIGHTS_NAME, folder.name)
            try:
                check_weights_file(folder, config)
            except SFormerError:
                with contextlib.suppress(ValueError):  # offline: nothing better can be had
                    get(WEIGHTS_NAME, folder.name, again=True)  # a damaged cache, or a damaged transfer
                try:
                    check_weights_file(folder, config)
                except SFormerError as e:
                    raise SFormerError(f'{where} on the Hub, downloaded twice: {e}') from None
    return folder
