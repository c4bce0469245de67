"""scripts/baselines.py, on the smallest network of the package."""
import importlib
import json
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:  # scripts import one another
    patch.syspath_prepend(Path(__file__).parents[1] / 'scripts')
    script = importlib.import_module('baselines')

ROWS = ['source', 'SFN, N = 8', 'W8A8', 'IF layer-synchronous = MTN, T = 2', 'IF step by step, T = 2']


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'ROWS', {name: script.ROWS[name] for name in ROWS})

    def run(**kwargs):
        options = dict(num_images=16, num_test=32, batch_size=4, rounds=2)
        script.main('sformer_nano.digits', 'digits', tmp_path / 'out.json', **options | kwargs)
        return json.loads((tmp_path / 'out.json').read_text())['sformer_nano.digits']['rows']
    return run


def test_rows_are_written_as_they_come_and_not_measured_again(run, tmp_path, monkeypatch, capsys):
    first = run(only=['source', 'W8A8'])
    assert [name for name, row in first.items() if row] == ['source', 'W8A8']
    assert first['source']['error'] == 0 == first['source']['drop'] and first['source']['agreement'] == 100
    assert 'spikes' not in first['W8A8'] and first['W8A8']['account'] > 0
    monkeypatch.setitem(script.ROWS, 'W8A8', None)  # nobody calls it again
    rows = run(only=['W8A8', 'IF step'])
    assert rows['W8A8'] == first['W8A8']
    stepped = rows['IF step by step, T = 2']
    assert stepped['error'] > 0 and len(set(stepped['spikes'].values())) == 1 and stepped['coding'] == 'unary'
    table = (tmp_path / 'out.sformer_nano.digits.md').read_text()
    assert [line.split(' | ')[0] for line in table.splitlines()[2:]] == ['| source', '| W8A8', f'| {ROWS[-1]}']
    assert 'IF step by step' in capsys.readouterr().out


@pytest.mark.slow
def test_all_rows_say_what_they_cost(run):
    rows = run()
    spikes = rows['SFN, N = 8']['spikes']
    assert spikes['unary'] > spikes['binary'] > spikes['graded'] > 0
    assert rows['IF layer-synchronous = MTN, T = 2']['unequal'] < 1e-6
    assert all(rows[name]['error'] > 0 for name in ROWS[1:])


@pytest.mark.slow
def test_timings_come_beside_figures(run):
    before = run(only=['source'])
    rows = run(only=['source', 'W8A8'], timings=True)
    timing = rows['source'].pop('timing')
    assert rows['source'] == before['source']
    assert timing['time_min'] <= timing['time'] <= timing['time_max'] and timing['images'] == 4
    assert list(rows['W8A8']) == ['timing']


def test_figures_of_other_images_are_no_part_of_a_table(run):
    run(only=['source'])
    with pytest.raises(SystemExit, match='name another file'):
        run(only=['source'], seed=1)


def test_a_toolkit_that_is_missing_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    name = 'W8A8, torchao (linear layers)'
    monkeypatch.setitem(script.ROWS, name, lambda source, batches: script.Built(
        script.baselines.torchao_int8(source)))
    assert not run(only=['source', name]).get(name)
    assert "pip install '.[baselines]'" in capsys.readouterr().out
