"""pretrained=True always works: where weights are found, and what happens to the neurons that go with them."""
import contextlib
import dataclasses
import json
import logging
import re
import shutil

import pytest
import timm
import torch
import torch.nn as nn
from cli_process import FORKS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import _registry, get_pretrained_cfg

import sformer
from sformer import SFNConfig, SFormerError, is_calibrated, named_neurons
from sformer.conversion import record_of
from sformer.conversion.record import CalibrationRecord
from sformer.conversion.sources import create_source
from sformer.files import state_hash
from sformer.saving import pretrained


def buffers(model):
    """State of all neurons, by name."""
    return {f'{name}.{key}': b for name, neuron in named_neurons(model) for key, b in neuron.named_buffers()}


def inputs(size=224):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


NAME = 'sformer_tiny.augreg_in21k_ft_in1k'
HUB_ID = 'timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k'
FEW = dict(pretrained.RECIPE, num_images=2)


def publish(cache, state=None, commit='0' * 40, repo_id=HUB_ID):
    """Put weights where the Hub's client caches what it downloads; returns the folder."""
    repo = cache / f'models--{repo_id.replace("/", "--")}'
    snapshot = repo / 'snapshots' / commit
    snapshot.mkdir(parents=True)
    (repo / 'refs').mkdir(exist_ok=True)
    (repo / 'refs' / 'main').write_text(commit)
    if state is not None:
        save_file(state, snapshot / 'model.safetensors')
    return snapshot


def shorten(patch):
    """Let published sources have four blocks of their twelve: every fit of their neurons takes a third."""
    for name in ('vit_tiny_patch16_224', 'eva02_tiny_patch14_224'):
        whole = timm.models.model_entrypoint(name)
        patch.setitem(_registry._model_entrypoints, name, lambda pretrained=False, whole=whole, **kwargs: whole(
            pretrained, **{'depth': 4, **kwargs}))


@pytest.fixture(scope='module', autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope='module')
def published():
    """State of a stand-in for the published source."""
    torch.manual_seed(0)
    source = timm.create_model('vit_tiny_patch16_224')
    nn.init.normal_(source.head.weight, std=0.1)
    return source.state_dict()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr(pretrained, 'RECIPE', FEW)


@pytest.fixture(scope='module')
def warm(published, tmp_path_factory):
    """A cache of the Hub's client with the source's weights and fitted neurons, and the model that came of it."""
    cache = tmp_path_factory.mktemp('hub')
    publish(cache, published)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        patch.setattr(pretrained, 'RECIPE', FEW)
        return cache, timm.create_model('sformer_tiny', pretrained=True, cache_dir=cache).eval()


def refuse(*args, **kwargs):
    raise AssertionError('fitted again')


def test_first_use_fits_and_second_use_reads(warm, published, offline, monkeypatch, caplog):
    cache, first = warm
    monkeypatch.setattr(pretrained, 'fit_to_source', refuse)
    with caplog.at_level(logging.INFO, 'sformer'):
        second = timm.create_model(NAME, pretrained=True, cache_dir=cache).eval()
    assert [m for m in caplog.messages if 'neurons of' in m] and [m for m in caplog.messages if HUB_ID in m]
    assert is_calibrated(first) and is_calibrated(second)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in published.items())
    assert second.conversion == first.conversion and second.conversion.source == 'vit_tiny_patch16_224'
    assert second.conversion.source_weights == f'{HUB_ID}@{"0" * 40}'
    assert second.conversion.calibration == CalibrationRecord(
        'dead-leaves', None, 0, second.conversion.calibration.fingerprint, 2)
    with torch.no_grad():
        assert torch.equal(first(inputs()), second(inputs()))


def test_same_as_converting_the_source_oneself(warm, published):
    source = timm.create_model('vit_tiny_patch16_224')
    source.load_state_dict(published)
    own = sformer.convert(source, num_images=2)
    assert all(torch.equal(v, warm[1].state_dict()[k]) for k, v in own.state_dict().items())


