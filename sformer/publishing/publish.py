"""Publishing: a model, its card, results and plots as one commit on the Hugging Face Hub."""
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion.repositories import hub_errors, redact
from ..errors import SFormerError, UncalibratedError
from ..files import file_hash
from ..layers import is_calibrated, uncalibrated
from ..saving.model_config import CONFIG_NAME, WEIGHTS_NAME
from .cards import render_card, render_eval_results
from .model_record import ModelRecord, load_recorded, read_record
from .plots import render_plots

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationCopy, HfApi

__all__ = ['Publication', 'prepare', 'publish', 'upload']

# folders of the repository that belong to us: what is in them on the Hub and no longer here is deleted there
OWN_FOLDERS = ('results/', 'plots/')
EVAL_RESULTS = '.eval_results/sformer.yaml'


@dataclass
class Publication:
    """What is, or would be, published.

    Args:
        repo_id: `org/name`.
        record: What the card says.
        files: Path in the repository -> file or content.
        unused: Names of files with results of other weights, which are left out.
        url: Page of the commit or the pull request; None before it is published.
        commit: Commit that holds these files.
        changed: Whether there was anything to commit.
    """
    repo_id: str
    record: ModelRecord
    files: dict[str, Path | bytes]
    unused: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None
    changed: bool = False

    @property
    def card(self) -> str:
        card = self.files['README.md']
        assert isinstance(card, bytes)
        return card.decode()

    def listing(self) -> list[str]:
        """One line per file: size in bytes, SHA-256, path in the repository."""
        lines = []
        for path, content in self.files.items():
            if isinstance(content, Path):
                size, sha256 = content.stat().st_size, file_hash(content)
            else:
                size, sha256 = len(content), hashlib.sha256(content).hexdigest()
            lines.append(f'{size:>13,}  {sha256}  {path}')
        return lines


