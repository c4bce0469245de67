"""How a command ends that does not succeed: in one line, no traceback.

The first module that the package imports, so that Ctrl-C ends in a line, too, while the rest is still being imported,
which takes seconds.
"""
import os
import sys
from typing import Any, NoReturn

__all__ = ['fail']


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr."""
    print(f'sformer: error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)


def _is_command() -> bool:
    """Whether this process is `sformer ...` or `python -m sformer ...`."""
    args = sys.orig_argv
    module = args[args.index('-m') + 1] if '-m' in args[:-1] else ''
    return module == 'sformer' or os.path.basename(sys.argv[0]) in ('sformer', 'sformer.exe')


def _hook(kind: Any, error: Any, traceback: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print('sformer: error: interrupted.', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if _is_command():
    sys.excepthook = _hook
