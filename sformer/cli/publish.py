"""`sformer publish`."""
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import RecordOptions, unfolded

__all__ = ['publish']


@unfolded
def publish(
        model: Annotated[Path, typer.Argument(help='Folder of an SFormer with its results files; or of a page')],
        repo: Annotated[str, typer.Argument(help='Repository on the Hub: org/name')],
        options: RecordOptions,
        private: Annotated[bool, typer.Option('--private', help='Create a private repository')] = False,
        create_pr: Annotated[bool, typer.Option('--create-pr', help='Propose a pull request')] = False,
        dry_run: Annotated[bool, typer.Option('--dry-run', help='Show files and card; needs no network')] = False,
        force: Annotated[bool, typer.Option('--force', help='Even if uncalibrated or not evaluated')] = False,
        space: Annotated[bool, typer.Option(
            '--space', help='Publish a page of `sformer page --space` as a static Space')] = False,
) -> None:
    """Publish an SFormer with its card, results and plots on the Hugging Face Hub; or a page of it."""
    if space:
        publish_page(model, repo, private, create_pr, dry_run)
        return
    from ..publishing.publish import prepare, upload
    done = prepare(model, repo, force=force, **options.keywords())
    if not dry_run:
        done = upload(done, private=private, create_pr=create_pr)
    for name in done.unused:
        print(f'{name} is not used: it has results of other weights', file=sys.stderr)
    if dry_run:
        print('\n'.join([f'{repo} would hold', *done.listing(), '', done.card]))
    else:
        print(f'{repo}: {"published" if done.changed else "nothing has changed"}, {done.url}')


def publish_page(folder: Path, repo: str, private: bool, create_pr: bool, dry_run: bool) -> None:
    """Publish a page as a Space, or list its files."""
    from ..publishing.space import publish_space, space_files
    if dry_run:
        print('\n'.join([f'the Space {repo} would hold', *(
            f'{path.stat().st_size:>13,}  {name}' for name, path in space_files(folder, repo).items())]))
        return
    done = publish_space(folder, repo, private=private, create_pr=create_pr)
    print(f'{repo}: {"published" if done.changed else "nothing has changed"}, {done.url}')
