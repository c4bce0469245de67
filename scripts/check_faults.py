"""What users hit that needs a machine's state: full disks, small shared memory, stopped and killed processes, Ctrl-C.

    python scripts/check_faults.py              # a table of what is expected and what came, in some minutes
    python scripts/check_faults.py 'killed'     # the cases whose name has this in it

Each case runs the command line on the digits of scikit-learn. Cases with a small file system mount one in a namespace
of their own (`unshare -m`, which needs root); where that is not allowed they are left out. A case that fails ends with
exit code 1.
"""
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer
from check_evaluation import NANO, write_digits

EVALUATE = ['-m', 'sformer', 'evaluate', NANO, '--no-source']
LITTLE_MEMORY = ('import resource, sformer.cli, sys; resource.setrlimit(resource.RLIMIT_AS, (7 << 30, 7 << 30)); '
                 'sformer.cli.main(sys.argv[1:])')
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc-per-node', '2']


class Case(NamedTuple):
    """A command, what happens to it, and how it has to end.

    Args:
        name: What is done.
        args: Command line of Python; {name} stands for what `run` makes.
        expected: Regular expression of the one line that begins with `sformer: error`; empty if it has to succeed.
        seconds: How long it may take from what happens to it.
        happens: Called with the running process and its folder once the run is under way.
        mount: Size and place of a small file system, in which a file lies.
        fill: Bytes of that file.
    """
    name: str
    args: list[str]
    expected: str
    seconds: float
    happens: Callable[[psutil.Process, Path], None] | None = None
    mount: tuple[str, str] | None = None
    fill: int = 0


