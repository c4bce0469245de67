"""Image data: generated, from scikit-learn, from folders; and every way to get it wrong."""
import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sformer import data
from sformer.data import dead_leaves, open_images
from sformer.errors import SFormerError


def config(size=(3, 32, 32), mean=None, std=None, **kwargs):
    mean, std = mean or (0.5,) * size[0], std or (0.25,) * size[0]
    return dict(
        input_size=size, interpolation='bicubic', mean=mean, std=std, crop_pct=1., crop_mode='center', **kwargs)


RGB, GREY = config(), config((1, 8, 8))


def all_images(images, batch_size=7, workers=0):
    batches = list(images.batches(batch_size, workers))
    labels = [y for _, y in batches]
    return torch.cat([x for x, _ in batches]), None if labels[0] is None else torch.cat(labels)


def encoded(level, mode='RGB', size=(32, 32), format='PNG'):
    buffer = io.BytesIO()
    Image.new(mode, size, level if mode == 'L' else (level,) * 3).save(buffer, format=format)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep `datasets` out of the user's cache, and off the network."""
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)


@pytest.fixture
def write_parquet(tmp_path):
    """Write a parquet file as the Hub has them. Image i of n is flat, of level 10 * i, and has label i % 3."""
    import datasets

    def write(path='set/train-00000-of-00001.parquet', num=6, image='img', label='label', images=None, **columns):
        values = {image: images or [{'bytes': encoded(10 * i), 'path': None} for i in range(num)]}
        features = {image: datasets.Image()}
        if label:
            values[label] = [i % 3 for i in range(num)]
            features[label] = datasets.ClassLabel(names=['ant', 'bee', 'cow'])
        for name, (column, feature) in columns.items():
            values[name], features[name] = column, feature
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(values, features=datasets.Features(features)).to_parquet(tmp_path / path)
        return str((tmp_path / path).parent)

    return write


@pytest.fixture
def image_folder(tmp_path):
    """Class folders below split folders; 'class10' follows 'class9', and the test split lacks 'class2'."""
    root = tmp_path / 'images'
    for split, names in (('train', ('class2', 'class9', 'class10')), ('test', ('class9', 'class10'))):
        for name in names:
            (root / split / name).mkdir(parents=True)
            (root / split / name / 'a.png').write_bytes(encoded(100))
            (root / split / name / 'b.JPG').write_bytes(encoded(200, size=(50, 40), format='JPEG'))
            (root / split / name / 'notes.txt').write_text('no image')
    return root


# Dead leaves ---------------------------------------------------------------------------------------------------------


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
        leaves = data._draw_leaves(np.random.default_rng(seed), height, width)
        ids = data._stack_leaves(leaves, height, width)
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
    r = data._draw_radii(np.random.default_rng(0), 200_000, 2., 200.)
    assert r.min() >= 2 and r.max() <= 200
    for radius in (3., 5., 10., 20., 40.):
        expected = (radius ** -2 - 200 ** -2) / (2 ** -2 - 200 ** -2)
        assert (r > radius).mean() == pytest.approx(expected, rel=0.12), radius
    # Over images the smallest radius differs, but the largest leaves show the same law: doubling leaves a quarter.
    drawn = [data._draw_leaves(np.random.default_rng(s), 256, 256)['r'][:-4] for s in range(300)]
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


def test_dead_leaves_as_image_data():
    images = open_images('dead-leaves', data_config=RGB, num_images=10, seed=4)
    x, y = all_images(images, 3)
    assert y is None and x.dtype == torch.float32 and x.shape == (10, 3, 32, 32)
    assert len(images) == images.num_images == 10 and images.split is None and images.class_names is None
    pixels = torch.from_numpy(np.stack(list(dead_leaves(10, (3, 32, 32), seed=4)))).permute(0, 3, 1, 2)
    assert torch.allclose(x, (pixels / 255 - 0.5) / 0.25, atol=1e-6)
    assert torch.equal(x, all_images(images, 4)[0]), 'iterable again, whatever the batch size'
    assert torch.equal(x, all_images(images, 5, workers=2)[0])
    assert len(open_images('dead-leaves', data_config=RGB)) == 256
    assert all_images(open_images('dead-leaves', data_config=GREY, num_images=2))[0].shape == (2, 1, 8, 8)


# Digits --------------------------------------------------------------------------------------------------------------


