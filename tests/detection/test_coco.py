"""What is wrong with annotations is said, by id."""
import copy
import logging
import re

import numpy as np
import pytest
import torch
from detection_tools import write_annotations, write_coco
from pycocotools import mask as tools

from sformer.detection import open_coco
from sformer.errors import SFormerError


def test_boxes_labels_and_masks(data, folder):
    assert [*data.images] == [10, 11, 12, 13, 14, 15] and data.categories == {3: 'disc', 7: 'square'}
    image, target = data.image(10), data.target(10)
    assert image.shape == (3, 64, 96) and target['labels'].tolist() == [1, 2]
    x0, y0, x1, y1 = target['boxes'][1].int().tolist()
    inside = image[:, y0:y1, x0:x1].reshape(3, -1).mean(1) * 255
    assert inside[2] > 100 > inside[0]  # blue
    mask = target['masks'][1].bool()
    assert mask[y0:y1, x0:x1].all() and mask.sum() == (y1 - y0) * (x1 - x0)
    assert set(open_coco(folder, 'val').target(10)) == {'boxes', 'labels'}


def broken(data, folder):
    """Each kind of mistake, with what is said of it."""
    data = copy.deepcopy(data)
    images, annotations = data['images'], data['annotations']
    annotations[1]['bbox'] = [90, 10, 30, 10]
    annotations[2].update(category_id=9)
    annotations[3].update(segmentation=dict(size=[96, 64], counts=[96 * 64]))
    annotations[4].update(segmentation=dict(size=[5, 5], counts=[25]))
    annotations[5].update(bbox=[1, 1, 0, 5])
    annotations.append(dict(annotations[0], id=1))
    annotations.append(dict(annotations[0], id=50, image_id=99))
    annotations.append(dict(annotations[0], id=51, bbox=[1, 2, float('nan'), 3]))
    annotations.append(dict(annotations[0], id=52, segmentation=[]))
    images.append(dict(images[0], id=40, file_name='gone.png'))
    (folder / 'train' / 'cut.png').write_bytes((folder / 'train' / '0.png').read_bytes()[:150])
    images.append(dict(images[0], id=41, file_name='cut.png'))
    images.append(dict(images[0], id=42, width=5))
    images.append(dict(images[1], id=10))
    return data, [
        'annotation 2 has a box outside of its image', 'annotation 3 is of the unknown category 9',
        'annotation 4 has an empty mask', r'annotation 5 has a mask of \[5, 5\] pixels',
        'annotation 6 has a box of no size', 'annotation 1 is there twice',
        'annotation 50 is of the unknown image 99', 'annotation 51 has no box of four numbers',
        'annotation 52 has no mask', 'image 40 is missing', 'image 41 is unreadable',
        r'image 42 is of \(96, 64\) pixels', 'image 10 is there twice']


def test_mistakes_are_named_and_left_out_only_if_asked(tmp_path, caplog):
    data, messages = broken(write_coco(tmp_path), tmp_path)
    write_annotations(tmp_path, data)
    with pytest.raises(SFormerError, match=r'image 40 is missing .* and 8 more\. --skip-bad .* leaves them out'):
        open_coco(tmp_path, 'train', masks=True)
    with caplog.at_level(logging.WARNING):
        left = open_coco(tmp_path, 'train', masks=True, skip_bad=True)
    assert 'They are left out' in caplog.text and len(left.problems) == len(messages)
    for message in messages:
        assert sum(bool(re.match(message, problem)) for problem in left.problems) == 1, message
    assert [*left.images] == [10, 11, 12, 13, 14, 15]
    assert sorted(a.id for found in left.annotations.values() for a in found) == [1, *range(7, 13)]


def test_codes_of_masks_and_crowds(tmp_path):
    data = write_coco(tmp_path, num=1)
    mask = np.zeros((64, 96), np.uint8, order='F')
    mask[3:9, 20:31] = 1
    code = tools.encode(mask)
    code['counts'] = code['counts'].decode()
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[-1], mask.flatten('F'), [-1]]))))
    data['annotations'][0].update(bbox=[20, 3, 11, 6], segmentation=code)
    data['annotations'][1].update(bbox=[20, 3, 11, 6], segmentation=dict(size=[64, 96], counts=runs.tolist()))
    data['annotations'].append(dict(data['annotations'][0], id=9, iscrowd=1))
    write_annotations(tmp_path, data)
    masks = open_coco(tmp_path, 'train', masks=True).target(10)['masks']
    assert len(masks) == 2 and all(torch.equal(m.as_subclass(torch.Tensor), torch.from_numpy(mask)) for m in masks)


def test_splits_are_found_as_coco_has_them(tmp_path):
    write_coco(tmp_path, 'val2017', 1)
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'val2017.json').rename(tmp_path / 'annotations' / 'instances_val2017.json')
    assert len(open_coco(tmp_path, 'val2017')) == 1
    with pytest.raises(SFormerError, match="no split 'test' .*annotations, val2017"):
        open_coco(tmp_path, 'test')


@pytest.mark.parametrize('text, message', [
    ('{', 'cannot be read as JSON'),
    ('{"images": []}', 'is not in COCO format: it has no list of annotations'),
    ('[]', 'is not in COCO format: it has no list of images'), ('[' * 10 ** 5, 'lists in lists in lists, without end'),
    ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', 'not one image is usable')])
def test_what_is_no_coco(text, message, tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train.json').write_text(text)
    with pytest.raises(SFormerError, match=message):
        open_coco(tmp_path, 'train')


def test_a_name_does_not_lead_out_of_the_folder(tmp_path):
    data = write_coco(tmp_path)
    (tmp_path / 'train' / '0.png').rename(tmp_path / '0.png')
    data['images'][0]['file_name'] = '../0.png'
    write_annotations(tmp_path, data)
    with pytest.raises(SFormerError, match='image 10 is not in the folder'):
        open_coco(tmp_path, 'train')
