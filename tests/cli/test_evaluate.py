"""`sformer evaluate` and `sformer compare`."""
import csv
import gc
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
from cli_process import assert_mistake
from evaluation_tools import class_folders, png

from sformer.evaluation import Journal


def test_evaluate_options(run, saved):
    result = run('evaluate', saved, '--dataset', 'digits', '--split', 'train', '--num-images', 30, '--no-source')
    assert (result.code, result.err) == (0, '')
    assert '30 images of digits (train)' in result.out and 'source' not in result.out


@pytest.mark.filterwarnings('always::ResourceWarning')
def test_no_file_is_left_open(run, saved, tmp_path, recwarn):
    class_folders(tmp_path / 'images', [str(i) for i in range(10)])
    out = tmp_path / 'r.csv'
    assert run('evaluate', saved, '--dataset', tmp_path / 'images', '--results-file', out).code == 0 and out.exists()
    gc.collect()
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]


def test_evaluate_by_name(run_apart):
    result = run_apart('evaluate', 'sformer_nano.digits', '--dataset', 'digits')
    assert (result.code, result.err) == (0, '') and re.search(r'top-1 9[7-9]\.\d\d %', result.out)


@pytest.mark.parametrize('args, message', [
    (['{files}/empty', '--dataset', 'digits'], 'empty has no config.json'),
    (['{files}/nowhere', '--dataset', 'digits'], 'is no folder'),
    (['local-dir:{files}/nowhere', '--dataset', 'digits'], 'is no folder'),
    (['{files}/digits.safetensors', '--dataset', 'digits'], 'digits.safetensors does not say which timm model it'),
    (['sformer_tiny', '--dataset', 'digits'], 'sformer_tiny'),
    (['no_such_model', '--dataset', 'digits'], "no model 'no_such_model'"),
    (['{saved}', '--dataset', 'no/such/dataset'], "'no/such/dataset' is not a folder"),
    (['{saved}', '--dataset', '{files}/empty'], 'no images'),
    (['{saved}', '--dataset', 'dead-leaves'], 'no labels'),
    (['{saved}', '--dataset', 'digits', '--split', 'val'], "no split 'val'"),
    (['{saved}', '--dataset', 'digits', '--num-images', '541'], '541 images asked for'),
    (['{saved}', '--dataset', 'digits', '--amp-dtype', 'int3'], "--amp-dtype is bfloat16 or float16, not 'int3'"),
    (['{saved}', '--dataset', 'digits', '--device', 'meta'], 'meta'),
    (['{saved}', '--dataset', 'digits', '--num-images', '0'], "'--num-images'"),
    (['{saved}', '--dataset', 'digits', '--batch-size', '0'], "'--batch-size'"),
    (['{saved}', '--dataset', 'digits', '--workers', '-1'], "'--workers'"),
    (['{saved}', '--dataset', 'digits', '--num-images', '1e20'], "'--num-images'.* integer"),
    (['{saved}', '--dataset', 'digits', '--num-images', f'{10 ** 20}'], "'--num-images'"),
    (['{saved}', '--dataset', 'digits', '--batch-size', f'{10 ** 20}'], "'--batch-size'"),
    (['{saved}', '--dataset', 'digits', '--img-size', f'{10 ** 9}'], "'--img-size'"),
    (['{saved}', '--dataset', 'digits', '--seed', f'{10 ** 20}'], "'--seed'"),
    (['{saved}', '--dataset', 'digits', '--timeout', '1e20'], "'--timeout'"),
    (['{saved}', '--dataset', 'digits', '--timeout', 'nan'], '--timeout'),
    (['timm/vit_tiny_patch16_224', '--dataset', 'digits'], 'A model on the Hub is hf-hub:timm/vit_tiny_patch16_224'),
    (['{saved}', '--dataset', 'digits', '--image-column', 'x'], "no columns, so 'x'"),
], ids=lambda v: ' '.join(v[:1] + v[2:]) if isinstance(v, list) else '')
def test_bad_options_of_evaluate(run, files, saved, args, message):
    assert_mistake(run('evaluate', *(a.format(files=files, saved=saved) for a in args)), message)


