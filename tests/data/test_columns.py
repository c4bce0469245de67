"""Which columns of a table are used."""
import datasets
import pytest
from image_helpers import RGB, all_images, encoded

from sformer import SFormerError
from sformer.data import open_images
from sformer.data.columns import find_columns

IMAGE, CLASSES = datasets.Image(), datasets.ClassLabel(names=['ant', 'bee'])
INTEGER, BYTES, TEXT = (datasets.Value(dtype) for dtype in ('int64', 'binary', 'string'))


def test_columns_are_detected_or_given(write_parquet):
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


@pytest.mark.parametrize('features, image, label', [
    (dict(image=IMAGE, kind=CLASSES, label=INTEGER), 'image', 'label'),  # names come before types
    (dict(image=BYTES, mask=IMAGE, label=CLASSES), 'image', 'label'),
    (dict(image=IMAGE, superclass=CLASSES, label=CLASSES), 'image', 'label'),
    (dict(image=TEXT, scan=IMAGE, label=TEXT, species=CLASSES), 'scan', 'species'),  # if they can be what they say
    (dict(mask=IMAGE, Image=IMAGE, Label=INTEGER), 'Image', 'Label'),
    (dict(jpg=IMAGE, png=IMAGE, cls=INTEGER), 'jpg', 'cls'),
    (dict(image=TEXT, fine_label=CLASSES, coarse_label=CLASSES), 'image', 'fine_label'),
])
def test_names_come_before_types(features, image, label):
    found = find_columns('x', features, needs_labels=True)
    assert (found.image, found.label) == (image, label)


def test_ambiguous_columns_are_listed():
    with pytest.raises(SFormerError, match='^several columns of x may hold the images: name one of left, right$'):
        find_columns('x', dict(left=IMAGE, right=IMAGE, label=CLASSES))
    with pytest.raises(SFormerError, match='^several columns of x may hold the images: name one of image, Image$'):
        find_columns('x', dict(image=IMAGE, Image=IMAGE, label=CLASSES))
    two = dict(image=IMAGE, species=CLASSES, colour=CLASSES, id=INTEGER)
    with pytest.raises(SFormerError, match='^several columns of x may hold the labels: name one of species, colour$'):
        find_columns('x', two, needs_labels=True)
    assert find_columns('x', two).label is None, 'nobody asked for it'
    assert find_columns('x', two, label_column='colour').class_names == ['ant', 'bee']


@pytest.mark.parametrize('streaming', [False, True])
def test_chosen_columns_are_known(write_parquet, streaming):
    folder = write_parquet(image='scan', species=([0] * 6, CLASSES))
    images = open_images(folder, data_config=RGB, streaming=streaming)
    assert (images.image_column, images.label_column) == ('scan', 'label')
    assert all_images(images)[1].tolist() == [0, 1, 2, 0, 1, 2]
    digits = open_images('digits', data_config=RGB)
    assert digits.image_column is None and digits.label_column is None


def test_a_table_without_images():
    with pytest.raises(SFormerError, match='^no image column found in x: name one of id, name$'):
        find_columns('x', dict(id=INTEGER, name=TEXT), needs_labels=False)
