"""A file in COCO format is checked when it is opened: what is wrong is said by id, what is odd is read right."""
import json

import numpy as np
import pytest
import torch
from detection_tools import write_annotations, write_coco
from PIL import Image
from pycocotools import mask as tools

from sformer.detection import coco_metrics, open_coco
from sformer.errors import SFormerError

SIZE = (64, 96)  # height and width of image 10, whose first object is a square of 20 pixels at 30, 10
BOX = [30, 10, 20, 20]
SQUARE = [30, 10, 50, 10, 50, 30, 30, 30]


def runs_of(mask):
    """Run-length code of a mask, not compressed."""
    flat = mask.flatten('F').astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def compressed(runs):
    return tools.frPyObjects(dict(size=[*SIZE], counts=runs), *SIZE)['counts'].decode()


INSIDE = np.zeros(SIZE, np.uint8)
INSIDE[10:30, 30:50] = 1
RUNS = runs_of(INSIDE)


def code(counts, size=SIZE):
    return dict(size=None if size is None else [*size], counts=counts)


@pytest.fixture
def data(tmp_path):
    """One image with two objects, as it is in the file."""
    data = write_coco(tmp_path, num=1)
    data['annotations'][0].update(bbox=BOX, segmentation=[SQUARE])
    return data


def opened(folder, data, **how):
    write_annotations(folder, data)
    return open_coco(folder, 'train', **dict(dict(masks=True), **how))


# mistakes -------------------------------------------------------------------------------------------------------------

NAN, FAR = float('nan'), 1e9
DEEP = json.loads('[' * 900 + ']' * 900)