def test_results_do_not_take_the_place_of_other_files(run, saved, tmp_path):
    config, mine, pipe = saved / 'config.json', tmp_path / 'mine.json', tmp_path / 'pipe'
    before = config.read_bytes()
    mine.write_text('{"mine": 1}')
    os.mkfifo(pipe)
    for path, message in ((config, 'part of a model'), (mine, 'holds no results'), (pipe, 'no regular file')):
        assert_mistake(run('evaluate', saved, '--dataset', 'digits', '--results-file', path), message, 1)
    assert config.read_bytes() == before and mine.read_text() == '{"mine": 1}' and pipe.is_fifo()


def test_evaluate_of_an_uncalibrated_model(run, tmp_path):
    """A folder in timm's format whose weights were never converted."""
    model = timm.create_model('sformer_nano', img_size=8, in_chans=1, num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path / 'x'), safe_serialization=True)
    assert_mistake(run('evaluate', tmp_path / 'x', '--dataset', 'digits'), 'uncalibrated', 1)


def test_results_file_that_can_not_be_written(run, saved, files):
    for path in (files / 'empty', files / 'file' / 'r.json', '/proc/sformer/r.json'):
        result = run('evaluate', saved, '--dataset', 'digits', '--num-images', 3, '--results-file', path)
        assert result.code == 1 and len(result.err.splitlines()) == 1 and 'Traceback' not in result.err
        assert str(path) in result.err or str(Path(path).parent) in result.err
        assert '.writing-' not in result.err, 'a temporary name tells the user nothing'


def test_home_folder(run_here, saved, tmp_path, monkeypatch):
    """Where the shell leaves `~` as it is: in quotes, and behind an equals sign."""
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copytree(saved, tmp_path / 'mine')
    result = run_here('evaluate', '~/mine', '--dataset', 'digits', '--num-images', 8, '--results-file=~/r.json')
    assert result.code == 0, result.err
    assert json.loads((tmp_path / 'r.json').read_text())['model'] == str(tmp_path / 'mine')


def test_ctrl_c_keeps_what_was_counted(run_here, saved, tmp_path, monkeypatch):
    """And says so; without a results file there is nothing to keep, and nothing is said."""
    args = ['evaluate', saved, '--dataset', 'digits', '--batch-size', 64]
    expected = run_here(*args, '--results-file', tmp_path / 'whole.json')
    assert expected.code == 0
    added, add = [], Journal.add

    def interrupted(journal, record):
        add(journal, record)
        added.append(record)
        if len(added) == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Journal, 'add', interrupted)
        result = run_here(*args, '--results-file', tmp_path / 'r.json')
    assert result.code == 130 and 'error: interrupted. The same command with --resume continues.' in result.err
    assert not (tmp_path / 'r.json').exists()
    assert run_here(*args, '--results-file', tmp_path / 'r.json', '--resume').code == 0
    whole, resumed = (json.loads((tmp_path / name).read_text()) for name in ('whole.json', 'r.json'))
    assert all(resumed[key] == whole[key] for key in ('top1', 'nll', 'agreement', 'activity', 'num_images'))

    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr('sformer.saving.folders.load_classifier', interrupt)
    for options in ([], ['--results-file', tmp_path / 'other.json']):
        result = run_here(*args, *options)
        assert result.code == 130 and result.err.rstrip().endswith('error: interrupted.')


def test_what_is_passed_over_is_shown_and_recorded(run_here, saved, tmp_path):
    folder = Path(class_folders(tmp_path / 'images', [str(i) for i in range(10)]))
    for name in ('.DS_Store', '3/notes.txt', 'beside.png'):
        (folder / name).write_bytes(png(0))
    result = run_here('evaluate', saved, '--dataset', folder, '--results-file', tmp_path / 'r.json')
    assert (result.code, result.err) == (0, '')
    assert ('passed over: 3 files or folders that are no labelled images (.DS_Store, 3/notes.txt, beside.png)'
            in result.out)
    recorded = json.loads((tmp_path / 'r.json').read_text())
    assert recorded['num_images'] == 10
    assert (recorded['num_passed_over'], recorded['passed_over']) == (3, ['.DS_Store', '3/notes.txt', 'beside.png'])
    assert 'passed over' not in run_here('evaluate', saved, '--dataset', 'digits', '--num-images', 4).out


# comparison -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def launched(monkeypatch, run_here, caplog):
    """Evaluates with variables that a launcher sets, and without others."""
    def launched(**environment):
        caplog.clear()
        with monkeypatch.context() as patch:
            for key in ('WORLD_SIZE', 'RANK', 'MASTER_PORT', 'ACCELERATE_MIXED_PRECISION', 'SLURM_NTASKS'):
                patch.delenv(key, raising=False)
            for key, value in environment.items():
                patch.setenv(key, value)
            result = run_here('evaluate', 'sformer_nano.digits', '--dataset', 'digits', '--num-images', 9)
        return result.code, result.err, [record.getMessage() for record in caplog.records]
    return launched


