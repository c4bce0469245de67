"""The processes of a run that torchrun (or mpirun, or accelerate) started: who they are and whether they all live.

accelerate forms the process group and picks devices. What it does not do is added here: the number of processes is
checked against what was asked for, an error of one rank ends all of them, and so does a rank that is lost, within a
timeout. Ranks tell one another through a key-value store beside the process group, so nobody hangs in a collective
that somebody else never reaches.
"""
import contextlib
import datetime
import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List, Optional, Union

import torch
import torch.distributed as dist

from ..errors import SFormerError

__all__ = ['Group', 'RankError', 'asked_world_size']

_SIZES = ('WORLD_SIZE', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE')  # as accelerate reads them
_GRACE = 5.  # seconds that a rank has to leave by itself after another one failed


@contextlib.contextmanager
def _no_more_errors() -> Iterator[None]:
    """Keep torch's signal handler, which raises when a loader worker has died, from getting between."""
    try:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except (ValueError, AttributeError):  # not the main thread; not on Windows
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)  # None: it was not installed by Python


class RankError(SFormerError):
    """Another rank failed, and the error has been printed by somebody else."""


def asked_world_size() -> int:
    """Number of processes according to the launcher's environment, 1 without a launcher.

    Raises:
        SFormerError: If `accelerate launch --cpu --num_processes N` started one process for N.
    """
    size = next((int(os.environ[key]) for key in _SIZES if os.environ.get(key, '').isdigit()), None)
    if size is None and 'ACCELERATE_MIXED_PRECISION' in os.environ and 'MASTER_PORT' in os.environ:
        # accelerate's launcher for one process sets the rendezvous for several, and then starts one
        raise SFormerError(
            'accelerate launch was asked for several processes and started only this one, as it does on CPUs: use '
            'torchrun --nproc-per-node N -m sformer ... instead.')
    tasks = os.environ.get('SLURM_NTASKS', '')
    # a script of sbatch has the variable, too, so it may be that nothing is wrong
    if size is None and tasks.isdigit() and int(tasks) > 1 and os.environ.get('SLURM_PROCID', '0') == '0':
        _warn(f'SLURM_NTASKS is {tasks}, but nothing says that processes belong together (RANK, WORLD_SIZE): if srun '
              f'started this one {tasks} times, all do the same work. Have srun start torchrun, once per node.')
    return size or 1


@functools.cache
def _warn(message: str) -> None:
    """Print a warning, once per process."""
    print(f'sformer: warning: {message}', file=sys.stderr)


