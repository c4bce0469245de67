"""One reader of pixels: what a file shows is the same to classifiers and to detectors."""
import numpy as np
import pytest
import torch
from detection_tools import write_annotations, write_coco
from image_helpers import all_images, config
from PIL import Image

from sformer import SFormerError
from sformer.data import UnreadableImageError, open_images
from sformer.detection import image_batches, open_coco
from sformer.detection.coco import read_image

LEVELS = np.array([[0, 257, 25700, 65535]] * 3, np.uint16)  # 0, 1, 100 and 255 of 255
GREY = [[0, 1, 100, 255]] * 3


def sixteen(path):
    Image.fromarray(LEVELS).save(path)
    return [GREY] * 3


def cmyk(path):
    Image.new('CMYK', (4, 3), (0, 255, 255, 0)).save(path)
    return [[[255] * 4] * 3, [[0] * 4] * 3, [[0] * 4] * 3]


def transparent(path):
    Image.new('RGBA', (4, 3), (10, 20, 30, 200)).save(path, lossless=True)
    return [[[value] * 4] * 3 for value in (10, 20, 30)]


def palette(path):
    image = Image.new('P', (4, 3), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path, transparency=1)
    return [[[value] * 4] * 3 for value in (10, 20, 30)]


def bilevel(path):
    Image.new('1', (4, 3), 1).save(path)
    return [[[255] * 4] * 3] * 3


def animated(path):
    frames = [Image.new('RGB', (4, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    return [[[255] * 4] * 3, [[0] * 4] * 3, [[0] * 4] * 3]


@pytest.mark.parametrize('name, make', [
    ('a.png', sixteen), ('a.tif', sixteen), ('a.ppm', sixteen), ('a.jpg', cmyk), ('a.tif', cmyk),
    ('a.png', transparent), ('a.webp', transparent), ('a.png', palette), ('a.gif', palette), ('a.png', bilevel),
    ('a.gif', animated), ('a.png', animated), ('a.webp', animated), ('a.tif', animated)])
def test_every_task_sees_the_same(tmp_path, name, make):
    expected = make(tmp_path / name)
    found = (read_image(tmp_path / name) * 255).round().int()
    assert (found - torch.tensor(expected)).abs().max() <= (2 if name == 'a.jpg' else 0)
    classified, _ = all_images(open_images(str(tmp_path), data_config=config((3, 3, 4), (0, 0, 0), (1, 1, 1))))
    assert torch.equal((classified[0] * 255).round().int(), found)


@pytest.mark.parametrize('levels', [np.float32([[0., 0.5]]), np.int32([[0, 100_000]]), np.float32([[0., 70000.]])])
def test_pixels_of_unknown_range_are_refused_by_every_task(tmp_path, levels):
    path = tmp_path / 'a.tiff'
    Image.fromarray(levels).save(path)
    with pytest.raises(UnreadableImageError, match='a.tiff cannot be read as an image: .* have no known range: save'):
        read_image(path)
    with pytest.raises(UnreadableImageError, match='have no known range: save'):
        all_images(open_images(str(tmp_path), data_config=config((3, 1, 2))))
    data = write_coco(tmp_path, num=1)
    Image.fromarray(np.resize(levels, (64, 96))).save(tmp_path / 'train' / '0.tiff')
    data['images'][0]['file_name'] = '0.tiff'
    write_annotations(tmp_path, data)
    with pytest.raises(SFormerError, match='image 10 is unreadable .0.tiff: .* have no known range: save'):
        open_coco(tmp_path, 'train')


@pytest.mark.parametrize('content, reason', [
    (b'', 'it is empty'), (b'version https://git-lfs.github.com/spec/v1\noid x', 'Git-LFS pointer'),
    (b'nothing', 'not an image')])
def test_files_that_are_no_images(tmp_path, content, reason):
    (tmp_path / 'a.png').write_bytes(content)
    with pytest.raises(UnreadableImageError, match=f'a.png cannot be read as an image: .*{reason}'):
        read_image(tmp_path / 'a.png')
    with pytest.raises(UnreadableImageError, match=reason):
        all_images(open_images(str(tmp_path), data_config=config((3, 3, 4))))


@pytest.mark.parametrize('orientation, corner', [
    (1, (0, 0)), (2, (0, 3)), (3, (2, 3)), (4, (2, 0)), (5, (0, 0)), (6, (0, 2)), (7, (3, 2)), (8, (3, 0))])
def test_orientations(tmp_path, orientation, corner):
    """Where the first pixel that is stored lies in the upright picture."""
    pixels = np.zeros((3, 4), np.uint16)
    pixels[0, 0] = 65535
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / 'a.png', exif=exif)
    upright = read_image(tmp_path / 'a.png')
    assert upright.shape == ((3, 4, 3) if orientation > 4 else (3, 3, 4))
    assert upright[0].nonzero().tolist() == [list(corner)]
    assert read_image(tmp_path / 'a.png', upright=False)[0].nonzero().tolist() == [[0, 0]]


def test_pictures_of_sixteen_bits_are_calibrated_with_as_they_are(tmp_path):
    data = write_coco(tmp_path, num=1)
    grey = np.asarray(Image.open(tmp_path / 'train' / '0.png').convert('L'))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'train' / 'wide.png')
    data['images'][0]['file_name'] = 'wide.png'
    write_annotations(tmp_path, data)
    found = open_coco(tmp_path, 'train')
    expected = torch.from_numpy(grey.copy()).float().div(255).expand(3, -1, -1)
    torch.testing.assert_close(image_batches(None, found, 1)[0][0], expected)
