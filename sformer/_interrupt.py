"""Ctrl-C while the command is still being imported, which takes seconds: one line, no traceback.

The first module that the package imports.
"""
import os
import sys
from typing import Any


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