@pytest.mark.parametrize('kwargs', [
    dict(num_classes=5), dict(num_classes=0), dict(in_chans=1), dict(img_size=64), dict(num_classes=3, in_chans=1),
    dict(features_only=True), dict(pretrained_cfg_overlay=dict(crop_pct=1.0)),
], ids=str)
def test_arguments_of_timm(warm, offline, monkeypatch, kwargs):
    monkeypatch.setattr(pretrained, 'fit_to_source', refuse)
    model = timm.create_model('sformer_tiny', pretrained=True, cache_dir=warm[0], **kwargs)
    x = inputs(kwargs.get('img_size', 224))[:, :kwargs.get('in_chans', 3)]
    with torch.no_grad():
        out = model.eval()(x)
    if 'features_only' in kwargs:
        assert len(out) == 3 and out[-1].shape[1] == 192
    else:
        assert out.shape == (1, kwargs.get('num_classes', 1000) or 192)
        assert all(bool(neuron.calibrated) for name, neuron in named_neurons(model))


def test_other_neurons_are_fitted_for_themselves(warm, published, offline, tmp_path):
    publish(tmp_path, published)
    model = timm.create_model('sformer_tiny', pretrained=True, cache_dir=tmp_path, sfn=dict(levels=4))
    assert is_calibrated(model) and model.sfn_config == SFNConfig(levels=4)
    assert not torch.equal(model.blocks[0].attn.qkv.neuron.step, warm[1].blocks[0].attn.qkv.neuron.step)


def test_key_depends_on_revision_and_version(published, offline, monkeypatch, tmp_path):
    publish(tmp_path, published)
    hub_id = pretrained.pinned(NAME, HUB_ID, tmp_path)
    assert hub_id == f'{HUB_ID}@{"0" * 40}'
    publish(tmp_path, published, commit='1' * 40)
    newer = pretrained.pinned(NAME, HUB_ID, tmp_path)
    assert newer == f'{HUB_ID}@{"1" * 40}'
    keys = [pretrained.cache_key(*args) for args in (
        (hub_id, SFNConfig()), (newer, SFNConfig()), (hub_id, SFNConfig(levels=8)))]
    monkeypatch.setattr('importlib.metadata.version', lambda name: '99.0')
    keys.append(pretrained.cache_key(hub_id, SFNConfig()))
    assert len(set(keys)) == 4


def test_new_weights_of_a_source_are_fitted_anew(warm, published, offline, tmp_path):
    shutil.copytree(warm[0], tmp_path, dirs_exist_ok=True)
    old = timm.create_model('sformer_tiny', pretrained=True, cache_dir=tmp_path)
    assert torch.equal(old.state_dict()['cls_token'], published['cls_token'])
    publish(tmp_path, {k: v * 2 if 'patch_embed' in k else v for k, v in published.items()}, commit='1' * 40)
    new = timm.create_model('sformer_tiny', pretrained=True, cache_dir=tmp_path)
    key = 'blocks.0.attn.qkv.neuron.step'
    assert not torch.equal(old.state_dict()[key], new.state_dict()[key])


def test_weights_that_bring_neurons_need_none_fitted(warm, offline, monkeypatch, tmp_path):
    first = warm[1]
    publish(tmp_path, {key: value.contiguous() for key, value in first.state_dict().items()})
    monkeypatch.setattr(pretrained, 'fit_to_source', refuse)
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path).eval()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in first.state_dict().items())


def test_only_published_weights_are_called_so(published, offline, tmp_path):
    publish(tmp_path, published)
    save_file(published, tmp_path / 'mine.safetensors')
    mine, source = str(tmp_path / 'mine.safetensors'), HUB_ID.partition('/')[2]
    assert create_source(source, cache_dir=tmp_path).weights == HUB_ID
    for kwargs in (dict(num_classes=0), dict(checkpoint_path=mine), dict(pretrained_cfg_overlay=dict(file=mine))):
        assert create_source(source, cache_dir=tmp_path, **kwargs).weights is None, kwargs


def bfloat16_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize('context', [
    lambda: torch.autocast('cpu', torch.bfloat16), contextlib.contextmanager(bfloat16_by_default),
    torch.inference_mode, lambda: torch.device('meta'),
], ids=['autocast', 'default dtype', 'inference mode', 'device'])
def test_neurons_do_not_depend_on_what_the_caller_has_set(warm, published, offline, tmp_path, context):
    publish(tmp_path, published)
    hub_id = pretrained.pinned(NAME, HUB_ID, tmp_path)
    with context():
        state, _ = pretrained.neuron_state(NAME, HUB_ID.partition('/')[2], hub_id, cache_dir=tmp_path)
    expected = warm[1].state_dict()
    assert len(state) > 100 and all(torch.equal(v, expected[k]) for k, v in state.items())