def test_digits():
    from sklearn.datasets import load_digits
    train, test = open_images('digits', data_config=GREY), open_images('digits', data_config=GREY, needs_labels=True)
    assert (train.split, len(train), test.split, len(test)) == ('train', 1257, 'test', 540)
    assert test.class_names == [str(i) for i in range(10)]
    x, y = all_images(test, 100)
    assert x.shape == (540, 1, 8, 8) and y.dtype == torch.int64
    counts = torch.bincount(y)
    assert counts.min() >= 52 and counts.max() <= 55, 'stratified'
    # Every image is one of scikit-learn's, with its label, and no image is in both splits.
    digits = load_digits()
    known = {np.round(i * 255 / 16).astype(np.uint8).tobytes(): int(t) for i, t in zip(
        digits.images, digits.target, strict=True)}
    pixels = ((x * 0.25 + 0.5) * 255).round().to(torch.uint8)
    keys = [p.numpy().tobytes() for p in pixels]
    assert [known[key] for key in keys] == y.tolist()
    others = ((all_images(train, 100)[0] * 0.25 + 0.5) * 255).round().to(torch.uint8)
    assert len(known) == 1797 and not set(keys) & {p.numpy().tobytes() for p in others}


def test_grey_images_for_a_colour_model():
    x, _ = all_images(open_images('digits', data_config=RGB, num_images=3))
    assert x.shape == (3, 3, 32, 32) and torch.equal(x[:, 0], x[:, 2])


# Subsets, fingerprints, random numbers -------------------------------------------------------------------------------


def test_subset_is_random_sorted_and_seeded(write_parquet):
    folder = write_parquet(num=25)

    def levels(**kwargs):
        x, _ = all_images(open_images(folder, data_config=RGB, **kwargs))
        return ((x[:, 0, 0, 0] * 0.25 + 0.5) * 25.5).round().int().tolist()

    assert levels() == levels(num_images=25, seed=1) == list(range(25))
    subset = levels(num_images=8)
    assert subset == sorted(set(subset)) and len(subset) == 8 and subset != list(range(8))
    assert subset == levels(num_images=8, seed=0) != levels(num_images=8, seed=1)
    assert subset == np.sort(np.random.default_rng(0).choice(25, 8, replace=False)).tolist()


def test_fingerprint_identifies_what_is_delivered(write_parquet):
    import shutil
    folder = write_parquet(num=12)
    copy = shutil.copytree(folder, folder + '_copy')
    other = write_parquet('other/train.parquet', num=13)

    def fingerprint(name, **kwargs):
        return open_images(name, data_config=RGB, **kwargs).fingerprint

    assert fingerprint(folder) == fingerprint(folder, seed=9) == fingerprint(copy)
    different = [
        fingerprint(folder), fingerprint(folder, num_images=5), fingerprint(folder, num_images=5, seed=1),
        fingerprint(other), fingerprint('digits'), fingerprint('digits', split='test'),
        fingerprint('dead-leaves'), fingerprint('dead-leaves', seed=1), fingerprint('dead-leaves', num_images=5)]
    assert len(set(different)) == len(different) and all(different)


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    all_images(open_images('digits', data_config=GREY, num_images=20))
    all_images(open_images('dead-leaves', data_config=GREY, num_images=2))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


# Parquet folders -----------------------------------------------------------------------------------------------------


def test_parquet_folder(write_parquet):
    folder = write_parquet()
    write_parquet('set/test-00000-of-00002.parquet', num=4)
    write_parquet('set/test-00001-of-00002.parquet', num=3)
    train, test = open_images(folder, data_config=RGB), open_images(folder, data_config=RGB, needs_labels=True)
    assert (train.split, len(train), test.split, len(test)) == ('train', 6, 'test', 7)
    assert test.class_names == ['ant', 'bee', 'cow'] and test.name == folder
    x, y = all_images(test, 3)
    assert y.tolist() == [0, 1, 2, 0, 0, 1, 2]
    levels = torch.tensor([0, 10, 20, 30, 0, 10, 20]) / 255
    assert torch.allclose(x.mean((1, 2, 3)), (levels - 0.5) / 0.25, atol=1e-5)
    assert torch.equal(x, all_images(test, 2, workers=1)[0])