def test_accelerate_launch_that_starts_one_process_for_two(launched):
    """The environment that `accelerate launch --cpu --num_processes 2` makes."""
    import argparse

    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env
    args = launch_command_parser().parse_args(['--cpu', '--num_processes', '2', '-m', 'sformer'])
    defaults = dict(
        num_machines=1, mixed_precision='no', dynamo_backend='no', use_cpu=True, num_cpu_threads_per_process=1)
    _, env = prepare_simple_launcher_cmd_env(argparse.Namespace(**{**vars(args), **defaults}))
    keys = ('ACCELERATE_MIXED_PRECISION', 'MASTER_ADDR', 'MASTER_PORT')
    code, err, _ = launched(**{key: env[key] for key in keys})
    assert code == 1 and re.search('accelerate launch was asked for several processes .* torchrun', err)


def test_mpirun(launched):
    code, err, _ = launched(OMPI_COMM_WORLD_SIZE='2')
    assert code == 1 and 'mpirun starts processes that do not know where to meet: use torchrun' in err
    assert launched(OMPI_COMM_WORLD_SIZE='1') == (0, '', [])


def test_slurm_without_a_launcher(launched):
    """`srun -n 4 sformer ...` starts four processes that do the same work."""
    code, err, (line,) = launched(SLURM_NTASKS='4')
    assert (code, err) == (0, '') and line.startswith('SLURM_NTASKS is 4') and 'torchrun' in line
    assert launched(SLURM_NTASKS='4', SLURM_PROCID='3') == launched(SLURM_NTASKS='1') == (0, '', [])
    assert launched(SLURM_NTASKS='4', WORLD_SIZE='1') == (0, '', [])


@pytest.fixture
def long_name(saved, tmp_path):
    """A folder with a name that is wider than its column, in the words of other tools' markup."""
    return shutil.copytree(saved, tmp_path / '[bold]a-name-that-is-longer-than-any-column-of-a-table-of-eight-columns')


def test_comparison_fits_into_80_columns(run_here, saved, long_name, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.chdir(long_name.parent)
    result = run_here('compare', saved, long_name.name, 'sformer_nano.digits', '--dataset', 'digits', '--num-images', 9)
    assert (result.code, result.err) == (0, '')
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80 and '9 images of digits (test)' in lines[0]
    names = ''.join(line.split()[0] for line in lines[5:] if line.strip())
    assert names == f'{saved}{long_name.name}sformer_nano.digits', 'a name is cut'
    rows = [line.split()[1:] for line in lines[5:] if len(line.split()) > 1]
    assert [len(row) for row in rows] == [6] * 3 and rows[0][:5] == rows[1][:5]
    assert all(re.fullmatch(r'\d+\.\d+', number) for row in rows for number in row)


def test_comparison_as_csv(run_here, saved, long_name, tmp_path):
    args = ['compare', saved, long_name, '--dataset', 'digits', '--num-images', 50, '--format', 'csv',
            '--results-file', tmp_path / 'r.json']
    result = run_here(*args)
    assert result.code == 0 and str(tmp_path / 'r.json') in result.err
    rows, values = list(csv.DictReader(io.StringIO(result.out))), json.loads((tmp_path / 'r.json').read_text())
    assert [row['model'] for row in rows] == [str(saved), str(long_name)]
    for row, value in zip(rows, values, strict=True):
        for key in ('top1', 'top5', 'ece', 'source_top1', 'agreement', 'activity', 'relative_logit_error'):
            assert float(row[key]) == value[key], key


def test_evaluate_and_compare_take_the_same_options(run_here):
    options = [set(re.findall(r'^│ (?:\* )? *(--[\w-]+)', run_here(name, '--help').out, re.MULTILINE))
               for name in ('evaluate', 'compare')]
    assert options[1] - options[0] == {'--format'} and not options[0] - options[1]
    assert {'--dataset', '--batch-size', '--amp', '--amp-dtype', '--resume', '--timeout', '--streaming'} <= options[0]
    for name in ('evaluate', 'compare'):
        assert run_here(name, '--help').out.count('--batch-size') == 1