class Group:
    """This process and the others of the run. Without a launcher: this process alone, at no cost.

    Args:
        device: Device of this process; the one that accelerate picks if None.
        num_processes: How many processes there have to be; not checked if None.
        timeout: Seconds without a sign of life after which a rank counts as lost.

    Raises:
        SFormerError: If there are more or fewer processes than asked for, or they do not find one another.
    """
    _count = 0

    def __init__(
            self,
            device: Union[str, torch.device, None] = None,
            num_processes: Optional[int] = None,
            timeout: float = 600.,
    ):
        self.timeout = timeout
        self.rank, self.local_rank, self.world_size = 0, 0, 1
        self.error: Optional[str] = None
        self._store: Any = None
        self._mine = False  # whether this rank is the one that prints the error
        self._counters: dict = {}
        self._runs = 0
        size = asked_world_size()
        if num_processes is not None and size != num_processes:
            # the same on all ranks, which are not connected yet
            raise (SFormerError if os.environ.get('RANK', '0') == '0' else RankError)(
                f'{num_processes} processes were asked for, but {size} {"is" if size == 1 else "are"} running: '
                f'start them with torchrun --nproc-per-node {num_processes} -m sformer ...')
        if size > 1:
            self._join(device, size)
        self.device = self._device(device)

    def _device(self, device: Union[str, torch.device, None]) -> torch.device:
        try:
            if device is None:
                if self.world_size > 1:
                    from accelerate import PartialState
                    return PartialState().device
                return torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')
            found = torch.device(device)
            if found.type == 'cuda' and found.index is None and self.world_size > 1:
                found = torch.device('cuda', self.local_rank)
            torch.empty(0, device=found)
            return found
        except (RuntimeError, AssertionError) as e:
            raise SFormerError(f'device {str(device)!r} cannot be used: {str(e).splitlines()[0]}') from e

    def _join(self, device: Union[str, torch.device, None], size: int) -> None:
        from accelerate import PartialState
        os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
        os.environ.setdefault('LOCAL_RANK', '0')
        # without `cpu`, accelerate would take processes without an accelerator for single ones
        cpu = torch.device(device).type == 'cpu' if device is not None else not torch.accelerator.is_available()
        try:
            state = PartialState(cpu=cpu, timeout=datetime.timedelta(seconds=self.timeout))
            self.rank, self.local_rank = state.process_index, state.local_process_index
            self.world_size = state.num_processes
            if self.world_size == size:
                Group._count += 1
                # a connection of our own: the process group's may be blocked
                store = dist.TCPStore(
                    os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                    timeout=datetime.timedelta(seconds=self.timeout))
                restart = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
                self._store = dist.PrefixStore(f'sformer/{restart}/{Group._count}', store)
        except (RuntimeError, ValueError, KeyError, OSError) as e:
            raise SFormerError(f'the {size} processes do not find one another: {str(e).splitlines()[0]}') from e
        if self.world_size != size:
            raise SFormerError(f'the launcher speaks of {size} processes, but the group has {self.world_size}.')
        self._ticks = 0
        self._working = False
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._heard = time.monotonic()  # when the store answered last
        self._call('set', f'pid/{self.rank}', str(os.getpid()))
        for target in (self._watch, self._watch_store):
            threading.Thread(target=target, name='sformer-watch', daemon=True).start()

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    # signs of life -----------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Say that this rank makes progress; from the first call to `rest` it has to every `timeout` seconds.

        Raises:
            RankError: If another rank failed or was lost.
        """
        if self._store is not None:
            self._ticks += 1
            self._working = True
            self._check()

    def rest(self) -> None:
        """Say that this rank has nothing to do: being alive is enough now."""
        if self._store is not None:
            self._working = False

    def _check(self) -> None:
        if self.error is not None:
            raise (SFormerError if self._mine else RankError)(self.error)

    def _call(self, method: str, *args: Any) -> Any:
        """Call the store; its methods are not to be called by two threads at once."""
        with self._lock:
            return getattr(self._store, method)(*args)

    def _watch(self) -> None:
        interval = min(1., self.timeout / 8)
        # everybody watches rank 0, and rank 0 everybody
        others = range(1, self.world_size) if self.rank == 0 else [0]
        seen = {rank: (b'', time.monotonic()) for rank in others}
        beats = 0
        while not self._stop.wait(interval):
            beats += 1
            self._heard = time.monotonic()
            try:
                self._call('set', f'beat/{self.rank}', f't{self._ticks}' if self._working else f'b{beats}')
                if self._call('check', ['error']):
                    self._end(self._call('get', 'error').decode())
                    return
                now = time.monotonic()
                for rank in others:
                    key = f'beat/{rank}'
                    beat = self._call('get', key) if self._call('check', [key]) else b''
                    if beat != seen[rank][0]:
                        seen[rank] = beat, now
                    elif now - seen[rank][1] > self.timeout and not self._call('check', [f'left/{rank}']):
                        self._end(
                            f'rank {rank} of {self.world_size} gave no sign of life for {self.timeout:g} s', True, rank)
                        return
            except RuntimeError as e:  # the store is gone, and with it the rank or the agent that served it
                self._end(f'rank {self.rank} lost the connection to the others: {str(e).splitlines()[0]}', True)
                return

    def _watch_store(self) -> None:
        """End this rank where a call to the store does not return: its host hangs or is cut off, and nobody can be
        told, nor can the main thread, which may be in such a call itself."""
        interval = min(1., self.timeout / 8)
        heard, quiet = self._heard, 0.
        while not self._stop.wait(interval):
            # counted by wake-ups: a process that was stopped and goes on wakes once, after any time
            heard, quiet = self._heard, quiet + interval if heard == self._heard else 0.
            if quiet > self.timeout + _GRACE:
                print(f'sformer: error: rank {self.rank} lost the connection to the others: no answer for '
                      f'{self.timeout:g} s', file=sys.stderr, flush=True)
                os._exit(1)

    def _end(self, message: str, tell: bool = False, lost: Optional[int] = None) -> None:
        """End this rank: by an error in the main thread or, where that is blocked, at once."""
        self._mine = tell and self._announce(message)
        self.error = message
        if lost is not None:
            self._kill(lost)
        if self._stop.wait(_GRACE):
            return
        if self._mine:
            print(f'sformer: error: {message}', file=sys.stderr, flush=True)
        os._exit(1)

    def _kill(self, rank: int) -> None:
        """Kill a lost rank if it is of the launcher that started this one, which else waits half a minute for it."""
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            if self._call('check', [f'pid/{rank}']):
                pid = int(self._call('get', f'pid/{rank}'))
                stat = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8', errors='replace')
                if int(stat.rpartition(')')[2].split()[1]) == os.getppid():
                    os.kill(pid, signal.SIGKILL)

    def _announce(self, message: str) -> bool:
        """Tell all ranks of an error; returns whether this rank is the first to tell, and so the one that prints."""
        try:
            first = self._call('add', 'told', 1) == 1
            if first:
                self._call('set', 'error', message)
            return first
        except RuntimeError:
            return True  # nobody can be told, so everybody prints

    @contextlib.contextmanager
    def guard(self) -> Iterator['Group']:
        """Tell the other ranks of an error inside of the block; on all but one rank it becomes a `RankError`."""
        if self._store is None:
            yield self
            return
        try:
            with self._told_by_launcher():
                yield self
            self._leave(self.timeout)
        except RankError:
            self._leave(_GRACE)
            raise
        except BaseException as e:
            with _no_more_errors():
                first = self._mine or self._announce(
                    str(e) if isinstance(e, SFormerError) else f'{type(e).__name__}: {e}')
                self._leave(_GRACE)
            if isinstance(e, (SFormerError, OSError)) and not first:
                raise RankError(str(e)) from e
            raise

    @contextlib.contextmanager
    def _told_by_launcher(self) -> Iterator[None]:
        """Let SIGTERM, by which launchers end the other ranks when one was killed, be an error like others."""
        def end(*args: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this rank ends now, and has something to say
            self._check()
            raise SFormerError(f'rank {self.rank} of {self.world_size} was told to end (SIGTERM): another rank was '
                               f'killed, or the whole run was.')

        if threading.current_thread() is not threading.main_thread() or \
                signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, end)
        try:
            yield
        except BaseException:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as this is being said
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _leave(self, patience: float) -> None:
        """Leave the run. Rank 0 may serve the store, so it leaves last, but does not wait for ever."""
        self.rest()
        with contextlib.suppress(RuntimeError):
            self._call('set', f'left/{self.rank}', '1')
            deadline = time.monotonic() + (patience if self.rank == 0 else 0)
            keys = [f'left/{rank}' for rank in range(self.world_size)]
            while time.monotonic() < deadline and not self._call('check', keys):
                time.sleep(0.02)
        self._stop.set()

    # what ranks share --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin another run with the same processes: counters and names start anew. All ranks call it."""
        self._runs += 1

    def add(self, counter: str, number: int) -> int:
        """Add to a counter of all ranks; returns its new value."""
        counter = f'{self._runs}/{counter}'
        if self._store is None:
            self._counters[counter] = self._counters.get(counter, 0) + number
            return self._counters[counter]
        try:
            return self._call('add', f'count/{counter}', number)
        except RuntimeError as e:
            if 'DataLoader' in str(e):  # raised by torch's signal handler, wherever the main thread is
                raise
            raise SFormerError(f'rank {self.rank} lost the connection to the others: {str(e).splitlines()[0]}') from e

    def wait(self, name: str) -> None:
        """Wait until all ranks are here, however long they take, as long as they live.

        Raises:
            RankError: If another rank failed or was lost.
        """
        if self._store is None:
            return
        self.rest()
        here = self.add(name, 1)
        pause = 0.01
        while here < self.world_size:
            self._check()
            time.sleep(pause)
            pause = min(0.2, pause * 1.5)
            here = self.add(name, 0)

    def gather(self, value: Any, name: str) -> List[Any]:
        """Values of all ranks, by rank, on every rank."""
        if self._store is None:
            return [value]
        self.wait(name)  # so that the collective is over at once, or fails
        values: List[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as e:
            raise SFormerError(f'a rank was lost: {str(e).splitlines()[0]}') from e
        return values
