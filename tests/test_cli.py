"""The command line, in processes of their own: output, exit codes, one line per mistake and never a traceback."""
import contextlib
import json
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from conftest import NANO
from safetensors.torch import load_file, save_file

import sformer
from sformer.cli import parse_kwargs, spread
from sformer.errors import SFormerError

NAME = 'vit_tiny_patch16_224'
KWARGS = [f'{key}={value}' for key, value in NANO.items()]
PREPROCESSING = ['--mean', '.5', '--std', '.5', '--crop-pct', '1', '--interpolation', 'bilinear']
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['sformer.cli'])  # importing it takes seconds, once is enough


@dataclass
class Result:
    code: int
    out: str
    err: str


def result_of(process, folder):
    out, err = (path.read_text() if path.exists() else '' for path in (folder / 'out', folder / 'err'))
    return Result(process.exitcode, out, err)


def command(args, folder, terminal=None, started=None):
    """Be `sformer ARGS`, in a process of its own.

    Args:
        args: Command line.
        folder: Working directory, and where `out` and `err` are written.
        terminal: Name of a terminal for stderr.
        started: Path of a file that says that calibration images are being read.
    """
    from huggingface_hub import constants

    from sformer import cli, conversion
    constants.HF_HUB_OFFLINE = True  # nothing here is on the Hub, and its client would try for half a minute
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    os.chdir(folder)
    sys.argv = ['sformer', *args]
    for fd, path in ((1, 'out'), (2, terminal or 'err')):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY), fd)
    if started:
        observe = conversion.observe

        def announced(*args, **kwargs):
            Path(started).touch()
            return observe(*args, **kwargs)
        conversion.observe = announced
    cli.main()


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
def run(tmp_path):
    def run(*args, **kwargs):
        log = tmp_path / '.log'
        log.mkdir(exist_ok=True)
        process = FORKS.Process(target=command, args=([str(a) for a in args], log), kwargs=kwargs)
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            pytest.fail('the command hangs')
        return result_of(process, log)
    return run


@pytest.fixture
def convert_digits(run, files, tmp_path):
    """`sformer convert` of the digits checkpoint to `tmp_path/out`, with more or other options."""
    def convert_digits(*options, checkpoint='digits.safetensors', output=tmp_path / 'out', kwargs=KWARGS, **how):
        return run('convert', NAME, '--checkpoint', files / checkpoint, '--model-kwargs', *kwargs,
                   '--calibration', 'digits', '--output', output, *options, **how)
    return convert_digits


def assert_mistake(result, pattern, code=None):
    """One line that matches, no traceback, nothing on stdout."""
    assert 'Traceback' not in result.err, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith('sformer: error: ') and re.search(pattern, lines[0]), lines[0]
    assert result.code not in (0, None) if code is None else result.code == code
    assert result.out == ''


# what works -----------------------------------------------------------------------------------------------------------

def test_convert_and_evaluate(convert_digits, run, model, tmp_path):
    result = convert_digits(*PREPROCESSING)
    assert (result.code, result.err) == (0, '')
    assert re.fullmatch(rf'{NAME} -> sformer_tiny: N = 32, calibrated on 256 digits images, saved to \S+out\n',
                        result.out)
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'model.safetensors', 'config.json'}
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['sformer']['command'].startswith(f'sformer convert {NAME} --checkpoint ')
    assert config['pretrained_cfg']['mean'] == [0.5] and config['pretrained_cfg']['crop_pct'] == 1.0
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()), 'not what the API makes'

    result = run('evaluate', tmp_path / 'out', '--dataset', 'digits', '--results-file', tmp_path / 'r.json')
    assert (result.code, result.err) == (0, '')
    assert '540 images of digits (test)' in result.out and 'firing rate 0.' in result.out
    values = json.loads((tmp_path / 'r.json').read_text())
    assert values['top1'] >= 97 and values['model'] == str(tmp_path / 'out')
    assert values['architecture'] == 'sformer_tiny' and values['command'].startswith('sformer evaluate ')
    assert f'top-1 {values["top1"]:.2f} %' in result.out
    assert f'source: top-1 {values["source_top1"]:.2f} %' in result.out
    assert values['top1'] == sformer.evaluate(model, 'digits')['top1']


