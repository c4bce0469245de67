"""Every task keeps one contract, and a third one is one file, `dense_task.py`."""
import copy
import csv
import io
import json
import re

import dense_task
import numpy as np
import pytest
import timm
import torch
from detection_tools import small_detector, write_coco

import sformer
from sformer import FitConfig, SFNConfig, SFormerError
from sformer.data import ImageRequest
from sformer.detection import convert_detector, evaluate_detector, open_coco
from sformer.evaluation.launch import Group
from sformer.tasks import OPTIONS, ConversionOptions, task_named, task_of, tasks

torch.manual_seed(0)


@pytest.fixture(scope='module')
def folders(tmp_path_factory, source):
    """Folder of a source per task, and one with images in COCO format; not to be changed."""
    root = tmp_path_factory.mktemp('tasks')
    write_coco(root / 'shapes', 'val', 2)
    torch.manual_seed(0)
    sformer.save_model(dense_task.Segmenter(4), root / 'dense')
    sformer.save_model(small_detector(), root / 'detection')
    return root


@pytest.fixture(scope='module')
def converted(folders):
    """The same, converted by their tasks."""
    images = ImageRequest(dataset='dead-leaves', num_images=8)
    for name in ('dense', 'detection'):
        task = task_named(name)
        options = ConversionOptions(batch_size=4)
        model = task.convert(str(folders / name), images, SFNConfig(), FitConfig(), 'sformer convert', options)
        task.save(model, folders / f'{name}-s')
    sformer.save_model(timm.create_model('sformer_nano.digits', pretrained=True), folders / 'classification-s')
    return folders