@pytest.mark.parametrize('change, message', [
    # polygons
    (dict(segmentation=[[]]), 'has a polygon of 0 numbers'),
    (dict(segmentation=[[30, 10]]), 'has a polygon of 2 numbers'),
    (dict(segmentation=[[30, 10, 50, 30]]), 'has a polygon of 4 numbers'),
    (dict(segmentation=[SQUARE, [30, 10, 50, 30]]), 'has a polygon of 4 numbers'),
    (dict(segmentation=[SQUARE[:7]]), 'has a polygon of 7 numbers'),
    (dict(segmentation=[[*map(str, SQUARE)]]), 'has a mask that is no list of polygons'),
    (dict(segmentation=[[*SQUARE[:7], True]]), 'has a mask that is no list of polygons'),
    (dict(segmentation=SQUARE), 'has a mask that is no list of polygons'),
    (dict(segmentation=[[[30, 10], [50, 10], [50, 30]]]), 'has a mask that is no list of polygons'),
    (dict(segmentation=[dict(x=1)]), 'has a mask that is no list of polygons'),
    (dict(segmentation=DEEP), 'has a mask that is no list of polygons'),
    (dict(segmentation=[[*SQUARE[:7], NAN]]), 'has a polygon with nan'),
    (dict(segmentation=[[*SQUARE[:7], -NAN]]), 'has a polygon with nan'),
    (dict(segmentation=[[*SQUARE[:7], float('inf')]]), 'has a polygon with inf'),
    (dict(segmentation=[[*SQUARE[:7], FAR]]), 'has a polygon with 1000000000.0'),
    (dict(segmentation=[[*SQUARE[:7], 10 ** 400]]), 'has a polygon with 1000'),
    (dict(segmentation=[[*SQUARE[:7], 1e6]]), 'has a polygon far outside of its image'),
    (dict(segmentation=[[x + 900 for x in SQUARE]]), 'has a polygon far outside of its image'),
    (dict(segmentation=[[0, 0, 96, 64] * 6000]), 'has a polygon whose outline is longer than 1,000,000 pixels'),
    (dict(segmentation=[[30, 10, 50, 10, 40, 10]]), 'has an empty mask'),
    (dict(segmentation='30 10 50 10 50 30'), 'has a mask that is neither polygons nor a run-length code'),
    (dict(segmentation=None), 'has no mask'),
    (dict(segmentation=[[x % 30 for x in SQUARE]]), 'has a mask of which 0% lies in its box'),
    (dict(segmentation=[[0, 0, 96, 0, 96, 64, 0, 64]]), r'has a mask of which \d% lies in its box'),
    # run-length codes
    (dict(segmentation=code(RUNS[:-1])), f'has a mask whose runs add up to {6144 - RUNS[-1]} pixels, not to 64 x 96'),
    (dict(segmentation=code([*RUNS, 5])), 'has a mask whose runs add up to 6149 pixels, not to 64 x 96'),
    (dict(segmentation=code([10 ** 9, 10 ** 9])), 'has a mask whose runs add up to 2000000000 pixels'),
    (dict(segmentation=code([2 ** 32 + 100, 44])), 'has a mask whose runs add up to'),
    (dict(segmentation=code([])), 'has a mask whose runs add up to 0 pixels'),
    (dict(segmentation=code([-5, 5, 6144])), 'has a mask whose runs are no whole numbers'),
    (dict(segmentation=code(['6000', '144'])), 'has a mask whose runs are no whole numbers'),
    (dict(segmentation=code([6000.5, 143.5])), 'has a mask whose runs are no whole numbers'),
    (dict(segmentation=code(None)), 'has a mask whose runs are no whole numbers'),
    (dict(segmentation=dict(size=[*SIZE])), 'has a mask whose runs are no whole numbers'),
    (dict(segmentation=code(compressed(RUNS)[:-2])), 'has a mask whose (runs add up to|code ends in the middle)'),
    (dict(segmentation=code(compressed(RUNS)[:-1])), 'has a mask whose (runs add up to|code ends in the middle)'),
    (dict(segmentation=code(compressed(RUNS) + compressed(RUNS))), 'has a mask whose runs'),
    (dict(segmentation=code('o' * 40)), 'has a mask whose code ends in the middle of a run'),
    (dict(segmentation=code('ü')), "has a mask with the character 'ü'"),
    (dict(segmentation=code('0 1')), "has a mask with the character ' '"),
    (dict(segmentation=code(RUNS, None)), 'has a mask of None pixels'),
    (dict(segmentation=code(RUNS, SIZE[::-1])), r'has a mask of \[96, 64\] pixels, not \[64, 96\]'),
    # crowds
    *((dict(iscrowd=value), 'has an iscrowd of .*, which is 0 or 1') for value in ('0', '1', None, 2, [], NAN)),
    # boxes
    (dict(bbox=[*map(str, BOX)]), 'has no box of four numbers'), (dict(bbox=[*BOX[:3], True]), 'has no box of four'),
    (dict(bbox=[*BOX[:3], NAN]), 'has no box of four numbers'), (dict(bbox=None), 'has no box of four numbers'),
    (dict(bbox=[10 ** 400, *BOX[1:]]), 'has no box of four numbers'), (dict(bbox=DEEP), 'has no box of four numbers'),
    (dict(bbox=[96.2, 10, 0.7, 20]), 'has a box of no size within its image'),
    (dict(bbox=[-0.9, 10, 0.9, 20]), 'has a box of no size within its image'),
    (dict(bbox=[30, 64, 20, 0.5]), 'has a box of no size within its image'),
    (dict(bbox=[30, 10, 1e-9, 20]), 'has a box of no size within its image'),
    *((dict(bbox=box), 'has a box outside of its image') for box in (
        [-1.1, 10, 20, 20], [30, -1.1, 20, 20], [77.1, 10, 20, 20], [30, 45.1, 20, 20], [1e8, 10, 20, 20])),
    # what they are of
    *((dict(image_id=value), 'is of the unknown image') for value in ([1], None, '10', {}, 10.5, True)),
    *((dict(category_id=value), 'is of the unknown category') for value in ([3], None, '3', True)),
], ids=lambda value: repr(value)[:60])
def test_mistakes_of_an_annotation(tmp_path, data, change, message):
    data['annotations'][0].update(change)
    with pytest.raises(SFormerError, match=f'train.json: annotation 1 {message}.*--skip-bad .* leaves them out'):
        opened(tmp_path, data)
    left = opened(tmp_path, data, skip_bad=True)
    assert len(left.problems) == 1 and [annotation.id for annotation in left.annotations[10]] == [2]


def test_what_is_annotated_twice_counts_once(tmp_path, data, caplog):
    first, second = data['annotations'][:2]
    data['annotations'] += [dict(first, id=11), dict(second, id=12), dict(first, id=13, bbox=[30, 10, 20.5, 20])]
    data['annotations'] += [dict(first, id=14, segmentation=[[n + 0.25 for n in SQUARE]])]
    data['annotations'] += [dict(first, id=15, iscrowd=1)]
    found = opened(tmp_path, data)
    assert [annotation.id for annotation in found.annotations[10]] == [1, 2, 13, 14, 15] and not found.problems
    message, = (record.getMessage() for record in caplog.records)
    assert '2 annotations repeat another in all but their ids (11, 12), and are left out' in message


