"""`sformer predict`: classes of images as they lie there, in lines, as CSV, as JSON, as a picture."""
import csv
import json

import pytest
import torch
from detection_tools import small_detector, write_coco
from PIL import Image

import sformer
from sformer.data.origins import Digits
from sformer.detection import convert_detector, detect
from sformer.detection.coco import read_image
from sformer.files import png_values


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Twenty digits, one of them in a folder below, and a file that is no image."""
    root = tmp_path_factory.mktemp('photos')
    (root / 'more').mkdir()
    digits = Digits('test')
    for i in range(20):
        digits.read(i)[0].save(root / ('more' if i == 19 else '') / f'{i}.png')
    (root / 'torn.png').write_bytes(b'\x89PNG\r\n')
    return root


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """Folder of a converted detector, and one with images."""
    root = tmp_path_factory.mktemp('detector')
    write_coco(root / 'shapes', 'val', 2)
    sformer.save_model(convert_detector(small_detector(), num_images=2), root / 'det')
    return root


def test_lines(run, saved, photos):
    result = run('predict', saved, photos / '3.png', photos / 'gone.png', '--topk', '2')
    first, second = result.out.splitlines()
    assert first.startswith(f'{photos}/3.png: 6 0.') and first.count(',') == 1
    assert second == f'{photos}/gone.png: No such file or directory'
    assert result.code == 1 and result.err.endswith('sformer: error: 1 of 2 images cannot be read.\n')
    assert result.err.startswith('names of classes: none: numbers (sformer convert --label-names gives them names)\n')
    assert run('predict', saved, photos / '3.png').code == 0


def test_a_folder_and_a_pattern(run, saved, photos):
    lines = run('predict', saved, photos).out.splitlines()
    names = [line.partition(': ')[0].removeprefix(f'{photos}/') for line in lines]
    assert names == [*(f'{i}.png' for i in range(19)), 'more/19.png', 'torn.png']
    out = run('predict', saved, f'{photos}/**/1*.png').out
    assert out.count('\n') == 11 and f'{photos}/more/19.png: ' in out
    result = run('predict', saved, f'{photos}/*.tif')
    assert (result.code, result.err) == (1, f"sformer: error: no file matches '{photos}/*.tif'.\n")


def test_an_image_is_not_replaced(run, saved, photos):
    """Nor a picture of this command's, if it is among the images that are to be seen."""
    before = (photos / '3.png').read_bytes()
    for images in (photos / '3.png', photos, f'{photos}/*.png'):
        result = run('predict', saved, images, '-o', photos / '3.png', '--overwrite')
        assert result.code == 1 and '3.png is among the images, which predictions would replace' in result.err
        assert (photos / '3.png').read_bytes() == before


def test_patterns_are_in_natural_order(run, saved, photos):
    out = run('predict', saved, f'{photos}/1*.png', '--topk', '1').out
    names = [line.partition(': ')[0].removeprefix(f'{photos}/') for line in out.splitlines()]
    assert names == ['1.png', *(f'{i}.png' for i in range(10, 19))]


def test_csv_and_json_hold_the_same(run, saved, photos, tmp_path, model):
    for name in ('p.csv', 'p.json'):
        for _ in range(2):  # its own file is replaced
            result = run('predict', saved, photos, '--source', '--topk', '3', '-o', tmp_path / name, '--batch-size', 4)
        assert result.code == 1 and f'21 images: {tmp_path / name}' in result.out
        assert f'{photos}/torn.png: ' in result.out
    rows = list(csv.DictReader(open(tmp_path / 'p.csv', newline='')))
    found = json.loads((tmp_path / 'p.json').read_text())
    assert found['topk'] == 3 and len(found['images']) == 21
    again = []
    for image in found['images']:
        if 'error' in image:
            again.append(dict.fromkeys(rows[0], '') | dict(image=image['image'], error=image['error']))
        for network, key in (('model', 'found'), ('source', 'source')):
            for rank, finding in enumerate(image.get(key, ()), 1):
                again.append(dict(
                    dict.fromkeys(rows[0], ''), image=image['image'], network=network, rank=str(rank),
                    index=str(finding['index']), name=finding['name'], probability=str(finding['probability'])))
    assert again == rows
    # the same as whoever evaluates has it: digits in batches of the test split
    digits = sformer.data.open_images('digits', 'test', data_config=dict(
        input_size=(1, 8, 8), mean=(.5,), std=(.5,), crop_pct=1., interpolation='bilinear'))
    images, _ = next(digits.batches(20))
    with torch.inference_mode():
        shares = [network(images).softmax(-1) for network in (model, sformer.source_view(model))]
    for share, key in zip(shares, ('found', 'source'), strict=True):
        by_name = {image['image'].rpartition('/')[2]: image[key] for image in found['images'] if key in image}
        for i in range(20):
            mine = by_name[f'{i}.png']
            assert [f['index'] for f in mine] == share[i].topk(3).indices.tolist()
            assert torch.allclose(torch.tensor([f['probability'] for f in mine]), share[i].topk(3).values, atol=1e-5)