def test_convert_options_reach_the_neurons(convert_digits, tmp_path):
    result = convert_digits(
        '--levels', 7, '--fire', 'power2', '--attention-fire', 'density', '--firing', 'floor', '--dead-zone', .5,
        '--scale', 1.25, '--estimator', 'quantile', '--quantile', .99, '--num-images', 50, '--batch-size', 20,
        '--seed', 3, '--split', 'test')
    assert (result.code, result.err) == (0, '')
    record = json.loads((tmp_path / 'out' / 'config.json').read_text())['sformer']
    assert record['recipe'] == dict(
        levels=7, fire='power2', attention_fire='density', firing='floor', dead_zone=.5, scale=1.25,
        estimator='quantile', quantile=.99)
    calibration = record['calibration']
    assert (calibration['num_images'], calibration['seed'], calibration['split']) == (50, 3, 'test')


def test_convert_needs_no_data(run, files, tmp_path):
    result = run('convert', NAME, '--checkpoint', files / 'digits.safetensors', '-o', tmp_path / 'out',
                 '--model-kwargs', *KWARGS)
    assert (result.code, result.err) == (0, '') and 'calibrated on 256 dead-leaves images' in result.out


def test_allowed_pickle(convert_digits):
    result = convert_digits('--allow-pickle', checkpoint='digits.pth')
    assert (result.code, result.err) == (0, '')


def test_overwrite(convert_digits, tmp_path):
    assert convert_digits().code == 0
    assert convert_digits('--overwrite', '--levels', 8).code == 0
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['sformer']['recipe']['levels'] == 8


def test_several_values_per_option(run, tmp_path):
    """In the colour of RGB, where each of the three values has a place of its own."""
    source = timm.create_model(NAME, img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2)
    save_file(source.state_dict(), tmp_path / 'rgb.safetensors')
    result = run('convert', NAME, '--mean', '.4', '.5', '.6', '--checkpoint', tmp_path / 'rgb.safetensors',
                 '--model-kwargs', 'img_size=16', 'patch_size=8', 'embed_dim=48', 'depth=1', 'num_heads=3',
                 'num_classes=2', '--std', '.1', '.2', '.3', '--num-images', 4, '-o', tmp_path / 'out')
    assert (result.code, result.err) == (0, '')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['pretrained_cfg']['mean'] == [.4, .5, .6] and config['pretrained_cfg']['std'] == [.1, .2, .3]
    step = sformer.load_model(tmp_path / 'out').patch_embed.proj.neuron.threshold.flatten()
    torch.testing.assert_close(step, 1 / 255 / torch.tensor([.1, .2, .3]))


def test_spread():
    assert spread(['--std', '-.1', '2', '-o', 'x', 'y']) == ['--std', '-.1', '--std', '2', '-o', 'x', 'y']
    assert spread(['--mean', '1', '--mean', '2']) == ['--mean', '1', '--mean', '2']
    assert spread(['a', '--model-kwargs', 'b=1', 'c=-1', '--flag', 'd']) == [
        'a', '--model-kwargs', 'b=1', '--model-kwargs', 'c=-1', '--flag', 'd']


def test_parse_kwargs():
    assert parse_kwargs(['img_size=32', 'global_pool=avg', 'size=(1, 2)', 'x=None', 'y=a=b', 'lr=1e-3']) == dict(
        img_size=32, global_pool='avg', size=(1, 2), x=None, y='a=b', lr=1e-3)
    assert parse_kwargs(None) == {}
    for bad in ('img_size', '=3', '1x=2', 'a b=3'):
        with pytest.raises(SFormerError, match='key=value'):
            parse_kwargs([bad])


def test_evaluate_options(run, saved):
    result = run('evaluate', saved, '--dataset', 'digits', '--split', 'train', '--num-images', 30, '--no-source')
    assert (result.code, result.err) == (0, '')
    assert '30 images of digits (train)' in result.out and 'source' not in result.out


def test_evaluate_by_name(run):
    result = run('evaluate', 'sformer_nano.digits', '--dataset', 'digits')
    assert (result.code, result.err) == (0, '') and re.search(r'top-1 9[7-9]\.\d\d %', result.out)