def test_cache_that_can_not_be_written(warm, published, offline, tmp_path, caplog):
    publish(tmp_path, published)
    pretrained.cache_folder(tmp_path).write_text('a file')
    model = timm.create_model('sformer_tiny', pretrained=True, cache_dir=tmp_path)
    assert 'cannot be written' in caplog.text
    assert all(torch.equal(v, warm[1].state_dict()[k]) for k, v in model.state_dict().items())


def test_pixels_are_coded_as_they_are_normalised(warm, offline):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = timm.create_model(
        'sformer_tiny', pretrained=True, cache_dir=warm[0], pretrained_cfg_overlay=dict(mean=mean, std=std))
    white = ((1 - torch.tensor(mean)) / torch.tensor(std)).view(1, 3, 1, 1)
    torch.testing.assert_close(model.patch_embed.proj.neuron(white), white)


def test_features_that_the_head_was_not_fitted_to(warm, offline):
    model = timm.create_model('sformer_tiny', pretrained=True, cache_dir=warm[0], global_pool='avg', fc_norm=False)
    assert [name for name, neuron in named_neurons(model) if not neuron.calibrated] == ['head.neuron']


def test_classifier_on_a_source_without_one(offline, tmp_path):
    name, hub_id = 'sformer_eva02_tiny.mim_in22k', 'timm/eva02_tiny_patch14_224.mim_in22k'
    torch.manual_seed(0)
    publish(tmp_path, timm.create_model('eva02_tiny_patch14_224', num_classes=0).state_dict(), repo_id=hub_id)
    for num_classes in (0, 5):
        model = timm.create_model(name, pretrained=True, cache_dir=tmp_path, num_classes=num_classes)
        assert is_calibrated(model) and model.num_classes == num_classes
    headless = sformer.save_model(
        timm.create_model(name, pretrained=True, cache_dir=tmp_path), tmp_path / 'headless')
    record = sformer.load_model(headless).conversion
    assert record.source_weights.startswith(f'{hub_id}@') and not record.changed
    model = timm.create_model(f'local-dir:{headless}', pretrained=True, num_classes=5)
    assert [n for n, neuron in named_neurons(model) if not neuron.calibrated] == ['head.neuron']


def rewrite(change_state=lambda state: state, **changes):
    """A file of cached neurons with other contents; None leaves a piece of its metadata out."""
    def damage(path):
        with safe_open(path, framework='pt') as f:
            about = {**f.metadata(), **changes}
        save_file(change_state(load_file(path)), path, metadata={k: v for k, v in about.items() if v is not None})
    return damage


def with_nan(state):
    state['blocks.3.mlp.fc1.neuron.step'][5] = float('nan')
    return state


def flip(data, index=-1000):
    data = bytearray(data)
    data[index] ^= 1
    return bytes(data)


@pytest.mark.parametrize('damage, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), ''),
    (lambda path: path.write_bytes(b''), ''),
    (lambda path: path.write_bytes(path.read_bytes()[:8] + b'x' * 99), ''),
    (lambda path: path.write_bytes(flip(path.read_bytes())), 'its hash is another'),
    (rewrite(with_nan), 'its hash is another'),
    (rewrite(lambda state: {k: v for k, v in state.items() if 'blocks.3.mlp' not in k}), 'its hash is another'),
    (rewrite(conversion=None), "'conversion'"), (rewrite(conversion='{'), ''),
    (rewrite(conversion=json.dumps(dict(version=1, source='vit'))), 'the record of the conversion has version 1'),
    (rewrite(key='0' * 64), 'its hash is another'), (rewrite(sha256=None), 'its hash is another'),
], ids=['truncated', 'empty', 'header', 'a bit', 'NaN', 'missing', 'no record', 'no JSON', 'old record', 'key', 'hash'])
def test_damaged_cache_is_fitted_again(warm, published, offline, tmp_path, monkeypatch, caplog, damage, message):
    publish(tmp_path, published)
    folder = pretrained.cache_folder(tmp_path)
    folder.mkdir()
    file = next(pretrained.cache_folder(warm[0]).glob('*.safetensors'))
    (folder / file.name).write_bytes(file.read_bytes())
    hub_id = pretrained.pinned(NAME, HUB_ID, tmp_path)
    damage(folder / file.name)

    fits, whole = [], load_file(file)

    def fit(*args):
        fits.append(args)
        return whole, warm[1].conversion
    monkeypatch.setattr(pretrained, 'fit_to_source', fit)
    for _ in range(2):
        state, conversion = pretrained.neuron_state(NAME, HUB_ID.partition('/')[2], hub_id, cache_dir=tmp_path)
        assert conversion == warm[1].conversion and state_hash(state) == state_hash(whole)
    assert len(fits) == 1, 'what was fitted again is whole'
    assert len(caplog.messages) == 1 and 'fitting neurons' in caplog.text
    assert f'{folder / file.name} is damaged ({message}' in caplog.text