@pytest.mark.parametrize('change, message', [
    (lambda data: data['images'].append(dict(file_name='0.png', width=96, height=64)), 'image number 1 has no integer'),
    (lambda data: data['images'].append(None), 'image number 1 has no integer id'),
    (lambda data: data['images'].append('0.png'), 'image number 1 has no integer id'),
    (lambda data: data['images'].append(dict(data['images'][0], id=[1])), 'image number 1 has no integer id'),
    (lambda data: data['images'].append(dict(data['images'][0], id='7')), 'image number 1 has no integer id'),
    (lambda data: data['images'].append(dict(data['images'][0], id=7, width='96')), r'image 7 is of \(96, 64\) pixels'),
    (lambda data: data['images'].append(dict(id=7, file_name='0.png')), r'image 7 is of \(96, 64\) pixels'),
    (lambda data: data['images'].append(dict(data['images'][0], id=7, file_name=['0.png'])), 'image 7 is missing'),
    (lambda data: data['images'].append(dict(data['images'][0], id=7, file_name='x' * 5000)), 'image 7 is missing'),
    (lambda data: data['images'].append(dict(data['images'][0], id=7, file_name='a\0b')), 'image 7 is missing'),
    (lambda data: data['images'].append(dict(data['images'][0], id=7)), 'image 7 is the file of image 10, too'),
    (lambda data: data['images'].append(dict(data['images'][0], id=7, file_name='./0.png')),
     r'image 7 is the file of image 10, too \(\./0\.png\)'),
    (lambda data: data['annotations'].append([]), 'annotation number 2 has no integer id'),
    (lambda data: data['annotations'].append(dict(id=None)), 'annotation number 2 has no integer id'),
    (lambda data: data['categories'].append(dict(id=8)), r'category 8 has no name \(None\)\. Mend the categories'),
    (lambda data: data['categories'].append(dict(id=8, name=None)), 'category 8 has no name'),
    (lambda data: data['categories'].append(dict(id=8, name='')), 'category 8 has no name'),
    (lambda data: data['categories'].append(dict(id=8, name=' ')), 'category 8 has no name'),
    (lambda data: data['categories'].append('star'), 'category number 2 has no integer id'),
    (lambda data: data['categories'].append(dict(id=3, name='star')), 'category 3 is there twice'),
    (lambda data: data['categories'].append(dict(id=8, name='disc')), "categories 3 and 8 have the same name, 'disc'"),
])
def test_mistakes_of_other_entries(tmp_path, data, change, message):
    change(data)
    with pytest.raises(SFormerError, match=message) as caught:
        opened(tmp_path, data)
    assert '\n' not in str(caught.value)
    if 'categor' in message:  # of which none can be left out
        with pytest.raises(SFormerError, match=message):
            opened(tmp_path, data, skip_bad=True)
    else:
        assert [*opened(tmp_path, data, skip_bad=True).images] == [10]


@pytest.mark.parametrize('text', [
    '[' * 10 ** 5, '{"images": ' * 10 ** 5, '1' * 5000, '\x00', '{"images": []} x', '\ud800'])
def test_what_is_no_json(tmp_path, data, text):
    (tmp_path / 'train.json').write_bytes(text.encode('utf-8', 'surrogatepass'))
    with pytest.raises(SFormerError, match='cannot be read as JSON: '):
        open_coco(tmp_path, 'train')


# what is odd, and right -----------------------------------------------------------------------------------------------


def figures(found):
    """Average precision if all were detected as it is annotated."""
    detections = [dict(image_id=id, category_id=a.category_id, score=0.9, segmentation=a.mask, bbox=[*a.box])
                  for id in found.images for a in found.annotations[id]]
    return [coco_metrics(found, detections, [*found.images], kind)['mAP'] for kind in ('boxes', 'masks')]


@pytest.mark.parametrize('first', [0, -2, 10 ** 19, 2 ** 63 - 2])
def test_ids_may_start_anywhere(tmp_path, first):
    """pycocotools takes an object with the id 0 for none: 44.2 for 100 with three objects."""
    data = write_coco(tmp_path, num=3)
    for entries, key in ((data['annotations'], 'id'), (data['images'], 'id'), (data['annotations'], 'image_id'),
                         (data['annotations'], 'category_id'), (data['categories'], 'id')):
        for i, value in enumerate(sorted({entry[key] for entry in entries})):
            for entry in entries:
                if entry[key] == value and not isinstance(value, str):
                    entry[key] = str(first + i)
    for entry in (*data['annotations'], *data['images'], *data['categories']):
        entry.update({key: int(entry[key]) for key in ('id', 'image_id', 'category_id') if key in entry})
    found = opened(tmp_path, data)
    assert [*found.images] == [first, first + 1, first + 2] and [*found.categories] == [first, first + 1]
    assert figures(found) == [100., 100.]
    assert found.target(first)['labels'].tolist() == [1, 2]


