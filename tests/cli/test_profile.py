"""`sformer profile`."""
import csv
import json
import sys

import pytest

from sformer import save_model


def test_profile(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside(
        'profile', 'out', '--dataset', 'digits', '--split', 'test', '--num-images', '20', '-o', 'report')
    assert code == 0, err
    assert 'Logits are equal to those of graded spikes bit for bit' in out.replace('\n', ' ')
    assert '20 images of digits' in out and 'quantised' in out and 'By the literature' in out and 'ISSCC' in out
    assert max(len(line) for line in out.splitlines() if line[:4] in ('attn', 'mlp.', 'prod', 'tota')) <= 80
    result = json.loads((tmp_path / 'report' / 'profile.json').read_text())
    assert result['executed']['equal'] and result['executed']['images'] == 1
    assert {path.name for path in (tmp_path / 'report').iterdir()} == {
        'index.html', 'profile.json', 'operations.csv', 'sites.csv', 'floating.csv', 'energy.csv', 'activity.png',
        'levels.png', 'energy.png', 'maps.png'}
    assert result['images']['num_images'] == 20 and result['command'].startswith('sformer profile out --dataset digits')
    rows = list(csv.DictReader((tmp_path / 'report' / 'operations.csv').open()))
    assert [row['name'] for row in rows] == [o['name'] for o in result['operations']]
    assert float(rows[1]['synaptic_operations_unary']) == result['operations'][1]['synaptic_operations']['unary']
    assert len(list(csv.DictReader((tmp_path / 'report' / 'sites.csv').open()))) == len(result['sites'])
    rows = {row['part']: row for row in csv.DictReader((tmp_path / 'report' / 'energy.csv').open())}
    account = result['energy']['account']
    assert {row['part']: float(row['graded']) for row in rows.values()} == account['graded']
    assert float(rows['total']['quantised']) == account['quantised']['total']
    assert run_inside('profile', 'out', '--num-images', '1', '-o', 'report')[0] == 0, 'its own is replaced'
    assert json.loads((tmp_path / 'report' / 'profile.json').read_text())['images']['num_images'] == 1


def test_energies_for_programs_and_papers(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside('profile', 'out', '--num-images', '1', '--format', 'csv')
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0, err
    assert [*rows[0]] == ['part', 'quantised', 'quantised, skipping zeros', 'graded', 'binary', 'unary']
    assert sum(float(row['graded']) for row in rows[:6]) == pytest.approx(float(rows[6]['graded']))
    code, latex, _ = run_inside('profile', 'out', '--num-images', '1', '--format', 'latex')
    lines = latex.splitlines()
    assert code == 0 and lines[1] == r'\begin{tabular}{lrrrrr}' and lines[-1] == r'\end{tabular}'
    assert f'{float(rows[0]["graded"]):.4g}' in lines[5] and len(lines) == 6 + 9 + 1


def test_what_is_spiking(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, _ = run_inside('profile', 'out', '--num-images', '1', '--what-is-spiking')
    assert code == 0 and 'blocks.0.attn.products.0 QK^T' in ' '.join(out.split()) and ' NO' not in out


def test_reports_of_others_are_kept(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    (tmp_path / 'report').mkdir()
    (tmp_path / 'report' / 'sites.csv').write_text('mine')
    code, _, err = run_inside('profile', 'out', '--num-images', '1', '-o', 'report')
    assert code == 1 and 'report/sites.csv is there and holds no profile' in err and err.count('\n') == 1
    assert [(p.name, p.read_text()) for p in (tmp_path / 'report').iterdir()] == [('sites.csv', 'mine')]


def test_a_missing_package_is_noticed_before_the_work(run_inside, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    code, _, err = run_inside('profile', 'nothing', '-o', 'report')
    assert (code, err) == (1, "sformer: error: matplotlib is missing: pip install '.[pages]' in a clone of sformer.\n")


def test_report_that_cannot_be_written_is_noticed_before_the_work(run_inside, tmp_path, monkeypatch):
    monkeypatch.setattr('os.access', lambda path, mode: False)
    code, _, err = run_inside('profile', 'nothing', '-o', 'report')
    assert code == 1 and 'is read-only for you' in err and err.count('\n') == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, message', [
    (('nothing',), 'nothing'), (('vit_tiny_patch16_224', '--dataset', 'nowhere/'), 'vit_tiny'),
    (('out', '--dataset', 'nowhere/'), 'nowhere'), (('out', '--image-column', 'x'), "no columns, so 'x'"),
    (('out', '--constant', 'hop=1', '--num-images', '1'), "'hop'"), (('out', '--constants', 'none.json'), 'none.json'),
    (('out', '--curve', 'none.json'), 'none.json'),
    (('out', '-o', 'out/config.json', '--num-images', '1'), 'config.json')])
def test_bad_input(run_inside, model, tmp_path, args, message):
    save_model(model, tmp_path / 'out')
    code, _, err = run_inside('profile', *args)
    assert code != 0 and message in err and err.count('\n') == 1 and 'Traceback' not in err


def test_constants(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    (tmp_path / 'mine.json').write_text('{"weight_bit": 0}')
    code, out, err = run_inside(
        'profile', 'out', '--num-images', '1', '--constants', 'mine.json', '--constant', 'hops=0')
    assert code == 0, err
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line[:7] in ('weights', 'routing')}
    assert rows == dict(weights=['0'] * 5, routing=['0'] * 5) and 'given; the default is 1: hops' in out
