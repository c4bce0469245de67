"""The application that the commands make up, and how it is run."""
import io
import logging
import os
import sys
from importlib import metadata
from typing import Annotated, Any, List, Optional

import typer

from ..errors import RunInterruptedError, SFormerError
from . import (
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
    profile,
    publish,
    sweep,
)
from .arguments import expand_home, spread
from .failure import fail

__all__ = ['app', 'run_command']

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # typer brings its own click and exports no more than this

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help='Single-timestep spiking vision transformers from timm models, training-free.')
app.command()(convert.convert)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.command()(export.export)
app.command()(benchmark.benchmark)
app.command()(profile.profile)
app.command()(sweep.sweep)
app.command()(sweep.search)
app.command()(distill.distill)
app.add_typer(detect.commands, name='detect')
app.command('list')(list_models.list_models)
app.command()(demo.demo)
app.command()(publish.publish)
app.command()(card.card)


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


def run_command(argv: Optional[List[str]] = None) -> None:
    """Run a command; mistakes of the user end in one line on stderr and a non-zero exit code."""
    for name in ('huggingface_hub', 'datasets'):  # retries, failed reads; the error that ends them is ours
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that a terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors='backslashreplace')
    args = spread([expand_home(arg) for arg in (sys.argv[1:] if argv is None else argv)])
    if '' in args:
        fail('an argument is empty; is a variable of the shell unset?', 2)
    try:
        code = app(args or ['--help'], standalone_mode=False)
        sys.stdout.flush()
    except RunInterruptedError as e:
        fail(str(e), 130)
    except SFormerError as e:
        fail(str(e))
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except USAGE_ERROR as e:
        fail(f'{e.format_message().rstrip(".")}. Try --help.', 2)
    except BrokenPipeError:  # whoever reads the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        sys.exit(1)
    except OSError as e:
        fail(f'{e.filename or "file"}: {e.strerror or e}')
    if code == 130:  # typer turns Ctrl-C into this exit code
        fail('interrupted.', 130)
    sys.exit((code if isinstance(code, int) else 0) if args else 2)
