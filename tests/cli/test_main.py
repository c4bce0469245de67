"""What holds for all commands: help, versions, mistakes, output, and what they wait for."""
import io
import json
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from cli_process import NAME, SCRIPT, Result, assert_mistake
from evaluation_tools import write_digits

import sformer
from sformer import cli, neurons
from sformer.cli import list_models
from sformer.cli.failure import is_command

# processes of their own have the package that is tested here
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(sformer.__file__).parents[1]))


def test_help(run):
    for args in (['--help'], ['convert', '--help'], ['evaluate', '--help'], ['list', '--help'], ['demo', '--help']):
        result = run(*args)
        assert (result.code, result.err) == (0, '') and 'Usage: ' in result.out
    assert '--attention-fire' in run('convert', '--help').out


@pytest.mark.parametrize('args, code', [
    (['--help'], 0), (['convert', '--help'], 0), (['detect', 'train', '--help'], 0), (['--version'], 0), (['list'], 0),
    (['transmogrify'], 2), (['evaluate', 'x', '--datset', 'y'], 2), (['convert', 'x', '-o', 'y', '--crop-pct', '2'], 2),
    (['convert', 'x', '-o', 'y', '--levels', '200'], 1), (['sweep', 'x', '--silence', '-1'], 1)], ids=str)
def test_help_and_mistakes_of_typing_wait_for_no_torch(args, code, tmp_path):
    """Neither as a module nor, of which the first case is enough, as installed."""
    for start in [['-m', 'sformer']] + ([[str(SCRIPT)]] if args == ['--help'] and SCRIPT.exists() else []):
        done = subprocess.run([sys.executable, '-X', 'importtime', *start, *args], env=ENVIRONMENT, cwd=tmp_path,
                              capture_output=True, text=True)
        loaded = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
        assert done.returncode == code and 'sformer.cli.app' in loaded, done.stderr
        assert not {'torch', 'timm', 'torchvision', 'numpy', 'datasets'} & loaded


@pytest.mark.parametrize('argv, args, expected', [
    (['-m', 'list'], ['python', '-u', '-m', 'sformer', 'list'], True),
    (['-m', 'list'], ['python', '-m', 'sformer.data', 'list'], False),
    (['x.py', '-m', 'sformer'], ['python', 'x.py', '-m', 'sformer'], False),
    ([str(SCRIPT), 'list'], [], True),
    (['here/link/sformer', 'list'], [], True),  # as pipx makes them
    (['here/sformer', 'list'], [], False),
    ([str(Path(sformer.__file__).with_name('__main__.py'))], [], True),  # a worker that is spawned
    ([''], ['python'], False), ([], [], False)])
