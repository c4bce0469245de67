"""`sformer sweep`, `search` and `distill`."""
import csv
import json
import re
import signal
import sys

import pytest
import torch
from layer_tools import same_state

from sformer import load_model, save_model

DIGITS = '--dataset', 'digits', '--split', 'train', '--num-images', '16', '--num-calibration', '16'


def test_sweep(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside('sweep', 'out', *DIGITS, '--levels', '4', '20', '--results-file', 'r/sweep.json')
    assert code == 0, err
    result = json.loads((tmp_path / 'r' / 'sweep.json').read_text())
    few, many = result['points']
    assert [p['config']['levels'] for p in (few, many)] == [4, 20]
    assert few['error'] > many['error'] and few['activity'] < many['activity']
    assert f'{few["error"]:.4f}' in out and result['images']['num_images'] == 16 and result['seconds'] > 0
    assert result['forward_passes'] == 16 + 2 * (16 + 16)


def test_points_as_csv(run_inside, model, tmp_path):
    """JSON was written into a file that ends in .csv."""
    save_model(model, tmp_path / 'out')
    for levels in ('4', '20'):
        code, _, err = run_inside('sweep', 'out', *DIGITS, '--levels', levels, '--results-file', 'sweep.csv')
        assert code == 0, err
    with open(tmp_path / 'sweep.csv', newline='') as file:
        few, many = csv.DictReader(file)
    assert (few['levels'], many['levels']) == ('4', '20')
    assert (few['fire'], few['model'], few['dataset']) == ('auto', 'out', 'digits')
    assert float(few['error']) > float(many['error']) and few['num_images'] == '16' and few['origin'] == 'sweep'


def test_points_in_formats(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside('sweep', 'out', *DIGITS, '--levels', '4', '--format', 'csv', '--results-file', 'p.csv')
    assert code == 0 and out == (tmp_path / 'p.csv').read_text() and 'written to p.csv' in err
    code, out, _ = run_inside('sweep', 'out', *DIGITS, '--levels', '4', '--format', 'md')
    comment, heads, _, row = out.splitlines()
    assert code == 0 and comment.startswith('<!-- out: 16 images of digits') and heads.count('|') == row.count('|') == 9
    assert row.startswith('| 4 | ')


@pytest.mark.parametrize('command', ['sweep', 'search'])
def test_files_of_others_stay(run_inside, model, tmp_path, command):
    if command == 'search':
        pytest.importorskip('optuna')
    save_model(model, tmp_path / 'out')
    (tmp_path / 'eval.json').write_text('{"model": "out", "top1": 97.0}')
    (tmp_path / 'eval.csv').write_text('model,top1\nout,97.0\n')
    (tmp_path / 'other.json').write_text('{"model": "another", "points": [], "forward_passes": 0}')
    (tmp_path / 'notes').write_text('mine')
    (tmp_path / 'link.json').symlink_to('eval.json')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    for file, message in (
            ('eval.json', 'is there and holds no points of a sweep or search'), ('link.json', 'is there and holds no'),
            ('eval.csv', 'is there and holds no'), ('notes', 'is there and holds no'),
            ('other.json', 'has results of another, which would be lost'),
            ('out/config.json', 'is there and holds no points'),
            ('out/model.safetensors', 'ends in .json or .csv'), ('points.txt', 'ends in .json or .csv')):
        code, _, err = run_inside(command, 'out', *DIGITS, '--results-file', file)
        assert code == 1 and message in err and err.count('\n') == 1, (file, err)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    load_model(tmp_path / 'out')


def test_points_replace_those_of_the_same_model(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    (tmp_path / 'real.json').write_text('{"model": "out", "points": [], "forward_passes": 0}')
    (tmp_path / 'link.json').symlink_to('real.json')
    code, _, err = run_inside('sweep', 'out', *DIGITS, '--levels', '4', '--results-file', 'link.json')
    assert code == 0, err
    assert (tmp_path / 'link.json').is_symlink()
    assert len(json.loads((tmp_path / 'real.json').read_text())['points']) == 1


def test_search(run_inside, model, tmp_path):
    pytest.importorskip('optuna')
    save_model(model, tmp_path / 'out')
    args = 'search', 'out', *DIGITS, '--budget', '5', '--storage', 'trials', '--results-file', 'search.json'
    code, out, err = run_inside(*args)
    assert code == 0, err
    result = json.loads((tmp_path / 'search.json').read_text())
    assert len(result['points']) == 5 and result['recommended'] in result['points']
    assert all(point in result['points'] for point in result['front'])
    assert 'recommended' in out and 'lambda alone' in out and '5 trials' in out
    code, out, _ = run_inside(*args)  # all trials are in the journal
    assert code == 0 and json.loads((tmp_path / 'search.json').read_text())['points'] == result['points']


def test_distill(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside('distill', 'out', '--dataset', 'digits', '--split', 'train', '--num-images', '40',
                                '--steps', '3', '--batch-size', '16', '-o', 'trained')
    assert code == 0, err
    assert 'step 3: relative error' in out
    trained = load_model(tmp_path / 'trained')
    assert trained.conversion.changed and trained.conversion.distillation.startswith('3 steps of 16 of 40 images')
    assert 'sformer distill out --dataset digits' in trained.conversion.distillation
    code, out, err = run_inside('distill', 'trained', '--dataset', 'digits', '--split', 'train', '--num-images', '40',
                                '--steps', '2', '--batch-size', '16', '-o', 'more', '--source-model', 'out', '--amp')
    assert code == 0 and 'step 2: relative error' in out, err


@pytest.mark.parametrize('storage, message', [
    (('--storage', 'trials.log'), 'error: interrupted. The same command continues.\n'), ((), 'interrupted')])
def test_a_search_that_is_interrupted(run_inside, model, tmp_path, monkeypatch, storage, message):
    pytest.importorskip('optuna')

    def interrupt(*args):
        raise KeyboardInterrupt
    save_model(model, tmp_path / 'out')
    monkeypatch.setattr('sformer.conversion.search.search', interrupt)
    code, out, err = run_inside('search', 'out', *DIGITS, *storage)
    assert (code, out) == (130, '') and message in err and ('same command' in err) == bool(storage)


TRAINED = ('distill', 'out', '--dataset', 'digits', '--split', 'train', '--num-images', '40', '--steps', '6',
           '--batch-size', '16', '--learning-rate', '0.001', '-o', 'trained')


@pytest.fixture
def interrupted(run_inside, model, tmp_path, monkeypatch):
    """`distill`, ended by Ctrl-C in its third step."""
    save_model(model, tmp_path / 'out')
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def clip_and_interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return clip(*args)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, 'clip_grad_norm_', clip_and_interrupt)
        result = run_inside(*TRAINED)
    assert result == (130, '', 'sformer: error: interrupted. The same command with --resume continues.\n')
    assert [path.name for path in (tmp_path / 'trained').iterdir()] == ['training.safetensors']
    return run_inside


def test_distill_goes_on_where_it_was_interrupted(interrupted, tmp_path):
    code, _, err = interrupted(*TRAINED)
    assert code == 1 and err == ('sformer: error: trained has the state of a training that was ended: --resume '
                                 'continues it, --overwrite starts over.\n')
    code, _, err = interrupted(*TRAINED, '--resume', '--price', '0.5')
    assert code == 1 and 'with other data or options' in err
    code, resumed, err = interrupted(*TRAINED, '--resume')
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / 'trained').iterdir()) == ['config.json', 'model.safetensors']
    code, whole, _ = interrupted(*TRAINED[:-1], 'whole')
    assert code == 0 and resumed.partition('trained for')[0] == whole.partition('trained for')[0] != ''
    assert re.search(r'trained for \d+ s, from relative error 0\.\d{4}, \d+\.\d{3} unary spikes', whole)
    models = [load_model(tmp_path / name) for name in ('trained', 'whole')]
    assert same_state(models[0], models[1].state_dict())
    assert models[0].conversion.distillation.endswith('--resume')


def test_distill_starts_over(interrupted, tmp_path):
    code, _, err = interrupted(*TRAINED, '--overwrite', '--steps', '2')
    assert code == 0 and load_model(tmp_path / 'trained').conversion.distillation.startswith('2 steps'), err
    assert not (tmp_path / 'trained' / 'training.safetensors').exists()


def test_missing_optuna_is_named_before_the_work(run_inside, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    code, _, err = run_inside(
        'search', 'nothing', *DIGITS, '--storage', 'a/trials.json', '--results-file', './a/trials.json')
    assert code == 1 and 'cannot be both --storage and --results-file' in err
    code, _, err = run_inside('search', 'nothing', *DIGITS, '--storage', 'a/trials')
    assert code == 1 and err == "sformer: error: optuna is missing: pip install '.[search]' in a clone of sformer.\n"
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('args, message', [
    (('sweep', 'out', *DIGITS, '--levels', '200'), 'levels must be'),
    (('sweep', 'out', '--dataset', 'digits', '--num-images', '4', '--num-calibration', '5000'), 'has only 1257'),
    (('sweep', 'out', *DIGITS, '--results-file', 'out'), 'out is a folder'),
    (('search', 'out', *DIGITS, '--spikes', 'few'), '--spikes is'),
    (('search', 'out', *DIGITS, '--budget', '2'), 'budget'),
    (('distill', 'out', '--dataset', 'digits', '-o', 'out'), 'out'),
    (('distill', 'out', '--dataset', 'digits', '-o', 'new', '--num-images', '4'), 'fewer than a batch')])
def test_bad_input(run_inside, model, tmp_path, args, message):
    save_model(model, tmp_path / 'out')
    code, _, err = run_inside(*args)
    assert code != 0 and message in err and err.count('\n') == 1 and 'Traceback' not in err
    assert not (tmp_path / 'new').exists()
