"""`sformer detect train | show`, and `convert` and `evaluate` of detectors."""
import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from cli_process import assert_mistake
from detection_tools import small_detector, write_annotations, write_coco
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from sformer import source_of
from sformer.detection import convert_detector, detect, detector_evaluation, load_detector, open_coco, save_detector


@pytest.fixture
def files(tmp_path):
    write_coco(tmp_path / 'shapes')
    write_coco(tmp_path / 'shapes', 'val', 3)
    torch.manual_seed(0)
    save_file(timm.create_model('test_vit2').state_dict(), tmp_path / 'backbone.safetensors')
    return tmp_path


@pytest.mark.slow
def test_train_convert_evaluate_show(files, run_inside):
    code, out, _ = run_inside(
        'detect', 'train', '--backbone', 'test_vit2', '--checkpoint', 'backbone.safetensors', '--data', 'shapes', '-o',
        'det', '--masks', '--image-size', '64', '96', '--channels', '16', '--epochs', '40', '--lr', '0.003',
        '--device', 'cpu')
    lines = out.splitlines()
    assert code == 0 and len(lines) == 41 and lines[0].startswith('epoch 1: loss_objectness 0.')
    assert lines[-1] == 'detector of disc, square on test_vit2, trained on 6 images, saved to det'
    assert {path.name for path in (files / 'det').iterdir()} == {'model.safetensors', 'config.json'}
    code, out, _ = run_inside('convert', 'det', '--calibration', 'shapes', '--num-images', '4', '-o', 'det-s')
    assert code == 0 and out == 'det -> det-s: N = 63, calibrated on 4 shapes images\n'
    assert load_detector(files / 'det-s').conversion.calibration.split == 'train'
    code, out, _ = run_inside('evaluate', 'det-s', '--data', 'shapes', '--split', 'train', '--results-file', 'r.json')
    assert code == 0 and 'det-s on 6 images of shapes (train)' in out and 'source: mAP' in out
    result = json.loads((files / 'r.json').read_text())
    assert result['source_boxes']['mAP50'] > 50  # of images that it was trained on
    assert result['boxes']['mAP50'] > result['source_boxes']['mAP50'] - 10
    code, out, _ = run_inside('detect', 'show', 'det-s', 'shapes/train/0.png', '-o', 'o.png')
    assert code == 0 and Image.open(files / 'o.png').width > 3 * 4 * 96


def test_train(files, run_inside):
    save_file(timm.create_model('test_vit_short').state_dict(), files / 'short.safetensors')
    code, out, _ = run_inside(
        'detect', 'train', '--backbone', 'test_vit_short', '--checkpoint', 'short.safetensors', '--data', 'shapes',
        '-o', 'det', '--image-size', '64', '96', '--channels', '8', '--epochs', '1', '--device', 'cpu')
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 and lines[0].startswith('epoch 1: loss_objectness 0.')
    assert lines[-1] == 'detector of disc, square on test_vit_short, trained on 6 images, saved to det'
    assert load_detector(files / 'det').config.channels == 8


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    """Folders of an SFormer that segments and of one that does not, and images; not to be changed."""
    root = tmp_path_factory.mktemp('converted')
    write_coco(root / 'shapes', 'val', 3)
    data = open_coco(root / 'shapes', 'val', masks=True)
    for name, masks in (('boxes', False), ('masks', True)):
        save_detector(convert_detector(small_detector(masks=masks), data, num_images=2, name='shapes'), root / name)
    return root


@pytest.fixture
def pair(converted, tmp_path):
    return shutil.copytree(converted, tmp_path, dirs_exist_ok=True)


def test_compare(pair, run_inside):
    code, out, _ = run_inside('compare', 'boxes', 'masks', '--data', 'shapes', '--results-file', 'r.json')
    results = json.loads((pair / 'r.json').read_text())
    assert code == 0 and [result['model'] for result in results] == ['boxes', 'masks']
    assert out.startswith('3 images of shapes (val)\n') and 'results in r.json' in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(('boxes', 'masks'))}
    figures = []
    for kind in ('boxes', 'masks'):
        figures += [results[1][kind][name] for name in ('mAP', 'mAP50', 'mAP75')]
        figures.append(results[1][f'source_{kind}']['mAP'])
    assert rows['masks'] == [f'{figure:.2f}' for figure in figures] and len(rows['boxes']) == 4
    assert max(figures) > 0
    code, out, _ = run_inside('compare', 'boxes', 'masks', '--data', 'shapes', '--no-source', '--format', 'csv')
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and float(rows[0]['boxes_mAP50']) == results[0]['boxes']['mAP50']
    assert (rows[0]['masks_mAP'], rows[1]['source_boxes_mAP']) == ('', '')
    assert rows[1]['weights_sha256'] == results[1]['weights_sha256']


