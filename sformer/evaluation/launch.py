"""The processes of a run that torchrun started: what they tell one another, and how all of them end.

torchrun ends the others when one has died, and accelerate forms the process group and picks devices. A rank that hangs
fails the others by the timeout of a process group, in sums that all of them take part in as they get on."""
import contextlib
import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import RankError, SFormerError, first_line
from .networks import usable_device

__all__ = ['Group']

Value = TypeVar('Value')


class Group:
    """This process and the others of the run. Without a launcher: this process alone, at no cost.

    Args:
        device: Device of this process; the one that accelerate picks if None.
        timeout: Seconds without progress after which a rank counts as lost.

    Raises:
        SFormerError: If the device cannot be used, processes do not find one another or, later on, one is lost.
    """
    _count = 0

    def __init__(self, device: str | torch.device | None = None, timeout: float = 600.):
        self.timeout = timeout
        self.rank = int(os.environ.get('RANK', 0))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.is_main = self.rank == 0  # who writes and prints
        self.device = usable_device(device, self._join(device) if self.world_size > 1 else None)
        self._counts = self._totals = [0, 0, 0]
        self._work: dist.Work | None = None  # the sum that is under way
        self._seen = 0.

    def _join(self, device: str | torch.device | None) -> torch.device:
        """Meet the other ranks; returns the device that accelerate picks."""
        from accelerate import PartialState
        Group._count += 1
        restart = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        limit = datetime.timedelta(seconds=self.timeout)
        try:
            store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), timeout=limit)
            self._store = dist.PrefixStore(f'sformer/{restart}/{Group._count}', store)
            self._store.set(f'seen/{self.rank}', str(time.time()))
            cpu = str(device).startswith('cpu') if device else not torch.accelerator.is_available()
            state = PartialState(cpu=cpu, timeout=limit)  # else it takes ranks without an accelerator for single ones
            group = dist.new_group(backend='gloo', timeout=limit)  # whose timeouts raise, and do not abort
            assert isinstance(group, dist.ProcessGroup)  # a number for a rank that is not in it
            self._group = group
            return state.device
        except (RuntimeError, ValueError, KeyError) as e:
            raise (SFormerError if self._speaks() else RankError)(
                f'the {self.world_size} processes do not find one another: {first_line(e)}') from e

    def tick(self, images: int = 0, hits: int = 0, bad: int = 0) -> list[int]:
        """Say that this rank gets on, and what it has counted so far; returns what all have, as of a moment ago."""
        self._counts = [images, hits, bad]
        if self.world_size == 1:
            return self._counts
        if time.time() - self._seen > 0.1:  # a sum takes a millisecond
            self._sum_up()
        return self._totals

    def gather(self, value: Value) -> list[Value]:
        """Values of all ranks, by rank, on every rank; waits for others as long as they get on."""
        values = [value] * self.world_size
        if self.world_size > 1:
            while not self._sum_up(waits=True):
                time.sleep(0.05)
            with self._missing():
                dist.all_gather_object(values, value, self._group)
            self._counts = self._totals = [0, 0, 0]
        return values

    def _sum_up(self, waits: bool = False) -> bool:
        """Begin the next sum over all ranks if the last one is complete; returns whether in that one all waited."""
        with self._missing():
            self._seen = time.time()
            self._store.set(f'seen/{self.rank}', str(self._seen))
            if self._work is not None:
                if not self._work.is_completed():
                    return False
                self._work.wait()
                self._work = None
                waiting, *self._totals = self._sum.tolist()
                if waiting == self.world_size:
                    return True
            self._sum: torch.Tensor = torch.tensor([int(waits), *self._counts])
            self._work = dist.all_reduce(self._sum, group=self._group, async_op=True)
        return False

    @contextlib.contextmanager
    def _missing(self) -> Iterator[None]:
        """Name the ranks that others wait for in vain."""
        try:
            yield
        except RuntimeError as e:
            if 'DataLoader' in str(e):  # of torch's signal handler, which raises wherever the main thread is
                raise
            now, seen = time.time(), self._ask(self._last_seen)
            late = [str(rank) for rank, at in enumerate(seen or []) if now - float(at) > self.timeout / 2]
            who = 'the launcher' if seen is None else f'rank {" and ".join(late)}' if late else 'another rank'
            reason = first_line(e).rpartition('] ')[2].partition('. ')[0]
            raise SFormerError(f'{who} of {self.world_size} processes hangs, or was lost: {reason}') from e

    def _last_seen(self) -> list[bytes]:
        return self._store.multi_get([f'seen/{rank}' for rank in range(self.world_size)])

    def _ask(self, question: Callable[[], Value]) -> Value | None:
        """What the launcher's store answers, or None: while its host hangs no call returns, whatever its timeout."""
        answers: list[Value] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, AttributeError):  # it is gone, or was not there
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(5)
        return answers[0] if answers else None

    def _speaks(self) -> bool:
        """Whether this rank is the first to fail; if the launcher does not answer, the first of its computer."""
        return (self._ask(lambda: self._store.add('failed', 1)) or self.local_rank + 1) == 1

    @contextlib.contextmanager
    def guard(self) -> Iterator['Group']:
        """Have one rank alone say why a run ends: an error in the block becomes a `RankError` on all but the first."""
        if self.world_size == 1:
            yield self
            return
        main = threading.current_thread() is threading.main_thread()
        listens = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if listens:
            signal.signal(signal.SIGTERM, self._end)
        try:
            yield self
        except BaseException as e:
            if main:
                self._end()
            if self._speaks() or not isinstance(e, (SFormerError, OSError, KeyboardInterrupt)):
                raise
            raise RankError(str(e)) from e
        if listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.destroy_process_group(self._group)

    def _end(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Take no more signals, of which torch's for a dead loader worker raises, too; as a handler, raise."""
        for name in {'SIGTERM', 'SIGINT', 'SIGCHLD'} & {*dir(signal)}:
            signal.signal(getattr(signal, name), lambda *args: None)
        if number:
            raise SFormerError(f'rank {self.rank} of {self.world_size} was told to end (SIGTERM): another rank was '
                               f'killed, or the whole run was.')
