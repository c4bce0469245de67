"""What holds for all commands: help, versions, mistakes, output."""
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from cli_process import NAME, Result, assert_mistake

import sformer
from sformer import cli

# processes of their own have the package that is tested here
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(sformer.__file__).parents[1]))


def test_help(run):
    for args in (['--help'], ['convert', '--help'], ['evaluate', '--help'], ['list', '--help'], ['demo', '--help']):
        result = run(*args)
        assert (result.code, result.err) == (0, '') and 'Usage: ' in result.out
    assert '--attention-fire' in run('convert', '--help').out


def test_versions(run):
    result = run('--version')
    assert (result.code, result.err) == (0, '')
    assert result.out == ', '.join(f'{name} {metadata.version(name)}' for name in ('sformer', 'torch', 'timm')) + '\n'


def test_importing_the_package_registers_its_models(tmp_path):
    """Whatever the command line leaves out; even in a script that has its name. What is slow to load waits."""
    (tmp_path / 'sformer').write_text(
        "import sys, sformer, sformer.data\n"
        "print(*{'datasets', 'sklearn', 'pyarrow', 'matplotlib'} & set(sys.modules))\n"
        "import timm\nassert timm.is_model('sformer_nano') and sformer.convert and sformer.evaluate\n")
    done = subprocess.run([sys.executable, str(tmp_path / 'sformer'), 'evaluate'], env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b'\n', b'')


def test_names_that_the_terminal_cannot_show(model, tmp_path):
    """And the command as installed, in which nobody else has loaded the models."""
    folder = sformer.save_model(model, tmp_path / 'модель')
    script = Path(sys.executable).with_name('sformer')
    done = subprocess.run(
        [*([str(script)] if script.exists() else [sys.executable, '-m', 'sformer']),
         'compare', folder.name, '--dataset', 'digits', '--num-images', '8'],
        cwd=tmp_path, env=dict(ENVIRONMENT, PYTHONIOENCODING='ascii'), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and r'\u043c' in done.stdout and '8 images' in done.stdout


@pytest.mark.parametrize('args', [['--version'], ['list', '--format', 'csv']])
def test_output_that_is_read_in_part(args, capsys, monkeypatch):
    """As by `sformer list | head`: no complaint, and none when the interpreter flushes."""
    entry = dict(param_count=1., input_size=(1, 8, 8))
    monkeypatch.setattr('sformer.saving.entrypoints.entries', lambda: iter([entry] * 999))
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


@pytest.mark.parametrize('args', [['-m', 'sformer'], ['-c', 'import sformer']], ids=['command', 'library'])
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