def prepare(
        folder: str | Path,
        repo_id: str,
        *,
        force: bool = False,
        license: str | None = None,
        base_model: str | None = None,
        dataset_ids: dict[str, str] | None = None,
) -> Publication:
    """Put together what is to be published. Needs no network and changes nothing.

    Args:
        folder: Folder of an SFormer with the results files of its evaluations (`sformer evaluate --results-file`).
        repo_id: `org/name`.
        force: Publish a model that is uncalibrated or was not evaluated; its card says so.
        license: Licence of the source weights, where the conversion could not know it.
        base_model: Hub id of the source weights, where the conversion could not know it.
        dataset_ids: Hub id by the name of a data set in results, for local copies.

    Raises:
        SFormerError: If the name is not allowed, the model is damaged or was not evaluated, or its records cannot be
            true.
        UncalibratedError: If thresholds were never fitted.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    model = load_recorded(folder)
    if not is_calibrated(model) and not force:
        raise UncalibratedError(f'{uncalibrated(model)}; it is not published without --force.')
    record, others = read_record(
        folder, model, repo_id=repo_id, license=license, base_model=base_model, dataset_ids=dataset_ids)
    if not force and not record.conversion.get('weights_sha256'):
        raise SFormerError(f'{folder / CONFIG_NAME} does not record the hash of its weights, so nobody could verify '
                           f'them; save the model with sformer.save_model(), or use --force.')
    if not force and not record.evaluations:
        found = f' ({", ".join(others)}: results of other weights, or of an export)' if others else ''
        raise SFormerError(
            f'{folder} was not evaluated{found}. sformer evaluate {folder} --dataset ... --results-file '
            f'{folder / "eval.json"} does it; --force publishes without.')
    plots = render_plots(record)
    card = render_card(record, {title: f'plots/{file}' for file, (title, _) in plots.items()})
    files: dict[str, Path | bytes] = {
        WEIGHTS_NAME: folder / WEIGHTS_NAME,
        CONFIG_NAME: folder / CONFIG_NAME,
        'README.md': f'{card}\n'.encode(),
    }
    for name, result in record.evaluations.items():
        files[f'results/{name}'] = (json.dumps(result, indent=2) + '\n').encode()
    for name, (_, png) in plots.items():
        files[f'plots/{name}'] = png
    eval_results = render_eval_results(record)
    if eval_results:
        files[EVAL_RESULTS] = eval_results.encode()
    for path, content in files.items():
        if path.endswith(('.md', '.json', '.yaml')):
            text = (content.read_bytes() if isinstance(content, Path) else content).decode('utf-8', 'replace')
            if redact(text) != text:
                raise SFormerError(f'{path} would publish an access token of the Hub; remove it from the records in '
                                   f'{folder}.')
    return Publication(repo_id, record, files, others)


def publish(
        folder: str | Path,
        repo_id: str,
        *,
        private: bool = False,
        create_pr: bool = False,
        token: str | None = None,
        **options: Any,
) -> Publication:
    """Publish an SFormer with its card, results and plots on the Hugging Face Hub, in one commit.

    What is there already is not uploaded again, and where nothing changed nothing is committed; so a publication that
    was interrupted is simply repeated.

    Args:
        folder: Folder of an SFormer with the results files of its evaluations.
        repo_id: `org/name`; created if it does not exist.
        private: Create a private repository. A public one that is there is refused.
        create_pr: Propose a pull request instead of a commit to the main branch.
        token: Access token; the one that the Hub client finds if None.
        **options: Of `prepare`.

    Returns:
        What was published, with the URL of its commit or pull request.

    Raises:
        SFormerError: If the model is not fit for publication or the Hub does not take it; one line without secrets.
    """
    return upload(prepare(folder, repo_id, **options), private=private, create_pr=create_pr, token=token)


def upload(
        publication: Publication,
        *,
        private: bool = False,
        create_pr: bool = False,
        token: str | None = None,
) -> Publication:
    """Publish what was prepared; see `publish`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    if not (token or get_token()):
        raise SFormerError('publishing needs an access token of the Hub that may write: hf auth login, or HF_TOKEN.')
    repo_id = publication.repo_id
    api = HfApi(token=token, library_name='sformer', library_version=metadata.version('sformer'))
    with hub_errors(repo_id, token):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise SFormerError(f'{repo_id} is there and public; --private cannot hide it. Nothing was published.')
        if create_pr:
            proposed = _proposed(api, publication)
            if proposed:
                return dataclasses.replace(publication, url=proposed[0], commit=proposed[1])
        there = {sibling.rfilename for sibling in info.siblings or ()}
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            CommitOperationAdd(path, str(content) if isinstance(content, Path) else content)
            for path, content in publication.files.items()]
        operations += [
            CommitOperationDelete(path) for path in sorted(there - publication.files.keys())
            if path.startswith(OWN_FOLDERS) or path == EVAL_RESULTS]
        commit = api.create_commit(repo_id, operations, commit_message=_message(publication), create_pr=create_pr)
    return dataclasses.replace(
        publication, url=commit.pr_url or str(commit.commit_url), commit=commit.oid, changed=commit.oid != info.sha)


def _message(publication: Publication) -> str:
    return f'SFormer {publication.record.name}, weights {publication.record.weights_sha256[:12]}'


def _proposed(api: 'HfApi', publication: Publication) -> tuple[str, str | None] | None:
    """URL and head of an open pull request with exactly these files; None if there is none."""
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import sha
    for discussion in api.get_repo_discussions(
            publication.repo_id, discussion_type='pull_request', discussion_status='open'):
        if discussion.title != _message(publication):
            continue
        revision = f'refs/pr/{discussion.num}'
        tree = {f.path: f for f in api.list_repo_tree(publication.repo_id, recursive=True, revision=revision)
                if isinstance(f, RepoFile)}
        for path, content in publication.files.items():
            file = tree.get(path)
            data = content.read_bytes() if isinstance(content, Path) else content
            if file is None or (hashlib.sha256(data).hexdigest() != file.lfs.sha256 if file.lfs
                                else sha.git_hash(data) != file.blob_id):
                break
        else:
            return discussion.url, api.model_info(publication.repo_id, revision=revision).sha
    return None


def check_repo_id(repo_id: str) -> None:
    """Raise SFormerError if a name can't be that of a repository, before anything is done."""
    from huggingface_hub.utils import validate_repo_id
    if repo_id.count('/') != 1:
        raise SFormerError(f'{repo_id!r} is not a name that the Hub allows: it takes org/name.')
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
