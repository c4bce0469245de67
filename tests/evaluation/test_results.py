"""Results files: what is kept, what is refused, and where they are written."""
import csv
import json
import math
import os
import sys

import pytest
import timm
from evaluation_tools import png

from sformer import SFormerError, evaluate, save_model
from sformer.cli import main
from sformer.evaluation import check_replaceable, check_results_file, write_results
from sformer.files import state_hash


def test_csv_keeps_rows_and_columns(model, tmp_path):
    path = tmp_path / 'sub' / 'r.csv'
    assert check_results_file(path) == 'csv' and not path.parent.exists()
    result = evaluate(model, 'digits', num_images=16)
    write_results(path, [result], 'csv')
    header = path.read_text().splitlines()[0].split(',')
    assert header[:9] == ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct',
                          'interpolation']
    assert {'weights_sha256', 'dataset_fingerprint', 'num_images', 'world_size', 'versions'} <= set(header)
    timm_file = tmp_path / 'timm.csv'
    timm_file.write_text('model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation,note\n'
                         '"a,b",81.5,18.5,95,5,22.05,224,0.9,bicubic,"kept, too"\n')
    write_results(timm_file, [result, result], 'csv')
    rows = list(csv.DictReader(open(timm_file, newline='')))
    assert len(rows) == 3 and rows[0]['model'] == 'a,b' and rows[0]['note'] == 'kept, too' and rows[0]['nll'] == ''
    assert float(rows[2]['top1']) == result['top1'] and rows[1]['note'] == ''
    assert json.loads(rows[1]['versions'])['timm'] == timm.__version__
    assert math.isclose(float(rows[1]['param_count']), result['param_count'])


def test_csv_with_many_unreadable_images(tmp_path):
    path = tmp_path / 'r.csv'
    for _ in range(2):
        write_results(path, [dict(model='m', top1=1., bad_images=['name' * 10] * 5000)], 'csv')
    assert len(path.read_text().splitlines()) == 3


def test_results_files_that_can_not_be(tmp_path):
    assert check_results_file(tmp_path / 'r') == 'json' and check_results_file(tmp_path / 'r.txt', 'csv') == 'csv'
    with pytest.raises(SFormerError, match="json or csv, not as 'xml'"):
        check_results_file(tmp_path / 'r.xml')
    with pytest.raises(SFormerError, match='is a folder'):
        check_results_file(tmp_path)
    rows, line = 'has rows with more or fewer fields', 'is no CSV file of results: its first line is'
    for text, message in (('a,b\n1,2\n', f"{line} 'a, b'"), ('model,top1\nx,1,2\n', rows), ('model,top1\nx\n', rows),
                          ('\x00\xff', 'is no CSV file of results: .utf-8'), ('model,top1,top1\n', line)):
        (tmp_path / 'foreign.csv').write_bytes(text.encode('latin-1'))
        with pytest.raises(SFormerError, match=f'foreign.csv {message}'):
            check_results_file(tmp_path / 'foreign.csv')
    assert {p.name for p in tmp_path.iterdir()} == {'foreign.csv'}


def result(model, dataset='digits', **others):
    return dict(model='m', top1=50., dataset=dataset, weights_sha256=state_hash(model.state_dict()), **others)


def test_csv_has_a_column_per_code_of_spikes(model, tmp_path):
    path = tmp_path / 'r.csv'
    evaluated = evaluate(model, 'digits', num_images=16)
    write_results(path, [evaluated], 'csv')
    row, = csv.DictReader(open(path, newline=''))
    for code, figure in evaluated['spikes_per_neuron'].items():
        assert float(row[f'spikes_{code}']) == figure
    assert float(row['activity']) == evaluated['activity'] and not {'activity_per_site', 'spikes_per_neuron'} & {*row}


