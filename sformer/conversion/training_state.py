"""What a training keeps on disk, so that it goes on where it ended: weights, the optimizer and how far it came."""
import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import SFormerError, first_line
from ..files import write_aside

__all__ = ['Interrupt', 'STATE_NAME', 'TrainingState', 'deferred_interrupt']

STATE_NAME = 'training.safetensors'  # in the folder that the model will be in


class TrainingState:
    """The state of a training in a file.

    Args:
        path: The file, safetensors; its folder is made when something is written.

    Attributes:
        done: How much is done, in what the training counts: steps, epochs.
        seconds: How long that took, over all of its runs.
        history: What was measured in each step.
    """

    def __init__(self, path: Path):
        self.path = path
        self.done = 0
        self.history: list[list[float]] = []
        self._before = 0.
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def open(self, key: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Take over what an earlier run has left, if one has.

        Args:
            key: What tells the training from others.
            parameters: What is trained, by name.
            optimizer: Of these.

        Returns:
            `done`.

        Raises:
            SFormerError: If the file is of another training, or damaged.
        """
        self.key = key
        self.parameters = parameters
        self.optimizer = optimizer
        self._start = time.perf_counter()
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, 'pt') as f:
                metadata = f.metadata() or {}
                if metadata.get('key') != key:
                    raise SFormerError(f'{self.path} is the state of a training with other data or options: repeat '
                                       f'that one, or remove the file to start over.')
                self._take({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118  it is no mapping
        except SafetensorError as e:
            raise SFormerError(f'{self.path} is truncated or corrupted ({first_line(e)}): remove it to start '
                               f'over.') from e
        optimizer.param_groups[0].update(json.loads(metadata['group']))  # which a schedule goes on from
        self.done = int(metadata['done'])
        self.history = json.loads(metadata['history'])
        self._before = float(metadata['seconds'])
        return self.done

    def _take(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, p in self.parameters.items():
            p.data.copy_(state[name])
            for part in ('step', 'exp_avg', 'exp_avg_sq'):
                value = state.get(f'{name}:{part}')  # none of what no gradient has reached
                if value is not None:
                    self.optimizer.state[p][part] = value if part == 'step' else value.to(p.device)

    def save(self, done: int) -> None:
        """Write the state, aside first: whatever happens meanwhile, there is one."""
        self.done = done
        state: dict[str, torch.Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            state.update({f'{name}:{part}': value for part, value in self.optimizer.state[p].items()})
        group = {key: value for key, value in self.optimizer.param_groups[0].items() if key != 'params'}
        with write_aside(self.path.parent) as aside:
            save_file({name: t.cpu().contiguous() for name, t in state.items()}, aside / self.path.name, metadata=dict(
                key=self.key, done=str(done), seconds=str(self.seconds), group=json.dumps(group),
                history=json.dumps(self.history)))

    def remove(self) -> None:
        """Remove the file: the training has come to its end."""
        self.path.unlink(missing_ok=True)


class Interrupt:
    """Whether an end was asked for."""
    asked = False


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Let the first Ctrl-C, or SIGTERM, inside of the context only be noted, where it would end the process as it does
    by default: whoever trains saves the state after the step at hand. The second one raises KeyboardInterrupt."""
    found = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        if found.asked:
            raise KeyboardInterrupt
        found.asked = True

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, note)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