def test_normalisation_and_resizing_are_those_of_timm(write_parquet):
    from timm.data import create_transform
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format='PNG')
    folder = write_parquet(num=1, images=[{'bytes': buffer.getvalue(), 'path': None}])
    cfg = dict(config((3, 16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), crop_pct=0.9)
    expected = create_transform(**cfg, is_training=False)(Image.fromarray(noise))
    assert torch.equal(all_images(open_images(folder, data_config=cfg))[0][0], expected)


def test_parquet_in_data_subfolder_with_an_awkward_name(write_parquet):
    folder = write_parquet('my [1] set/data/validation.parquet')
    images = open_images(str(Path(folder).parent), data_config=RGB)
    assert images.split == 'validation' and len(all_images(images)[0]) == 6


def test_columns_are_detected_or_given(write_parquet):
    import datasets
    other = dict(
        thumbnail=([{'bytes': encoded(250), 'path': None}] * 6, datasets.Image()),
        coarse_label=([5] * 6, datasets.Value('int32')), id=(list(range(6)), datasets.Value('int64')))
    folder = write_parquet(image='image', label='fine_label', **other)
    x, y = all_images(open_images(folder, data_config=RGB))
    assert y.tolist() == [0, 1, 2, 0, 1, 2] and x[0].max() < 0
    given = open_images(folder, data_config=RGB, image_column='thumbnail', label_column='coarse_label')
    x, y = all_images(given)
    assert y.tolist() == [5] * 6 and x.min() > 1 and given.class_names is None
    # One column of a type needs no usual name.
    x, y = all_images(open_images(write_parquet('odd/train.parquet', image='scan', label='species'), data_config=RGB))
    assert len(x) == 6 and y.tolist() == [0, 1, 2, 0, 1, 2]


def test_images_as_bytes_and_pixels(tmp_path):
    import datasets
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    columns = dict(
        pixel_values=(noise.tolist(), datasets.Array2D((8, 8), 'uint8')),
        jpg=([encoded(30, 'L', (8, 8))] * 2, datasets.Value('binary')))
    table = datasets.Dataset.from_dict(
        {k: v for k, (v, _) in columns.items()}, features=datasets.Features({k: f for k, (_, f) in columns.items()}))
    (tmp_path / 'set').mkdir()
    table.to_parquet(tmp_path / 'set/train.parquet')
    folder = str(tmp_path / 'set')
    x, y = all_images(open_images(folder, data_config=GREY))
    assert y is None and torch.allclose(x[:, 0], (torch.from_numpy(noise) / 255 - 0.5) / 0.25, atol=1e-6)
    x, _ = all_images(open_images(folder, data_config=GREY, image_column='jpg'))
    assert torch.allclose(x, torch.tensor((30 / 255 - 0.5) / 0.25), atol=1e-5)


# Image folders -------------------------------------------------------------------------------------------------------


def test_image_folder(image_folder):
    train = open_images(str(image_folder), data_config=RGB)
    assert (train.split, len(train), train.class_names) == ('train', 6, ['class2', 'class9', 'class10'])
    x, y = all_images(train)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    levels = torch.tensor([100, 200] * 3) / 255
    assert torch.allclose(x.mean((1, 2, 3)), (levels - 0.5) / 0.25, atol=0.02)
    # A class that is missing from a split does not shift the labels of the others.
    test = open_images(str(image_folder), data_config=RGB, needs_labels=True)
    assert test.split == 'test' and all_images(test)[1].tolist() == [1, 1, 2, 2] and len(test.class_names) == 3


def test_class_by_the_name_of_a_split(tmp_path):
    for name in ('bus', 'train', 'tulip'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path / name / 'a.png')
    images = open_images(str(tmp_path), data_config=RGB, needs_labels=True)
    assert (len(images), images.split, images.class_names) == (3, None, ['bus', 'train', 'tulip'])
    assert len(open_images(str(tmp_path), 'train', data_config=RGB)) == 1, 'unless it is asked for'


def test_split_folders_without_classes_beside_other_folders(tmp_path):
    for name, number in (('train', 3), ('val', 2), ('annotations', 0)):
        (tmp_path / name).mkdir()
        for i in range(number):
            Image.new('RGB', (8, 8)).save(tmp_path / name / f'{i}.png')
    images = open_images(str(tmp_path), data_config=RGB)
    assert (len(images), images.split) == (3, 'train')


def test_image_folder_without_splits_or_classes(image_folder):
    classes = open_images(str(image_folder / 'test'), data_config=RGB, needs_labels=True)
    assert classes.split is None and all_images(classes)[1].tolist() == [0, 0, 1, 1]
    flat = open_images(str(image_folder / 'test' / 'class9'), data_config=RGB)
    assert len(flat) == 2 and flat.class_names is None and all_images(flat)[1] is None


def test_palette_cmyk_and_alpha_images(tmp_path):
    Image.new('P', (9, 9), 3).save(tmp_path / 'p.png')
    Image.new('CMYK', (9, 9)).save(tmp_path / 'c.jpg')
    Image.new('RGBA', (9, 9), (255, 0, 0, 0)).save(tmp_path / 'a.png')
    assert all_images(open_images(str(tmp_path), data_config=RGB))[0].shape == (3, 3, 32, 32)


# The Hub -------------------------------------------------------------------------------------------------------------


def test_hub_dataset(monkeypatch):
    import datasets
    table = datasets.Dataset.from_dict(
        dict(image=[{'bytes': encoded(50), 'path': None}] * 3, label=[0, 1, -1]),
        features=datasets.Features(dict(image=datasets.Image(), label=datasets.Value('int64'))))
    asked = []

    def load_dataset(name, **kwargs):
        asked.append(name)
        return datasets.DatasetDict(train=table, validation=table.select([0, 1]))

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert len(open_images('some/set', data_config=RGB)) == 3 and asked == ['some/set']
    evaluation = open_images('some/set', data_config=RGB, needs_labels=True)
    assert evaluation.split == 'validation' and all_images(evaluation)[1].tolist() == [0, 1]
    with pytest.raises(SFormerError, match=r"^'some/set' has no split 'test', but: train, validation$"):
        open_images('some/set', 'test', data_config=RGB)
    with pytest.raises(SFormerError, match=r"^image 2 of 'some/set' \(split 'train'\) has no label \(-1\)$"):
        all_images(open_images('some/set', 'train', data_config=RGB, needs_labels=True))


def test_progress_bars(monkeypatch, write_parquet):
    import datasets
    folder, seen, load = write_parquet(), [], datasets.load_dataset

    def load_dataset(*args, **kwargs):
        seen.append(datasets.are_progress_bars_disabled())
        return load(*args, **kwargs)

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    was = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    try:
        for terminal in (False, True):
            for stream in (data.sys.stdout, data.sys.stderr):
                monkeypatch.setattr(stream, 'isatty', lambda terminal=terminal: terminal, raising=False)
            open_images(folder, data_config=RGB)
            assert not datasets.are_progress_bars_disabled(), 'restored'
        assert seen == [True, False]
    finally:
        if was:
            datasets.disable_progress_bars()


def test_import_is_light():
    import ast
    names = set()
    for node in ast.parse(Path(data.__file__).read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or '').split('.')[0])
    assert 'torch' in names and not names & {'datasets', 'sklearn', 'PIL', 'torchvision', 'pyarrow'}


