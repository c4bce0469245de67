"""From names to images; and every way to get it wrong."""
import errno
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from image_helpers import GREY, RGB, all_images, config, encoded, error_of

from sformer.data import open_images, resolution
from sformer.errors import SFormerError


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
            for stream in (resolution.sys.stdout, resolution.sys.stderr):
                monkeypatch.setattr(stream, 'isatty', lambda terminal=terminal: terminal, raising=False)
            open_images(folder, data_config=RGB)
            assert not datasets.are_progress_bars_disabled(), 'restored'
        assert seen == [True, False]
    finally:
        if was:
            datasets.disable_progress_bars()


@pytest.mark.parametrize('args, kwargs, message', [
    (['dead-leaves', 'train'], {}, "'dead-leaves' has no splits, so not 'train' either"),
    (['dead-leaves'], dict(needs_labels=True), "'dead-leaves' images have no labels: name a labelled data set"),
    (['dead-leaves'], dict(num_images=0), 'num_images must be an integer of at least 1, got 0.'),
    (['dead-leaves'], dict(seed=-1), f'seed must be an integer from 0 to {2 ** 63 - 1}, got -1.'),
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
    assert error_of(two) == f'several columns of {two!r} may hold the images: name one of left, right'

    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad/train.parquet').write_text('not parquet at all')
    bad = str(tmp_path / 'bad')
    assert error_of(bad).startswith(f"cannot read the parquet files of {bad!r} (split 'train'): ")


@pytest.mark.parametrize('status, attempts, expected', [(503, 3, 'abc'), (429, 3, 'abc'), (404, 1, None)])
def test_revision_of_a_dataset_on_a_busy_hub(monkeypatch, status, attempts, expected):
    """All processes ask at once, and have to hear the same."""
    import datasets
    import huggingface_hub
    asked = []

    class Api:
        def dataset_info(self, name, timeout):
            asked.append(name)
            if len(asked) < 3:
                error = OSError('busy')
                error.response = SimpleNamespace(status_code=status)
                raise error
            return SimpleNamespace(sha='abc')
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    assert (resolution.hub_revision('org/name'), len(asked)) == (expected, attempts)


def test_a_hub_that_cannot_be_asked(monkeypatch):
    """`datasets` would ask again and again, unless it has a copy."""
    import datasets
    import huggingface_hub
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **kwargs: pytest.fail('it asks'))

    class Api:
        def dataset_info(self, name, timeout):
            raise RuntimeError('no route to host')
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    assert error_of('org/Some_Set').endswith('and the Hugging Face Hub said: no route to host')
    (Path(datasets.config.HF_DATASETS_CACHE) / 'org___some_set').mkdir()
    assert resolution.hub_revision('org/Some_Set') is None


@pytest.mark.parametrize('kind', ['errno', 'pyarrow', 'datasets'])
def test_full_disk_of_the_cache_is_named(write_parquet, monkeypatch, kind):
    """A stream of the same data needs no copy."""
    import datasets
    folder = write_parquet()

    def full(*args, **kwargs):
        try:
            raise OSError(errno.ENOSPC, 'No space left on device') if kind == 'errno' else OSError(
                '[Errno 28] Error writing bytes to file. Detail: No space left on device' if kind == 'pyarrow' else
                'Not enough disk space. Needed: 3 GiB (download: 1 GiB)')
        except OSError as e:
            raise datasets.exceptions.DatasetGenerationError('An error occurred while generating the dataset') from e
    monkeypatch.setattr(datasets, 'load_dataset', full)
    for name in (folder, 'org/set'):
        message = error_of(name)
        assert message.startswith("cannot copy 'org/set': the disk of its copy is full (") == (name == 'org/set')
        assert 'disk of its copy is full' in message and 'HF_HOME' in message and '--streaming' in message


def test_folder_of_a_built_in_name_is_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    open_images('digits', data_config=GREY, num_images=2)
    assert not caplog.records
    (tmp_path / 'digits').mkdir()
    open_images('digits', data_config=GREY, num_images=2)
    message, = (record.getMessage() for record in caplog.records)
    assert "the folder is './digits'" in message
