"""Many processes: the counts of one, and an end to all when one fails. The full checks are in the script."""
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sformer import SFormerError
from sformer.evaluation import distributed
from sformer.evaluation.distributed import Group, RankError, asked_world_size

SCRIPTS = str(Path(__file__).parents[2] / 'scripts')
sys.path.insert(0, SCRIPTS)  # processes that are forked look there, too
import check_evaluation as check  # noqa: E402


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for key in ('WORLD_SIZE', 'RANK', 'MASTER_ADDR', 'MASTER_PORT', 'ACCELERATE_MIXED_PRECISION', 'SLURM_NTASKS',
                'SLURM_PROCID'):
        monkeypatch.delenv(key, raising=False)


def errors(folder):
    """Lines of errors of all ranks."""
    return [line for path in sorted(folder.glob('err*')) for line in path.read_text().splitlines()
            if not line.startswith('[W') and not line.startswith('[rank')]


def wait_until(condition, processes, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(p.is_alive() for p in processes), 'it never came about'
        time.sleep(0.02)


def recorded(folder, rank):
    """Whether a rank has finished a chunk."""
    return any(path.read_text().count('\n') > 1 for path in folder.glob(f'r.json.progress/*/{rank:05d}-*.jsonl'))


def test_counts_do_not_depend_on_processes(tmp_path):
    """With ranks that have no image at all, an odd tail, and shards fewer and more than ranks."""
    assert check.check_counts(tmp_path, [1, 3], [103], [8], [2, 5]) == (6, [])


def test_error_of_one_rank_ends_all(tmp_path):
    """An unreadable image in the second chunk, which is not rank 0's."""
    import datasets
    import pyarrow.parquet as pq
    folder = check.write_digits(tmp_path, 150, 1)
    path = next(folder.glob('*.parquet'))
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / 'cache')).cast_column(
        'image', datasets.Image(decode=False))
    images = table['image'][:]
    images[100] = {'bytes': b'no image', 'path': None}
    damaged = datasets.Dataset.from_dict(dict(image=images, label=table['label'][:]), features=table.features)
    pq.write_table(damaged.with_format('arrow')[:], path)
    begin = time.monotonic()
    assert check.finish(check.start(['evaluate', check.NANO, '--dataset', folder], 2, tmp_path), 60) == [1, 1]
    assert time.monotonic() - begin < 30
    lines = errors(tmp_path)
    assert len(lines) == 1 and lines[0].startswith('sformer: error: cannot read image 100 of '), lines
    codes = check.finish(check.start(['evaluate', check.NANO, '--dataset', folder, '--max-bad', 1], 2, tmp_path), 60)
    assert codes == [0, 0] and 'left out: 1 images unreadable' in (tmp_path / 'out0').read_text()


@pytest.mark.parametrize('lost, how', [
    (1, signal.SIGKILL),
    pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow), pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow)])
def test_lost_rank_ends_all(tmp_path, lost, how):
    folder = check.write_digits(tmp_path, 3000, 1)
    processes = check.start(['evaluate', check.NANO, '--dataset', folder, '--timeout', 2, '--batch-size', 4,
                             '--results-file', tmp_path / 'r.json'], 2, tmp_path)
    try:
        other = processes[1 - lost]
        wait_until(lambda: recorded(tmp_path, lost), processes)
        os.kill(processes[lost].pid, how)
        begin = time.monotonic()
        other.join(60)
        assert other.exitcode == 1 and time.monotonic() - begin < 20
        if lost:  # rank 0 serves the store where there is no agent of torchrun, so nobody could be asked for its pid
            processes[lost].join(5)
            assert processes[lost].exitcode == -signal.SIGKILL, 'the launcher would wait for it'
    finally:
        for process in processes:
            process.kill()
    lines = [line for line in errors(tmp_path) if line.startswith('sformer: error')]
    assert len(lines) == 1, errors(tmp_path)
    assert f'rank {lost} of 2 gave no sign of life' in lines[0] or 'lost the connection' in lines[0]
    assert not (tmp_path / 'r.json').exists()


def test_rank_that_its_launcher_ends_says_so(tmp_path):
    """As torchrun does within a tenth of a second when another rank was killed."""
    folder = check.write_digits(tmp_path, 3000, 1)
    processes = check.start(['evaluate', check.NANO, '--dataset', folder, '--batch-size', 4,
                             '--results-file', tmp_path / 'r.json'], 2, tmp_path)
    try:
        wait_until(lambda: recorded(tmp_path, 0), processes)
        os.kill(processes[1].pid, signal.SIGKILL)
        os.kill(processes[0].pid, signal.SIGTERM)
        assert check.finish(processes, 30) == [1, -signal.SIGKILL]
    finally:
        for process in processes:
            process.kill()
    line, = errors(tmp_path)
    assert line.startswith('sformer: error: rank 0 of 2 was told to end (SIGTERM): another rank was killed')
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_dead_worker_ends_the_run(tmp_path):
    import psutil
    folder = check.write_digits(tmp_path, 3000, 1)
    processes = check.start(['evaluate', check.NANO, '--dataset', folder, '--workers', 1, '--batch-size', 2,
                             '--results-file', tmp_path / 'r.json'], 2, tmp_path)
    try:
        wait_until(lambda: recorded(tmp_path, 1), processes)
        worker = psutil.Process(processes[1].pid).children()[0]
        worker.kill()
        codes = check.finish(processes, 60)
    finally:
        for process in processes:
            process.kill()
    assert codes == [1, 1]
    assert [line for line in errors(tmp_path) if 'images died or hangs' in line], errors(tmp_path)


