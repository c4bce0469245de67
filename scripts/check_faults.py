"""What users hit that needs a machine's state: full disks, small memory, lost and slow processes, Ctrl-C.

    python scripts/check_faults.py              # a table of what is expected and what came, in half an hour
    python scripts/check_faults.py torchrun     # the cases whose name has this in it: distill, search, COCO ...

Each case runs the command line on the digits of scikit-learn. A run of torchrun that a fault ended is resumed on one
process, and has to count what a run without faults does. Cases with a small file system mount one in a namespace of
their own (`unshare -m`, which needs root); where that is not allowed they are left out. A case that fails ends with
exit code 1.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from check_evaluation import NANO, differing, free_port, write_digits, write_parquet
from fault_jobs import JOBS, LITTLE_MEMORY, make_jobs
from fault_tools import KILLED, Case, children, interrupt_after, wait_for

EVALUATE = ['-m', 'sformer', 'evaluate', NANO, '--no-source']
TIMEOUT = 4  # seconds without progress after which ranks give one up
ELASTIC = 30  # seconds that torchrun waits for a process to take its signal, before it kills it
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc-per-node']
# two agents of torchrun that meet on the loopback interface; the first one serves the store
AGENTS = '''
import subprocess, sys
first, second, port, *rest = sys.argv[1:]
command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--rdzv-backend', 'c10d', '--rdzv-id', 'x',
           '--rdzv-endpoint', f'127.0.0.1:{port}']
agents = [subprocess.Popen([*command, '--rdzv-conf', f'is_host={host}', '--nproc-per-node', number, *rest])
          for host, number in ((1, first), (0, second))]
sys.exit(max(agent.wait() for agent in agents))
'''
# `sformer` where rank 1 has other arguments, imports from another folder first, or stops
UNLIKE = '''
import os, signal, sys
what, argument, instead, *args = sys.argv[1:]
sys.argv[1:] = args
if os.environ['RANK'] == '1':
    sys.argv = [instead if arg == argument else arg for arg in sys.argv]
    if what == 'imports':
        sys.path.insert(0, instead)
    if what == 'never joins':
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == 'joins and stops':
        from sformer.evaluation.launch import Group
        Group.guard = lambda group: os.kill(os.getpid(), signal.SIGSTOP)
from sformer import cli
cli.main()
'''


def signal_worker(process: psutil.Process, folder: Path, number: int = signal.SIGSTOP) -> None:
    """Send a signal to a process that loads images: the youngest child."""
    wait_for(lambda: len(children(process)) >= 2)
    time.sleep(2)
    os.kill(children(process)[-1].pid, number)


# Processes of torchrun ------------------------------------------------------------------------------------------------


def wait_for_chunk(folder: Path, *ranks: int) -> None:
    """Wait until ranks have finished a chunk each."""
    for rank in ranks:
        files = f'r.json.progress/*/{rank:05d}-*'
        wait_for(lambda files=files: any(p.read_text().count('\n') > 1 for p in folder.glob(files)))


def rank_of(process: psutil.Process, rank: int) -> psutil.Process:
    return next(p for p in children(process) if p.environ().get('RANK') == str(rank))


def signal_rank(rank: int, number: int) -> Callable[[psutil.Process, Path], None]:
    def happen(process: psutil.Process, folder: Path) -> None:
        wait_for_chunk(folder, 0, 1)
        rank_of(process, rank).send_signal(number)
    return happen


def slow_rank(rank: int) -> Callable[[psutil.Process, Path], None]:
    """Let a rank run for a fifth of the time, so that others wait for it longer than for one that hangs."""
    def happen(process: psutil.Process, folder: Path) -> None:
        wait_for_chunk(folder, rank)
        slow, begin = rank_of(process, rank), time.monotonic()
        while slow.is_running() and slow.status() != psutil.STATUS_ZOMBIE:
            slow.suspend()
            time.sleep(TIMEOUT / 5)
            slow.resume()
            time.sleep(TIMEOUT / 20)
        print(f'  a rank was slow for {time.monotonic() - begin:.0f} s', flush=True)
    return happen


def signal_launcher(number: int, all_processes: bool = False) -> Callable[[psutil.Process, Path], None]:
    def happen(process: psutil.Process, folder: Path) -> None:
        wait_for_chunk(folder, 0, 1)
        for p in [process, *(children(process) if all_processes else [])]:
            p.send_signal(number)
    return happen


def lose_computer(number: int) -> Callable[[psutil.Process, Path], list[psutil.Process]]:
    """Stop an agent and its ranks: nothing answers there, and no connection is closed, as where a computer hangs."""
    def happen(process: psutil.Process, folder: Path) -> list[psutil.Process]:
        wait_for_chunk(folder, 0, 1)
        agents = sorted(process.children(), key=psutil.Process.create_time)
        lost = [agents[number], *children(agents[number])]
        for p in lost:
            p.suspend()
        # without the first one, which serves the store, the other waits for an answer when its ranks have ended
        return [process, *lost, *(agents if number == 0 else [])]
    return happen


RUN = [*EVALUATE[2:], '--dataset', '{some}', '--batch-size', '4', '--timeout', str(TIMEOUT),
       '--results-file', '{folder}/r.json']


def counted(args: list[str], env: dict[str, str], shared: dict[str, Any]) -> str:
    """What is not as expected in the results of a run that, if it was ended, is resumed on one process."""
    args = [re.sub(r'\{(\w+)\}', lambda m: shared[m[1]], arg) for arg in RUN]
    file = Path(args[-1])
    if not file.exists():
        command = [sys.executable, '-m', 'sformer', *args, '--resume']
        resumed = subprocess.run(command, env=env, capture_output=True, text=True)
        if resumed.returncode or not re.search(r'resuming after [1-9]', resumed.stderr):
            return f'resumed with exit code {resumed.returncode}: {resumed.stderr[-300:]}'
    different = differing(json.loads(file.read_text()), shared['expected'])
    return f'{different} differ from those of a run without faults' if different else ''


def torchrun_cases(world: int) -> list[Case]:
    """The table of faults of so many processes."""
    start = [*TORCHRUN, str(world), '--master-port', '{port}']
    told = rf'rank \d of {world} was told to end \(SIGTERM\): another rank was killed'
    lost = f'of {world} processes hangs, or was lost'

    def case(what: str, expected: str, seconds: float, happens: Any = None, *more: str, unlike: Any = None,
             **options: Any) -> Case:
        program = ['-m', 'sformer'] if unlike is None else ['{unlike}', *unlike]
        args = [*start, *program, *RUN, *more]
        return Case(f'torchrun, {world}: {what}', args, expected, seconds, happens, **options)

    cases = []
    for rank in (0, 1):
        cases += [
            case(f'rank {rank} killed', f'{told}|{lost}', 5, signal_rank(rank, signal.SIGKILL), then=counted),
            case(f'rank {rank} stopped', f'rank {rank} {lost}', TIMEOUT + 5, signal_rank(rank, signal.SIGSTOP),
                 rest=ELASTIC + 5, then=counted),
            case(f'rank {rank} slow', '', 300, slow_rank(rank), then=counted),
        ]
    cases.append(case('rank 1 killed, with loader workers', f'{told}|{lost}', 5, signal_rank(1, signal.SIGKILL),
                      '--workers', '2', then=counted))
    for number, nodes in enumerate(((1, world - 1), (world - 1, 1))):
        args = ['-c', AGENTS, *map(str, nodes), '{port}', '-m', 'sformer', *RUN]
        cases.append(Case(f'torchrun, {world}: computer {number} hangs', args, lost, TIMEOUT + 15,
                          lose_computer(number), rest=ELASTIC + 5, then=counted))
    starting = 60  # seconds from the command to the first batch on a machine that does other things, too
    return cases + [
        case('launcher ended', told, 5, signal_launcher(signal.SIGTERM), then=counted),
        case('launcher killed', f'the launcher {lost}|{told}', 5, signal_launcher(signal.SIGKILL), then=counted),
        case('Ctrl-C', 'interrupted. The same command with --resume continues', 5,
             signal_launcher(signal.SIGINT, all_processes=True), then=counted),
        case('rank 1 never joins', f'the {world} processes do not find one another', starting + TIMEOUT,
             unlike=['never joins', '', ''], rest=ELASTIC + 5),
        case('rank 1 joins and stops', f'rank 1 {lost}', starting + TIMEOUT, unlike=['joins and stops', '', ''],
             rest=ELASTIC + 5),
        case('an image of rank 1 is damaged', 'cannot read image 100 of', starting, None, '--dataset', '{damaged}'),
        case('other model', r'do not evaluate the same \(models', starting,
             unlike=['replaces', NANO, '{other_model}']),
        case('other data', r'do not evaluate the same \(dataset', starting,
             unlike=['replaces', '{some}', '{other_data}']),
        case('other version of timm', r'do not evaluate the same \(timm', starting,
             unlike=['imports', '', '{other_timm}']),
    ]


CASES = [
    Case('stopped loader worker', [*EVALUATE, '--dataset', '{many}', '--workers', '2', '--batch-size', '4',
                                   '--timeout', '10'],
         'images died or hangs: no batch came for 10 s', 25, signal_worker),
    Case('small /dev/shm', [*EVALUATE, '--dataset', '{many}', '--workers', '2', '--batch-size', '256'],
         r'no room in shared memory \(/dev/shm\)', 60, mount=('200k', '/dev/shm')),
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
    *JOBS, *(case for world in (2, 3) for case in torchrun_cases(world)),
]


def family(folder: str) -> list[psutil.Process]:
    """Processes that work in a folder, and are not over."""
    found = []
    for p in psutil.process_iter(['cwd', 'status']):
        if p.info['cwd'] == folder and p.info['status'] != psutil.STATUS_ZOMBIE:
            found.append(p)
    return found


def errors(text: str) -> list[str]:
    """Lines in which sformer tells of an error; and tracebacks but those of torchrun, which tells of every failure."""
    lines = [line for line in text.splitlines() if re.match(r'sformer: error|\[rank\d+\]: ', line)]
    return lines + ['Traceback'] * ('Traceback' in text and 'torch/distributed/run.py' not in text)


def ends_right(case: Case, expected: str, code: int, lines: list[str]) -> bool:
    """Whether a command that ended with this code and these lines about errors did so as it has to."""
    if not case.expected:
        return code == 0
    if case.expected == KILLED:
        return code == -signal.SIGKILL and not lines
    return len(lines) == 1 and code != 0 and re.search(expected, lines[0]) is not None


def run(case: Case, shared: dict[str, Any]) -> tuple[str, str]:
    """What is not as expected, and what came, when."""
    with tempfile.TemporaryDirectory() as name:
        names = {**shared, 'folder': name, 'hf': f'{name}/hf', 'small': f'{name}/small', 'port': str(free_port())}
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
        out = Path(name, 'out')
        with open(out, 'w') as stream:
            process = psutil.Popen(  # a job in the background ignores Ctrl-C, and so would what it starts
                command, stdout=stream, stderr=stream, env=env, cwd=name,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        told = None
        try:
            lost = (case.happens(process, Path(name)) if case.happens else None) or []
            begin = time.monotonic()
            while {p.pid for p in family(name)} - {p.pid for p in lost}:
                process.poll()
                seconds = time.monotonic() - begin
                told = seconds if told is None and errors(out.read_text(errors='replace')) else told
                if seconds > case.seconds + case.rest:
                    return f'not over after {seconds:.0f} s: {out.read_text()[-300:]}', ''
                time.sleep(0.05)
            ended = time.monotonic() - begin
        except (TimeoutError, psutil.Error) as e:
            return f'{type(e).__name__}: {out.read_text()[-300:]}', ''
        finally:
            for p in family(name):
                p.kill()
            code = process.wait()
        text = out.read_text(errors='replace')
        lines = errors(text)
        told = ended if told is None else told
        when = f'over after {ended:.1f} s'
        if lines:
            when = f'{"; ".join(lines)} (told after {told:.1f} s, {when})'
        if not ends_right(case, fill(case.expected), code, lines):
            return f'exit code {code}: {lines or text[-300:]}', when
        if told > case.seconds:
            return f'told after more than {case.seconds:g} s', when
        return case.then(command[-len(case.args):], env, {**shared, **names}) if case.then else '', when


def count_alone(data: Path, folder: str) -> dict[str, Any]:
    """Results without a launcher and without faults."""
    args = [arg.format(some=data, folder=folder) for arg in RUN]
    subprocess.run([sys.executable, '-m', 'sformer', *args], check=True, capture_output=True)
    return json.loads(Path(args[-1]).read_text())


def can_mount() -> bool:
    command = ['unshare', '-m', 'sh', '-c', 'mount -t tmpfs tmpfs /mnt']
    return subprocess.run(command, capture_output=True).returncode == 0


def make_shared(folder: Path) -> dict[str, Any]:
    """Data and models that cases share."""
    import datasets
    import timm
    from safetensors.torch import save_file

    import sformer
    tiny = timm.create_model('vit_tiny_patch16_224', img_size=1792, depth=1)  # 12,545 tokens
    save_file(tiny.state_dict(), folder / 'tiny.safetensors')
    nano = timm.create_model(NANO, pretrained=True)
    shared: dict[str, Any] = dict(
        many=write_digits(folder, 20000, 4), some=write_digits(folder, 6000, 2), tiny=folder / 'tiny.safetensors',
        model=sformer.save_model(nano, folder / 'model'), unlike=folder / 'unlike.py', damaged=folder / 'damaged',
        other_data=write_digits(folder, 300, 1), other_timm=folder / 'other_timm')
    nano.head.bias.data += 1
    shared['other_model'] = sformer.save_model(nano, folder / 'other')
    shared['unlike'].write_text(UNLIKE)
    info = shared['other_timm'] / 'timm-0.0.1.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n')
    rows = datasets.load_dataset('parquet', data_files=str(shared['other_data'] / '*.parquet'), split='train',
                                 cache_dir=str(folder / 'cache')).cast_column('image', datasets.Image(decode=False))
    images = rows['image'][:]
    images[100] = dict(bytes=b'no image', path=None)
    write_parquet(shared['damaged'], 'test', 1, rows.features['label'], images, rows['label'][:])
    shared['expected'] = count_alone(shared['some'], folder)
    shared |= make_jobs(folder, shared['model'])
    return {key: str(value) if isinstance(value, Path) else value for key, value in shared.items()}


def main(name: Annotated[str, typer.Argument()] = '') -> None:
    mounts, failed = can_mount(), 0
    with tempfile.TemporaryDirectory() as folder:
        shared = make_shared(Path(folder))
        for case in CASES:
            if name not in case.name:
                continue
            if case.mount and not mounts:
                print(f'{case.name:48} left out: no mounts here')
                continue
            problem, what = run(case, shared)
            failed += bool(problem)
            print(f'{case.name:48} {what}', flush=True)
            if problem:
                print(f'  FAILED: expected {case.expected or "success"}, got {problem}', flush=True)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    typer.run(main)
