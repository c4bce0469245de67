"""`sformer convert`."""
import contextlib
import dataclasses
import json
import os
import pty
import re
import signal
import termios
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from cli_process import FORKS, KWARGS, NAME, assert_mistake, command, result_of
from evaluation_tools import class_folders
from layer_tools import build, pixels
from safetensors.torch import load_file, save_file

import sformer
from sformer import FitConfig, SFNConfig
from sformer.conversion import reconstruction
from sformer.neurons import RECIPES

PREPROCESSING = ['--mean', '.5', '--std', '.5', '--crop-pct', '1', '--interpolation', 'bilinear']


def test_convert_and_evaluate(convert_digits, run_apart, model, tmp_path):
    result = convert_digits(*PREPROCESSING, run=run_apart)
    assert (result.code, result.err) == (0, '')
    assert re.fullmatch(rf'{NAME} -> sformer_tiny: N = 63, calibrated on 256 digits images, saved to \S+out\n'
                        rf'architecture {NAME}: given; weights: digits.safetensors\n'
                        r'head of 10 classes: given\nimage size 8 x 8: given\nmean 0\.5, std 0\.5: given\n', result.out)
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'model.safetensors', 'config.json'}
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['sformer']['command'].startswith(f'sformer convert {NAME} --checkpoint ')
    assert config['pretrained_cfg']['mean'] == [0.5] and config['pretrained_cfg']['crop_pct'] == 1.0
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()), 'not what the API makes'

    result = run_apart('evaluate', tmp_path / 'out', '--dataset', 'digits', '--results-file', tmp_path / 'r.json')
    assert (result.code, result.err) == (0, '')
    assert '540 images of digits (test)' in result.out and 'activity 0.' in result.out
    values = json.loads((tmp_path / 'r.json').read_text())
    assert values['top1'] >= 97 and values['model'] == str(tmp_path / 'out')
    assert values['architecture'] == 'sformer_tiny' and values['command'].startswith('sformer evaluate ')
    assert f'top-1 {values["top1"]:.2f} %' in result.out
    assert f'source: top-1 {values["source_top1"]:.2f} %' in result.out
    assert values['top1'] == sformer.evaluate(model, 'digits')['top1']


def test_names_of_classes(convert_digits, run, tmp_path, files):
    names = [f'digit {i}' for i in range(9, -1, -1)]
    (tmp_path / 'names.txt').write_text('\ufeff' + '\n'.join(names) + '\n', encoding='utf-8')
    result = convert_digits(*PREPROCESSING, '--num-images', 20, '--label-names', tmp_path / 'names.txt')
    assert result.code == 0 and 'classes: digit 9, digit 8, digit 7, digit 6, digit 5 ...: given\n' in result.out
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['label_names'] == names and config['id2label']['9'] == 'digit 0'
    folder = class_folders(tmp_path / 'x', ['Digit_3', 'digit-7'])
    assert run('evaluate', tmp_path / 'out', '--data', folder).code == 0
    result = run('evaluate', tmp_path / 'out', '--data', class_folders(tmp_path / 'y', ['digit 3', 'seven']))
    assert result.code == 1 and "y has a class 'seven', which is no class of the model" in result.err
    assert run('evaluate', tmp_path / 'out', '--data', tmp_path / 'y', '--by-position').code == 0
    for given in (['a', 'b'], [tmp_path / 'empty.txt']):
        (tmp_path / 'empty.txt').touch()
        result = convert_digits('--label-names', *given, '--overwrite')
        assert result.code == 1 and f'{len(given) if len(given) > 1 else 0} names of classes (label_names) for a ' \
                                    'model of 10' in result.err
    result = convert_digits('--label-names', files / 'digits.safetensors', '--overwrite')
    assert result.code == 1 and 'is no text file of names, one per line' in result.err