@pytest.mark.parametrize('name', ['sformer_tiny', 'sformer_small.augreg_in1k'])
def test_offline_with_a_cold_cache_says_what_to_download(offline, tmp_path, name):
    hub_id = timm.get_pretrained_cfg(name).hf_hub_id
    with pytest.raises(SFormerError, match=f'not in the cache.*hf download {re.escape(hub_id)} model.safetensors'):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)


@pytest.fixture(scope='module')
def converted_once(published, tmp_path_factory):
    """A folder of a converted model with neurons of its own, and the model; not to be changed."""
    source = timm.create_model('vit_tiny_patch16_224')
    source.load_state_dict(published)
    model = sformer.convert(source, num_images=2, config=SFNConfig(levels=8, initial_potential=0, dead_zone=0.7))
    return sformer.save_model(model, tmp_path_factory.mktemp('converted') / 'model'), model


@pytest.fixture
def converted(converted_once, offline, tmp_path):
    """A cache with that model, and the model."""
    folder, model = converted_once
    shutil.copytree(folder, publish(tmp_path, repo_id=f'my-org/{NAME}'), dirs_exist_ok=True)
    return tmp_path, model


@pytest.mark.parametrize('how', ['namespace', 'overlay', 'hf-hub'])
def test_converted_weights_are_what_their_config_says(converted, monkeypatch, caplog, how):
    cache, expected = converted
    name, kwargs = NAME, dict(pretrained=True, cache_dir=cache)
    if how == 'namespace':
        monkeypatch.setenv(pretrained.NAMESPACE_VARIABLE, 'my-org')
    elif how == 'overlay':
        kwargs['pretrained_cfg_overlay'] = dict(hf_hub_id=f'my-org/{NAME}', crop_pct=0.7)
    else:
        name = f'hf-hub:my-org/{NAME}'
    with caplog.at_level(logging.INFO, 'sformer'):
        model = timm.create_model(name, **kwargs).eval()
    assert how != 'namespace' or f'my-org/{NAME}' in caplog.text
    assert model.sfn_config == expected.sfn_config
    assert model.conversion.source_sha256 == expected.conversion.source_sha256
    assert model.pretrained_cfg['crop_pct'] == (0.7 if how == 'overlay' else 0.9)
    with torch.no_grad():
        assert torch.equal(model(inputs()), expected(inputs()))
    with pytest.raises(SFormerError, match="was converted with levels=8, initial_potential=0, dead_zone=0.7"):
        timm.create_model(name, sfn=dict(levels=4), **kwargs)


