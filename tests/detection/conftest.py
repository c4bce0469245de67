"""A small data set and a small SFormer that segments, for all tests of detection: not to be changed."""
import pytest
from detection_tools import small_detector, write_coco

from sformer import SFNConfig
from sformer.detection import convert_detector, open_coco


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    write_coco(root)
    write_coco(root, 'val', 3)
    return root


@pytest.fixture(scope='session')
def data(folder):
    return open_coco(folder, 'train', masks=True)


@pytest.fixture(scope='session')
def sformer_detector(data):
    return convert_detector(small_detector(masks=True), data, SFNConfig(levels=32), num_images=2, name='shapes')
