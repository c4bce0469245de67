"""Detectors by name, from folders and from the Hub: the real client against a stand-in on the loopback interface."""
import copy
import json

import pytest
import timm
import torch
import torchvision
from detection_tools import CATEGORIES, small_config

import sformer
from sformer import SFormerError, UncalibratedError, is_calibrated
from sformer.detection import (
    COCO_CATEGORIES,
    build_detector,
    detect,
    evaluate_detector,
    load_detector,
    save_detector,
)
from sformer.detection.detector_entrypoints import BACKBONES
from sformer.layers import named_neurons
from sformer.tasks import task_of

REPO = 'my-org/shapes'
NAME = 'sformer_maskrcnn_vit_tiny_patch16_224'
SMALL = dict(categories={c['id']: c['name'] for c in CATEGORIES}, image_size=(64, 96), channels=8, hidden=16)


@pytest.fixture(scope='module')
def saved(sformer_detector, tmp_path_factory):
    return save_detector(sformer_detector, tmp_path_factory.mktemp('saved') / 'det')


def upload(hub, folder, **changes):
    """Put the files of a folder on the Hub, behind the client's back; returns the commit."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files['config.json'])
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return hub.put(REPO, dict(files, **{'config.json': json.dumps(config).encode()}))


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# names ----------------------------------------------------------------------------------------------------------------


def test_names_are_torchvisions():
    names = torchvision.models.list_models(include='sformer_*')
    assert NAME in names and len(names) == 2 * len(BACKBONES) and not {*names} & {*timm.list_models()}
    assert torchvision.models.get_model_builder(NAME).__name__ == NAME
    assert len(COCO_CATEGORIES) == 80 and (COCO_CATEGORIES[1], COCO_CATEGORIES[90]) == ('person', 'toothbrush')
    assert all(map(timm.is_model, BACKBONES))


@pytest.mark.parametrize('name', [
    pytest.param(f'sformer_{kind}_{backbone}', marks=() if 'tiny' in backbone else pytest.mark.slow)
    for backbone in BACKBONES for kind in ('fasterrcnn', 'maskrcnn')])
def test_what_a_name_builds(name):
    with torch.device('meta'):
        detector = torchvision.models.get_model(name, image_size=(64, 64))
    kind = torchvision.models.detection.MaskRCNN if 'mask' in name else torchvision.models.detection.FasterRCNN
    assert type(detector) is kind and name.endswith(f'rcnn_{detector.config.backbone}')
    assert detector.config.categories == COCO_CATEGORIES and any(True for _ in named_neurons(detector))


def test_a_named_detector_is_uncalibrated(data, tmp_path):
    assert task_of(NAME).noun == 'detector' and task_of('vit_tiny_patch16_224').noun == 'classifier'
    detector = torchvision.models.get_model(NAME, sfn=dict(levels=8), **SMALL)
    assert detector.sfn.levels == 8 and not is_calibrated(detector)
    with pytest.raises(UncalibratedError, match=r'convert it with convert_detector\(\) before saving'):
        save_detector(detector, tmp_path / 'det')
    with pytest.raises(UncalibratedError, match=r'; convert it with convert_detector\(\)\.$'):
        evaluate_detector(detector, data)
    assert not (tmp_path / 'det').exists()
    with pytest.raises(SFormerError, match='no weights are published as those of'):
        torchvision.models.get_model(NAME, weights='DEFAULT')


def test_a_folder_of_that_name_comes_first(saved, tmp_path, monkeypatch):
    (tmp_path / NAME).symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    assert is_calibrated(load_detector(NAME)) and task_of(NAME).noun == 'detector'


# the Hub --------------------------------------------------------------------------------------------------------------


def test_from_the_hub(hub, saved, sformer_detector, data):
    commit = upload(hub, saved)
    for name, revision in ((f'hf-hub:{REPO}', None), (f'hf-hub:{REPO}@{commit}', None), (f'hf-hub:{REPO}', commit),
                           (f'local-dir:{saved}', None)):
        assert task_of(name).noun == 'detector'
        loaded = load_detector(name, revision)
        assert same_state(loaded, sformer_detector) and not loaded.training
        assert loaded.conversion.calibration.name == 'shapes'
    image, threshold = data.image(10), sformer_detector.roi_heads.score_thresh
    loaded.roi_heads.score_thresh = threshold
    assert torch.equal(detect(loaded, image)['boxes'], detect(sformer_detector, image)['boxes'])
    assert {r.path.split('/')[4] for r in hub.log if '/resolve/' in r.path} == {'main', commit}


def test_both_files_are_of_one_commit(hub, saved, sformer_detector, monkeypatch):
    """A commit that comes in between changes nothing."""
    first = upload(hub, saved)
    real = hub.server.RequestHandlerClass.reply

    def reply(handler, code, *args, **kwargs):
        if handler.command == 'GET' and 'config.json' in handler.path and hub.repos[REPO].refs['main'] == first:
            done = real(handler, code, *args, **kwargs)
            hub.put(REPO, {'config.json': b'{}', 'model.safetensors': b'other'})
            return done
        return real(handler, code, *args, **kwargs)
    hub.server.RequestHandlerClass.reply = reply
    assert same_state(load_detector(f'hf-hub:{REPO}'), sformer_detector)
    assert hub.repos[REPO].refs['main'] != first


def test_damaged_transfer_is_repeated(hub, saved, sformer_detector):
    upload(hub, saved)
    hub.corrupt('/cdn/')
    assert same_state(load_detector(f'hf-hub:{REPO}'), sformer_detector)
    assert hub.count('GET', '/cdn/') == 2


def test_wrong_weights_are_not_loaded(hub, saved):
    hub.put(REPO, {'config.json': (saved / 'config.json').read_bytes(), 'model.safetensors': b'{}'})
    with pytest.raises(SFormerError, match=f'{REPO} on the Hub, downloaded twice: .*truncated or corrupted'):
        load_detector(f'hf-hub:{REPO}')


@pytest.mark.parametrize('changes, message', [
    (dict(detector=dict(backbone='../os')), r"json: the backbone '\.\./os' is not the name of a timm architecture"),
    (dict(detector=dict(channels=2 ** 40)), 'channels must be an integer from 1 to 16384, got 1099511627776'),
    (dict(detector=dict(hidden=True)), 'hidden must be an integer .* got True'),
    (dict(detector=dict(image_size=[2 ** 20, 32])), 'image_size'),
    (dict(detector=dict(std=[0, 1, 1])), 'std must lie in'),
    (dict(detector=dict(categories={'1': ['x']})), 'categories have names'),
    (dict(detector=dict(weights='http://x')), r'config\.json is not as sformer wrote it: .*weights'),
    (dict(sfn=5), 'not as sformer wrote it'), (dict(sfn=dict(levels=10 ** 9)), 'levels'),
    (dict(sformer=dict(version=1)), 'version 1'), (dict(weights_sha256=5), 'weights_sha256 is no text'),
], ids=str)
def test_configs_that_are_not_trusted(hub, saved, changes, message):
    """What is wrong is said before weights are fetched."""
    upload(hub, saved, **changes)
    with pytest.raises(SFormerError, match=message) as caught:
        load_detector(f'hf-hub:{REPO}')
    assert '\n' not in str(caught.value) and not hub.count('GET', 'model.safetensors')


def test_a_config_without_neurons_of_its_own(hub, saved):
    config = json.loads((saved / 'config.json').read_text())
    del config['sfn']['levels']
    hub.put(REPO, {'config.json': json.dumps(config).encode()})
    with pytest.raises(SFormerError, match='does not say how its neurons fire: sfn lacks levels'):
        load_detector(f'hf-hub:{REPO}')


def test_what_is_not_there(hub, saved, tmp_path):
    hub.put(REPO, {'README.md': b'mine'})
    for load in (load_detector, sformer.load_model):
        with pytest.raises(SFormerError, match=f'{REPO} on the Hub holds no SFormer: there is no config.json'):
            load(f'hf-hub:{REPO}')
        with pytest.raises(SFormerError, match='there is no such repository'):
            load('hf-hub:my-org/nothing')
    with pytest.raises(SFormerError, match='there is no such repository'):
        task_of('hf-hub:my-org/nothing')
    assert task_of(f'hf-hub:{REPO}').noun == 'classifier'  # of weights that no config.json is beside, it may be one
    with pytest.raises(SFormerError, match='only a model on the Hub has revisions'):
        load_detector(saved, 'main')
    with pytest.raises(SFormerError, match='holds no detector'):
        load_detector(tmp_path)
    assert task_of(tmp_path / 'none').noun == 'classifier'


def test_timm_says_that_it_has_none(hub, saved):
    upload(hub, saved)
    for name in (f'hf-hub:{REPO}', f'local-dir:{saved}'):
        with pytest.raises(RuntimeError, match='Unknown model .sformer_maskrcnn_test_vit'):
            timm.create_model(name, pretrained=True)


def test_a_source_is_named_without_neurons(tmp_path):
    save_detector(build_detector(small_config()), tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'fasterrcnn_test_vit_short'


def test_weights_that_are_no_numbers_are_not_saved(sformer_detector, tmp_path):
    detector = copy.deepcopy(sformer_detector)
    with torch.no_grad():
        next(detector.roi_heads.parameters()).fill_(float('nan'))
    with pytest.raises(SFormerError, match=r'roi_heads\.\S+ has NaN or infinite values, so it is not saved'):
        save_detector(detector, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()
