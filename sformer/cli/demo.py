"""`sformer demo`."""
from pathlib import Path
from typing import Annotated

import typer

from .arguments import check_folder

__all__ = ['demo']


def demo(
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for models and pictures')] = Path(
            'sformer-demo'),
) -> None:
    """Convert and evaluate a small vision transformer on handwritten digits; needs no network, under two minutes."""
    check_folder(output)
    from ..demo import run
    run(output)
