"""Many processes: the counts of one, and an end to all when one fails.

Faults of processes that torchrun itself has started are in scripts/check_faults.py.
"""
import json
import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from sformer import SFormerError
from sformer.evaluation.launch import Group

SCRIPTS = str(Path(__file__).parents[2] / 'scripts')
sys.path.insert(0, SCRIPTS)  # processes that are forked look there, too
import check_evaluation as check  # noqa: E402


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for key in ('WORLD_SIZE', 'RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(key, raising=False)


def in_group(folder, code, world=2, seconds=60):
    """What `found` is on each of the ranks after they ran some code that has a `group` and a `rank`."""
    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(world):
        env = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1',
                   MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True')
        program = textwrap.dedent(f'''
            import json, os, sys, time
            os.environ.update({env})
            from sformer import SFormerError
            from sformer.evaluation.launch import Group
            group, rank, found = Group('cpu', timeout=3), {rank}, None
        ''') + textwrap.dedent(code) + f'\njson.dump(found, open({str(folder / str(rank))!r}, "w"))\n'
        processes.append(check.FORKS.Process(target=exec, args=(program, {})))
        processes[-1].start()
    codes = check.finish(processes, seconds)
    assert not any(codes), codes
    return [json.loads((folder / str(rank)).read_text()) for rank in range(world)]


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
    """With an odd tail, and fewer shards than ranks."""
    assert check.check_counts(tmp_path, [1, 3], [103], [8], [2]) == (4, [])


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
    (1, signal.SIGKILL), pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow), pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow)])
def test_lost_rank_ends_all(tmp_path, lost, how):
    folder = check.write_digits(tmp_path, 3000, 1)
    processes = check.start(['evaluate', check.NANO, '--dataset', folder, '--timeout', 3, '--batch-size', 4,
                             '--results-file', tmp_path / 'r.json'], 2, tmp_path)
    try:
        other = processes[1 - lost]
        wait_until(lambda: recorded(tmp_path, lost), processes)
        os.kill(processes[lost].pid, how)
        begin = time.monotonic()
        other.join(60)
        assert other.exitcode == 1 and time.monotonic() - begin < 20
    finally:
        for process in processes:
            process.kill()
    line, = errors(tmp_path)
    who = f'rank {lost}' if how == signal.SIGSTOP else f'(another rank|rank {lost})'
    assert re.match(f'sformer: error: {who} of 2 processes hangs, or was lost: ', line), line
    assert not (tmp_path / 'r.json').exists()


@pytest.mark.slow
def test_rank_that_is_stopped_for_a_while_is_waited_for(tmp_path):
    folder = check.write_digits(tmp_path, 1000, 1)
    args = ['evaluate', check.NANO, '--dataset', folder, '--batch-size', 4, '--results-file', tmp_path / 'r.json']
    processes = check.start([*args, '--timeout', 10], 2, tmp_path)
    wait_until(lambda: recorded(tmp_path, 1), processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    time.sleep(2)
    os.kill(processes[1].pid, signal.SIGCONT)
    assert check.finish(processes, 60) == [0, 0] and errors(tmp_path) == []
    assert json.loads((tmp_path / 'r.json').read_text())['num_images'] == 1000


@pytest.mark.slow
def test_slow_rank_that_gets_on_is_waited_for(tmp_path):
    """Longer than for one that hangs."""
    assert in_group(tmp_path, '''
        begin = time.monotonic()
        for _ in range(9 * rank):
            time.sleep(0.5)
            group.tick()
        values = group.gather(rank)
        found = values, time.monotonic() - begin > 4
    ''') == [[[0, 1], True]] * 2


@pytest.mark.slow
def test_rank_that_hangs_is_named_by_whoever_waits_or_works(tmp_path):
    waits, works, _ = in_group(tmp_path, '''
        begin = time.monotonic()
        try:
            if rank == 0:
                group.gather('here')
            while rank == 1:
                time.sleep(0.1)
                group.tick()
        except SFormerError as e:
            found = str(e), time.monotonic() - begin < 7
        time.sleep(7 * (rank == 2))
    ''', 3)
    for message, in_time in (waits, works):
        assert message.startswith('rank 2 of 3 processes hangs, or was lost: Timed out') and in_time, message


@pytest.mark.slow
def test_store_that_does_not_answer(tmp_path):
    """As where the computer of the launcher hangs: its calls would not return."""
    found = in_group(tmp_path, '''
        class Silent:
            def set(self, *args):
                pass
            def multi_get(self, *args):
                time.sleep(100)
            add = multi_get
        group._store = Silent()
        begin = time.monotonic()
        time.sleep(6 * rank)
        try:
            with group.guard():
                group.gather('here')
        except SFormerError as e:
            found = str(e), time.monotonic() - begin < 16
    ''')
    message, in_time = found[0]
    assert message.startswith('the launcher of 2 processes hangs, or was lost: Timed out') and in_time, message


def test_sums_are_of_all_ranks_and_begin_anew(tmp_path):
    code = '''
        found = []
        for run in (1, 2):
            deadline = time.monotonic() + 0.7
            while time.monotonic() < deadline:
                sums = group.tick(10 * run, rank, run)
                time.sleep(0.01)
            found.append(sums)
            group.gather(None)
        found.append(group.tick())
    '''
    for found in in_group(tmp_path, code, 3):
        assert found == [[30, 3, 3], [60, 3, 6], [0, 0, 0]]


def test_rank_that_its_launcher_ends_says_so(tmp_path):
    """As torchrun does within a tenth of a second when another rank was killed."""
    folder = check.write_digits(tmp_path, 3000, 1)
    processes = check.start(['evaluate', check.NANO, '--dataset', folder, '--batch-size', 4,
                             '--results-file', tmp_path / 'r.json'], 2, tmp_path)
    try:
        wait_until(lambda: recorded(tmp_path, 0), processes)
        os.kill(processes[0].pid, signal.SIGTERM)
        assert check.finish(processes, 30) == [1, 1]
    finally:
        for process in processes:
            process.kill()
    line, = errors(tmp_path)
    assert line.startswith('sformer: error: rank 0 of 2 was told to end (SIGTERM): another rank was killed')
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_errors_of_all_ranks_are_one_line(tmp_path):
    """A typo is the same on all of them."""
    for options, message in ((['--benchmark', 'imagenet-x'], "no benchmark 'imagenet-x'"),
                             (['--num-processes', 3], '3 processes were asked for, but 2 are running')):
        processes = check.start(['evaluate', check.NANO, '--dataset', 'digits', *options], 2, tmp_path)
        assert check.finish(processes, 60) == [1, 1]
        line, = errors(tmp_path)
        assert message in line


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
    line, = errors(tmp_path)
    assert 'images died or hangs' in line


def test_command_line(tmp_path):
    """Comparison, results files, and what is refused before any work."""
    import csv
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


def test_devices():
    assert Group('cpu').device.type == 'cpu'
    for device in ('quantum', 'cuda:77'):
        with pytest.raises(SFormerError, match=f'device .{device}. cannot be used'):
            Group(device)


def test_one_process_needs_nobody():
    with Group().guard() as group:
        assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
        assert group.tick(3, 2, 1) == [3, 2, 1] and group.gather('x') == ['x'] and group.tick() == [0, 0, 0]
    with pytest.raises(ZeroDivisionError), Group().guard():
        1 / 0  # noqa: B018