@pytest.mark.parametrize('damage, message', [
    (lambda folder: save_file({k: v * 2 for k, v in load_file(folder / 'model.safetensors').items()},
                              folder / 'model.safetensors'), 'SHA-256 differs'),
    (lambda folder: (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin'), 'not in the local cache'),
    (lambda folder: (folder / 'config.json').write_text(
        (folder / 'config.json').read_text().replace('"sformer_tiny"', '"sformer_small"')),
     'on the Hub holds a sformer_small, not a sformer_tiny'),
], ids=['weights', 'pickle', 'architecture'])
def test_converted_weights_are_verified(converted, monkeypatch, damage, message):
    cache, _ = converted
    damage(next(cache.glob(f'models--my-org--{NAME}/snapshots/*')))
    overlay = dict(hf_hub_id=f'my-org/{NAME}')
    with pytest.raises(SFormerError, match=message):
        timm.create_model(NAME, pretrained=True, cache_dir=cache, pretrained_cfg_overlay=overlay)
    monkeypatch.setenv(pretrained.NAMESPACE_VARIABLE, 'my-org')
    with pytest.raises(SFormerError, match=message):
        timm.create_model(NAME, pretrained=True, cache_dir=cache)


def test_other_neurons_for_embedded_weights():
    with pytest.raises(SFormerError, match="was converted with initial_potential=0.5"):
        timm.create_model('sformer_nano', pretrained=True, sfn=dict(initial_potential=0))


def test_embedded_weights_do_not_come_from_a_namespace(monkeypatch):
    monkeypatch.setenv(pretrained.NAMESPACE_VARIABLE, 'my-org')
    model = timm.create_model('sformer_nano', pretrained=True)
    assert is_calibrated(model)


@pytest.mark.parametrize('name', ['sformer_nano', 'sformer_micro', 'sformer_eva02_micro'])
def test_record_of_embedded_weights(name, tmp_path):
    model = timm.create_model(name, pretrained=True)
    assert model.sfn_config == SFNConfig() and not model.conversion.changed
    saved = sformer.load_model(sformer.save_model(model, tmp_path / 'out'))
    assert saved.conversion == dataclasses.replace(record_of(model), weights_sha256=saved.conversion.weights_sha256)
    assert saved.conversion.state_sha256 == model.conversion.source_sha256


def test_weights_of_a_source_without_neurons_are_refused_elsewhere(published, tmp_path):
    save_file(published, tmp_path / 'plain.safetensors')
    with pytest.raises(SFormerError, match='neuron buffers missing'):
        timm.create_model('sformer_tiny', pretrained=True,
                          pretrained_cfg_overlay=dict(file=str(tmp_path / 'plain.safetensors')))


def load_in_process(cache, index, barrier, results):
    import huggingface_hub
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    torch.set_num_threads(1)
    pretrained.RECIPE = FEW
    shorten(pytest.MonkeyPatch())
    fit, fits = pretrained.fit_to_source, []
    pretrained.fit_to_source = lambda *args: fits.append(1) or fit(*args)
    barrier.wait()
    model = timm.create_model('sformer_tiny', pretrained=True, cache_dir=cache)
    results.put((index, len(fits), state_hash(model.state_dict())))


def test_processes_that_start_at_once_fit_once(warm, published, tmp_path):
    publish(tmp_path, published)
    barrier, results = FORKS.Barrier(3), FORKS.Queue()
    processes = [FORKS.Process(target=load_in_process, args=(tmp_path, i, barrier, results)) for i in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum(fits for _, fits, _ in found) == 1
    assert {digest for _, _, digest in found} == {state_hash(warm[1].state_dict())}


# weights in the package, and files that the user names --------------------------------------------------------------

def test_pretrained_nano(digits):
    model = timm.create_model('sformer_nano.digits', pretrained=True).eval()
    assert is_calibrated(model)
    images, labels = digits
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert len(labels) == 540 and accuracy >= 0.97
    assert timm.is_model_pretrained('sformer_nano.digits')


@pytest.mark.parametrize('kwargs, shape', [
    (dict(num_classes=5), (2, 5)), (dict(num_classes=0), (2, 64)), (dict(in_chans=3), (2, 10)),
    (dict(img_size=16), (2, 10))], ids=lambda v: str(v))
def test_pretrained_nano_adapts(kwargs, shape):
    model = timm.create_model('sformer_nano.digits', pretrained=True, **kwargs).eval()
    reference = timm.create_model('sformer_nano.digits', pretrained=True)
    size = kwargs.get('img_size', 8)
    with torch.no_grad():
        assert model(torch.rand(2, kwargs.get('in_chans', 1), size, size)).shape == shape
    assert is_calibrated(model)
    fitted = buffers(reference)
    for name, buffer in buffers(model).items():
        if not name.startswith('patch_embed'):
            assert torch.equal(buffer, fitted[name]), f'{name} is not what was fitted'


def test_pretrained_nano_with_three_channels_sees_the_same(digits):
    """timm spreads the weights of one channel over three; a grey RGB image then gives the same logits."""
    grey = timm.create_model('sformer_nano.digits', pretrained=True).eval()
    colour = timm.create_model('sformer_nano.digits', pretrained=True, in_chans=3).eval()
    x = digits[0][:64]
    with torch.no_grad():
        a, b = grey(x), colour(x.expand(-1, 3, -1, -1))
    assert (a - b).norm() / a.norm() < 0.01


def test_pretrained_nano_features():
    model = timm.create_model('sformer_nano.digits', pretrained=True, features_only=True).eval()
    assert is_calibrated(model)
    assert [f.shape for f in model(torch.rand(2, 1, 8, 8))] == [(2, 64, 4, 4)] * 3


def test_weights_of_nobody_are_an_error():
    with pytest.raises(RuntimeError, match='sformer_custom'):
        timm.create_model('sformer_custom', pretrained=True)


STEP = 'blocks.2.mlp.fc1.neuron.step'
SPOILT = dict(
    missing=lambda t: None,
    nan=lambda t: torch.full_like(t, float('nan')),
    infinite=lambda t: torch.full_like(t, float('inf')),
    zero=lambda t: torch.cat([t[:1], torch.zeros_like(t[1:])]),
    negative=lambda t: -t,
    shape=lambda t: t[:-1].contiguous(),
)


@pytest.mark.parametrize('num_classes', [10, 5])
@pytest.mark.parametrize('spoil', SPOILT.values(), ids=SPOILT.keys())
def test_spoilt_steps_are_named(tmp_path, spoil, num_classes):
    """Also where timm loads non-strictly, which is where num_classes differs."""
    path = tmp_path / 'spoilt.safetensors'
    state = load_file(get_pretrained_cfg('sformer_nano.digits').file)
    state[STEP] = spoil(state[STEP])
    save_file({k: v for k, v in state.items() if v is not None}, path)
    with pytest.raises((SFormerError, RuntimeError), match=STEP):
        timm.create_model(
            'sformer_nano.digits', pretrained=True, num_classes=num_classes,
            pretrained_cfg_overlay=dict(file=str(path)))


@pytest.mark.parametrize('num_classes', [10, 5])
@pytest.mark.parametrize('levels', [[5, *range(1, 32)], [*range(1, 32), 200], [0, *range(2, 33)], [*range(2, 34)]])
def test_spoilt_levels_are_named(tmp_path, levels, num_classes):
    path = tmp_path / 'spoilt.safetensors'
    state = load_file(get_pretrained_cfg('sformer_nano.digits').file)
    state['blocks.0.attn.qkv.neuron.levels'] = torch.tensor(levels, dtype=torch.int16)
    save_file(state, path)
    with pytest.raises((SFormerError, RuntimeError), match='blocks.0.attn.qkv.neuron.levels'):
        timm.create_model(
            'sformer_nano.digits', pretrained=True, num_classes=num_classes,
            pretrained_cfg_overlay=dict(file=str(path)))


@pytest.mark.parametrize('num_classes', [10, 5])
def test_missing_neuron_is_named(tmp_path, num_classes):
    """All of its state at once, as if the checkpoint was of before the layer spiked."""
    path = tmp_path / 'spoilt.safetensors'
    state = load_file(get_pretrained_cfg('sformer_nano.digits').file)
    save_file({k: v for k, v in state.items() if not k.startswith('blocks.2.mlp.fc1.neuron.')}, path)
    with pytest.raises(SFormerError, match=r'blocks\.2\.mlp\.fc1\.neuron\.step'):
        timm.create_model(
            'sformer_nano.digits', pretrained=True, num_classes=num_classes,
            pretrained_cfg_overlay=dict(file=str(path)))


def test_source_checkpoint_is_not_taken_for_an_sformer(tmp_path, source):
    path = tmp_path / 'source.safetensors'
    save_file(source.state_dict(), path)
    with pytest.raises(SFormerError, match=r'no patch_embed\.proj\.neuron\..* is not a converted SFormer'):
        timm.create_model('sformer_nano.digits', pretrained=True, num_classes=5,
                          pretrained_cfg_overlay=dict(file=str(path)))


def test_other_neurons_than_the_weights_have_are_an_error():
    with pytest.raises(SFormerError, match='was converted with levels=63'):
        timm.create_model('sformer_nano.digits', pretrained=True, sfn=dict(levels=8))
