"""`sformer card`."""
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import RecordOptions, unfolded

__all__ = ['card']


@unfolded
def card(
        model: Annotated[Path, typer.Argument(help='Folder of an SFormer with its results files')],
        options: RecordOptions,
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for the card')] = Path('model_cards'),
        name: Annotated[str | None, typer.Option(help='Name of the model; that of the folder if not given')] = None,
        repo: Annotated[str | None, typer.Option(help='Repository that it will be in: org/name')] = None,
        overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace a card that was edited')] = False,
) -> None:
    """Write the model card of an SFormer, with plots, to OUTPUT/NAME.md."""
    from ..publishing.cards import write_card
    from ..publishing.model_record import load_recorded, read_record
    from ..publishing.publish import check_repo_id
    if repo:
        check_repo_id(repo)
    record, unused = read_record(model, load_recorded(model), name=name, repo_id=repo, **options.keywords())
    for file in unused:
        print(f'{file} is not used: it has results of other weights', file=sys.stderr)
    print(f'card in {write_card(record, output, overwrite)}')