@pytest.mark.parametrize('change', [
    *(dict(area=value) for value in (-1, '7', None, NAN, 0)),
    *(dict(iscrowd=value) for value in (False, 0., 0)), dict(category_id=3.), dict(image_id=10.), dict(id=1.)], ids=str)
def test_what_changes_nothing(tmp_path, data, change):
    expected = opened(tmp_path, data).target(10)
    data['annotations'][0].update(change)
    found = opened(tmp_path, data)
    assert all(torch.equal(found.target(10)[key], expected[key]) for key in expected) and len(expected['labels']) == 2
    assert figures(found) == [100., 100.]


def test_keys_may_be_left_out(tmp_path, data):
    for key in ('area', 'iscrowd'):
        del data['annotations'][0][key]
    assert figures(opened(tmp_path, data)) == [100., 100.]


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_a_byte_order_mark_is_read(tmp_path, data, encoding):
    data['categories'][0] = dict(id=3, name='Scheibe für Schütz')
    (tmp_path / 'train.json').write_text(json.dumps(data, ensure_ascii=False), encoding=encoding)
    assert open_coco(tmp_path, 'train').categories[3] == 'Scheibe für Schütz'


ZEROS = [*RUNS[:5], 0, 0, *RUNS[5:]]
SPLIT = [RUNS[0] - 7, 0, 7, 0, 0, *RUNS[1:]]


@pytest.mark.parametrize('segmentation', [
    [SQUARE], code(RUNS), code(compressed(RUNS)), code(ZEROS), code(compressed(ZEROS)), code(SPLIT), code([*RUNS, 0]),
    [SQUARE[:4] + [50, 20, 30, 20], [30, 20, 50, 20, 50, 30, 30, 30]]], ids=str)
def test_codes_of_one_mask(tmp_path, data, segmentation):
    data['annotations'][0]['segmentation'] = segmentation
    found = opened(tmp_path, data)
    assert torch.equal(found.target(10)['masks'][0].as_subclass(torch.Tensor), torch.from_numpy(INSIDE))
    # runs of no pixel, in the same places of both, end pycocotools' intersections
    annotation = found.annotations[10][0]
    assert tools.iou([annotation.mask], [annotation.mask], [0])[0, 0] == 1.


def test_a_polygon_that_leaves_the_image_is_cut_off(tmp_path, data):
    data['annotations'][0].update(bbox=[76, 10, 20, 20], segmentation=[[76, 10, 106, 10, 106, 30, 76, 30]])
    mask = opened(tmp_path, data).target(10)['masks'][0]
    assert mask[10:30, 76:96].all() and mask.sum() == 20 * 20


def test_boxes_are_cut_off_at_the_image(tmp_path, data):
    data['annotations'][0].update(bbox=[-0.5, -1, 20, 20.25])
    data['annotations'][1].update(bbox=[80, 50, 16.75, 14.5])
    found = opened(tmp_path, data, masks=False)
    assert found.target(10)['boxes'].tolist() == [[0., 0., 19.5, 19.25], [80., 50., 96., 64.]]
    assert found.annotations[10][0].box == (-0.5, -1., 20., 20.25)  # which COCO's figures are of


@pytest.mark.parametrize('rows, usable', [(3, True), (11, True), (13, True), (17, False)])
def test_half_of_a_mask_lies_in_its_box(tmp_path, data, rows, usable):
    """Or beside it by a pixel. The box may be larger: of the whole object, of which the mask is what can be seen."""
    data['annotations'][0].update(bbox=[30, 10, 20, 7], segmentation=[[30, 10, 50, 10, 50, 10 + rows, 30, 10 + rows]])
    if usable:
        assert opened(tmp_path, data).target(10)['masks'][0].sum() == 20 * rows
    else:  # 8 rows of 17
        with pytest.raises(SFormerError, match='annotation 1 has a mask of which 47% lies in its box'):
            opened(tmp_path, data)


