"""The application that the commands make up, and how it is run."""
import io
import logging
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer

from ..errors import RunInterruptedError, SFormerError
from . import (
    baselines,
    benchmark,
    card,
    compare,
    convert,
    demo,
    detect,
    distill,
    evaluate,
    export,
    list_models,
    page,
    predict,
    profile,
    publish,
    sweep,
)
from .arguments import expand_home, spread
from .failure import fail
from .panels import fill_panels

__all__ = ['app', 'run_command']

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # typer brings its own click and exports no more than this

# panel -> commands, each with an example: in the order of the work
COMMANDS: dict[str, tuple[tuple[Callable[..., None], str], ...]] = {
    'First steps': (
        (demo.demo, 'sformer demo'),
        (list_models.list_models, 'sformer list --format csv')),
    'Convert and measure': (
        (convert.convert, 'sformer convert my-vit/ -o out/ --calibration my-images/'),
        (predict.predict, 'sformer predict out/ photo.jpg -o seen.png'),
        (evaluate.evaluate, 'sformer evaluate out/ --dataset my-images/ --split val'),
        (compare.compare, 'sformer compare out-n4/ out-n32/ --dataset my-images/ --split val'),
        (profile.profile, 'sformer profile out/ --dataset my-images/ -o report/'),
        (baselines.baselines, 'sformer baselines out/ --dataset my-images/ --split val --timesteps 1 2 4 8')),
    'Fewer spikes': (
        (sweep.sweep, 'sformer sweep out/ --dataset my-images/ --levels 4 8 16 32'),
        (sweep.search, 'sformer search out/ --dataset my-images/ --budget 40'),
        (distill.distill, 'sformer distill out/ --dataset my-images/ --split train -o trained/')),
    'In integers': (
        (export.export, 'sformer export out/ out/model.onnx'),
        (benchmark.benchmark, 'sformer benchmark out/ --execution openvino --batch-size 1 8')),
    'Publish': (
        (card.card, 'sformer card out/ --license apache-2.0'),
        (page.page, 'sformer page out-n4/ out-n63/ -o page/'),
        (publish.publish, 'sformer publish out/ my-org/sformer_base.mine --dry-run')),
}

app = typer.Typer(
    pretty_exceptions_enable=False, rich_markup_mode='markdown', epilog='Example: `sformer convert --help`',
    help='Single-timestep spiking vision transformers from timm models, training-free.')
for panel, commands in COMMANDS.items():
    for command, example in commands:
        name = 'list' if command is list_models.list_models else command.__name__
        app.command(name, rich_help_panel=panel, epilog=f'Example: `{example}`')(command)
app.add_typer(detect.commands, name='detect', rich_help_panel='Detectors')
fill_panels(app)


def show_versions(wanted: bool) -> None:
    if wanted:
        print(', '.join(f'{name} {metadata.version(name)}' for name in ('sformer', 'torch', 'timm')))
        raise typer.Exit


@app.callback()
def options(
        version: Annotated[bool, typer.Option(
            '--version', callback=show_versions, is_eager=True, help='Show versions and exit.')] = False,
) -> None:
    pass


def run_command(argv: list[str] | None = None) -> None:
    """Run a command; mistakes of the user end in one line on stderr and a non-zero exit code."""
    for name in ('huggingface_hub', 'datasets'):  # retries, failed reads; the error that ends them is ours
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that a terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors='backslashreplace')
    args = spread([expand_home(arg) for arg in (sys.argv[1:] if argv is None else argv)])
    if '' in args:
        fail('an argument is empty; is a variable of the shell unset?', 2)
    try:
        code = app(args or ['--help'], prog_name='sformer', standalone_mode=False)
        sys.stdout.flush()
    except RunInterruptedError as e:
        fail(str(e), 130)
    except SFormerError as e:
        fail(str(e))
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except USAGE_ERROR as e:
        message = e.format_message().rstrip('.')
        fail(f'{message}{"" if message.endswith("?") else "."} Try --help.', 2)
    except BrokenPipeError:  # whoever reads the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        sys.exit(1)
    except OSError as e:
        fail(f'{e.filename or "file"}: {e.strerror or e}')
    if code == 130:  # typer turns Ctrl-C into this exit code
        fail('interrupted.', 130)
    sys.exit((code if isinstance(code, int) else 0) if args else 2)
