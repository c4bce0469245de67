"""Fixtures of the data layer: parquet files and folders of images."""
import datasets
import pytest
from image_helpers import encoded


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep `datasets` out of the user's cache, and off the network."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path_factory.mktemp('cache')))
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)


@pytest.fixture
def write_parquet(tmp_path):
    """Write a parquet file as the Hub has them. Image i of n is flat, of level 10 * i, and has label i % 3."""
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
