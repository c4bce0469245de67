"""From images of all modes to tensors."""
import io
import struct

import numpy as np
import pytest
import torch
from image_helpers import RGB, all_images, config
from PIL import Image

from sformer.data import UnreadableImageError, open_images
from sformer.data.pixels import eight_bits


def test_grey_images_for_a_colour_model():
    x, _ = all_images(open_images('digits', data_config=RGB, num_images=3))
    assert x.shape == (3, 3, 32, 32) and torch.equal(x[:, 0], x[:, 2])


def test_normalisation_and_resizing_are_those_of_timm(write_parquet):
    from timm.data import create_transform
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format='PNG')
    folder = write_parquet(num=1, images=[{'bytes': buffer.getvalue(), 'path': None}])
    cfg = dict(config((3, 16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), crop_pct=0.9)
    expected = create_transform(**cfg, is_training=False)(Image.fromarray(noise))
    assert torch.equal(all_images(open_images(folder, data_config=cfg))[0][0], expected)


def test_palette_cmyk_and_alpha_images(tmp_path):
    Image.new('P', (9, 9), 3).save(tmp_path / 'p.png')
    Image.new('CMYK', (9, 9)).save(tmp_path / 'c.jpg')
    Image.new('RGBA', (9, 9), (255, 0, 0, 0)).save(tmp_path / 'a.png')
    assert all_images(open_images(str(tmp_path), data_config=RGB))[0].shape == (3, 3, 32, 32)


LEVELS = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)


def reopened(image, format):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return Image.open(buffer)


@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'PPM'])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, format):
    """Pillow opens some as mode I;16 and some, widened, as mode I."""
    image = reopened(Image.fromarray(np.tile(LEVELS, (4, 1))), format)
    assert np.asarray(eight_bits(image)).tolist() == [[0, 1, 100, 255]] * 4
    image.save(tmp_path / f'a.{format.lower()}')
    x, _ = all_images(open_images(str(tmp_path), data_config=config((3, 4, 4))))
    assert torch.allclose(x[0, 0, 0], (torch.tensor([0, 1, 100, 255]) / 255 - 0.5) / 0.25)


def test_sixteen_bits_by_other_names():
    widened = Image.fromarray(LEVELS.astype(np.int32))
    widened.format = 'PNG'  # as older versions of Pillow open PNG files of 16 bits
    assert np.asarray(eight_bits(widened)).tolist() == [[0, 1, 100, 255]]
    big_endian = Image.frombytes('I;16B', (4, 1), LEVELS.astype('>u2').tobytes())
    assert np.asarray(eight_bits(big_endian)).tolist() == [[0, 1, 100, 255]]


def test_twelve_bits_have_a_white_of_their_own():
    """TIFF says how many bits are in use."""
    data = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # levels 0, 2048, 4095 in 12 bits each, and fill
    entries = [(256, 3), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 5)]
    directory = struct.pack('<H', len(entries)) + b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in entries)
    header = b'II*\0' + struct.pack('<I', 14) + data
    image = Image.open(io.BytesIO(header + directory + bytes(4)))
    assert image.mode == 'I;16' and np.asarray(eight_bits(image)).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize('levels', [np.float32([[0., 0.5]]), np.int32([[0, 100_000]])])
def test_pixels_of_unknown_range_are_refused(tmp_path, levels):
    Image.fromarray(levels).save(tmp_path / 'a.tiff')
    mode = Image.fromarray(levels).mode
    with pytest.raises(UnreadableImageError, match=f"image 0 .'a.tiff'. .*mode '{mode}' have no known range"):
        all_images(open_images(str(tmp_path), data_config=RGB))
