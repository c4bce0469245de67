"""Figures are COCO's, and the same however the work was shared."""
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from detection_tools import small_detector, write_annotations, write_coco
from PIL import Image, ImageOps

from sformer.detection import (
    TrainingConfig,
    coco_metrics,
    convert_detector,
    detector_evaluation,
    drawing,
    evaluate_detector,
    open_coco,
    save_detector,
    train_,
)
from sformer.detection.drawing import enlarged, picture, token_activity
from sformer.errors import SFormerError
from sformer.evaluation import Journal
from sformer.evaluation.launch import Group
from sformer.layers import named_neurons, placed


def truth(data, ids, move=0.):
    """What is annotated, as if it were detected, moved to the right by a share of its width."""
    return [dict(image_id=id, category_id=a.category_id, score=0.9, segmentation=a.mask,
                 bbox=[a.box[0] + move * a.box[2], *a.box[1:]])
            for id in ids for a in data.annotations[id]]


def test_metrics(data):
    ids = [*data.images]
    perfect = coco_metrics(data, truth(data, ids), ids)
    assert (perfect['mAP'], perfect['mAP50'], perfect['mAP75']) == (100., 100., 100.)
    # a third to the right: an IoU of 1/2, of 0.55 and more no longer
    moved = coco_metrics(data, truth(data, ids, 0.33), ids)
    assert (moved['mAP'], moved['mAP50'], moved['mAP75']) == (10., 100., 0.)
    discs = coco_metrics(data, [d for d in truth(data, ids) if d['category_id'] == 3], ids)
    assert discs['mAP'] == 50. and [figures['mAP'] for figures in discs['per_class'].values()] == [100., 0.]
    assert coco_metrics(data, [], ids)['mAP'] == 0.
    half = coco_metrics(data, truth(data, ids[:3]), ids)['mAP50']
    assert half == pytest.approx(100 * 51 / 101, abs=0.01)  # of 101 recalls, those up to 1/2
    assert coco_metrics(data, truth(data, ids[:3]), ids[:3])['mAP50'] == 100.


def test_metrics_of_masks(data):
    ids = [*data.images]
    found = truth(data, ids, 0.33)
    assert coco_metrics(data, found, ids, 'masks')['mAP'] == 100. > coco_metrics(data, found, ids)['mAP']


FIGURES = ('boxes', 'masks', 'source_boxes', 'source_masks')


@pytest.fixture(scope='module')
def result(sformer_detector, folder):
    return evaluate_detector(sformer_detector, open_coco(folder, 'val', masks=True))


def test_sformer_beside_its_source(result, folder):
    assert result['num_images'] == 3 and {*FIGURES} <= {*result}
    alone = evaluate_detector(small_detector(masks=True), open_coco(folder, 'val', masks=True))
    assert alone['boxes'] == result['source_boxes'] and alone['masks'] == result['source_masks']
    assert alone['boxes']['mAP50'] > 0 and 'source_boxes' not in alone


