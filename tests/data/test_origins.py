"""Generated images, digits, files and rows as they are read."""
import numpy as np
import torch
from image_helpers import GREY, RGB, all_images, encoded

from sformer.data import dead_leaves, open_images


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


def test_digits():
    from sklearn.datasets import load_digits  # takes seconds to load
    from sklearn.model_selection import train_test_split
    train, test = open_images('digits', data_config=GREY), open_images('digits', data_config=GREY, needs_labels=True)
    assert (train.split, len(train), test.split, len(test)) == ('train', 1257, 'test', 540)
    assert test.class_names == [str(i) for i in range(10)]
    x, y = all_images(test, 100)
    assert x.shape == (540, 1, 8, 8) and y.dtype == torch.int64
    counts = torch.bincount(y)
    assert counts.min() >= 52 and counts.max() <= 55, 'stratified'
    # They are scikit-learn's, in the order of its split.
    digits = load_digits()
    indices = train_test_split(np.arange(1797), test_size=540, stratify=digits.target, random_state=0)
    for part, chosen in zip((train, test), indices, strict=True):
        x, y = all_images(part, 100)
        pixels = ((x * 0.25 + 0.5) * 255).round()[:, 0].to(torch.uint8).numpy()
        assert (pixels == np.round(digits.images[chosen] * 255 / 16)).all()
        assert y.tolist() == digits.target[chosen].tolist()


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
