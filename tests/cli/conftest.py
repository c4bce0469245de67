"""Fixtures of tests of the command line: output, exit codes, one line per mistake and never a traceback."""
import sys

import pytest
import torch
from cli_process import FORKS, KWARGS, NAME, command, result_of
from huggingface_hub import constants
from safetensors.torch import save_file

import sformer


@pytest.fixture(scope='module')
def files(tmp_path_factory, source):
    """Checkpoints, good and bad ones, and folders that hold no model; not to be changed."""
    folder = tmp_path_factory.mktemp('files')
    state = source.state_dict()
    save_file(state, folder / 'digits.safetensors')
    save_file({**state, 'norm.bias': torch.full((64,), float('nan'))}, folder / 'nan.safetensors')
    (folder / 'truncated.safetensors').write_bytes((folder / 'digits.safetensors').read_bytes()[:50_000])
    torch.save(state, folder / 'digits.pth')
    (folder / 'file').write_text('mine')
    (folder / 'empty').mkdir()
    return folder


@pytest.fixture(scope='module')
def saved(tmp_path_factory, model):
    """Folder of an SFormer; not to be changed."""
    return sformer.save_model(model, tmp_path_factory.mktemp('models') / 'saved')


@pytest.fixture
def run(run_here, tmp_path, monkeypatch):
    """`sformer ARGS` in this process: exit code, stdout and stderr."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)  # nothing here is there, and it would try for half a minute
    (tmp_path / '.log').mkdir(exist_ok=True)

    def run(*args):
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / '.log')
            patch.setattr(sys, 'argv', ['sformer', *map(str, args)])
            return run_here(*args)
    return run


@pytest.fixture
def run_inside(run_here, tmp_path, monkeypatch):
    """`sformer ARGS` in this process, in `tmp_path`: exit code, stdout and stderr as a tuple."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['sformer', *map(str, args)])  # which is what records say was run
        result = run_here(*args)
        return result.code, result.out, result.err
    return run


@pytest.fixture
def run_apart(tmp_path):
    """The same in a process of its own, which so shows warnings and logs, too."""
    def run(*args, **kwargs):
        log = tmp_path / '.log'
        log.mkdir(exist_ok=True)
        process = FORKS.Process(target=command, args=([str(a) for a in args], log), kwargs=kwargs)
        process.start()
        process.join(240)  # the demo takes a minute where everything else runs
        if process.exitcode is None:
            process.kill()
            pytest.fail('the command hangs')
        return result_of(process, log)
    return run


@pytest.fixture
def convert_digits(run, files, tmp_path):
    """`sformer convert` of the digits checkpoint to `tmp_path/out`, with more or other options."""
    def convert_digits(*options, checkpoint='digits.safetensors', output=tmp_path / 'out', run=run, **how):
        return run('convert', NAME, '--checkpoint', files / checkpoint, '--model-kwargs', *KWARGS,
                   '--calibration', 'digits', '--output', output, *options, **how)
    return convert_digits