# Errors --------------------------------------------------------------------------------------------------------------


def error_of(*args, **kwargs):
    kwargs.setdefault('data_config', RGB)
    with pytest.raises(SFormerError) as info:
        open_images(*args, **kwargs)
    message = str(info.value)
    assert '\n' not in message
    return message


@pytest.mark.parametrize('args, kwargs, message', [
    (['dead-leaves', 'train'], {}, "'dead-leaves' has no splits, so not 'train' either"),
    (['dead-leaves'], dict(needs_labels=True), "'dead-leaves' images have no labels: name a labelled data set"),
    (['dead-leaves'], dict(num_images=0), "0 images of 'dead-leaves' asked for: at least 1 is needed"),
    (['dead-leaves'], dict(seed=-1), 'seed -1 is negative: seeds are 0 or more'),
    (['digits', 'val'], {}, "'digits' has no split 'val', but: train, test"),
    (['digits'], dict(num_images=2000), "2000 images asked for, but 'digits' (split 'train') has only 1257"),
    (['digits'], dict(label_column='y'), "'digits' has no columns, so 'y' cannot be one of them"),
    (['digits'], dict(data_config=config((2, 8, 8))),
     'input size (2, 8, 8) is not of an image: (1, H, W) is grey, (3, H, W) is RGB'),
    (['digits'], dict(data_config=config((1, 8, 8), mean=(0.1, 0.2, 0.3))),
     'the mean of the preprocessing has 3 entries (0.1, 0.2, 0.3), but the model takes 1 channel(s): give 1'),
    (['digits'], dict(data_config=config((3, 8, 8), std=(0.5,))),
     'the std of the preprocessing has 1 entries (0.5,), but the model takes 3 channel(s): give 3'),
    (['no such: thing'], {}, "'no such: thing' is not a folder, not 'dead-leaves' or 'digits', and cannot be a "
                             'Hugging Face dataset id'),
    (['../nowhere/set'], {}, "'../nowhere/set' is not a folder, not 'dead-leaves' or 'digits', and cannot be a "
                             'Hugging Face dataset id'),
    ([''], {}, "'' is not a folder, not 'dead-leaves' or 'digits', and cannot be a Hugging Face dataset id"),
    ([__file__], {}, f'{__file__!r} is a file: name the folder it is in'),
])
def test_errors(args, kwargs, message):
    assert error_of(*args, **kwargs) == message