def test_what_is_a_command(argv, args, expected, tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here' / 'sformer').touch()
    (tmp_path / 'here' / 'link').symlink_to(SCRIPT.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', argv)
    monkeypatch.setattr(sys, 'orig_argv', args)
    assert is_command() == expected


def test_versions(run):
    result = run('--version')
    assert (result.code, result.err) == (0, '')
    assert result.out == ', '.join(f'{name} {metadata.version(name)}' for name in ('sformer', 'torch', 'timm')) + '\n'


def test_names_that_are_not_there():
    for module in (sformer, neurons):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'convrt'"):
            _ = module.convrt


def test_importing_the_package_registers_its_models(tmp_path):
    """Whatever the command line leaves out; even in a script that has its name. What is slow to load waits, and what
    was said to its logger before is not forgotten then."""
    folder = write_digits(tmp_path, 1, 10)
    (tmp_path / 'sformer').write_text(
        "import logging, sys, sformer, sformer.data\n"
        "logging.getLogger('datasets').setLevel(logging.CRITICAL)\n"
        "print(*{'datasets', 'pyarrow', 'matplotlib', 'rich'} & set(sys.modules))\n"
        "import timm, torchvision\n"
        "assert timm.is_model('sformer_nano') and 'sformer_maskrcnn_vit_tiny_patch16_224' in "
        "torchvision.models.list_models()\n"
        "assert {*sformer.__all__} <= {*dir(sformer)} and {*sformer.neurons.__all__} <= {*dir(sformer.neurons)}\n"
        "assert all(getattr(sformer, name) for name in sformer.__all__)\n"
        "assert all(hasattr(sformer.neurons, name) for name in sformer.neurons.__all__)\n"
        "assert sformer.baselines.quantised and sformer.detection.load_detector\n"
        "assert not hasattr(sformer, 'nothing') and not hasattr(sformer.neurons, 'nothing')\n"
        "assert 'datasets' not in sys.modules\n"
        f"sformer.data.open_images({folder!r}, data_config=dict(input_size=(1, 8, 8), mean=(.5,), std=(.5,)))\n"
        "assert 'datasets' in sys.modules and logging.getLogger('datasets').level == logging.CRITICAL\n")
    done = subprocess.run([sys.executable, str(tmp_path / 'sformer'), 'evaluate'], capture_output=True,
                          env=dict(ENVIRONMENT, HF_HOME=str(tmp_path / 'home')))
    assert (done.returncode, done.stdout, done.stderr) == (0, b'\n', b'')


def test_names_that_the_terminal_cannot_show(model, tmp_path, monkeypatch, capsys):
    folder = sformer.save_model(model, tmp_path / 'модель')
    terminal = io.TextIOWrapper(io.BytesIO(), 'ascii')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'stdout', terminal)
    with pytest.raises(SystemExit) as done:
        cli.main(['compare', folder.name, 'sformer_nano.digits', '--dataset', 'digits', '--num-images', '8'])
    shown = terminal.buffer.getvalue().decode()
    assert (done.value.code, capsys.readouterr().err) == (0, '') and r'\u043c' in shown and '8 images' in shown


@pytest.mark.parametrize('args', [['--version'], ['list', '--format', 'csv']])
def test_output_that_is_read_in_part(args, capsys, monkeypatch, tmp_path):
    """As by `sformer list | head`: no complaint, and none when the interpreter flushes."""
    monkeypatch.setattr(list_models, 'KNOWN', tmp_path / 'many.json')
    (tmp_path / 'many.json').write_text(json.dumps(dict(models=[dict(input_size=(1, 8, 8))] * 999, others=[])))
    read, write = os.pipe()
    os.close(read)
    with open(write, 'w') as stdout:
        monkeypatch.setattr(sys, 'stdout', stdout)
        with pytest.raises(SystemExit) as done:
            cli.main(args)
        sys.stdout.flush()
    assert done.value.code == 1 and capsys.readouterr().err == ''


def test_no_arguments_show_the_help(run_apart):
    result = run_apart()
    assert result.code == 2 and 'Traceback' not in result.err
    assert 'Usage: ' in result.out + result.err and 'convert' in result.out + result.err


def test_entry_points(capsys, monkeypatch):
    """`sformer` and `python -m sformer`."""
    installed, = metadata.entry_points(group='console_scripts', name='sformer')
    for start in (installed.load(), lambda: runpy.run_module('sformer', run_name='__main__')):
        monkeypatch.setattr(sys, 'argv', ['sformer', 'convert', 'vit_tiny_patch16_22', '-o', 'x'])
        with pytest.raises(SystemExit) as done:
            start()
        assert_mistake(Result(done.value.code, *capsys.readouterr()), 'Did you mean vit_tiny_patch16_224', 1)


@pytest.mark.parametrize('args, message', [
    (['convert'], 'SOURCE|source'), (['convert', NAME], 'output'), (['evaluate'], 'MODEL|model'),
    (['evaluate', 'x'], 'dataset'), (['transmogrify'], 'transmogrify'), (['--frob'], '--frob')])
def test_usage(run, args, message):
    assert_mistake(run(*args), message, 2)


@pytest.mark.parametrize('args', [
    ['-m', 'sformer', 'evaluate', 'x', '--dataset', 'digits'], ['-c', 'import sformer']], ids=['command', 'library'])
def test_ctrl_c_during_the_first_import(args, tmp_path):
    (tmp_path / 'torch.py').write_text('raise KeyboardInterrupt')  # at that moment
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT['PYTHONPATH']])
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=tmp_path,
                          env=dict(ENVIRONMENT, PYTHONPATH=path))
    assert done.returncode != 0 and done.stdout == ''
    if args[0] == '-m':
        assert done.stderr == 'sformer: error: interrupted.\n'
    else:  # programs that use the package decide themselves
        assert 'KeyboardInterrupt' in done.stderr and 'sformer: error' not in done.stderr
