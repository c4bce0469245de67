"""`sformer baselines`, on the smallest network of the package."""
import csv
import json
import sys

import pytest
import timm
from conftest import NANO

from sformer import convert, save_model
from sformer.baselines import Comparison, comparison_rows
from sformer.data import ImageRequest

MEASURED = '--dataset', 'digits', '--split', 'test', '--num-images', '32', '--batch-size', '16'
FITTED = '--calibration', 'digits', '--calibration-split', 'train', '--num-calibration', '16'
ARGUMENTS = ('baselines', 'sformer_nano.digits', *MEASURED, *FITTED, '--levels', '8', '--timesteps', '2')


def test_rows_are_written_as_they_come_and_not_measured_again(run_inside, tmp_path, monkeypatch):
    args = (*ARGUMENTS, '--results-file', 'r.json', '--only', 'source', 'W8A8')
    code, out, err = run_inside(*args, '--format', 'csv')
    assert code == 0, err
    first = {row['baseline']: row for row in json.loads((tmp_path / 'r.json').read_text())['rows']}
    source, quantised, *_ = csv.DictReader(out.splitlines())
    assert first['source']['error'] == 0 == first['source']['drop'] and first['source']['agreement'] == 100
    assert source['baseline'] == 'source' and source['spikes_unary'] == source['account'] == ''
    assert float(quantised['account']) == first['W8A8']['account'] > 0 and 'spikes' not in first['W8A8']
    monkeypatch.setattr('sformer.baselines.rows.quantised', lambda *args: pytest.fail('measured again'))
    code, out, err = run_inside(*args, 'IF step', '--format', 'md')
    assert code == 0, err
    rows = {row['baseline']: row for row in json.loads((tmp_path / 'r.json').read_text())['rows']}
    assert rows['W8A8'] == first['W8A8']
    stepped = rows['IF step by step, T = 2']
    assert stepped['error'] > 0 and len(set(stepped['spikes'].values())) == 1 and stepped['coding'] == 'unary'
    names = [line.split(' | ')[0] for line in out.splitlines()[3:]]
    assert names[:2] == ['| source', '| W8A8'] and names[-1] == '| IF step by step, T = 2'
    assert 'IF step by step, T = 2: relative error' in err


def test_times_come_beside_figures(run_inside, tmp_path):
    args = (*ARGUMENTS, '--results-file', 'r.json', '--only', 'twin')
    assert run_inside(*args)[0] == 0
    before, = json.loads((tmp_path / 'r.json').read_text())['rows']
    code, out, err = run_inside(*args, '--pairs', '2')
    timed, = json.loads((tmp_path / 'r.json').read_text())['rows']
    assert code == 0 and before.items() < timed.items() and 'time /' in out, err
    assert timed['time_min'] <= timed['time'] <= timed['time_max'] and timed['timed_images'] == 16


@pytest.mark.slow
def test_all_rows_say_what_they_cost(run_inside, tmp_path):
    code, _, err = run_inside(*ARGUMENTS, '--results-file', 'r.json')
    assert code == 0, err
    rows = {row['baseline']: row for row in json.loads((tmp_path / 'r.json').read_text())['rows']}
    spikes = rows['SFN, N = 8']['spikes']
    assert spikes['unary'] > spikes['binary'] > spikes['graded'] > 0
    assert rows['IF layer-synchronous = MTN, T = 2']['unequal'] < 1e-6
    assert all(row['error'] > 0 for name, row in rows.items() if name != 'source') and len(rows) >= 10


def test_a_plain_network_without_classes(run_inside, tmp_path):
    """Its tokens are compared; no labels are read."""
    source = timm.create_model('vit_tiny_patch16_224', **dict(NANO, depth=1, num_classes=0)).eval()
    save_model(convert(source, 'digits', split='train', num_images=16), tmp_path / 'out')
    code, out, err = run_inside('baselines', 'out', '--dataset', 'dead-leaves', '--num-images', '8', '--levels', '8',
                                '--num-calibration', '8', '--only', 'W8A8', '--format', 'csv')
    rows = [*csv.DictReader(out.splitlines())]
    assert code == 0 and len(rows) == 1 and 0 < float(rows[0]['error']) < 1 and rows[0]['top1'] == '', err


def test_no_image_is_fitted_to_and_measured_on(model):
    wanted = ImageRequest(dataset='digits', split='test', num_images=200, seed=3)
    bench = Comparison(model, wanted, wanted, batch_size=50)
    fitted, measured = ({image.numpy().tobytes() for batch in batches for image in batch}
                        for batches in (bench.calibration, bench.batches))
    assert len(fitted) > 190 < len(measured) and not fitted & measured
    assert sum(map(len, bench.batches)) == len(bench.labels) == 200
    assert bench.measure('source', comparison_rows((), ())['source'](model, bench.calibration))['top1'] > 30


def test_a_toolkit_that_is_missing_is_named(run_inside, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    code, out, err = run_inside(*ARGUMENTS, '--only', 'source', 'W8A8, torchao')
    assert code == 0 and "torchao is missing: pip install '.[baselines]'" in out, err


def test_figures_of_other_images_are_no_part_of_a_table(run_inside, tmp_path):
    args = (*ARGUMENTS, '--results-file', 'r.json')
    assert run_inside(*args, '--only', 'source')[0] == 0
    before = (tmp_path / 'r.json').read_bytes()
    for more, message in ((('--seed', '1'), 'rows with another seed'), (('--only', 'nothing'), 'no row begins with')):
        code, _, err = run_inside(*args, *more)
        assert code == 1 and message in err and err.count('\n') == 1
    assert (tmp_path / 'r.json').read_bytes() == before