def test_a_run_that_was_killed_goes_on(sformer_detector, folder, result, tmp_path, monkeypatch):
    data, detect, calls = open_coco(folder, 'val', masks=True), detector_evaluation.detect, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return detect(*args)
    monkeypatch.setattr(detector_evaluation, 'detect', killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_detector(sformer_detector, data, journal=Journal(tmp_path / 'j'))
    again = evaluate_detector(sformer_detector, data, journal=Journal(tmp_path / 'j', resume=True))
    assert len(calls) == 4 + 4  # the first image is not detected again
    assert all(again[key] == result[key] for key in FIGURES)


@pytest.mark.slow
def test_processes_share_the_images(data, folder, tmp_path):
    detector = small_detector(masks=True, backbone='test_vit')  # which other processes know, too
    save_detector(convert_detector(detector, data, num_images=2), tmp_path / 'm')
    results = []
    for processes in (1, 2, 3):
        file = tmp_path / f'{processes}.json'
        launcher = [] if processes == 1 else ['-m', 'torch.distributed.run', '--nproc-per-node', str(processes)]
        subprocess.run(
            [sys.executable, *launcher, '-m', 'sformer', 'evaluate', str(tmp_path / 'm'), '--data', str(folder),
             '--split', 'train', '--results-file', str(file)], check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        results.append(json.loads(file.read_text()))
    assert [r['world_size'] for r in results] == [1, 2, 3] and results[0]['boxes']['mAP50'] > 0
    for result in results[1:]:
        assert all(result[key] == results[0][key] for key in FIGURES)


def test_processes_that_evaluate_different_detectors(data):
    class Different(Group):
        def gather(self, value):
            return [value, dict(value, models=['another'])]
    with pytest.raises(SFormerError, match=r'do not evaluate the same \(models differ\)'):
        evaluate_detector(small_detector(masks=True), data, group=Different())


@pytest.mark.parametrize('categories', [{1: 'disc', 2: 'square'}, {1: 'square', 2: 'Disc'}, {7: 'disc', 3: ' square'}])
def test_categories_are_the_same_by_their_names(folder, categories):
    """Whatever their ids, and the order of these."""
    data, first = open_coco(folder, 'val', masks=True), small_detector(masks=True)
    expected = evaluate_detector(first, data)['boxes']
    detector = small_detector(masks=True, categories=categories)
    found = evaluate_detector(detector, data)['boxes']
    names = [categories[id] for id in sorted(categories)]
    if names[0] == 'disc':
        assert found == expected and expected['mAP50'] > 0
    else:  # its first label is of squares
        assert found['per_class'] != expected['per_class']
        by_position = evaluate_detector(detector, data, by_position=True)['boxes']
        assert by_position == expected


def test_categories_that_are_not_the_same(folder):
    data = open_coco(folder, 'val')
    for categories, message in (
            ({3: 'disc', 8: 'star'}, r"has a class 'square', which is no class of the detector \(disc, star\)"),
            ({3: 'disc', 7: 'square', 9: 'star'}, r"has 2 categories, the detector finds 3: it has no 'star'"),
            ({3: 'disc'}, r"has a class 'square', which is no class")):
        with pytest.raises(SFormerError, match=message):
            evaluate_detector(small_detector(categories=categories), data)
    assert evaluate_detector(small_detector(categories={3: 'disc', 8: 'star'}), data, by_position=True)['boxes'] == \
        evaluate_detector(small_detector(), data)['boxes']
    with pytest.raises(SFormerError, match='has 2 categories, the detector finds 1'):
        evaluate_detector(small_detector(categories={3: 'disc'}), data, by_position=True)


def test_a_subset_is_random_by_its_seed(sformer_detector, folder, monkeypatch):
    data, detect, seen = open_coco(folder, 'train', masks=True), detector_evaluation.detect, []
    pixels = {id: data.image(id) for id in data.images}
    monkeypatch.setattr(detector_evaluation, 'detect', lambda network, image: seen.append(
        next(id for id in pixels if torch.equal(pixels[id], image))) or detect(network, image))

    def subset(**how):
        seen.clear()
        result = evaluate_detector(sformer_detector, data, source=False, **how)
        assert result['num_images'] == len(seen)
        return [*seen]
    assert subset(num_images=3) == subset(num_images=3, seed=0) != subset(num_images=3, seed=1)
    assert len({*map(tuple, (subset(num_images=2, seed=seed) for seed in range(8)))}) > 4
    assert subset() == subset(num_images=6, seed=3) == [*data.images]
    for number, message in ((7, '7 images asked for, but .*train.json. has only 6'), (0, 'num_images must be')):
        with pytest.raises(SFormerError, match=message):
            subset(num_images=number)


def test_nothing_is_changed(sformer_detector, folder):
    """Neither the mode of any part, nor where it lies, nor what is trained."""
    data = open_coco(folder, 'val', masks=True)
    detector, other = copy.deepcopy(sformer_detector).train(), small_detector(masks=True).train()
    detector.roi_heads.eval()
    detector.backbone.vit.requires_grad_(False)

    def state():
        modules = {id(module): module.training for network in (detector, other) for module in network.modules()}
        tensors = {id(p): (p.data_ptr(), p.requires_grad) for network in (detector, other)
                   for p in network.parameters()}
        return modules, tensors
    before = state()
    expected = evaluate_detector(sformer_detector, data, num_images=1)
    found = evaluate_detector(detector, data, num_images=1)
    assert all(found[key] == expected[key] for key in FIGURES)
    evaluate_detector(detector, data, source=other, num_images=1)
    image = data.image(10)
    same = detector_evaluation.detect(detector, image)
    assert torch.equal(same['scores'], detector_evaluation.detect(sformer_detector, image)['scores'])
    assert torch.equal(picture(detector, image), picture(sformer_detector, image))
    assert state() == before


def test_what_lies_elsewhere_is_copied():
    detector, device = small_detector(), torch.device('meta')
    moved = placed(detector, device)
    assert placed(detector, torch.device('cpu')) is detector and placed(moved, device) is moved is not detector
    assert {p.device.type for p in moved.parameters()} == {'meta'}
    assert {p.device.type for p in detector.parameters()} == {'cpu'}


def test_other_images_are_another_run(sformer_detector, tmp_path):
    """What was detected in images that have been replaced since is not taken for what is in the new ones."""
    write_coco(tmp_path, 'val', 2)
    journal = tmp_path / 'j'
    evaluate_detector(sformer_detector, open_coco(tmp_path, 'val', masks=True), journal=Journal(journal))
    for path in (tmp_path / 'val').iterdir():
        ImageOps.invert(Image.open(path)).save(path)
    data = open_coco(tmp_path, 'val', masks=True)
    found = evaluate_detector(sformer_detector, data, journal=Journal(journal, resume=True))
    expected = evaluate_detector(sformer_detector, data)
    assert all(found[key] == expected[key] for key in FIGURES)


def test_bad_annotations_are_found_before_anything_is_detected(sformer_detector, tmp_path, monkeypatch):
    monkeypatch.setattr(detector_evaluation, 'detect', pytest.fail)
    for change in (dict(iscrowd=None), dict(segmentation=[[1, 2]]), dict(bbox=None)):
        data = write_coco(tmp_path / str(change), 'val', 2)
        data['annotations'][0].update(change)
        write_annotations(tmp_path / str(change), data, 'val')
        with pytest.raises(SFormerError, match='annotation 1 has'):
            evaluate_detector(sformer_detector, open_coco(tmp_path / str(change), 'val', masks=True))


@pytest.mark.parametrize('size', [(4, 3000), (3000, 4), (1, 5000), (1, 1)])
def test_images_as_narrow_as_a_line(sformer_detector, tmp_path, size):
    """torchvision would leave no pixel of their short side."""
    write_coco(tmp_path, 'val', 1)
    height, width = size
    Image.new('RGB', (width, height), (200, 30, 30)).save(tmp_path / 'val' / 'line.png')
    data = json.loads((tmp_path / 'val.json').read_text())
    data['images'].append(dict(id=99, file_name='line.png', width=width, height=height))
    box = [0, 0, width, height]
    data['annotations'].append(dict(id=99, image_id=99, category_id=3, bbox=box, segmentation=[
        [0, 0, width, 0, width, height, 0, height]]))
    write_annotations(tmp_path, data, 'val')
    found = open_coco(tmp_path, 'val', masks=True)
    result = evaluate_detector(sformer_detector, found)
    assert result['num_images'] == 2 and result['boxes']['mAP'] is not None
    boxes = detector_evaluation.detect(small_detector(), found.image(99))['boxes']
    assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    resized = sformer_detector.transform([found.image(99)])[0].image_sizes[0]
    assert min(resized) >= 1 and max(resized) <= 96
    large, _ = enlarged(found.image(99))
    assert picture(sformer_detector, found.image(99), 0.).shape[2] > 3 * large.shape[2]
    history = train_(small_detector(masks=True), found, TrainingConfig(epochs=1), tmp_path / 'state')
    assert all(map(math.isfinite, history[0].values()))


def test_pictures(sformer_detector, data, monkeypatch):
    image = data.image(10)
    real, kept = drawing.detect, {}

    def detect_once(detector, pixels):
        """Scores are close together here, and the order of what is found may hang on the last bit of them."""
        found = real(detector, pixels)
        return kept.setdefault(any(True for _ in named_neurons(detector)), found)
    monkeypatch.setattr(drawing, 'detect', detect_once)
    drawn = picture(sformer_detector, image, min_score=0.)
    large, times = enlarged(image)
    assert times == 4 and large.shape == (3, 256, 384) and drawn.dtype == torch.uint8
    title, gap = (drawn.shape[1] - 256) // 2, (drawn.shape[2] - 3 * 384) // 2  # as high as the line of the scale
    assert drawn.shape == (3, 256 + 2 * title, 3 * 384 + 2 * gap) and title > 12 and gap > 4
    panels = [drawn[..., i * (384 + gap):i * (384 + gap) + 384] for i in range(3)]
    plain = (large * 255).round().to(torch.uint8)
    source, spiking, activity = (panel[:, title:-title] for panel in panels)
    assert all(not torch.equal(part, plain) for part in (source, spiking, activity))
    assert torch.equal(picture(small_detector(masks=True), image, min_score=0.), source)
    assert torch.equal(picture(sformer_detector, image, min_score=0., side_by_side=False), spiking)
    assert torch.equal(picture(sformer_detector, image, min_score=1., side_by_side=False), plain)
    for part in (*(panel[:, :title] for panel in panels), panels[2][:, -title:]):  # three titles and the scale
        assert (part == 255).float().mean() < 0.98
    assert (drawn[:, -title:, :-384] == 255).all()
    _, shares = token_activity(sformer_detector, image)
    assert shares.shape == (4, 6) and 0 < shares.min() < shares.max() < 1


def test_as_many_detections_count_as_asked_for(data):
    ids = [*data.images][:1]
    right = truth(data, ids)
    wrong = [dict(found, bbox=[0., 0., 1., 1.], score=0.95) for found in right for _ in range(3)]
    assert coco_metrics(data, [*wrong, *right], ids, max_detections=3)['mAP'] == 0.
    assert coco_metrics(data, [*wrong, *right], ids, max_detections=4)['mAP'] > 0.


class Oracle(torch.nn.Module):
    """Finds what is annotated in an image, after so many mistakes of a category, all in masks of two values."""

    def __init__(self, data, config, mistakes=0):
        super().__init__()
        self.data, self.config, self.mistakes = data, config, mistakes
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        image, = images
        target = next(self.data.target(id) for id in self.data.images if torch.equal(self.data.image(id), image))
        boxes = torch.cat([torch.tensor([[0., 0., 1., 1.]]).repeat(2 * self.mistakes, 1), target['boxes']])
        wrong = torch.zeros(2 * self.mistakes, *image.shape[1:])
        wrong[:, 0, 0] = 1
        masks = torch.cat([wrong, target['masks'].float()])
        labels = torch.cat([torch.tensor([1, 2]).repeat(self.mistakes), target['labels']])
        scores = torch.linspace(0.9, 0.1, len(boxes))
        return [dict(boxes=boxes, labels=labels, scores=scores, masks=0.4 + 0.2 * masks[:, None])]


def test_pixels_of_which_more_than_half_is_an_object_are_its_mask(data):
    oracle = Oracle(data, small_detector(masks=True).config)
    result = evaluate_detector(oracle, data, source=False)
    assert result['masks']['mAP'] == result['boxes']['mAP'] == 100.


@pytest.mark.parametrize('limit, mistakes, counts', [(10, 99, True), (10, 100, False), (102, 101, True)])
def test_a_hundred_detections_of_a_category_count_or_all_that_a_detector_gives(data, limit, mistakes, counts):
    config = dataclasses.replace(small_detector(masks=True).config, max_detections=limit)
    result = evaluate_detector(Oracle(data, config, mistakes), data, source=False, num_images=1)
    assert (result['boxes']['mAP'] > 0) == (result['masks']['mAP'] > 0) == counts