def children(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def signal_worker(process: psutil.Process, folder: Path, number: int = signal.SIGSTOP) -> None:
    """Send a signal to a process that loads images: the youngest child."""
    wait_for(lambda: len(children(process)) >= 2)
    time.sleep(2)
    os.kill(children(process)[-1].pid, number)


def signal_rank(rank: int, number: int) -> Callable[[psutil.Process, Path], None]:
    def happen(process: psutil.Process, folder: Path) -> None:
        wait_for(lambda: any(p.read_text().count('\n') > 1 for p in folder.glob(f'r.json.progress/*/{rank:05d}-*')))
        os.kill(next(p.pid for p in children(process) if p.environ().get('RANK') == str(rank)), number)
    return happen


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


RANKS = [*TORCHRUN, *EVALUATE, '--dataset', '{many}', '--batch-size', '4', '--results-file', '{folder}/r.json']
CASES = [
    Case('stopped loader worker', [*EVALUATE, '--dataset', '{many}', '--workers', '2', '--batch-size', '4',
                                   '--timeout', '10'],
         'images died or hangs: no batch came for 10 s', 25, signal_worker),
    Case('small /dev/shm', [*EVALUATE, '--dataset', '{many}', '--workers', '2', '--batch-size', '256'],
         r'no room in shared memory \(/dev/shm\)', 60, mount=('200k', '/dev/shm')),
    Case('stopped rank 1, torchrun', [*RANKS, '--timeout', '5'], 'rank 1 of 2 gave no sign of life for 5 s', 20,
         signal_rank(1, signal.SIGSTOP)),
    Case('stopped rank 0, torchrun', [*RANKS, '--timeout', '5'], 'rank 0 of 2 gave no sign of life for 5 s', 20,
         signal_rank(0, signal.SIGSTOP)),
    Case('killed rank 1, torchrun', RANKS, r'rank 0 of 2 was told to end \(SIGTERM\): another rank was killed', 20,
         signal_rank(1, signal.SIGKILL)),
    *(Case(f'Ctrl-C after {seconds} s', [*EVALUATE, '--dataset', '{many}'], 'interrupted', 10, interrupt_after(seconds))
      for seconds in (0.5, 1., 2., 3.)),
    Case('HF_HOME full', [*EVALUATE, '--dataset', '{many}'], 'disk of its copy is full .*--streaming', 60,
         mount=('300k', '{hf}')),
    Case('HF_HOME full, streaming', [*EVALUATE, '--dataset', '{many}', '--num-images', '100', '--streaming'], '', 60,
         mount=('300k', '{hf}')),
    Case('disk full for a card', ['-m', 'sformer', 'card', '{model}', '-o', '{small}'],
         '{small}: No space left on device', 60, mount=('8k', '{small}'), fill=8192),
    Case('no memory to convert', [
        '-c', LITTLE_MEMORY, 'convert', 'vit_tiny_patch16_224', '-o', '{folder}/x', '--checkpoint', '{tiny}',
        '--model-kwargs', 'img_size=1792', 'depth=1'], 'out of memory', 300),
]


def run(case: Case, shared: dict[str, str]) -> str:
    """What came of a case: empty if it is as expected."""
    with tempfile.TemporaryDirectory() as name:
        names = {**shared, 'folder': name, 'hf': f'{name}/hf', 'small': f'{name}/small'}
        for key in ('hf', 'small'):
            Path(names[key]).mkdir()

        def fill(text: str) -> str:
            return re.sub(r'\{(\w+)\}', lambda m: names.get(m[1], m[0]), text)
        command = [sys.executable, *map(fill, case.args)]
        if case.mount:
            size, place = case.mount[0], fill(case.mount[1])
            full = f'head -c {case.fill} /dev/zero > {place}/x'
            mount = f'mount -t tmpfs -o size={size} tmpfs {place} && {full}; exec "$@"'
            command = ['unshare', '-m', 'sh', '-c', mount, 'sh', *command]
        env = dict(os.environ, OMP_NUM_THREADS='1', HF_HOME=names['hf'], HF_HUB_OFFLINE='1')
        with open(Path(name, 'out'), 'w+') as out:
            process = psutil.Popen(  # a job in the background ignores Ctrl-C, and so would what it starts
                command, stdout=out, stderr=out, env=env, cwd=name,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
            begin = time.monotonic()
            try:
                if case.happens:
                    case.happens(process, Path(name))
                begin = time.monotonic()
                code = process.wait(case.seconds)
            except (subprocess.TimeoutExpired, psutil.TimeoutExpired, TimeoutError, psutil.Error) as e:
                return f'{type(e).__name__} after {time.monotonic() - begin:.0f} s'
            finally:
                for p in (*(children(process) if process.is_running() else ()), process):
                    try:
                        p.kill()
                    except psutil.Error:
                        continue
            seconds = time.monotonic() - begin
        text = Path(name, 'out').read_text(errors='replace')
        lines = [line for line in text.splitlines() if line.startswith('sformer: error')]
        if not case.expected:
            return '' if code == 0 else f'exit code {code}: {text[-200:]}'
        if len(lines) != 1 or code == 0 or not re.search(fill(case.expected), lines[0]) or \
                ('Traceback' in text and 'ChildFailedError' not in text):  # which is torchrun's own
            return f'exit code {code} after {seconds:.0f} s: {lines or text[-300:]}'
        return ''


def can_mount() -> bool:
    command = ['unshare', '-m', 'sh', '-c', 'mount -t tmpfs tmpfs /mnt']
    return subprocess.run(command, capture_output=True).returncode == 0


def main(name: Annotated[str, typer.Argument()] = '') -> None:
    import timm
    from safetensors.torch import save_file

    import sformer
    mounts, failed = can_mount(), 0
    with tempfile.TemporaryDirectory() as folder:
        tiny = timm.create_model('vit_tiny_patch16_224', img_size=1792, depth=1)  # 12,545 tokens
        save_file(tiny.state_dict(), f'{folder}/tiny.safetensors')
        model = sformer.save_model(timm.create_model(NANO, pretrained=True), f'{folder}/model')
        shared = dict(
            many=str(write_digits(Path(folder), 20000, 4)), model=str(model), tiny=f'{folder}/tiny.safetensors')
        for case in CASES:
            if name not in case.name:
                continue
            if case.mount and not mounts:
                print(f'{case.name:26} left out: no mounts here')
                continue
            problem = run(case, shared)
            failed += bool(problem)
            print(f'{case.name:26} expected: {case.expected or "success"}; '
                  f'{"got: " + problem if problem else "so it is"}', flush=True)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    typer.run(main)