@pytest.mark.parametrize('format', ['csv', 'json'])
def test_names_that_are_not_utf8(tmp_path, format):
    """File names are bytes; Python hands on those that it cannot decode as lone surrogates."""
    path, name = tmp_path / 'r', os.fsdecode(b'caf\xe9')
    results = [dict(model=name, top1=1., dataset=f'\u00fc/{name}', bad_images=[f'{name}.png: not an image'])]
    for _ in range(2):  # the second time beside what is there
        write_results(path, results, format)
        check_results_file(path, format)
    text = path.read_text(encoding='utf-8')
    assert r'caf\udce9' in text
    if format == 'csv':
        rows = [*csv.DictReader(text.splitlines())]
        assert len(rows) == 2 and rows[1]['dataset'] == r'ü/caf\udce9'
    else:
        assert json.loads(text) == results[0]


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such file names')
def test_images_and_folders_whose_names_are_not_utf8(model, tmp_path):
    folder = os.fsencode(tmp_path) + b'/caf\xe9'
    for label in range(10):
        os.makedirs(folder + b'/%d' % label)
        with open(folder + b'/%d/\xff.png' % label, 'wb') as f:
            f.write(png(90) if label else b'no image')
    evaluated = evaluate(model, os.fsdecode(folder), max_bad=1)
    assert len(evaluated['bad_images']) == 1
    for format in ('csv', 'json'):
        write_results(tmp_path / f'r.{format}', [evaluated], format)


@pytest.mark.parametrize('format', ['csv', 'json'])
def test_home_folder(tmp_path, monkeypatch, format):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert check_results_file(f'~/r.{format}') == format
    write_results(f'~/r.{format}', [dict(model='m', top1=1.)], format)
    assert (tmp_path / f'r.{format}').is_file() and not (tmp_path / '~').exists()
    with pytest.raises(SFormerError, match='~nobody-here/r.csv cannot be found: '):
        check_results_file('~nobody-here/r.csv')


@pytest.mark.parametrize('format', ['csv', 'json'])
@pytest.mark.parametrize('there', [False, True])
def test_links_stay(tmp_path, format, there):
    """The file that a link leads to is written, in its own folder, whether it is there or not."""
    target, link = tmp_path / 'results' / f'target.{format}', tmp_path / f'r.{format}'
    target.parent.mkdir()
    if there:
        write_results(target, [dict(model='old', top1=1.)], format)
    link.symlink_to(target)
    assert check_results_file(link) == format
    write_results(link, [dict(model='new', top1=2.)], format)
    assert link.is_symlink() and 'new' in target.read_text()
    assert ('old' in target.read_text()) == (there and format == 'csv')


def test_results_of_other_models_are_not_lost(model, coarse, tmp_path):
    path = tmp_path / 'r.json'
    check_replaceable(path, [model], 'digits')
    write_results(path, [result(model), result(coarse)])
    check_replaceable(path, [coarse, model], 'digits')
    for models, dataset, what in (([model], 'digits', 'other weights'), ([model, coarse], 'x', 'another data set')):
        with pytest.raises(SFormerError, match=f'r.json has a result of m with {what}.* Name another file'):
            check_replaceable(path, models, dataset)
    write_results(path, [result(model)])
    check_replaceable(path, [model, coarse], 'digits')


def test_command_line_and_results_of_other_models(model, coarse, tmp_path, capsys):
    """Refused before any image is read; the same model, or a run that is resumed, may replace its results."""
    path = tmp_path / 'r.json'
    folders = [str(save_model(m, tmp_path / name)) for m, name in ((model, 'a'), (coarse, 'b'))]

    def run(folder, *options):
        with pytest.raises(SystemExit) as done:
            main(['evaluate', folder, '--dataset', 'digits', '--num-images', '16', '--results-file', str(path),
                  *options])
        return done.value.code, json.loads(path.read_text())['weights_sha256']
    hashes = [state_hash(m.state_dict()) for m in (model, coarse)]
    assert run(folders[0]) == run(folders[0]) == (0, hashes[0])
    capsys.readouterr()
    assert run(folders[1]) == (1, hashes[0])
    line, = capsys.readouterr().err.splitlines()
    assert 'r.json has a result of ' in line and 'other weights' in line
    assert run(folders[1], '--resume') == (0, hashes[1])
