"""Folders of images: splits, classes, and every file counted or named."""
import os

import pytest
import torch
from image_helpers import RGB, all_images, encoded, error_of
from PIL import Image

from sformer.data import UnreadableImageError, open_images
from sformer.data.image_folders import find_images


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
    (empty / 'annotations').mkdir()
    (empty / 'a.png').write_bytes(encoded(0))
    assert error_of(str(empty)) == f'no images in the class folders of {str(empty)!r}, only beside them: a.png'


def test_whatever_pillow_opens_is_counted(tmp_path):
    names = ['a.webp', 'b.tif', 'c.TIFF', 'd.gif', 'e.bmp', 'f.ppm', 'g.jp2', 'h.jfif', 'i.png', 'j.avif']
    formats = ['WEBP', 'TIFF', 'TIFF', 'GIF', 'BMP', 'PPM', 'JPEG2000', 'JPEG', 'PNG', 'PNG']
    for name, format in zip(names, formats, strict=True):
        (tmp_path / name).write_bytes(encoded(100, format=format))
    (tmp_path / 'without_extension').write_bytes(encoded(100))
    others = ['.hidden.png', 'README', 'Thumbs.db', 'annotation.json', 'features.h5', 'film.mpg', 'notes.txt',
              'paper.pdf']
    for name in others:
        (tmp_path / name).write_bytes(b'%PDF, or anything')
    images = open_images(str(tmp_path), data_config=RGB)
    assert len(images) == len(all_images(images)[0]) == 11
    assert images.passed_over == others
    assert find_images(tmp_path)[0] == [*names, 'without_extension']


def test_what_is_beside_classes_is_passed_over(image_folder):
    root = image_folder / 'test'
    (root / '__MACOSX' / 'class9').mkdir(parents=True)
    (root / '__MACOSX' / 'class9' / 'a.png').write_bytes(encoded(0))
    (root / '.cache').mkdir()
    (root / 'montage.png').write_bytes(encoded(0))
    images = open_images(str(root), data_config=RGB, needs_labels=True)
    assert images.class_names == ['class9', 'class10'] and len(images) == 4
    assert images.passed_over == [
        '.cache', '__MACOSX', os.path.join('class10', 'notes.txt'), os.path.join('class9', 'notes.txt'), 'montage.png']
    split = open_images(str(image_folder), 'test', data_config=RGB)
    assert split.class_names == ['class2', 'class9', 'class10'] and all_images(split)[1].tolist() == [1, 1, 2, 2]


@pytest.mark.timeout(60)
def test_links_and_pipes(image_folder):
    root = image_folder / 'test'
    (root / 'class9' / 'up').symlink_to('..')
    (root / 'class9' / 'other').symlink_to(root / 'class10')
    (root / 'class10' / 'self').symlink_to('.')
    os.mkfifo(root / 'class9' / 'pipe.png')
    os.mkfifo(root / 'class9' / 'pipe')
    images = open_images(str(root), data_config=RGB)
    assert len(images) == 4 and all_images(images)[1].tolist() == [0, 0, 1, 1]
    assert {'class9/up', 'class9/other', 'class10/self', 'class9/pipe', 'class9/pipe.png'} < set(images.passed_over)
    # two images may well have the same pixels
    (root / 'class10' / 'again.png').symlink_to('a.png')
    # a folder elsewhere is part of the data
    (root / 'class2').symlink_to(image_folder / 'train' / 'class2')
    assert all_images(open_images(str(root), data_config=RGB))[1].tolist() == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize('target', ['nowhere.png', 'c.png'])
def test_broken_link_to_an_image_is_an_unreadable_image(image_folder, target):
    (image_folder / 'test' / 'class9' / 'c.png').symlink_to(target)
    images = open_images(str(image_folder), 'test', data_config=RGB)
    assert len(images) == 5
    with pytest.raises(UnreadableImageError, match=r"^cannot read image 2 \('class9/c.png'\) of .*class9/c.png"):
        all_images(images)


def test_broken_link_to_a_folder_is_named(image_folder):
    path = image_folder / 'test' / 'class7'
    path.symlink_to('nowhere')
    assert error_of(str(image_folder), 'test') == f"{str(path)!r} is a broken link"


@pytest.mark.parametrize('folder', ['', 'test', 'test/class9', 'test/class9/more'])
def test_folder_that_cannot_be_read_is_named(image_folder, monkeypatch, folder):
    """By another scandir, as permissions do not stop root."""
    (image_folder / 'test' / 'class9' / 'more').mkdir()
    scandir, closed = os.scandir, image_folder / folder

    def refuse(path):
        if os.path.samefile(path, closed):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    assert error_of(str(image_folder), 'test') == f'cannot read folder {str(closed)!r}: Permission denied'
