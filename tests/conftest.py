"""Fixtures that several test files share: a trained source, its SFormer, and the real data where there is some.

What takes seconds to load waits: the process that hands out tests to others needs none of it.
"""
import functools
import os
import signal
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

# sformer_nano, spelled for its source, of half as many blocks: what tests find of all of them they find of two
NANO = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=2, num_heads=4, num_classes=10)


if 'PYTEST_XDIST_WORKER' in os.environ:  # workers share the cores
    import torch
    torch.set_num_threads(1)
    os.environ['OMP_NUM_THREADS'] = '1'


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script, where Ctrl-C is not for it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow, too')


def pytest_configure(config):
    if hasattr(config, 'workerinput') or not config.getoption('numprocesses', None):  # a process that runs tests
        config.pluginmanager.import_plugin('hub_fixtures')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'):
        return
    for item in items:
        if item.get_closest_marker('slow'):
            item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))


@pytest.fixture(scope='session')
def test_data() -> Path:
    """Folder with `data/cifar10` (parquet) and `checkpoints/vit_micro_cifar10.safetensors`."""
    folder = os.environ.get('SFORMER_TEST_DATA')
    if not folder:
        pytest.skip('SFORMER_TEST_DATA does not name the folder of the real data')
    folder = Path(folder)
    for name in ('data/cifar10', 'checkpoints/vit_micro_cifar10.safetensors'):
        if not (folder / name).exists():
            pytest.skip(f'SFORMER_TEST_DATA: there is no {name} in {folder}')
    return folder


@pytest.fixture(scope='session')
def made_once(tmp_path_factory):
    """`made_once(name, make)`: a file or folder that `make(path)` has written, once for all processes that test; not to
    be changed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'made'  # of this run, and of no other
    folder.mkdir(exist_ok=True)

    def made_once(name, make):
        with FileLock(folder / f'{name}.lock'):
            if not (folder / name).exists():
                with tempfile.TemporaryDirectory(dir=folder) as aside:
                    make(Path(aside) / name)
                    (Path(aside) / name).rename(folder / name)
        return folder / name
    return made_once


@functools.cache
def trained_state():
    """The first blocks of `sformer_nano.digits`, and a head that least squares fit to what they say: 98 % top-1."""
    import timm
    import torch
    import torch.nn.functional as F
    from timm.data import resolve_input_data_config

    import sformer
    from sformer.data import open_images
    trained = sformer.source_of(timm.create_model('sformer_nano.digits', pretrained=True))
    trained.blocks = trained.blocks[:NANO['depth']]
    digits = open_images('digits', 'train', data_config=resolve_input_data_config(trained), needs_labels=True)
    images, labels = next(digits.batches(digits.num_images))
    with torch.no_grad():
        features = F.pad(trained.forward_head(trained.forward_features(images), pre_logits=True), (0, 1), value=1.)
        moments = features.T @ features + 10 * torch.eye(features.shape[1])
        head = torch.linalg.solve(moments, features.T @ (10 * F.one_hot(labels, NANO['num_classes'])).float())
    return {**trained.state_dict(), 'head.weight': head[:-1].T.contiguous(), 'head.bias': head[-1].clone()}


def make_source():
    """A ViT trained on digits, as a user has one: a plain timm model. Tests may change it."""
    import timm

    from sformer.conversion.sources import set_data_config_
    source = timm.create_model('vit_tiny_patch16_224', **NANO).eval()
    source.load_state_dict(trained_state())
    set_data_config_(source, mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation='bilinear')
    return source


@pytest.fixture(scope='session')
def operators_read_once():
    """Each export of torch's reads its table of ONNX operators, which takes longer than a small network does."""
    exporter = pytest.importorskip('torch.onnx._internal.exporter._registration').ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, 'from_torchlib', staticmethod(functools.cache(exporter.from_torchlib)))
        yield


@pytest.fixture(scope='session')
def source():
    """The source of the whole session: not to be changed."""
    return make_source()


@pytest.fixture
def own_source():
    """A source of the test's own."""
    return make_source()


@pytest.fixture(scope='session')
def model(source):
    """The SFormer of `source`, calibrated on digits: not to be changed."""
    import sformer
    return sformer.convert(source, 'digits', split='train')


@pytest.fixture(scope='session')
def spiking_graph(made_once, model):
    """`model` as a graph that says where it spikes, too."""
    def export(path):
        import sformer
        sformer.export_onnx(model, path, spikes=True, command='sformer export /home/me/out')
    pytest.importorskip('onnxscript')
    return made_once('spiking.onnx', export)


@pytest.fixture(scope='session')
def digits(source):
    """All test digits, normalised (540, 1, 8, 8), and their labels (540,)."""
    from timm.data import resolve_input_data_config

    from sformer.data import open_images
    config = resolve_input_data_config(source)
    return next(open_images('digits', 'test', data_config=config, needs_labels=True).batches(540))


@pytest.fixture(scope='session')
def images(digits):
    """A batch of normalised digits, (32, 1, 8, 8)."""
    return digits[0][:32]