def test_results_as_csv(pair, run_inside):
    """They were refused. Rows of several detectors are added, those of classifiers beside them kept."""
    (pair / 'r.csv').write_text('model,top1,note\nx,81.5,mine\n')
    for file, options in (('r.json', ()), ('r.csv', ()), ('r.csv', ('--resume',)), ('new.csv', ())):
        code, out, err = run_inside(
            'compare', 'boxes', 'masks', '--data', 'shapes', '--results-file', file, *options)
        assert code == 0 and f'results in {file}' in out, err
    results = json.loads((pair / 'r.json').read_text())
    kept, *rows = csv.DictReader((pair / 'r.csv').read_text().splitlines())
    assert (kept['model'], kept['top1'], kept['note'], kept['boxes_mAP']) == ('x', '81.5', 'mine', '')
    new = [*csv.DictReader((pair / 'new.csv').read_text().splitlines())]
    assert len(rows) == 4 and len(new) == 2 and (pair / 'new.csv').read_text().startswith('model,architecture,dataset')
    assert 'top1' not in new[0] and not (pair / 'r.csv.progress').exists()
    for row, result in zip((*rows, *new), results * 3, strict=True):
        assert row['model'] == result['model'] and row['weights_sha256'] == result['weights_sha256']
        for kind in ('boxes', 'source_boxes', 'masks', 'source_masks'):
            for name in ('mAP', 'mAP50', 'mAP75'):
                found = row[f'{kind}_{name}']
                assert found == '' if kind not in result else float(found) == result[kind][name]


def test_compare_goes_on_where_it_ended(pair, run_inside, monkeypatch):
    """Killed in the second of two detectors: neither is begun anew."""
    args = ('compare', 'boxes', 'masks', '--data', 'shapes', '--results-file', 'r.json')
    seen = []

    def until(count):
        def detect_some(detector, image):
            seen.append(detector)
            if len(seen) > count:
                raise KeyboardInterrupt
            return detect(detector, image)
        monkeypatch.setattr(detector_evaluation, 'detect', detect_some)
    until(8)  # two of three images of the second, beside its source
    code, _, err = run_inside(*args)
    assert code == 130 and '--resume continues' in err and not (pair / 'r.json').exists()
    seen.clear()
    until(100)
    code, _, _ = run_inside(*args, '--resume')
    resumed = json.loads((pair / 'r.json').read_text())
    assert code == 0 and len(seen) == 4 and not (pair / 'r.json.progress').exists()
    assert run_inside(*args)[0] == 0
    whole = json.loads((pair / 'r.json').read_text())
    assert [[r[k] for k in ('boxes', 'source_boxes')] for r in resumed] == [
        [r[k] for k in ('boxes', 'source_boxes')] for r in whole]


def test_bad_annotations_are_left_out_on_demand(pair, run_inside):
    data = json.loads((pair / 'shapes' / 'val.json').read_text())
    data['annotations'][0]['category_id'] = data['annotations'][1]['category_id'] = 99
    write_annotations(pair / 'shapes', data, 'val')
    code, _, err = run_inside('evaluate', 'boxes', '--data', 'shapes')
    assert code == 1 and 'annotation 1 is of the unknown category 99' in err
    code, _, err = run_inside('evaluate', 'boxes', '--data', 'shapes', '--max-bad', '1')
    assert code == 1 and '2 images and annotations are not usable, more than --max-bad 1' in err
    code, out, _ = run_inside('evaluate', 'boxes', '--data', 'shapes', '--max-bad', '2', '--num-images', '1')
    assert code == 0 and 'left out: annotation 2 is of the unknown category 99' in out