def test_a_picture(run, saved, photos, tmp_path):
    out = tmp_path / 'seen.png'
    result = run('predict', saved, photos / '3.png', photos / 'torn.png', '--source', '-o', out)
    assert result.code == 1 and result.out.endswith(f'2 images: {out}\n')
    values = png_values(out)['predictions']
    assert values[0]['found'][0]['name'] == values[0]['source'][0]['name'] == '6' and 'error' in values[1]
    with Image.open(out) as picture:
        assert min(picture.size) > 400
    result = run('predict', saved, photos, '-o', tmp_path / 'many.png')
    assert result.code == 1 and 'has room for 16 images' in result.err and not (tmp_path / 'many.png').exists()


def test_an_exported_graph(run, saved, spiking_graph, photos):
    for options in ((), ('--engine', 'onnxruntime')):
        result = run('predict', spiking_graph, photos / '3.png', *options)
        assert result.code == 0 and result.out.startswith(f'{photos}/3.png: 6 0.')
    beside = run('predict', spiking_graph, photos / '3.png', '--source-model', saved)
    assert beside.code == 0 and beside.out.count('6 0.') == 2
    assert 'no source inside' in run('predict', spiking_graph, photos / '3.png', '--source').err
    assert '.onnx' in run('predict', saved, photos / '3.png', '--engine', 'onnxruntime').err


def test_a_detector(run, detector, tmp_path):
    image = detector / 'shapes' / 'val' / '0.png'
    result = run('predict', detector / 'det', image, '--source', '--topk', '2', '-o', tmp_path / 'd.json')
    assert result.code == 0
    entry, = json.loads((tmp_path / 'd.json').read_text())['images']
    found = detect(sformer.load_model(detector / 'det'), read_image(image))
    assert [f['probability'] for f in entry['found']] == pytest.approx(found['scores'][:2].tolist())
    assert entry['found'][0]['box'] == pytest.approx(found['boxes'][0].tolist())
    assert {f['name'] for f in entry['found'] + entry['source']} <= {'disc', 'square'}
    assert ' at ' in run('predict', detector / 'det', image).out
    assert run('predict', detector / 'det', image, '--source', '-o', tmp_path / 'd.png').code == 0


def test_a_photograph_that_lies_on_its_side(saved, photos, tmp_path):
    upright = Image.open(photos / '3.png')
    exif = Image.Exif()
    exif[274] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'lies.png', exif=exif)
    first, second = sformer.predict(saved, [upright, tmp_path / 'lies.png'])
    assert first.found == second.found and first.name == '6' and first.probability == first.found[0].probability
    assert (first.image, second.image) == (str(photos / '3.png'), str(tmp_path / 'lies.png'))


def test_images_are_read_as_they_are_needed(saved, photos):
    """Or many would not fit into memory."""
    def endless():
        for number in range(100):
            assert number < 8, 'more was read than is asked for'
            yield photos / '3.png'
    found = sformer.predict(saved, endless(), batch_size=4)
    assert [next(found).name for _ in range(5)] == ['6'] * 5


def test_what_is_refused(run, saved, photos, tmp_path):
    (tmp_path / 'mine.csv').write_text('a,b\n')
    for args, message in (
            ((photos / '3.png', '-o', 'p.txt'), 'written as .csv, .json or, drawn, as .png'),
            ((photos / '3.png', '-o', tmp_path / 'mine.csv'), 'is there and holds no predictions'),
            ((photos / 'more', '--source-model', 'sformer_micro.cifar10'), 'other input'),
            ((tmp_path / 'empty',), 'has no images')):
        (tmp_path / 'empty').mkdir(exist_ok=True)
        result = run('predict', saved, *args)
        assert result.code == 1 and message in result.err and result.err.count('\n') == 1, args
    with pytest.raises(sformer.SFormerError, match='topk'):
        sformer.predict(saved, photos, topk=0)