def test_list(run):
    result = run('list')
    assert (result.code, result.err) == (0, '')
    for name in timm.list_models('sformer*', include_tags=True, exclude_filters='sformer_custom*'):
        assert re.search(rf'\b{re.escape(name)}\b', result.out), name
    row = next(line for line in result.out.splitlines() if 'sformer_base.augreg2_in21k_ft_in1k ' in line)
    for cell in ('vit_base_patch16_224.augreg2_in21k_ft_in1k', '86.6', '3x224x224', '1000', 'apache-2.0', 'first use'):
        assert cell in row
    assert re.search(r'99\.\d\d \(source', next(line for line in result.out.splitlines() if 'nano.digits' in line))


def test_help(run):
    for args in (['--help'], ['convert', '--help'], ['evaluate', '--help'], ['list', '--help'], ['demo', '--help']):
        result = run(*args)
        assert (result.code, result.err) == (0, '') and 'Usage: ' in result.out
    assert '--attention-fire' in run('convert', '--help').out


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.code == 2 and 'Traceback' not in result.err
    assert 'Usage: ' in result.out + result.err and 'convert' in result.out + result.err


def test_demo(run, tmp_path):
    result = run('demo', '-o', tmp_path / 'demo')
    assert (result.code, result.err) == (0, '')
    assert 'the same logits, bit for bit' in result.out and 'convert [s]' in result.out
    names = {p.name for p in (tmp_path / 'demo').iterdir()}
    assert names == {'sformer_nano', 'accuracy.png', 'firing_rates.png'}
    assert all((tmp_path / 'demo' / n).read_bytes()[:4] == b'\x89PNG' for n in names if n.endswith('png'))
    accuracy = dict(re.findall(r'SFormer, N = (\d+)\W+(\d+\.\d+) %', result.out))
    assert accuracy.keys() == {'4', '8', '32'} and float(accuracy['32']) >= 97
    assert sformer.is_calibrated(sformer.load_model(tmp_path / 'demo' / 'sformer_nano'))


def test_progress_bar_on_a_terminal_only(convert_digits):
    """A bar that animates where somebody watches; without a terminal not even its control characters."""
    main, side = pty.openpty()
    seen = bytearray()

    def watch():  # while the command runs: it would wait for a terminal that nobody reads
        with contextlib.suppress(OSError):  # the way a terminal ends
            while chunk := os.read(main, 4096):
                seen.extend(chunk)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = convert_digits(terminal=os.ttyname(side))
    finally:
        os.close(side)
        watcher.join(10)
        os.close(main)
    assert result.code == 0 and b'Calibrating' in seen

    result = convert_digits('--overwrite')
    assert (result.code, result.err) == (0, '')
    assert not re.search('[\r\x1b\u2500-\u259f]', result.out)


def test_entry_points():
    """`sformer` and `python -m sformer`, as installed."""
    script = Path(sys.executable).with_name('sformer')
    commands = [[sys.executable, '-m', 'sformer']] + ([[str(script)]] if script.exists() else [])
    for start in commands:
        done = subprocess.run([*start, 'convert', 'vit_tiny_patch16_22', '-o', 'x'], capture_output=True, text=True)
        assert_mistake(Result(done.returncode, done.stdout, done.stderr), 'Did you mean vit_tiny_patch16_224', 1)