def test_a_crowd_is_no_object(tmp_path, data):
    data['annotations'][0]['iscrowd'] = 1
    found = opened(tmp_path, data)
    assert found.target(10)['labels'].tolist() == [2] and [a.crowd for a in found.annotations[10]] == [True, False]


def test_the_fingerprint_is_of_images_and_annotations(tmp_path, data):
    first, again = opened(tmp_path, data).fingerprint, opened(tmp_path, data).fingerprint
    data['annotations'][0]['bbox'][0] += 1
    moved = opened(tmp_path, data).fingerprint
    Image.new('RGB', SIZE[::-1], (9, 9, 9)).save(tmp_path / 'train' / '0.png')
    assert first == again and len({first, moved, opened(tmp_path, data).fingerprint}) == 3


# photographs ----------------------------------------------------------------------------------------------------------


def photograph(path, orientation, size=(96, 64), **how):
    """White on the left of what is stored, black on the right; tagged. `size` is width and height as stored."""
    image = Image.new('RGB', size)
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **how)


def with_photograph(folder, data, name, annotated):
    data['images'] = [dict(id=10, file_name=name, width=annotated[0], height=annotated[1])]
    for annotation in data['annotations']:
        annotation.update(bbox=[5, 5, 20, 20])
    return opened(folder, data, masks=False)


WHITE = {5: slice(None, 48), 6: slice(None, 48), 7: slice(48, None), 8: slice(48, None)}  # rows of the turned picture


@pytest.mark.parametrize('orientation', WHITE)
@pytest.mark.parametrize('format', ['jpg', 'png', 'webp'])
def test_the_annotated_size_says_how_a_photograph_lies(tmp_path, data, orientation, format):
    name = f'0.{format}'
    photograph(tmp_path / 'train' / name, orientation)
    stored = with_photograph(tmp_path, data, name, (96, 64)).image(10)
    assert stored.shape == (3, 64, 96) and stored[..., :47].min() > 0.9 and stored[..., 49:].max() < 0.1
    found = with_photograph(tmp_path, data, name, (64, 96))
    turned = found.image(10)
    assert turned.shape == (3, 96, 64) and (found.images[10].height, found.images[10].width) == (96, 64)
    white = torch.zeros(96, 64, dtype=torch.bool)
    white[WHITE[orientation]] = True
    assert ((turned.mean(0) > 0.5) == white).float().mean() > 0.97
    with pytest.raises(SFormerError, match=r'image 10 is of \(96, 64\) pixels, not \(60, 96\)'):
        with_photograph(tmp_path, data, name, (60, 96))


@pytest.mark.parametrize('orientation, size', [
    (2, (96, 64)), (3, (96, 64)), (4, (96, 64)), (3, (80, 80)), (5, (80, 80)), (6, (80, 80)), (8, (80, 80))])
@pytest.mark.parametrize('name', ['0.jpg', '0.tif'])
def test_what_the_size_cannot_say_is_named(tmp_path, data, orientation, size, name):
    photograph(tmp_path / 'train' / name, orientation, size)
    message = f'image 10 has the EXIF orientation {orientation}, and its size does not say .*'
    with pytest.raises(SFormerError, match=message + rf'save it turned, without the orientation \({name}\)'):
        with_photograph(tmp_path, data, name, size)


@pytest.mark.parametrize('orientation', [0, 1, 9, 99])
def test_orientations_that_turn_nothing(tmp_path, data, orientation):
    photograph(tmp_path / 'train' / '0.png', orientation)
    assert with_photograph(tmp_path, data, '0.png', (96, 64)).image(10)[..., :48].min() == 1


def test_pillow_turns_tiff_itself(tmp_path, data):
    photograph(tmp_path / 'train' / '0.tif', 6)
    assert with_photograph(tmp_path, data, '0.tif', (64, 96)).image(10)[:, :48].min() == 1
    with pytest.raises(SFormerError, match=r'image 10 is of \(64, 96\) pixels, not \(96, 64\)'):
        with_photograph(tmp_path, data, '0.tif', (96, 64))


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')  # which Pillow says on opening
def test_damaged_metadata_say_nothing(tmp_path, data):
    Image.new('RGB', (96, 64), (255, 0, 0)).save(tmp_path / 'train' / '0.jpg', exif=b'Exif\0\0MM\0*\0\0\0\xff\xff\xff')
    assert with_photograph(tmp_path, data, '0.jpg', (96, 64)).image(10)[0].min() > 0.9
