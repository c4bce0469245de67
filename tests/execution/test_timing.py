"""Timings of executions, by a clock of the test's own."""
import pytest
import torch
from layer_tools import build

from sformer import SFormerError
from sformer.execution import timing
from sformer.execution.timing import benchmark


@pytest.fixture
def executions(monkeypatch):
    """Executions by name that take so many seconds, one after the other."""
    now, seen = [0.], []

    def add(name, *seconds):
        left = iter(seconds)

        def run(images):
            seen.append((name, tuple(images.shape)))
            now[0] += next(left)
        monkeypatch.setitem(timing.EXECUTIONS, name, lambda model: run)
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])
    return add, seen


def test_ratios_are_those_of_each_round(executions):
    add, seen = executions
    add('ours', 9, 9, 1, 2, 4)
    add('theirs', 1, 1, 4, 4, 4)
    add('other', 5, 5, 2, 3, 1)
    result = benchmark(build(depth=1), ['ours', 'theirs'], ['theirs', 'other'], [3], pairs=3, warmup=2)
    ours, theirs, other = result['results']
    assert [row['execution'] for row in result['results']] == ['ours', 'theirs', 'other']
    assert (ours['seconds'], theirs['seconds'], other['seconds']) == (2, 4, 2) and ours['batch_size'] == 3
    assert ours['speedup'] == dict(theirs=dict(median=2, min=1, max=4), other=dict(median=1.5, min=0.25, max=2))
    assert theirs['speedup'] == dict(other=dict(median=0.5, min=0.25, max=0.75))
    assert other['speedup'] == dict(theirs=dict(median=2, min=4 / 3, max=4))
    assert seen == [(name, (3, 3, 32, 32)) for name in ('ours', 'theirs', 'other')] * 5, 'in turn, round after round'
    assert result['pairs'] == 3 and not result['skipped'] and not result['verdict'] and result['processor']
    assert result['threads'] == torch.get_num_threads() and 'torch' in result['versions']


@pytest.mark.parametrize('factor, left', [(timing.MAX_SLOWDOWN, False), (0.9 * timing.MAX_SLOWDOWN, True)])
def test_what_would_not_end_is_left_out(executions, monkeypatch, factor, left):
    add, _ = executions
    add('ours', 1, 1)
    add('source:bf16', 2, 2)
    monkeypatch.setattr(timing, 'slowdown', lambda dtype: factor)
    result = benchmark(build(depth=1), ['ours'], ['source:bf16'], pairs=1, warmup=1)
    assert bool(result['skipped']) != left and ('source:bf16' in result['results'][0]['speedup']) == left
    if not left:
        assert f'bfloat16 products take {factor:.0f} times as long' in result['skipped']['source:bf16']
        with pytest.raises(SFormerError, match='nothing is left to measure: source:bf16: bfloat16 products take'):
            benchmark(build(depth=1), ['source:bf16'], [])
