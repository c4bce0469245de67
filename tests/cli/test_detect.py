"""`sformer detect train | show`, and `convert` and `evaluate` of detectors."""
import json

import pytest
import timm
import torch
from cli_process import assert_mistake
from detection_tools import small_detector, write_coco
from PIL import Image
from safetensors.torch import save_file

from sformer.detection import load_detector, save_detector


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
    assert code == 0 and out == 'det -> det-s: N = 32, calibrated on 4 shapes images\n'
    assert load_detector(files / 'det-s').conversion.calibration.split == 'train'
    code, out, _ = run_inside('evaluate', 'det-s', '--data', 'shapes', '--split', 'train', '--results-file', 'r.json')
    assert code == 0 and 'det-s on 6 images of shapes (train)' in out and 'source: mAP' in out
    result = json.loads((files / 'r.json').read_text())
    assert result['source_boxes']['mAP50'] > 50  # of images that it was trained on
    assert result['boxes']['mAP50'] > result['source_boxes']['mAP50'] - 10
    code, out, _ = run_inside('detect', 'show', 'det-s', 'shapes/train/0.png', '-o', 'o.png')
    assert code == 0 and Image.open(files / 'o.png').size == (3 * 96, 64)


def test_mistakes(files, run):
    save_detector(small_detector(), files / 'det')
    shapes, det = files / 'shapes', files / 'det'
    train = ('detect', 'train', '--checkpoint', files / 'backbone.safetensors', '--image-size', '64', '96')
    assert_mistake(run(*train, '--backbone', 'test_vit2', '--data', shapes, '-o', det), '--overwrite')
    assert_mistake(run(*train, '--backbone', 'test_vit2', '--data', shapes, '--split', 'test', '-o', files / 'x'),
                   "no split 'test'")
    assert_mistake(run(*train, '--backbone', 'test_vit9', '--data', shapes, '-o', files / 'x'), 'timm has no model')
    assert_mistake(run('evaluate', det, '--data', shapes, '--crop-pct', '0.5'), 'is a detector: leave out --crop-pct')
    assert_mistake(run('compare', det, '--data', shapes), 'is a detector: sformer evaluate takes it')
    assert_mistake(run('convert', det, '-o', files / 'x', '--crop-pct', '0.9'), 'is a detector: leave out --crop-pct')
    assert_mistake(run('compare', det, det, '--data', shapes), 'is a detector')
    assert_mistake(run('evaluate', det, '--data', shapes, '--results-file', files / 'r.csv'), 'written as JSON')
    assert_mistake(run('convert', det, '--calibration', shapes, '--split', 'no', '-o', files / 'x'), "no split 'no'")
    assert_mistake(run('detect', 'show', det, files / 'backbone.safetensors', '-o', files / 'o.png'), 'as an image')
    assert_mistake(run('detect', 'show', det, shapes / 'val' / '0.png', '-o', files / 'o.txt'), 'neither a PNG nor')
    for args in (('export', det, files / 'o.onnx'), ('card', det), ('sweep', det), ('distill', det, '--dataset', shapes,
                                                                               '-o', files / 'x')):
        assert_mistake(run(*args), 'holds a detector, which sformer convert, evaluate, profile and detect show take')
    assert_mistake(run('convert', det, '--silence', '0.01', '-o', files / 'x'), 'no price of activity')
    assert not (files / 'x').exists() and not (files / 'o.onnx').exists() and not (files / 'o.png').exists()