def test_convert_options_reach_the_neurons(convert_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, 'STEPS', 1)
    result = convert_digits(
        '--levels', 7, '--fire', 'power2', '--attention-fire', 'density', '--initial-potential', 0,
        '--dead-zone', .5, '--scale', 1.25, '--estimator', 'quantile', '--quantile', .99, '--no-unbiased',
        '--activation-fire', 'uniform', '--silence', .02, '--keys-rest', '--lateral', 3, '--lateral-zone', .25,
        '--lateral-cost', 1.5, '--balance', '--concentrate', '--effort', 'high', '--num-images', 50, '--batch-size', 20,
        '--seed', 3, '--split', 'test')
    assert (result.code, result.err) == (0, '')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['model_args']['sfn'] == dict(
        levels=7, fire='power2', attention_fire='density', activation_fire='uniform', initial_potential=0,
        dead_zone=.5, scale=1.25, token_scale=True, silence=.02, keys_rest=True, lateral=3, lateral_zone=.25,
        lateral_cost=1.5, neuron='scale_and_fire')
    assert config['sformer']['fit'] == dict(
        estimator='quantile', quantile=.99, floor=0., margin=1., unbiased=False, compensate=False, balance=True,
        concentrate=True, effort='high')
    assert config['sformer']['recipe'] is None
    calibration = config['sformer']['calibration']
    assert (calibration['num_images'], calibration['seed'], calibration['split']) == (50, 3, 'test')


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes(convert_digits, tmp_path, recipe):
    result = convert_digits('--recipe', recipe, '--num-images', 20)
    assert (result.code, result.err) == (0, '')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['model_args']['sfn'] == dataclasses.asdict(SFNConfig.recipe(recipe))
    assert config['sformer']['recipe'] == recipe
    assert config['sformer']['fit'] == dataclasses.asdict(FitConfig.recipe(recipe).settled())


def test_single_options_change_a_recipe(convert_digits, tmp_path):
    assert convert_digits('--recipe', 'fast', '--levels', 31, '--num-images', 20).code == 0
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['model_args']['sfn'] == dataclasses.asdict(SFNConfig.recipe('fast', levels=31))
    assert config['sformer']['recipe'] is None and config['sformer']['fit']['estimator'] == 'max'
    result = convert_digits('--recipe', 'slow')
    assert result.code == 1 and "no recipe 'slow': there are default, fast, accurate" in result.err


def test_weights_that_compensate_are_compared_with_their_source(convert_digits, run, tmp_path):
    options = ('--levels', 4, '--silence', .05, '--split', 'train', '--num-images', 300)
    assert convert_digits(*options, '--compensate').code == 0
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['sformer']['fit']['compensate'] and config['sformer']['changed']
    (tmp_path / 'out').rename(tmp_path / 'better')
    assert convert_digits(*options).code == 0
    errors, data = {}, ('--dataset', 'digits', '--num-images', 200, '--results-file', tmp_path / 'r.json')
    for name in ('out', 'better'):
        result = run('evaluate', tmp_path / name, *data, '--source-model', tmp_path / 'out')
        assert (result.code, result.err) == (0, '')
        values = json.loads((tmp_path / 'r.json').read_text())
        errors[name] = values['relative_logit_error']
        assert values['source_model'] == str(tmp_path / 'out')
        (tmp_path / 'r.json').unlink()
    assert errors['better'] < 0.98 * errors['out']
    run('compare', tmp_path / 'out', tmp_path / 'better', *data, '--source-model', tmp_path / 'out')
    both = json.loads((tmp_path / 'r.json').read_text())
    assert [result['relative_logit_error'] for result in both] == [*errors.values()]
    assert both[0]['source_seconds'] == both[1]['source_seconds']  # run once for both
    assert 'relative_logit_error' in values and values['source_top1'] > 95


