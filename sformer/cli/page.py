"""`sformer page`."""
from pathlib import Path
from typing import Annotated

import typer

__all__ = ['page']


def page(
        models: Annotated[list[str], typer.Argument(
            help='Folders of SFormers, hf-hub:ID, names of some with weights, or ONNX files of `export --spikes`')],
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for the page')],
        title: Annotated[str | None, typer.Option(help='Title of the page')] = None,
        runtime: Annotated[Path | None, typer.Option(
            help='Folder dist of npm\'s onnxruntime-web; npm fetches a pinned version once if not given')] = None,
        space: Annotated[bool, typer.Option('--space', help='Add the card of a static Space of the Hub')] = False,
        license: Annotated[str | None, typer.Option(help='Licence that the card names')] = None,
        overwrite: Annotated[bool, typer.Option(
            '--overwrite', help='Replace files that are there; a page of this command is replaced anyway')] = False,
) -> None:
    """Write a page that runs SFormers in the browser: classes of an image or the camera, and where it spikes."""
    from ..publishing.page import write_page
    written = write_page(
        models, output, title=title, runtime=runtime, space=space, license=license, overwrite=overwrite)
    for model in written.models:
        print(f'{model.title}: {model.description}' + ('' if model.grid_size else ', does not say where it spikes'))
    print(f'{output}: {written.size / 2 ** 20:.1f} MiB with {written.runtime}. To look at it: python -m http.server -d '
          f'{output}')