def test_error_of_default_statistics_for_a_grey_model():
    message = error_of('digits', data_config=dict(input_size=(1, 8, 8)))
    assert message.startswith('the mean of the preprocessing has 3 entries') and message.endswith('give 1')


def test_error_of_dead_leaves_with_four_channels():
    with pytest.raises(SFormerError, match=r'^dead leaves are grey \(1, H, W\) or RGB \(3, H, W\), not \(4, 8, 8\)$'):
        dead_leaves(1, (4, 8, 8))


def test_error_of_the_hub(monkeypatch):
    import datasets

    def load_dataset(name, **kwargs):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert error_of('nobody/nothing') == (
        "'nobody/nothing' is not a folder, not 'dead-leaves' or 'digits', and the Hugging Face Hub said: "
        "Couldn't reach 'nobody/nothing' on the Hub (offline)")


def test_errors_of_parquet_folders(write_parquet, tmp_path):
    import datasets
    integers = [list(range(6)), datasets.Value('int64')]
    folder = write_parquet(label=None, id=integers, name=(['x'] * 6, datasets.Value('string')))
    assert error_of(folder, 'test') == f"{folder!r} has no split 'test', but: train"
    assert error_of(folder, needs_labels=True) == f'no label column found in {folder!r}: name one of id, name'
    assert error_of(folder, image_column='jpg') == f"{folder!r} has no column 'jpg', but: img, id, name"
    assert error_of(folder, label_column='label') == f"{folder!r} has no column 'label', but: img, id, name"
    assert error_of(folder, label_column='name').startswith(f"column 'name' of {folder!r} holds no class indices: ")
    assert error_of(folder, num_images=9) == f"9 images asked for, but {folder!r} (split 'train') has only 6"
    assert len(open_images(folder, label_column='id', needs_labels=True, data_config=RGB)) == 6
    assert all_images(open_images(folder, data_config=RGB))[1] is None

    write_parquet('set/test.parquet')
    write_parquet('set/validation.parquet')
    assert error_of(folder, needs_labels=True) == f'choose a split of {folder!r}: test, train, validation'

    two = write_parquet('two/train.parquet', image='left', right=([{'bytes': encoded(0)}] * 6, datasets.Image()))
    assert error_of(two) == f'no image column found in {two!r}: name one of left, label, right'

    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad/train.parquet').write_text('not parquet at all')
    bad = str(tmp_path / 'bad')
    assert error_of(bad).startswith(f"cannot read the parquet files of {bad!r} (split 'train'): ")


def test_errors_of_image_folders(image_folder, tmp_path):
    root = str(image_folder)
    assert error_of(root, 'val') == f"{root!r} has no split 'val', but: test, train"
    inner = str(image_folder / 'test')
    assert error_of(inner, 'val') == f"{inner!r} has no split 'val', and no other: it has no split folders"
    assert error_of(root, num_images=7) == f"7 images asked for, but {root!r} (split 'train') has only 6"
    flat = str(image_folder / 'test' / 'class9')
    assert error_of(flat, needs_labels=True) == f'the images of {flat!r} have no labels: {flat!r} has no class folders'
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert error_of(str(empty)) == f'no images or parquet files in folder {str(empty)!r}'


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_are_named(write_parquet, image_folder, workers):
    whole = encoded(100)
    for damaged in (whole[:50], b'no image', None):
        images = [{'bytes': whole, 'path': None}] * 3 + [damaged and {'bytes': damaged, 'path': None}]
        folder = write_parquet(num=4, images=images)
        with pytest.raises(SFormerError) as info:
            all_images(open_images(folder, data_config=RGB), 2, workers)
        assert str(info.value).startswith(f"cannot read image 3 of {folder!r} (split 'train'): ")
        assert '\n' not in str(info.value)

    file = image_folder / 'train' / 'class9' / 'b.JPG'
    file.write_bytes(file.read_bytes()[:400])
    images = open_images(str(image_folder), data_config=RGB)
    with pytest.raises(SFormerError) as info:
        all_images(images, 2, workers)
    path = os.path.join('class9', 'b.JPG')
    assert str(info.value).startswith(f"cannot read image 3 ('{path}') of {str(image_folder)!r} (split 'train'): ")
    # The index is that of the data, not of the subset.
    subset = open_images(str(image_folder), data_config=RGB, num_images=5, seed=1)
    assert 3 in subset.dataset.indices.tolist() and subset.dataset.indices.tolist() != [0, 1, 2, 3, 4]
    with pytest.raises(SFormerError, match='^cannot read image 3 '):
        all_images(subset, 1, workers)
