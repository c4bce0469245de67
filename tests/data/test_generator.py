"""Dead leaves: reproducible, shaped as they should be, and like photographs."""
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_helpers import RGB, all_images
from PIL import Image

from sformer.data import dead_leaves, generator, open_images
from sformer.errors import SFormerError


def test_dead_leaves_are_the_same_everywhere():
    # Checksums of one machine: another one, or a new version of numpy, must not change a bit.
    rgb = np.stack(list(dead_leaves(20, (3, 32, 32), seed=3)))
    grey = next(dead_leaves(1, (1, 33, 47), seed=5))
    assert zlib.crc32(rgb.tobytes()) == 321246877
    assert zlib.crc32(grey.tobytes()) == 302140510


def test_dead_leaves_depend_on_seed_and_index_alone():
    eight = list(dead_leaves(8, (3, 24, 40), seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(dead_leaves(3, (3, 24, 40), seed=1), eight, strict=False))
    assert not np.array_equal(eight[0], eight[1])
    assert not np.array_equal(eight[0], next(dead_leaves(1, (3, 24, 40), seed=2)))
    assert not np.array_equal(eight[1], next(dead_leaves(1, (3, 24, 40), seed=2)))
    assert eight[0].shape == (24, 40, 3) and eight[0].dtype == np.uint8


def test_grey_dead_leaves_are_the_colour_ones_as_pil_converts_them():
    rgb, grey = next(dead_leaves(1, (3, 30, 20))), next(dead_leaves(1, (1, 30, 20)))
    assert np.array_equal(grey[..., 0], np.asarray(Image.fromarray(rgb).convert('L')))


@pytest.mark.parametrize('size', [(3, 1, 1), (1, 2, 9), (3, 8, 8), (3, 100, 17)])
def test_dead_leaves_of_any_size(size):
    for image in dead_leaves(3, size):
        assert image.shape == (size[1], size[2], size[0])


def contains(leaves, i, x, y):
    """Whether leaf i contains a point: in polar coordinates and corners, not as the implementation has it."""
    angle = np.arctan2(leaves['sin'][i], leaves['cos'][i])
    z = ((x - leaves['x'][i]) + 1j * (y - leaves['y'][i])) * np.exp(-1j * angle) / leaves['r'][i]
    z = z.real + 1j * z.imag / leaves['aspect'][i]
    if leaves['shape'][i] == 0:
        return abs(z) <= 1
    corners = {1: np.exp(1j * np.pi * (np.arange(4) + 0.5) / 2), 2: np.exp(2j * np.pi * np.arange(3) / 3)}
    corners = corners[int(leaves['shape'][i])]
    edges = np.roll(corners, -1) - corners
    return np.all((edges.conj() * (z - corners)).imag >= 0)


def test_leaves_occlude_one_another_and_cover_everything():
    height, width = 9, 13
    wrong, shapes, background = 0, set(), 0
    for seed in range(6):
        leaves = generator.draw_leaves(np.random.default_rng(seed), height, width)
        ids = generator.stack_leaves(leaves, height, width)
        assert ids.shape == (2 * height, 2 * width)
        last = len(leaves['r']) - 1
        for (row, column), i in np.ndenumerate(ids):
            x, y = (column + 0.5) / 2, (row + 0.5) / 2
            front = next((j for j in range(last) if contains(leaves, j, x, y)), last)
            wrong += front != i
        shapes |= {int(s) for s in leaves['shape'][np.unique(ids)]}
        background += (ids == last).mean() / 6
    assert wrong <= 2  # points on an edge may fall on either side
    assert shapes == {0, 1, 2}
    assert 0.02 < background < 0.6


def test_radii_follow_the_power_law():
    # p(r) ~ r^-3 between 2 and 200: the share above r is (r^-2 - 200^-2) / (2^-2 - 200^-2).
    r = generator.draw_radii(np.random.default_rng(0), 200_000, 2., 200.)
    assert r.min() >= 2 and r.max() <= 200
    for radius in (3., 5., 10., 20., 40.):
        expected = (radius ** -2 - 200 ** -2) / (2 ** -2 - 200 ** -2)
        assert (r > radius).mean() == pytest.approx(expected, rel=0.12), radius
    # Over images the smallest radius differs, but the largest leaves show the same law: doubling leaves a quarter.
    drawn = [generator.draw_leaves(np.random.default_rng(s), 256, 256)['r'][:-4] for s in range(300)]
    drawn = np.concatenate(drawn)
    expected = (80 ** -2 - 256 ** -2) / (40 ** -2 - 256 ** -2)
    assert (drawn > 80).sum() / (drawn > 40).sum() == pytest.approx(expected, abs=0.06)


def statistics(images):
    """Mean, pixel std, std of image means, contrast, correlation R to B, spectral slope, of (N, H, W, 3) uint8."""
    x = images.astype(np.float64) / 255
    light = x.mean(-1)
    light = light - light.mean((1, 2), keepdims=True)
    size = x.shape[1]
    power = (np.abs(np.fft.fft2(light * np.hanning(size)[:, None] * np.hanning(size))) ** 2).mean(0)
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    band = (f > 2 / size) & (f < 0.5)
    centred = x - x.mean((1, 2), keepdims=True)
    red, blue = centred[..., 0], centred[..., 2]
    return dict(
        mean=x.mean(),
        std=x.std(),
        std_of_means=x.mean((1, 2)).std(0).mean(),
        contrast=x.std((1, 2)).mean(),
        gradient=np.abs(np.diff(x.mean(-1), axis=2)).mean(),
        correlation=(red * blue).sum() / np.sqrt((red ** 2).sum() * (blue ** 2).sum()),
        slope=np.polyfit(np.log(f[band]), np.log(power[band]), 1)[0],
    )


def test_dead_leaves_resemble_photographs():
    images = np.stack(list(dead_leaves(400, (3, 32, 32))))
    s = statistics(images)
    # CIFAR-10 has 0.47, 0.25, 0.13, 0.20, 0.88 and -3.6.
    assert s['mean'] == pytest.approx(0.47, abs=0.04)
    assert s['std'] == pytest.approx(0.25, abs=0.03)
    assert s['std_of_means'] == pytest.approx(0.13, abs=0.03)
    assert s['contrast'] == pytest.approx(0.20, abs=0.03)
    assert 0.75 < s['correlation'] < 0.95
    assert -3.6 < s['slope'] < -2.6
    means, contrasts = images.mean((1, 2, 3)) / 255, images.mean(-1).std((1, 2)) / 255
    assert means.min() < 0.25 and means.max() > 0.7, 'dark and bright images'
    assert contrasts.min() < 0.08 and contrasts.max() > 0.28, 'flat and harsh images'


def test_dead_leaves_resemble_cifar10():
    folder = os.environ.get('SFORMER_TEST_DATA', '')
    if not folder or not (Path(folder) / 'data/cifar10').is_dir():
        pytest.skip('SFORMER_TEST_DATA names no folder with data/cifar10')
    cifar = open_images(str(Path(folder) / 'data/cifar10'), 'test', num_images=1000, data_config=RGB, needs_labels=True)
    x, y = all_images(cifar, 250)
    assert x.shape == (1000, 3, 32, 32) and set(y.tolist()) == set(range(10)) and cifar.class_names[0] == 'airplane'
    real = statistics(((x * 0.25 + 0.5) * 255).round().permute(0, 2, 3, 1).numpy())
    ours = statistics(np.stack(list(dead_leaves(500, (3, 32, 32)))))
    for key, tolerance in dict(
            mean=0.05, std=0.04, std_of_means=0.03, contrast=0.03, gradient=0.03, correlation=0.1, slope=0.8).items():
        assert ours[key] == pytest.approx(real[key], abs=tolerance), key


def test_error_of_dead_leaves_with_four_channels():
    with pytest.raises(SFormerError, match=r'^dead leaves are grey \(1, H, W\) or RGB \(3, H, W\), not \(4, 8, 8\)$'):
        dead_leaves(1, (4, 8, 8))