# mistakes -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options, message', [
    (['--levels', '0'], 'levels must be an integer from 1 to 127, got 0'),
    (['--levels', '128'], 'levels must be an integer from 1 to 127, got 128'),
    (['--levels', 'x'], "'--levels'.* integer"),
    (['--levels', '1.5'], "'--levels'.* integer"),
    (['--levels'], "'--levels'"),
    (['--fire', 'gauss'], "fire must be one of uniform, .*'gauss'"),
    (['--fire', 'power2'], 'power2 .* levels=32'),
    (['--attention-fire', 'gauss'], "attention_fire must be one of .*'gauss'"),
    (['--firing', 'up'], "firing must be .*'up'"),
    (['--estimator', 'mean'], "estimator must be .*'mean'"),
    (['--quantile', '1.5'], 'quantile must lie .* 1.5'),
    (['--scale', '0'], 'scale .* got 0'),
    (['--scale', 'nan'], 'scale .* got nan'),
    (['--scale', '1e300'], 'scale .* got 1e.300'),
    (['--mean', 'nan'], 'mean must lie .* got nan'),
    (['--std', '1e-40'], 'std must lie .* got 1e-40'),
    (['--crop-pct', '1e-9'], 'crop_pct must lie .* got 1e-09'),
    (['--mean'], '--mean has no values'),
    (['--model-kwargs', 'num_heads=0'], 'can not be built with .*ZeroDivisionError'),
    (['--model-kwargs', 'depth=-1'], 'is not a checkpoint of|can not be built'),
    (['--model-kwargs', 'device=meta'], 'arguments of the network, which device is not'),
    (['--model-kwargs', 'checkpoint_path=x'], 'arguments of the network, which checkpoint_path is not'),
    (['--dead-zone', '-1'], 'dead_zone .* got -1'),
    (['--no-such-option', '1'], 'No such option: --no-such-option'),
    (['surplus'], 'surplus'),
    (['--calibration', 'no/such/dataset'], "'no/such/dataset' is not a folder"),
    (['--split', 'validation'], "no split 'validation', but: train, test"),
    (['--num-images', '1258'], '1258 images asked for, .* only 1257'),
    (['--num-images', '0'], "'--num-images'"),
    (['--batch-size', '0'], "'--batch-size'"),
    (['--seed', '-1'], 'seed -1 is negative'),
    (['--mean', '.5', '.5'], 'mean needs 1 values for 1 channels, got 2'),
    (['--mean', 'a'], "'--mean'"),
    (['--std', '.1', '.2', '.3'], 'std needs 1 values for 1 channels, got 3'),
    (['--std', '0'], 'std'),
    (['--crop-pct', '0'], 'crop.pct'),
    (['--crop-pct', '-1'], 'crop.pct'),
    (['--interpolation', 'nearest-ish'], 'nearest-ish'),
    (['--model-kwargs', 'garbage'], "key=value pairs, got 'garbage'"),
    (['--model-kwargs', 'no_such_argument=1'], 'no_such_argument'),
    (['--model-kwargs', 'num_heads=7'], 'num_heads'),
    (['--model-kwargs', 'depth=x'], "'depth': 'x'"),
    (['--model-kwargs', 'depth=5'], r'blocks\.4\.norm1\.weight is missing.* more'),
    (['--model-kwargs', 'global_pool=map'], 'attn_pool'),
    (['--model-kwargs', 'pretrained=True'], 'pretrained'),
    (['--model-kwargs', 'checkpoint=x'], 'checkpoint'),
    (['--model-kwargs', 'allow_pickle=True'], 'allow_pickle'),
    (['--model-kwargs', 'name=x'], 'name'),
], ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_bad_options_of_convert(convert_digits, options, message, tmp_path):
    assert_mistake(convert_digits(*options), message)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('checkpoint, message', [
    ('nothing.safetensors', 'no checkpoint at .*nothing'),
    ('empty', 'no checkpoint at .*empty'),
    ('digits.pth', 'not a safetensors file.*--allow-pickle'),
    ('truncated.safetensors', 'truncated or corrupted'),
    ('nan.safetensors', r'norm\.bias .* NaN'),
])
def test_bad_checkpoints(convert_digits, checkpoint, message, tmp_path):
    assert_mistake(convert_digits(checkpoint=checkpoint), message, 1)
    assert not (tmp_path / 'out').exists()


def test_checkpoint_of_another_model(run, files, tmp_path):
    result = run('convert', 'vit_small_patch16_224', '--checkpoint', files / 'digits.safetensors', '-o', tmp_path / 'x')
    assert_mistake(result, r'is not a checkpoint of vit_small_patch16_224 .*blocks\.4\.norm1\.weight is missing')


def test_unknown_models(run, tmp_path):
    assert_mistake(run('convert', 'vit_tiny_patch16_22', '-o', tmp_path / 'x'), 'Did you mean vit_tiny_patch16_224')
    assert_mistake(run('convert', 'sformer_tiny', '-o', tmp_path / 'x'), 'sformer_tiny')
    result = run('convert', 'test_resnet', '--checkpoint', tmp_path / 'no.safetensors', '-o', tmp_path / 'x')
    assert_mistake(result, 'no checkpoint at')
    save_file(timm.create_model('test_resnet').state_dict(), tmp_path / 'resnet.safetensors')
    result = run('convert', 'test_resnet', '--checkpoint', tmp_path / 'resnet.safetensors', '-o', tmp_path / 'x')
    assert_mistake(result, 'no spiking counterpart .*ResNet')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('args, message', [
    (['convert'], 'SOURCE|source'), (['convert', NAME], 'output'), (['evaluate'], 'MODEL|model'),
    (['evaluate', 'x'], 'dataset'), (['transmogrify'], 'transmogrify'), (['--frob'], '--frob')])
