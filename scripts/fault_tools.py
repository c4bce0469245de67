"""What a case of `check_faults.py` is, and what may happen to its process."""
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

KILLED = 'killed'


class Case(NamedTuple):
    """A command, what happens to it, and how it has to end.

    Args:
        name: What is done.
        args: Command line of Python; {name} stands for what `run` makes.
        expected: Regular expression of the one line that has `sformer: error` in it; empty if it has to succeed, KILLED
            if it was killed, of which nobody tells.
        seconds: How long it may take from what happens to it until it says so.
        happens: Called with the running process and its folder once the run is under way; returns what is lost with
            it, and so need not end.
        mount: Size and place of a small file system, in which a file lies.
        fill: Bytes of that file.
        rest: How long it may take after `seconds` until all processes have ended.
        then: Called with the command line, the environment and what cases share once it has ended; returns what is not
            as it is without faults: it may go on where the command was ended, and compare.
    """
    name: str
    args: list[str]
    expected: str
    seconds: float
    happens: Callable[[psutil.Process, Path], list[psutil.Process] | None] | None = None
    mount: tuple[str, str] | None = None
    fill: int = 0
    rest: float = 5
    then: Callable[[list[str], dict[str, str], dict[str, Any]], str] | None = None


def children(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def interrupt_after(seconds: float) -> Callable[[psutil.Process, Path], None]:
    def happen(process: psutil.Process, folder: Path) -> None:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
    return happen


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError('it never came about')
        time.sleep(0.05)
