"""What several tests of evaluation need: images in files, and what of a result may differ."""
import io

import datasets
import numpy as np
from PIL import Image
from timm.data import resolve_input_data_config

from sformer.data import open_images

TIMINGS = {'seconds', 'source_seconds', 'images_per_second', 'decode_seconds', 'preprocess_seconds', 'wall_seconds',
           'wait_seconds', 'peak_memory_mib'}


def steady(result, *but):
    """What of a result does not depend on when it was measured."""
    return {k: v for k, v in result.items() if k not in TIMINGS and k not in but}


def png(level, mode='L', size=(8, 8)):
    """A PNG of one colour."""
    return encoded(Image.new(mode, size, level if mode == 'L' else (level,) * 3))


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, 'png')
    return buffer.getvalue()


def digit_files(num):
    """The first digits as PNG, and their labels."""
    from sklearn.datasets import load_digits  # takes seconds to load
    digits = load_digits()
    pixels = np.rint(digits.images[:num] * 255 / 16).astype(np.uint8)
    return [(encoded(Image.fromarray(p)), int(y)) for p, y in zip(pixels, digits.target, strict=False)]


def write_digits(folder, shards, num=200, damaged=()):
    """The first digits as parquet, in so many shards below a folder."""
    files = digit_files(num)
    images = [{'bytes': b'no image' if i in damaged else data, 'path': None} for i, (data, _) in enumerate(files)]
    table = datasets.Dataset.from_dict(
        dict(image=images, label=[label for _, label in files]),
        features=datasets.Features(dict(
            image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))))
    folder = folder / f'digits{shards}-{num}-{len(damaged)}'
    folder.mkdir(exist_ok=True)
    for i in range(shards):
        table.shard(shards, i).to_parquet(folder / f'test-{i}.parquet')
    return str(folder)


def class_folders(root, names, per_class=1):
    """A folder of images per class."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(per_class):
            (root / name / f'{j}.png').write_bytes(png((i * 37 + j * 91) % 256))
    return str(root)


def all_images(model, folder):
    """All images of a folder as the model is given them, (N, C, H, W), and their labels (N,)."""
    images = open_images(folder, data_config=resolve_input_data_config(model), needs_labels=True)
    return next(images.batches(len(images)))


def use_cache(monkeypatch, folder):
    """Have `datasets` cache in a folder and ask nobody."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(folder))
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    datasets.disable_progress_bars()