def test_another_source(pair, run_inside, caplog):
    code, out, _ = run_inside('evaluate', 'boxes', '--data', 'shapes', '--source-model', 'masks', '--results-file',
                              'r.json')
    result = json.loads((pair / 'r.json').read_text())
    assert code == 0 and 'source: mAP' in out and result['source_model'] == 'masks' and 'source_masks' not in result
    code, _, err = run_inside('evaluate', 'masks', '--data', 'shapes', '--source-model', 'boxes')
    assert code == 1 and err == 'sformer: error: boxes finds no masks to compare with.\n'
    code, _, err = run_inside('convert', 'boxes', '--calibration', 'shapes', '--split', 'val', '--num-images', '2',
                              '-o', 'new', '--compensate')
    assert code == 0 and not caplog.text
    assert run_inside('evaluate', 'new', '--data', 'shapes', '--num-images', '1')[0] == 0
    assert 'the weights of new have moved' in caplog.text
    code, _, err = run_inside('convert', 'new', '-o', 'newer')
    assert code == 1 and 'convert the source itself' in err


@pytest.mark.slow
def test_export(pair, run_inside):
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    code, out, _ = run_inside('export', 'boxes', 'b.onnx', '--image-size', '64', '64')
    assert code == 0 and re.match(r'boxes -> b.onnx: \d\.\d MiB, (\d+) of \1 layers in integers', out)
    save_detector(source_of(load_detector(pair / 'boxes')), pair / 'plain')
    code, out, err = run_inside('export', 'plain', 'at-once.onnx', '--image-size', '64', '64', '--recipe', 'fast',
                                '--calibration', 'shapes', '--split', 'val', '--num-images', '2')
    assert code == 0 and re.search(r'plain -> at-once.onnx: \d\.\d MiB, (\d+) of \1 layers in integers', out), err
    code, _, err = run_inside('evaluate', 'b.onnx', '--data', 'shapes')
    assert code == 1 and err.startswith('sformer: error: b.onnx is the graph of a detector, which `sformer predict` ')
    code, out, err = run_inside('predict', 'b.onnx', 'shapes/val', '--topk', '2', '-o', 'graph.json')
    assert code == 0 and 'names of classes' not in err
    found = json.loads((pair / 'graph.json').read_text())['images'][0]['found']
    assert len(found) == 2 and {finding['name'] for finding in found} <= {'disc', 'square'}
    assert run_inside('predict', 'b.onnx', 'shapes/val/0.png', '-o', 'graph.png')[0] == 0
    code, _, err = run_inside('predict', 'b.onnx', 'shapes/val', '--engine', 'openvino')
    assert code == 1 and 'openvino runs no graphs of detectors, onnxruntime does' in err
    code, _, err = run_inside('export', 'sformer_nano.digits', 'd.onnx', '--image-size', '64', '64')
    assert code == 1 and 'leave out --image-size' in err


def test_show_replaces_no_image_of_others(pair, run_inside):
    image = pair / 'img.png'
    shutil.copy(pair / 'shapes' / 'val' / '0.png', image)
    shutil.copy(image, pair / 'other.png')
    Image.open(image).save(pair / 'other.jpg')
    (pair / 'link.png').symlink_to(image)
    (pair / 'folder.png').mkdir()
    before = {path.name: path.read_bytes() for path in pair.iterdir() if path.is_file()}
    for name, options, message in (
            ('img.png', (), 'img.png is the image itself'), ('img.png', ('--overwrite',), 'is the image itself'),
            ('./shapes/../img.png', (), 'is the image itself'), ('link.png', ('--overwrite',), 'is the image itself'),
            ('other.png', (), 'other.png is there and holds no PNG that detect show wrote; --overwrite'),
            ('other.jpg', (), 'other.jpg is there and holds no PNG'), ('folder.png', (), 'folder.png is a folder')):
        code, _, err = run_inside('detect', 'show', 'boxes', 'img.png', '-o', name, *options)
        assert code == 1 and message in err and err.count('\n') == 1, name
    assert {path.name: path.read_bytes() for path in pair.iterdir() if path.is_file()} == before
    for options in ((), ('--min-score', '0.9')):  # its own is replaced
        assert run_inside('detect', 'show', 'boxes', 'img.png', '-o', 'out.png', *options)[0] == 0
    for name in ('other.png', 'other.jpg'):
        assert run_inside('detect', 'show', 'boxes', 'img.png', '-o', name, '--overwrite')[0] == 0
        assert Image.open(pair / name).width > 3 * 4 * 96


