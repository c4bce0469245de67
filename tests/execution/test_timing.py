"""Timings of executions, by a clock of the test's own, and what they say of a processor."""
import importlib.util

import pytest
import torch
from layer_tools import build, pixels

from sformer import SFormerError, convert, source_of
from sformer.execution import EXECUTIONS, timing
from sformer.execution.executions import SPIKING, Execution
from sformer.execution.prepared import slow_neurons
from sformer.execution.processor import instruction_set
from sformer.execution.timing import benchmark, default_executions, verdict_of


@pytest.fixture
def executions(monkeypatch):
    """Executions by name that take so many seconds, one after the other."""
    now, seen = [0.], []

    def add(name, *seconds):
        left = iter(seconds)

        def run(images):
            seen.append((name, tuple(images.shape)))
            now[0] += next(left)
        monkeypatch.setitem(timing.EXECUTIONS, name, lambda model, folder: Execution(run, 1))
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
    assert result['pairs'] == 3 and not result['skipped'] and result['processor']
    assert result['verdict'] == f'This processor has {instruction_set()}.'
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


def timed(name, seconds, **speedup):
    return dict(execution=name, batch_size=4, seconds=seconds, p95=seconds, images_per_second=4 / seconds, size=1,
                memory=None, speedup={other: dict(median=ratio) for other, ratio in speedup.items()})


def test_what_to_take(model, monkeypatch):
    monkeypatch.setattr('sformer.execution.timing.int8_gain', lambda engine: 3.14)
    monkeypatch.setattr('sformer.execution.timing.int8_verdict', lambda engine: '')
    rows = [timed('openvino', 0.2, rival=1.1), timed('openvino:fast', 0.1, rival=2.), timed('rival', 0.21)]
    found = verdict_of(model, rows, ['openvino'])
    assert found == (
        f'This processor has {instruction_set()}: openvino multiplies int8 3.1 times as fast as float32. Take the '
        f'recipe fast and openvino: 40.0 images per second at batch 4, 2.00 times as fast as rival.')
    rows = [timed('onnxruntime', 0.2, slow=2., rival=0.9), timed('slow', 0.4), timed('rival', 0.18)]
    found = verdict_of(model, rows, [])
    assert found.startswith(f'This processor has {instruction_set()}. Take rival where nothing but time counts: ')
    assert found.endswith('by onnxruntime, 20.0 images per second at batch 4, 0.90 times as fast as rival.')
    monkeypatch.setattr('sformer.execution.timing.int8_verdict', lambda engine: 'Integers gain nothing here.')
    assert verdict_of(model, rows, ['openvino']).startswith('Integers gain nothing here. Take rival')
    assert verdict_of(model, rows[1:], []) == f'This processor has {instruction_set()}.'


@pytest.mark.skipif(importlib.util.find_spec('openvino') is None, reason='no engine is here')
def test_neurons_that_engines_take_longer_for(model):
    assert slow_neurons(model)
    assert not slow_neurons(convert(source_of(model), [pixels(chans=1)[..., :8, :8]], recipe='fast'))
    executions, against = default_executions(model)
    assert executions == ['openvino', 'onnxruntime', 'openvino:fast', 'onnxruntime:fast']
    assert {'openvino:fp32', 'openvino:bf16', 'onnxruntime:fp32'} <= {*against} <= {*EXECUTIONS} - {*SPIKING}