def test_weights_that_have_moved_are_told_of(convert_digits, run, tmp_path, caplog):
    assert convert_digits('--compensate', '--num-images', 20, '--split', 'train').code == 0
    sformer.save_model(sformer.convert(build(), [pixels(8)]), tmp_path / 'seven')
    evaluate = ('evaluate', tmp_path / 'out', '--dataset', 'digits', '--num-images', 20)
    assert run(*evaluate).code == 0 and 'have moved since it was converted' in caplog.text
    caplog.clear()
    other = timm.create_model('sformer_nano.digits', pretrained=True)
    with torch.no_grad():
        other.head.bias.add_(0.1)
    sformer.save_model(other, tmp_path / 'other')
    assert run(*evaluate, '--source-model', tmp_path / 'other').code == 0
    assert caplog.text.count('has other weights than the network that it was converted from') == 1
    for args, message in (
            ((*evaluate, '--source-model', tmp_path / 'out'), 'convert the source itself'),
            ((*evaluate, '--source-model', 'sformer_nano.digits', '--no-source'), 'leave out --source-model'),
            ((*evaluate, '--source-model', 'sformer_micro.cifar10'), 'the source to compare the '
             r'model with has other input: \(3, 32, 32\), not \(1, 8, 8\)'),
            ((*evaluate, '--source-model', tmp_path / 'seven'), 'other classes: 7, not 10'),
            (('distill', tmp_path / 'out', '--dataset', 'digits', '-o', tmp_path / 'new', '--source-model',
              tmp_path / 'seven'), 'other classes: 7, not 10'),
            (('distill', tmp_path / 'out', '--dataset', 'digits', '-o', tmp_path / 'new'), 'convert the source itself'),
            (('sweep', tmp_path / 'out', '--dataset', 'digits'), 'convert the source itself')):
        assert_mistake(run(*args), message)


def test_convert_needs_no_data(run, files, tmp_path):
    result = run('convert', NAME, '--checkpoint', files / 'digits.safetensors', '-o', tmp_path / 'out',
                 '--model-kwargs', *KWARGS)
    assert (result.code, result.err) == (0, '') and 'calibrated on 256 dead-leaves images' in result.out


def test_what_is_no_image_is_told(convert_digits, tmp_path, caplog):
    folder = Path(class_folders(tmp_path / 'images', ['a', 'b']))
    (folder / 'a' / 'notes.txt').write_text('no image')
    result = convert_digits('--calibration', folder, '--num-images', '2')
    assert result.code == 0, result.err
    assert 'calibrated on 2 ' in result.out
    assert '1 files or folders are no images and were passed over (a/notes.txt)' in caplog.text


def test_pickle_of_tensors(convert_digits):
    result = convert_digits('--num-images', 4, checkpoint='digits.pth')
    assert (result.code, result.err) == (0, '')


def test_overwrite(convert_digits, tmp_path):
    assert convert_digits('--num-images', 4).code == 0
    assert convert_digits('--num-images', 4, '--overwrite', '--levels', 8).code == 0
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['model_args']['sfn']['levels'] == 8


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
    step = sformer.load_model(tmp_path / 'out').patch_embed.proj.neuron.step.flatten()
    torch.testing.assert_close(step, 1 / 255 / torch.tensor([.1, .2, .3]))


