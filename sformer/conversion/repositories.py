"""Repositories on the Hugging Face Hub: single files of them, and in one line what went wrong."""
import contextlib
import errno
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from ..errors import SFormerError

__all__ = ['download', 'hub_errors', 'redact', 'split_revision']

E = TypeVar('E', bound=BaseException)

LOGIN = 'hf auth login, or HF_TOKEN'


def split_revision(name: str) -> tuple[str, str | None]:
    """`org/name@revision` -> `('org/name', 'revision')`."""
    repo_id, at, revision = name.partition('@')
    if not repo_id or (at and not revision) or '@' in revision:
        raise SFormerError(f'{name!r} does not name a repository; org/name or org/name@revision does.')
    return repo_id, revision or None


def download(
        repo_id: str,
        name: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        optional: bool = True,
) -> Path | None:
    """A file of a repository, in the cache of the Hub's client; None if the repository has none of this name.

    Args:
        repo_id: `org/name`.
        name: Name of the file.
        revision: Branch, tag or commit; the main branch if None.
        cache_dir: Cache to use; the Hub client's own if None.
        optional: Where the Hub cannot be reached, too, take it that there is none.

    Raises:
        SFormerError: If it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
    with hub_errors(f'{repo_id}@{revision}' if revision else repo_id):
        try:
            # The error that follows says so. For good, as threads that download at once share their filters.
            warnings.filterwarnings('ignore', 'Not enough free disk space')
            return Path(hf_hub_download(
                repo_id, name, revision=revision, cache_dir=cache_dir, library_name='sformer'))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:
            if optional:
                return None
            raise


def redact(text: str, token: str | None = None) -> str:
    """Text without access tokens."""
    from huggingface_hub import get_token
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, '***')
    return re.sub(r'\bhf_[A-Za-z0-9]{8,}', '***', text)


@contextlib.contextmanager
def hub_errors(where: str, token: str | None = None) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into one clear line without secrets.

    Args:
        where: Repository, with or without a revision.
        token: Access token in use, if it is not the one that the Hub client finds.

    Raises:
        SFormerError: For every error of the Hub, of the connection or of the disk.
    """
    from huggingface_hub import errors
    http_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # httpx's own, whichever httpx the client uses
    xet_error: type[Exception] = getattr(errors, 'XetDownloadError', OSError)
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


def _refusal(status: int, said: str) -> str:
    """What it means that the Hub refuses, by the status of its answer and what it says there."""
    if status == 401 and 'credentials' in said:
        return f'the Hub does not accept the access token ({LOGIN})'
    if status in (401, 404):
        return (f'there is no such repository on the Hub, or it is private and no access token that may read it is at '
                f'hand ({LOGIN})')
    if status == 403:
        return f'the access token does not permit this ({said})'
    if status >= 500 or status == 429:
        return f'the Hub is not able to answer just now ({status} {said}). Try again later'
    return f'the Hub refuses ({status} {said})'


def _explain(e: BaseException, where: str, http_error: type[Exception]) -> str:
    from huggingface_hub import constants, errors
    chain = [e]  # the client wraps what happened, once or twice
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)

    def find(kind: type[E]) -> E | None:
        return next((cause for cause in chain if isinstance(cause, kind)), None)

    if find(errors.HFValidationError):
        return f'{where!r} is not a name that the Hub allows: {find(errors.HFValidationError)}'
    if find(errors.GatedRepoError):
        return f'{where} is gated: ask for access on its page, and be logged in ({LOGIN}).'
    if find(errors.RevisionNotFoundError):
        return f'{where}: there is no such revision on the Hub.'
    refused = find(errors.HfHubHTTPError)
    if refused:
        said = str(refused.server_message or refused.response.reason_phrase)
        return f'{where}: {_refusal(refused.response.status_code, said)}.'
    if find(errors.OfflineModeIsEnabled):
        return f'{where} is not in the local cache, and the Hub client is in offline mode (HF_HUB_OFFLINE).'
    lost = find(http_error)
    if lost:
        host = urlsplit(constants.ENDPOINT).hostname
        return f'{where}: the connection to {host} failed ({str(lost) or type(lost).__name__}). Try again.'
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno is not None:
            what = 'the disk is full' if cause.errno == errno.ENOSPC else cause.strerror
            return f'{where}: {what}{f" ({cause.filename})" if cause.filename else ""}.'
    return f'{where}: {str(e) or type(e).__name__}'