def test_show_turns_photographs_and_scales_sixteen_bits(pair, run_inside):
    image, exif = Image.open(pair / 'shapes' / 'val' / '0.png'), Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(pair / 'photo.png', exif=exif)
    levels = np.asarray(image.convert('L'))
    Image.fromarray(levels).save(pair / 'grey.png')
    Image.fromarray(levels.astype(np.uint16) * 257).save(pair / 'wide.png')
    for name in ('shapes/val/0.png', 'photo.png', 'grey.png', 'wide.png'):
        code, _, _ = run_inside('detect', 'show', 'boxes', name, '-o', f'{name.split("/")[-1]}.out.png')
        assert code == 0
    upright, photo, grey, wide = (np.asarray(Image.open(pair / f'{name}.png.out.png'))
                                  for name in ('0', 'photo', 'grey', 'wide'))
    assert (photo == upright).all() and (wide == grey).all() and grey.std() > 10
    Image.fromarray(levels.astype(np.float32)).save(pair / 'float.tiff')
    code, _, err = run_inside('detect', 'show', 'boxes', 'float.tiff', '-o', 'x.png')
    assert code == 1 and "pixels of mode 'F' have no known range" in err and not (pair / 'x.png').exists()


def test_bad_annotations_are_found_at_once(pair, run_inside, monkeypatch):
    """Before images are detected, and not again after each --resume."""
    monkeypatch.setattr(detector_evaluation, 'detect', pytest.fail)
    data = json.loads((pair / 'shapes' / 'val.json').read_text())
    data['annotations'][1]['iscrowd'] = None
    write_annotations(pair / 'shapes', data, 'val')
    for options in ((), ('--resume',)):
        code, _, err = run_inside('evaluate', 'masks', '--data', 'shapes', '--results-file', 'r.json', *options)
        assert code == 1 and 'annotation 2 has an iscrowd of None' in err and not (pair / 'r.json').exists()


def test_calibration_reads_no_annotation(pair, run_inside, caplog):
    (pair / 'shapes' / 'val.json').write_text(json.dumps(dict(
        json.loads((pair / 'shapes' / 'val.json').read_text()), categories=None, annotations=[dict(bbox='x')])))
    args = 'convert', 'boxes', '-o', 'new', '--calibration', 'shapes', '--split', 'val'
    code, _, err = run_inside(*args)
    assert code == 1 and "256 images asked for, but 'shapes/val.json' has only 3" in err
    code, out, _ = run_inside(*args, '--num-images', '3')
    assert code == 0 and 'calibrated on 3 shapes images' in out and not caplog.text


def test_a_subset_by_its_seed(pair, run_inside, monkeypatch):
    seen = []
    monkeypatch.setattr(detector_evaluation, 'detect', lambda detector, image: seen.append(
        image.sum().item()) or detect(detector, image))
    for seed in range(6):
        code, _, _ = run_inside('evaluate', 'boxes', '--data', 'shapes', '--no-source', '--num-images', '1', '--seed',
                                str(seed), '--results-file', f'{seed}.json')
        result = json.loads((pair / f'{seed}.json').read_text())
        assert code == 0 and (result['num_images'], result['seed']) == (1, seed)
    assert len(seen) == 6 and len({*seen}) > 1  # not always the first one
    code, _, err = run_inside('evaluate', 'boxes', '--data', 'shapes', '--num-images', '500')
    assert code == 1 and "500 images asked for, but 'shapes/val.json' has only 3" in err


def test_options_that_say_nothing_to_a_detector(pair, run_inside):
    for args in (('profile', 'boxes', '--dataset', 'shapes', '--batch-size', '2'),
                 ('profile', 'boxes', '--dataset', 'shapes', '--image-column', 'img'),
                 ('profile', 'boxes', '--dataset', 'shapes', '--execute', '3'),
                 ('convert', 'boxes', '-o', 'x', '--batch-size', '2'),
                 ('convert', 'boxes', '-o', 'x', '--batch-size', '4'),
                 ('convert', 'boxes', '-o', 'x', '--image-column', 'img'),
                 ('export', 'boxes', 'x.onnx', '--seed', '3'), ('export', 'boxes', 'x.onnx', '--num-images', '3'),
                 ('evaluate', 'boxes', '--data', 'shapes', '--crop-pct', '0.5')):
        option = next(arg for arg in args if arg.startswith('--') and arg != '--dataset' and arg != '--data')
        code, out, err = run_inside(*args)
        assert code == 1 and f'boxes is a detector: leave out {option}.' in err and not out, args
    code, out, _ = run_inside('profile', 'boxes', '--dataset', 'shapes', '--split', 'val', '--num-images', '1')
    assert code == 0 and '1 images of shapes, per image' in out