def test_command_line(tmp_path):
    """Comparison, results files, and what is refused before any work."""
    import csv
    import json
    data = check.write_digits(tmp_path, 40, 1)

    def run(*args):
        code, = check.finish(check.start([*args, '--dataset', data], 1, tmp_path), 60)
        return code, (tmp_path / 'out0').read_text(), (tmp_path / 'err0').read_text()
    code, out, err = run('compare', check.NANO, check.NANO, '--results-file', tmp_path / 'r.csv', '--amp', 'bf16')
    assert (code, err) == (0, '') and out.count(check.NANO) == 2 and 'top-1' in out
    code, out, err = run('evaluate', check.NANO, '--results-file', tmp_path / 'r.csv')
    rows = list(csv.DictReader(open(tmp_path / 'r.csv', newline='')))
    assert code == 0 and [r['amp'] for r in rows] == ['bf16', 'bf16', '']
    assert rows[2]['command'].startswith('sformer evaluate ')
    assert not list(tmp_path.glob('*.progress'))
    progress = tmp_path / 'r.json.progress'
    (progress / 'of another run').mkdir(parents=True)
    assert run('evaluate', check.NANO, '--results-file', tmp_path / 'r.json', '--resume')[0] == 0
    assert json.loads((tmp_path / 'r.json').read_text())['num_images'] == 40
    assert [p.name for p in progress.iterdir()] == ['of another run']
    for options, message in (
            (['--resume'], '--resume goes by the --results-file'),
            (['--num-processes', 2], '2 processes were asked for, but 1 is running'),
            (['--results-file', 'x.json', '--results-format', 'xml'], "json or csv, not as 'xml'"),
            (['--results-file', '/proc/x/r.csv'], '/proc/x'),
            (['--amp', 'int3'], 'int3'),
            (['--benchmark', 'imagenet-x'], "no benchmark 'imagenet-x'"),
            (['--device', 'quantum'], "device 'quantum' cannot be used"),
            (['--label-column', 'nope'], "has no column 'nope', but: image, label")):
        code, out, err = run('evaluate', check.NANO, *options)
        assert code in (1, 2) and out == '' and message in err and len(err.splitlines()) == 1, (options, err)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    resumed, failures = check.check_kill(tmp_path, 20, 2000, [1, 2, 3], seed=0)
    assert resumed >= 5 and not failures


@pytest.mark.slow
def test_all_counts(tmp_path):
    assert check.check_counts(tmp_path, [1, 2, 3, 4], [1, 7, 103], [1, 8, 64], [3, 12])[1] == []


def test_number_of_processes_is_checked(monkeypatch):
    assert asked_world_size() == 1
    Group(num_processes=1)
    with pytest.raises(SFormerError, match='2 processes were asked for, but 1 is running: .*torchrun'):
        Group(num_processes=2)
    monkeypatch.setenv('WORLD_SIZE', '3')
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(SFormerError, match='2 processes were asked for, but 3 are running'):
        Group(num_processes=2)
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(RankError):
        Group(num_processes=2)


def test_accelerate_launch_that_starts_one_process_for_two(monkeypatch):
    """The environment that `accelerate launch --cpu --num_processes 2` makes."""
    import argparse

    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env
    args = launch_command_parser().parse_args(['--cpu', '--num_processes', '2', '-m', 'sformer'])
    defaults = dict(
        num_machines=1, mixed_precision='no', dynamo_backend='no', use_cpu=True, num_cpu_threads_per_process=1)
    _, env = prepare_simple_launcher_cmd_env(argparse.Namespace(**{**vars(args), **defaults}))
    for key in ('ACCELERATE_MIXED_PRECISION', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(key, env[key])
    with pytest.raises(SFormerError, match='accelerate launch was asked for several processes .* torchrun'):
        asked_world_size()


def test_slurm_without_a_launcher(monkeypatch, capsys):
    """`srun -n 4 sformer ...` starts four processes that do the same work."""
    monkeypatch.setattr(distributed, '_warn', distributed._warn.__wrapped__)  # once per process
    monkeypatch.setenv('SLURM_NTASKS', '4')
    assert asked_world_size() == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('sformer: warning: SLURM_NTASKS is 4') and 'torchrun' in line
    for variables in (dict(SLURM_PROCID='3'), dict(WORLD_SIZE='4'), dict(SLURM_NTASKS='1')):
        with monkeypatch.context() as patch:
            for key, value in variables.items():
                patch.setenv(key, value)
            asked_world_size()
    assert capsys.readouterr().err == ''


def test_devices():
    assert Group('cpu').device.type == 'cpu'
    for device in ('quantum', 'cuda:77'):
        with pytest.raises(SFormerError, match=f'device .{device}. cannot be used'):
            Group(device)


def test_one_process_needs_nobody():
    with Group().guard() as group:
        assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
        group.tick()
        group.wait('here')
        assert group.gather('x', 'there') == ['x'] and group.add('n', 2) == 2 and group.add('n', 3) == 5
    with pytest.raises(ZeroDivisionError), Group().guard():
        1 / 0  # noqa: B018


def test_process_that_was_stopped_for_a_while(monkeypatch):
    """One late look at the clock is no proof that the store hangs."""
    ended = []
    monkeypatch.setattr('os._exit', lambda code: ended.append(code) or group._stop.set())
    group = Group()
    group.timeout, group.rank, group._stop = 0.8, 1, threading.Event()
    group._heard = time.monotonic() - 1000
    watch = threading.Thread(target=group._watch_store, daemon=True)
    watch.start()
    time.sleep(0.3)
    assert not ended
    monkeypatch.setattr('sformer.evaluation.distributed._GRACE', -0.5)  # it never answers
    watch.join(5)
    assert ended and not watch.is_alive()