def test_usage(run, args, message):
    assert_mistake(run(*args), message, 2)


def test_bad_outputs(convert_digits, files, saved, tmp_path):
    before = [(p, p.read_bytes()) for p in saved.iterdir()]
    assert_mistake(convert_digits(output=saved), 'holds a model already; --overwrite')
    assert all(p.read_bytes() == content for p, content in before)
    assert_mistake(convert_digits(output=files / 'file'), 'file is a file, not a folder')
    assert_mistake(convert_digits(output=files / 'file' / 'sub'), 'sub')
    assert_mistake(convert_digits(output='/proc/sformer'), '/proc/sformer can not be written')
    assert (files / 'file').read_text() == 'mine'


def test_existing_output_is_noticed_before_any_work(convert_digits, saved):
    assert_mistake(convert_digits('--calibration', 'no/such/dataset', output=saved), 'holds a model already')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_output_without_permission(convert_digits, tmp_path):
    closed = tmp_path / 'closed'
    closed.mkdir(0o555)
    assert_mistake(convert_digits(output=closed), 'closed can not be written')
    assert_mistake(convert_digits(output=closed / 'sub'), 'sub can not be written')


@pytest.mark.parametrize('args, message', [
    (['{files}/empty', '--dataset', 'digits'], 'holds no SFormer: there is no config.json'),
    (['{files}/nowhere', '--dataset', 'digits'], 'is no folder'),
    (['local-dir:{files}/nowhere', '--dataset', 'digits'], 'holds no SFormer'),
    (['{files}/digits.safetensors', '--dataset', 'digits'], 'digits.safetensors is no folder'),
    (['sformer_tiny', '--dataset', 'digits'], 'sformer_tiny'),
    (['no_such_model', '--dataset', 'digits'], "no model 'no_such_model'"),
    (['{saved}', '--dataset', 'no/such/dataset'], "'no/such/dataset' is not a folder"),
    (['{saved}', '--dataset', '{files}/empty'], 'no images'),
    (['{saved}', '--dataset', 'dead-leaves'], 'no labels'),
    (['{saved}', '--dataset', 'digits', '--split', 'val'], "no split 'val'"),
    (['{saved}', '--dataset', 'digits', '--num-images', '541'], '541 images asked for'),
    (['{saved}', '--dataset', 'digits', '--amp-dtype', 'int3'], "not 'int3'"),
    (['{saved}', '--dataset', 'digits', '--device', 'meta'], 'meta'),
    (['{saved}', '--dataset', 'digits', '--num-images', '0'], "'--num-images'"),
    (['{saved}', '--dataset', 'digits', '--batch-size', '0'], "'--batch-size'"),
    (['{saved}', '--dataset', 'digits', '--workers', '-1'], "'--workers'"),
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


def test_safetensors_by_another_name(convert_digits, files, tmp_path):
    path = tmp_path / 'digits.ckpt'
    path.write_bytes((files / 'digits.safetensors').read_bytes())
    assert convert_digits(checkpoint=path).code == 0


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


def test_ctrl_c(files, tmp_path):
    """During calibration on more images than anybody waits for."""
    log, started = tmp_path / '.log', tmp_path / 'started'
    log.mkdir()
    args = ['convert', NAME, '--checkpoint', str(files / 'digits.safetensors'), '--model-kwargs', *KWARGS,
            '--num-images', '1000000', '--output', str(tmp_path / 'out')]
    process = FORKS.Process(target=command, args=(args, log), kwargs=dict(started=started))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started.exists(), result_of(process, log)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert_mistake(result_of(process, log), 'interrupted', 130)
    finally:
        process.kill()
    assert {p.name for p in tmp_path.iterdir()} == {'.log', 'started'}
