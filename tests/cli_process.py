"""The command line in processes of their own."""
import importlib
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from conftest import NANO

NAME = 'vit_tiny_patch16_224'
KWARGS = [f'{key}={value}' for key, value in NANO.items()]
SCRIPT = Path(sysconfig.get_path('scripts'), 'sformer')  # where the package is installed
FORKS = multiprocessing.get_context('forkserver')
# importing all that takes seconds, once is enough
FORKS.set_forkserver_preload(['sformer.cli.app', 'sformer.evaluation', 'datasets', 'accelerate'])


@dataclass
class Result:
    code: int
    out: str
    err: str


def result_of(process, folder):
    out, err = (path.read_text() if path.exists() else '' for path in (folder / 'out', folder / 'err'))
    return Result(process.exitcode, out, err)


def command(args, folder, terminal=None, started=None, curve=None):
    """Be `sformer ARGS`, in a process of its own.

    Args:
        args: Command line.
        folder: Working directory, and where `out` and `err` are written.
        terminal: Name of a terminal for stderr.
        started: Path of a file that says that calibration images are being read.
        curve: Numbers of levels that the demo draws, where all of its own take too long.
    """
    from huggingface_hub import constants

    from sformer import cli
    convert = importlib.import_module('sformer.conversion.convert')  # the package has the function by this name
    constants.HF_HUB_OFFLINE = True  # nothing here is on the Hub, and its client would try for half a minute
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    os.chdir(folder)
    sys.argv = ['sformer', *args]
    for fd, path in ((1, 'out'), (2, terminal or 'err')):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY), fd)
    if started:
        calibrate = convert.calibrate_

        def announced(*args, **kwargs):
            Path(started).touch()
            return calibrate(*args, **kwargs)
        convert.calibrate_ = announced
    if curve:
        importlib.import_module('sformer.cli.demo').CURVE = curve
    cli.main()


def assert_mistake(result, pattern, code=None):
    """One line that matches, no traceback, nothing on stdout."""
    assert 'Traceback' not in result.err, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith('sformer: error: ') and re.search(pattern, lines[0]), lines[0]
    assert result.code not in (0, None) if code is None else result.code == code
    assert result.out == ''