def test_progress_bar_on_a_terminal_only(convert_digits, run_apart):
    """A bar that animates where somebody watches; without a terminal not even its control characters."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 80))  # a new one has no size
    seen = bytearray()

    def watch():  # while the command runs: it would wait for a terminal that nobody reads
        with contextlib.suppress(OSError):  # the way a terminal ends
            while chunk := os.read(main, 4096):
                seen.extend(chunk)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = convert_digits('--num-images', 64, run=run_apart, terminal=os.ttyname(side))
    finally:
        os.close(side)
        watcher.join(10)
        os.close(main)
    assert result.code == 0 and b'Calibrating' in seen, bytes(seen)

    result = convert_digits(*PREPROCESSING, '--num-images', 64, '--overwrite', run=run_apart)
    assert (result.code, result.err) == (0, '')
    assert not re.search('[\r\x1b\u2500-\u259f]', result.out)


@pytest.mark.parametrize('options, message', [
    (['--levels', '0'], 'levels must be an integer from 1 to 127, got 0'),
    (['--levels', '128'], 'levels must be an integer from 1 to 127, got 128'),
    (['--levels', 'x'], "'--levels'.* integer"),
    (['--levels', '1.5'], "'--levels'.* integer"),
    (['--levels'], "'--levels'"),
    (['--fire', 'gauss'], "fire must be one of auto, uniform, .*'gauss'"),
    (['--fire', 'power2'], 'power2 .* levels=63'),
    (['--attention-fire', 'gauss'], "attention_fire must be one of .*'gauss'"),
    (['--initial-potential', '1'], r'initial_potential must be a number in \[0, 1\), got 1.0'),
    (['--estimator', 'mean'], "estimator must be .*'mean'"),
    (['--quantile', '1.5'], r'quantile must be a number in \(0, 1\], got 1.5'),
    (['--scale', '0'], 'scale .* got 0'),
    (['--scale', 'nan'], 'scale .* got nan'),
    (['--scale', '1e300'], 'scale .* got 1e.300'),
    (['--mean', 'nan'], "'--mean'"),
    (['--std', '1e-40'], "'--std'"),
    (['--crop-pct', '1e-9'], "'--crop-pct'"),
    (['--mean'], '--mean has no values'),
    (['--model-kwargs', 'num_heads=0'], 'cannot be built with .*ZeroDivisionError'),
    (['--model-kwargs', 'depth=-1'], 'is not a checkpoint of|cannot be built'),
    (['--model-kwargs', 'device=meta'], 'arguments of the network, which device is not'),
    (['--model-kwargs', 'checkpoint_path=x'], 'arguments of the network, which checkpoint_path is not'),
    (['--dead-zone', '-1'], 'dead_zone .* got -1'),
    (['--no-such-option', '1'], 'No such option: --no-such-option'),
    (['surplus'], 'surplus'),
    (['--calibration', 'no/such/dataset'], "'no/such/dataset' is not a folder"),
    (['--split', 'validation'], "no split 'validation', but: train, test"),
    (['--image-column', 'x'], "no columns, so 'x' cannot be one of them"),
    (['--num-images', '1258'], '1258 images asked for, .* only 1257'),
    (['--num-images', '0'], "'--num-images'"),
    (['--num-images', '1e20'], "'--num-images'.* integer"),
    (['--num-images', f'{10 ** 20}'], "'--num-images'"),
    (['--batch-size', '0'], "'--batch-size'"),
    (['--batch-size', f'{10 ** 20}'], "'--batch-size'"),
    (['--seed', f'{10 ** 20}'], "'--seed'"),
    (['--seed', '-1'], "'--seed'"),
    (['--mean', '.5', '.5'], 'mean needs 1 values for 1 channels, got 2'),
    (['--mean', 'a'], "'--mean'"),
    (['--std', '.1', '.2', '.3'], 'std needs 1 values for 1 channels, got 3'),
    (['--std', '0'], "'--std'"),
    (['--crop-pct', '0'], "'--crop-pct'"),
    (['--crop-pct', '-1'], "'--crop-pct'"),
    (['--interpolation', 'nearest-ish'], 'nearest-ish'),
    (['--model-kwargs', 'garbage'], "key=value pairs, got 'garbage'"),
    (['--model-kwargs', 'no_such_argument=1'], 'no_such_argument'),
    (['--model-kwargs', 'num_heads=7'], 'num_heads'),
    (['--model-kwargs', 'depth=x'], "'depth': 'x'"),
    (['--model-kwargs', 'depth=3'], r'blocks\.2\.norm1\.weight is missing.* more'),
    (['--model-kwargs', 'global_pool=map'], 'attn_pool'),
    (['--model-kwargs', 'pretrained=True'], 'pretrained'),
    (['--model-kwargs', 'checkpoint=x'], 'checkpoint'),
    (['--model-kwargs', 'preprocessing=x'], 'preprocessing'),
    (['--model-kwargs', 'name=x'], 'name'),
], ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_bad_options_of_convert(convert_digits, options, message, tmp_path):
    assert_mistake(convert_digits(*options), message)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('checkpoint, message', [
    ('nothing.safetensors', 'no checkpoint at .*nothing'),
    ('empty', 'no checkpoint at .*empty'),
    ('file', 'file cannot be unpickled safely'),
    ('truncated.safetensors', 'truncated or corrupted'),
    ('nan.safetensors', r'norm\.bias .* NaN'),
])
def test_bad_checkpoints(convert_digits, checkpoint, message, tmp_path):
    assert_mistake(convert_digits(checkpoint=checkpoint), message, 1)
    assert not (tmp_path / 'out').exists()


def test_checkpoint_of_another_model(run, files, tmp_path):
    result = run('convert', 'vit_small_patch16_224', '--checkpoint', files / 'digits.safetensors', '-o', tmp_path / 'x')
    assert_mistake(result, r'is not a checkpoint of vit_small_patch16_224 .*blocks\.2\.norm1\.weight is missing')


def test_unknown_models(run, tmp_path):
    assert_mistake(run('convert', 'vit_tiny_patch16_22', '-o', tmp_path / 'x'), 'Did you mean vit_tiny_patch16_224')
    assert_mistake(run('convert', 'sformer_tiny', '-o', tmp_path / 'x'), 'sformer_tiny')
    result = run('convert', 'timm/vit_tiny_patch16_224', '-o', tmp_path / 'x')
    assert_mistake(result, 'A model on the Hub is hf-hub:timm/vit_tiny_patch16_224')
    assert_mistake(run('convert', 'model_best.pth.tar', '-o', tmp_path / 'x'), 'there is no file model_best.pth.tar')
    result = run('convert', 'test_efficientnet_evos', '--checkpoint', tmp_path / 'no.safetensors', '-o', tmp_path / 'x')
    assert_mistake(result, 'no checkpoint at')
    save_file(timm.create_model('test_efficientnet_evos').state_dict(), tmp_path / 'evos.safetensors')
    checkpoint = tmp_path / 'evos.safetensors'
    result = run('convert', 'test_efficientnet_evos', '--checkpoint', checkpoint, '-o', tmp_path / 'x')
    assert_mistake(result, 'no spiking counterpart .*EvoNorm')
    assert not (tmp_path / 'x').exists()


def test_bad_outputs(convert_digits, files, saved, tmp_path):
    before = [(p, p.read_bytes()) for p in saved.iterdir()]
    assert_mistake(convert_digits(output=saved), 'holds a model already; --overwrite')
    assert all(p.read_bytes() == content for p, content in before)
    assert_mistake(convert_digits(output=files / 'file'), 'file is a file, not a folder')
    assert_mistake(convert_digits('--num-images', 4, output=files / 'file' / 'sub'), 'sub')
    assert_mistake(convert_digits('--num-images', 4, output='/proc/sformer'), '/proc/sformer cannot be written')
    assert (files / 'file').read_text() == 'mine'


def test_links_that_lead_nowhere(convert_digits, tmp_path):
    """Noticed before any work."""
    link = tmp_path / 'link'
    link.symlink_to(tmp_path / 'nowhere')
    for output in (link, link / 'sub'):
        result = convert_digits('--calibration', 'no/such/dataset', output=output)
        assert_mistake(result, 'link is a link to .*nowhere, which does not exist')
    assert link.is_symlink() and not (tmp_path / 'nowhere').exists()


def test_existing_output_is_noticed_before_any_work(convert_digits, saved):
    assert_mistake(convert_digits('--calibration', 'no/such/dataset', output=saved), 'holds a model already')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_output_without_permission(convert_digits, tmp_path):
    closed = tmp_path / 'closed'
    closed.mkdir(0o555)
    assert_mistake(convert_digits(output=closed), 'closed cannot be written')
    assert_mistake(convert_digits(output=closed / 'sub'), 'sub cannot be written')


def test_model_that_became_a_value(run, files, tmp_path):
    result = run('convert', '--checkpoint', files / 'digits.safetensors', '-o', tmp_path / 'x', '--model-kwargs',
                 *KWARGS, NAME)
    assert_mistake(result, f"key=value pairs, got '{NAME}'; the name of a model goes before this option", 2)


def test_safetensors_by_another_name(convert_digits, files, tmp_path):
    path = tmp_path / 'digits.ckpt'
    path.write_bytes((files / 'digits.safetensors').read_bytes())
    assert convert_digits('--num-images', 4, checkpoint=path).code == 0


def test_ctrl_c(files, tmp_path):
    """During calibration on more images than anybody waits for."""
    log, started = tmp_path / '.log', tmp_path / 'started'
    log.mkdir()
    args = ['convert', NAME, '--checkpoint', str(files / 'digits.safetensors'), '--model-kwargs', *KWARGS,
            '--num-images', '1000000', '--output', str(tmp_path / 'out'), *PREPROCESSING]
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
        assert_mistake(result_of(process, log), r'interrupted\.$', 130)
    finally:
        process.kill()
    assert {p.name for p in tmp_path.iterdir()} == {'.log', 'started'}