def test_a_detector_of_the_hub(pair, hub, run_inside, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    hub.put('my-org/det', {path.name: path.read_bytes() for path in (pair / 'boxes').iterdir()})
    code, out, _ = run_inside('evaluate', 'hf-hub:my-org/det', '--data', 'shapes', '--num-images', '1')
    assert code == 0 and out.startswith('hf-hub:my-org/det on 1 images of shapes (val)\n')
    assert run_inside('detect', 'show', 'hf-hub:my-org/det', 'shapes/val/0.png', '-o', 'o.png')[0] == 0
    code, out, _ = run_inside('convert', 'hf-hub:my-org/det', '-o', 'new', '--calibration', 'shapes', '--split', 'val',
                              '--num-images', '1', '--levels', '8')
    assert code == 0 and load_detector(pair / 'new').sfn.levels == 8
    code, _, err = run_inside('evaluate', 'hf-hub:my-org/none', '--data', 'shapes')
    assert code == 1 and 'there is no such repository' in err


def test_mistakes(files, run):
    save_detector(small_detector(), files / 'det')
    shapes, det = files / 'shapes', files / 'det'
    train = ('detect', 'train', '--checkpoint', files / 'backbone.safetensors', '--image-size', '64', '96')
    assert_mistake(run(*train, '--backbone', 'test_vit2', '--data', shapes, '-o', det), '--overwrite')
    assert_mistake(run(*train, '--backbone', 'test_vit2', '--data', shapes, '--split', 'test', '-o', files / 'x'),
                   "no split 'test'")
    assert_mistake(run(*train, '--backbone', 'test_vit9', '--data', shapes, '-o', files / 'x'), 'timm has no model')
    for stride in (5, 64):
        assert_mistake(run(*train, '--backbone', 'test_vit2', '--data', shapes, '-o', files / 'x', '--finest-stride',
                           stride), f'--finest-stride is 4, 8 or 16, not {stride}')
    assert_mistake(run('evaluate', det, '--data', shapes, '--crop-pct', '0.5'), 'is a detector: leave out --crop-pct')
    assert_mistake(run('compare', det, 'sformer_nano.digits', '--data', shapes),
                   'is a detector, sformer_nano.digits is a classifier: nothing')
    assert_mistake(run('convert', det, '-o', files / 'x', '--crop-pct', '0.9'), 'is a detector: leave out --crop-pct')
    name = 'sformer_fasterrcnn_vit_tiny_patch16_224'
    assert_mistake(run('evaluate', name, '--data', shapes), 'is uncalibrated')
    assert_mistake(run('detect', 'show', name, shapes / 'val' / '0.png', '-o', files / 'o.png'), 'is uncalibrated')
    assert_mistake(run('convert', name, '-o', files / 'x'), 'has no weights: sformer detect train')
    (files / 'r.csv').write_text('model,mAP\nx,1\n')
    assert_mistake(run('evaluate', det, '--data', shapes, '--results-file', files / 'r.csv'), 'no CSV file of results')
    assert_mistake(run('convert', det, '--calibration', shapes, '--split', 'no', '-o', files / 'x'), "no split 'no'")
    assert_mistake(run('detect', 'show', det, files / 'backbone.safetensors', '-o', files / 'o.png'), 'as an image')
    assert_mistake(run('detect', 'show', det, shapes / 'val' / '0.png', '-o', files / 'o.txt'), 'neither a PNG nor')
    assert_mistake(run('export', det, files / 'o.onnx', '--calibration', shapes, '--split', 'no'), "no split 'no'")
    assert_mistake(run('export', det, files / 'o.onnx', '--crop-pct', '0.9'), 'is a detector: leave out --crop-pct')
    assert_mistake(run('export', det, files / 'o.safetensors'), 'leave out --format')
    for args in (('sweep', det), ('distill', det, '--dataset', shapes, '-o', files / 'x'), ('benchmark', det)):
        assert_mistake(run(*args), f'det is a detector, which sformer {args[0]} does not take')
    assert_mistake(run('detect', 'show', 'sformer_nano.digits', shapes / 'val' / '0.png', '-o', files / 'o.png'),
                   'sformer_nano.digits is a classifier, which sformer detect show does not take')
    assert_mistake(run('convert', det, '--silence', '0.01', '-o', files / 'x'), 'no price of activity')
    assert not (files / 'x').exists() and not (files / 'o.onnx').exists() and not (files / 'o.png').exists()
