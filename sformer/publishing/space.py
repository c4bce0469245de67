"""A page as a static Space of the Hugging Face Hub."""
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..conversion.repositories import hub_errors, redact
from ..errors import SFormerError
from .page import MODELS, is_page
from .publish import check_repo_id

__all__ = ['PublishedSpace', 'publish_space', 'space_files']

CARD = 'README.md'


@dataclass(frozen=True, kw_only=True)
class PublishedSpace:
    """A page on the Hub.

    Args:
        url: Of its commit.
        changed: Whether there was anything to commit.
    """
    url: str
    changed: bool


def space_files(folder: str | Path, repo_id: str) -> dict[str, Path]:
    """What is to be published of the folder of a page: its files by their names. Needs no network.

    Raises:
        SFormerError: If it is no page that `write_page` wrote for a Space, the name is not allowed, or a file holds an
            access token.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    if not is_page(folder / MODELS):
        raise SFormerError(f'{folder} is no page: sformer page MODEL --space -o {folder} writes one.')
    if not (folder / CARD).is_file():
        raise SFormerError(f'{folder} has no {CARD}, the card of a Space: write the page with sformer page --space.')
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    for name, path in files.items():
        if path.suffix in ('.md', '.json', '.html'):
            text = path.read_text(encoding='utf-8', errors='replace')
            if redact(text) != text:
                raise SFormerError(f'{name} would publish an access token of the Hub; remove it.')
    return files


def publish_space(
        folder: str | Path,
        repo_id: str,
        *,
        private: bool = False,
        create_pr: bool = False,
        token: str | None = None,
) -> PublishedSpace:
    """Publish a page as a static Space, in one commit; files of it that are gone here are deleted there.

    Args:
        folder: As `write_page` wrote it, with `space=True`.
        repo_id: `org/name`; created if it does not exist.
        private: Create a private one.
        create_pr: Propose a pull request instead of a commit to the main branch.
        token: Access token; the one that the Hub client finds if None.

    Raises:
        SFormerError: As `space_files` raises, or if the Hub does not take it; one line without secrets.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    files = space_files(folder, repo_id)
    if not (token or get_token()):
        raise SFormerError('publishing needs an access token of the Hub that may write: hf auth login, or HF_TOKEN.')
    api = HfApi(token=token, library_name='sformer', library_version=metadata.version('sformer'))
    with hub_errors(repo_id, token):
        api.create_repo(repo_id, repo_type='space', space_sdk='static', private=private or None, exist_ok=True)
        info = api.space_info(repo_id)
        if info.sdk not in (None, 'static'):
            raise SFormerError(f'{repo_id} is there and is no static Space (sdk: {info.sdk}). Nothing was published.')
        there = {sibling.rfilename for sibling in info.siblings or ()}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(there - files.keys())
                       if name.startswith('model-') and name.endswith('.onnx')]
        commit = api.create_commit(
            repo_id, operations, commit_message=f'A page of SFormer {metadata.version("sformer")}', repo_type='space',
            create_pr=create_pr)
    return PublishedSpace(url=commit.pr_url or str(commit.commit_url), changed=commit.oid != info.sha)
