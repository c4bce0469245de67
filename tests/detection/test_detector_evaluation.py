"""Figures are COCO's, and the same however the work was shared."""
import json
import os
import subprocess
import sys

import pytest
import torch
from detection_tools import small_detector

from sformer.detection import coco_metrics, detector_evaluation, evaluate_detector, open_coco, save_detector
from sformer.detection.drawing import picture, token_activity
from sformer.errors import SFormerError
from sformer.evaluation import Journal


def truth(data, ids, move=0.):
    """What is annotated, as if it were detected, moved to the right by a share of its width."""
    return [dict(image_id=id, category_id=a['category_id'], score=0.9, segmentation=a['segmentation'],
                 bbox=[a['bbox'][0] + move * a['bbox'][2], *a['bbox'][1:]])
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
    from pycocotools import mask
    ids = [*data.images]
    sizes = {id: (entry['height'], entry['width']) for id, entry in data.images.items()}
    found = truth(data, ids, 0.33)
    for detection in found:
        polygons = mask.frPyObjects(detection['segmentation'], *sizes[detection['image_id']])
        detection['segmentation'] = mask.merge(polygons)
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
def test_processes_share_the_images(sformer_detector, folder, tmp_path):
    save_detector(sformer_detector, tmp_path / 'm')
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


def test_categories_have_to_be_the_same(folder):
    detector = small_detector(categories={3: 'disc', 8: 'star'})
    with pytest.raises(SFormerError, match=r'other categories \(disc, square\) than the detector \(disc, star\)'):
        evaluate_detector(detector, open_coco(folder, 'val'))


def test_pictures(sformer_detector, data):
    image = data.image(10)
    drawn = picture(sformer_detector, image, min_score=0.)
    assert drawn.shape == (3, 64, 3 * 96) and drawn.dtype == torch.uint8
    plain = (image * 255).round().to(torch.uint8)
    source, spiking, activity = drawn.split(96, dim=-1)
    assert all(not torch.equal(part, plain) for part in (source, spiking, activity))
    assert torch.equal(picture(small_detector(masks=True), image, min_score=0.), source)
    assert torch.equal(picture(sformer_detector, image, min_score=0., side_by_side=False), spiking)
    assert torch.equal(picture(sformer_detector, image, min_score=1., side_by_side=False), plain)
    _, shares = token_activity(sformer_detector, image)
    assert shares.shape == (4, 6) and 0 < shares.min() < shares.max() < 1
