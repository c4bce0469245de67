"""One rule for names of data sets."""
import datasets
import pytest
from image_helpers import RGB, all_images, encoded, error_of

from sformer.data import ImageRequest, open_images
from sformer.data.names import SHORT_NAMES, Located, find_data, known_data
from sformer.errors import SFormerError
from sformer.evaluation import EvaluationConfig


@pytest.fixture
def shelf(tmp_path, monkeypatch, write_parquet):
    """A folder of copies that the environment names."""
    write_parquet('shelf/cifar10/test.parquet', num=4)
    write_parquet('shelf/imagenet-1k/validation.parquet', num=5)
    write_parquet('shelf/imagenet-1k/test.parquet', num=3)
    write_parquet('shelf/some/photos/train.parquet', num=3)
    monkeypatch.setenv('SFORMER_DATA', str(tmp_path / 'shelf'))
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'shelf'


def test_a_copy_by_its_name(shelf):
    for name, folder in (('cifar10', 'cifar10'), ('uoft-cs/cifar10', 'cifar10'), ('imagenet-real', 'imagenet-1k'),
                         ('ILSVRC/imagenet-1k', 'imagenet-1k'), ('some/photos', 'some/photos')):
        assert find_data(name) == Located(name, shelf / folder)
        assert open_images(name, data_config=RGB, needs_labels=True).name == name
    assert find_data('cifar100').folder is None and find_data('digits').folder is None
    assert find_data('../shelf/some').folder is None and find_data('').folder is None


def test_a_folder_that_is_named_comes_first(shelf, tmp_path):
    assert find_data('shelf/cifar10') == Located('shelf/cifar10', tmp_path.relative_to(tmp_path) / 'shelf/cifar10')
    (tmp_path / 'cifar10').mkdir()
    assert find_data('cifar10').folder != shelf / 'cifar10'


def test_a_folder_and_what_to_call_it(shelf, monkeypatch):
    monkeypatch.delenv('SFORMER_DATA')
    images = open_images('uoft-cs/cifar10=shelf/cifar10', data_config=RGB, needs_labels=True)
    assert (images.name, images.split, images.num_images) == ('uoft-cs/cifar10', 'test', 4)
    plain = open_images('shelf/cifar10', data_config=RGB)
    assert images.fingerprint == plain.fingerprint and plain.name == 'shelf/cifar10'
    for wrong, message in (
            ('cifar10=nowhere', "'cifar10=nowhere' reads as NAME=FOLDER, and 'nowhere' is no folder"),
            ('=shelf', "'=shelf' reads as NAME=FOLDER, and 'shelf' is no folder"),
            ('cifar10=', "'cifar10=' reads as NAME=FOLDER, and '' is no folder"),
            ('digits=shelf', "'digits' is the name of images that are built in: call those of 'shelf' otherwise")):
        assert error_of(wrong) == message


def test_a_shelf_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv('SFORMER_DATA', str(tmp_path / 'gone'))
    assert error_of('cifar10') == f'SFORMER_DATA is {str(tmp_path / "gone")!r}, which is no folder'
    assert len(open_images('digits', data_config=RGB | dict(input_size=(1, 8, 8), mean=(0,), std=(1,)))) == 1257


def test_splits_of_well_known_data(shelf):
    """ImageNet has a test split, too, whose labels are unknown."""
    assert open_images('imagenet-1k', data_config=RGB, needs_labels=True).split == 'validation'
    assert 'choose a split' in error_of('shelf/imagenet-1k', needs_labels=True)


@pytest.mark.parametrize('name, streamed', [('cifar10', False), ('imagenet-1k', True), ('imagenet-real', True)])
def test_from_the_hub(monkeypatch, name, streamed):
    monkeypatch.delenv('SFORMER_DATA', raising=False)
    asked = []

    def load_dataset(repository, **options):
        asked.append((repository, options))
        table = datasets.Dataset.from_dict(
            dict(image=[{'bytes': encoded(50), 'path': None}] * 3, label=[0, 1, 0]),
            features=datasets.Features(dict(image=datasets.Image(), label=datasets.Value('int64'))))
        if options.get('streaming'):
            table = table.to_iterable_dataset()
        return dict(train=table, test=table, validation=table)

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    images = open_images(name, data_config=RGB, num_images=3)
    assert asked == [(SHORT_NAMES[name].repository, dict(streaming=True) if streamed else {})]
    assert (images.name, images.split, images.streamed, len(images)) == (name, 'train', streamed, 3)
    assert all_images(images)[1].tolist() == [0, 1, 0]
    assert not open_images(name, data_config=RGB, streaming=False).streamed


def test_without_the_hub_a_line_says_what_to_set(monkeypatch):
    monkeypatch.delenv('SFORMER_DATA', raising=False)

    def load_dataset(repository, **options):
        raise ConnectionError(f"Couldn't reach '{repository}' on the Hub")
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert error_of('cifar10') == (
        "'cifar10' is uoft-cs/cifar10 on the Hugging Face Hub, which is not to be had here: name the folder of a copy "
        "as cifar10=FOLDER, or set SFORMER_DATA to the folder that has cifar10/ in it (Couldn't reach "
        "'uoft-cs/cifar10' on the Hub)")
    assert error_of('imagenet-v2') == (
        "'imagenet-v2' is no folder and not on the Hub: name the folder of a copy as imagenet-v2=FOLDER, or set "
        'SFORMER_DATA to the folder that has imagenet-v2/ in it')


def test_benchmarks_of_well_known_data():
    for name, benchmark in (('imagenet-real', 'imagenet-real'), ('imagenet-a', 'imagenet-a'), ('imagenet-1k', None),
                            ('imagenet-v2=some/folder', 'imagenet-v2'), ('digits', None)):
        assert EvaluationConfig(dataset=name).benchmark == benchmark
    assert EvaluationConfig(dataset='imagenet-real', benchmark='imagenet-1k').benchmark == 'imagenet-1k'
    assert known_data('uoft-cs/cifar100') is SHORT_NAMES['cifar100'] and known_data('nobody/nothing') is None
    assert ImageRequest(dataset='imagenet-1k').streaming is None


def test_annotated_images_by_the_same_rule(tmp_path, monkeypatch):
    from detection_tools import write_coco

    from sformer.detection import open_coco
    write_coco(tmp_path / 'shapes', num=2)
    found = open_coco(f'cells={tmp_path / "shapes"}', 'train').fingerprint
    monkeypatch.setenv('SFORMER_DATA', str(tmp_path))
    assert open_coco('shapes', 'train').fingerprint == found
    with pytest.raises(SFormerError, match=r"'cells' is not a folder: name the folder of a copy as cells=FOLDER, or "):
        open_coco('cells', 'train')
