"""How a command ends that does not succeed: in one line, no traceback.

The first module that the package imports, so that Ctrl-C ends in a line, too, while the rest is still being imported.
"""
import sys
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import NoReturn

__all__ = ['fail', 'is_command']


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr."""
    print(f'sformer: error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)


def is_command() -> bool:
    """Whether this process is `sformer ...` or `python -m sformer ...`, or is spawned by one.

    A script of somebody else's is none, whatever its name: only what lies where pip puts scripts is. A command that is
    not recognised only starts later.
    """
    argument = ''.join(sys.argv[:1])
    if argument == '-m':  # as long as Python looks for the module
        args = sys.orig_argv
        return '-m' in args and args[args.index('-m') + 1:][:1] == ['sformer']
    script = Path(argument)
    if script.name in ('sformer', 'sformer.exe'):
        schemes = sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme('user')
        folders = [Path(sysconfig.get_path('scripts', scheme)).resolve() for scheme in schemes]
        return script.resolve().parent in folders
    return script == Path(__file__).parents[1] / '__main__.py'


def _hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print('sformer: error: interrupted.', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if is_command():
    sys.excepthook = _hook