def state(model):
    """All that evaluation might change: modes, places, values, gradients, hooks, attributes."""
    modules = [(name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
               for name, m in model.named_modules()]
    tensors = [(name, t.data_ptr(), t.device, t.requires_grad, t.clone()) for name, t in
               [*model.named_parameters(), *model.named_buffers()]]
    return modules, tensors


def assert_same(before, after):
    assert before[0] == after[0]
    for a, b in zip(before[1], after[1], strict=True):
        assert a[:4] == b[:4] and torch.equal(a[4], b[4])


# the contract ---------------------------------------------------------------------------------------------------------


def test_converting_copies(source, folders):
    """A verb without an underscore leaves what it is handed as it was, in the mode that each part was in."""
    def convert_classifier(model):
        return sformer.convert(model, 'digits', num_images=16)

    def convert(model):
        return convert_detector(model, num_images=2)
    for model, verb in ((copy.deepcopy(source), convert_classifier), (small_detector(), convert)):
        model.train()
        next(model.children()).eval()
        before = state(model)
        found = verb(model)
        assert_same(before, state(model))
        assert sformer.is_calibrated(found) and found is not model and not found.training
        assert not {p.data_ptr() for p in found.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_a_conversion_in_place_that_fails_leaves_the_source(folders):
    """Nothing is detected, so no current reaches the head for masks."""
    detector = small_detector(masks=True).train()
    detector.roi_heads.eval()
    detector.roi_heads.score_thresh = 2.
    before = state(detector)
    with pytest.raises(SFormerError, match='mask'):
        convert_detector(detector, open_coco(folders / 'shapes', 'val'), num_images=1, inplace=True)
    assert_same(before, state(detector))


def test_evaluating_changes_nothing(converted):
    data = open_coco(converted / 'shapes', 'val')
    detector = sformer.load_model(converted / 'detection-s')
    classifier = sformer.load_model(converted / 'classification-s')
    for model, verb in ((classifier, lambda m, **how: sformer.evaluate(m, 'digits', num_images=8, **how)),
                        (detector, lambda m, **how: evaluate_detector(m, data, num_images=1, **how))):
        model.train()
        next(model.children()).eval()
        before = state(model)
        results = [verb(model), verb(model, source=sformer.source_view(model).train())]
        assert_same(before, state(model))
        assert results[0]['weights_sha256'] == results[1]['weights_sha256']


def test_evaluating_elsewhere_moves_nothing(converted):
    """On another device there is a copy; what is evaluated stays where it is."""
    model = sformer.load_model(converted / 'detection-s')
    group = Group()
    group.device = torch.device('meta')
    before = state(model)
    with pytest.raises(Exception, match='meta'):
        evaluate_detector(model, open_coco(converted / 'shapes', 'val'), group=group)
    assert_same(before, state(model))


# one door -------------------------------------------------------------------------------------------------------------


def test_one_door(converted):
    for name in ('classification', 'detection', 'dense'):
        folder = converted / f'{name}-s'
        model = sformer.load_model(folder)
        assert task_of(model).name == task_of(folder).name == task_of(f'local-dir:{folder}').name == name
        assert sformer.is_calibrated(model) and not model.training and model.conversion is not None
        again = sformer.load_model(sformer.save_model(model, converted / f'{name}-again'))
        assert all(torch.equal(a, b) for a, b in zip(
            model.state_dict().values(), again.state_dict().values(), strict=True))
    assert [task.name for task in tasks()][-1] == 'classification'
    assert task_of('vit_tiny_patch16_224').name == 'classification'


def test_options_that_only_some_tasks_take_are_options(converted, run_here):
    for verb, options in OPTIONS.items():
        known = re.findall(r'--([a-z][\w-]+)', run_here(verb, '--help').out)
        assert {option.replace('_', '-') for option in options} <= {*known}, verb
        for task in tasks():
            assert {*task.options.get(verb, ())} <= {*options}, (task.name, verb)


# a third task ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_third_task_goes_through_all_commands(folders, run_here, tmp_path, monkeypatch):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    ort = pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    source = folders / 'dense'
    result = run_here('convert', source, '-o', 'out', '--num-images', 4, '--batch-size', 2)
    assert (result.code, result.err) == (0, ''), result.err
    assert result.out == f'{source} -> segmenter: N = 63, calibrated on 4 dead-leaves images, saved to out\n'
    model = sformer.load_model('out')
    assert sformer.is_calibrated(model) and model.conversion.calibration.num_images == 4

    result = run_here('evaluate', 'out', '--data', 'dead-leaves', '--num-images', 4, '--results-file', 'out/r.json')
    found = json.loads((tmp_path / 'out' / 'r.json').read_text())
    assert result.code == 0 and found['model'] == 'out' and found['architecture'] == 'segmenter'
    assert result.out == f'out: {found["pixel_agreement"]:.2f} % of the pixels as the source has them\n' \
                         f'results in out/r.json\n'
    assert 90 < found['pixel_agreement'] <= 100
    result = run_here('compare', 'out', 'out', '--data', 'dead-leaves', '--num-images', 4, '--format', 'csv')
    rows = [*csv.DictReader(io.StringIO(result.out))]
    assert result.code == 0 and float(rows[1]['pixel_agreement']) == found['pixel_agreement'] and len(rows) == 2
    result = run_here('compare', 'out', 'out', '--data', 'dead-leaves', '--num-images', 4)
    assert result.code == 0 and f'{found["pixel_agreement"]:.2f}' in result.out

    result = run_here('export', 'out', 'out.onnx')
    assert result.code == 0 and re.match(r'out -> out.onnx: \d\.\d MiB, (\d+) of \1 layers in integers', result.out)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ran, = ort.InferenceSession('out.onnx').run(None, {'images': x.numpy()})
    with torch.inference_mode():
        simulated = model(x).numpy()
    assert np.abs(ran - simulated).max() < 0.05 * np.abs(simulated).max()

    result = run_here('profile', 'out', '--num-images', 1, '-o', 'report', '--what-is-spiking')
    assert result.code == 0 and 'NO' not in result.out and (tmp_path / 'report' / 'index.html').is_file()
    assert 'head' in result.out and 'vit.blocks.0.attn.qkv' in result.out

    result = run_here('card', 'out', '-o', 'cards')
    card = (tmp_path / 'cards' / 'out.md').read_text()
    assert result.code == 0 and 'spiking segmenter, converted from a segmenter on' in card
    assert '| classes of a pixel | 4 |' in card and "sformer.load_model('local-dir:out')" in card


@pytest.mark.parametrize('args, message', [
    (('convert', '{folder}', '-o', 'x', '--crop-pct', '0.9'), 'is a segmenter: leave out --crop-pct.'),
    (('evaluate', '{folder}', '--data', 'dead-leaves', '--amp'), 'is a segmenter: leave out --amp.'),
    (('export', '{folder}', 'x.onnx', '--image-size', '8', '8'), 'is a segmenter: leave out --image-size.'),
    (('profile', '{folder}', '--execute', '2'), 'is a segmenter: leave out --execute.'),
    (('sweep', '{folder}'), 'is a segmenter, which sformer sweep does not take.'),
    (('search', '{folder}'), 'is a segmenter, which sformer search does not take.'),
    (('benchmark', '{folder}'), 'is a segmenter, which sformer benchmark does not take.'),
    (('distill', '{folder}', '-o', 'x', '--dataset', 'dead-leaves'), 'which sformer distill does not take.'),
    (('card', '{folder}', '-o', 'cards'), 'holds a segmenter without neurons: sformer convert makes an SFormer of it.'),
    (('compare', '{folder}', 'sformer_nano.digits', '--data', 'digits'), 'is a classifier: nothing compares them')])
def test_what_a_third_task_does_not_take(folders, run_here, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    result = run_here(*(arg.format(folder=folders / 'dense') for arg in args))
    assert result.code == 1 and message in result.err and result.err.count('\n') == 1
    assert not (tmp_path / 'x').exists() and not (tmp_path / 'cards').exists()
