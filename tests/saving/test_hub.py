"""Loading from the Hub, by the real client against a stand-in on the loopback interface."""
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from hub_fixtures import REPO, assert_same, change_config, timm_load
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file

from sformer import SFormerError, is_calibrated, load_model
from sformer.files import file_hash
from sformer.publishing.publish import publish
from sformer.tasks import open_model

# loading --------------------------------------------------------------------------------------------------------------

def test_revisions(hub, folder, other_folder, images):
    first, second = publish(folder, REPO).commit, publish(other_folder, REPO).commit
    old, new = load_model(folder), load_model(other_folder)
    for name, expected in ((REPO, new), (f'{REPO}@main', new), (f'{REPO}@{first}', old), (f'{REPO}@{second}', new)):
        assert_same(timm_load(name), expected, images)
        assert_same(load_model(f'hf-hub:{name}'), expected, images)
        assert_same(open_model(f'hf-hub:{name}'), expected, images)
    assert_same(load_model(f'hf-hub:{REPO}', revision=first), old, images)
    assert timm_load(f'{REPO}@{first}').pretrained_cfg['hf_hub_id'] == f'{REPO}@{first}'
    assert timm_load().pretrained_cfg['hf_hub_id'] == f'{REPO}@{second}', 'what was verified is pinned'
    with pytest.raises(SFormerError, match='one revision and .* another'):
        load_model(f'hf-hub:{REPO}@{first}', revision=second)
    with pytest.raises(SFormerError, match='only a model on the Hub has revisions'):
        load_model(folder, revision=first)


@pytest.mark.filterwarnings('ignore')
def test_transformers(published, model, images):
    transformers = pytest.importorskip('transformers')
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(REPO).eval()
    assert is_calibrated(wrapped)
    with torch.no_grad():
        assert torch.equal(wrapped(images).logits, model(images))


def test_revision_that_does_not_exist(published, run_here):
    for name in (f'hf-hub:{REPO}@v9', f'hf-hub:{REPO}@' + 'a' * 40):
        with pytest.raises(SFormerError, match='there is no such revision'):
            load_model(name)
    assert run_here('evaluate', f'hf-hub:{REPO}@v9', '--dataset', 'digits').code == 1
    for name in (f'hf-hub:{REPO}@', f'hf-hub:{REPO}@a@b', 'hf-hub:', 'hf-hub:@main'):
        with pytest.raises(SFormerError, match='does not name a repository'):
            load_model(name)


def test_repository_that_does_not_exist(hub, run_here):
    for load in (load_model, open_model):
        with pytest.raises(SFormerError, match='my-org/nothing: there is no such repository on the Hub'):
            load('hf-hub:my-org/nothing')
    assert run_here('evaluate', 'hf-hub:my-org/nothing', '--dataset', 'digits').code == 1


def test_config_and_weights_are_of_one_commit(published, other_folder, model, images):
    """Somebody publishes other weights right between the two downloads."""
    def publish_more(handler):
        handler.route()
        published.put(REPO, {p.name: p.read_bytes() for p in other_folder.iterdir()})
        return True
    published.faults.append(SimpleNamespace(method='GET', path='/config.json', do=publish_more, times=1, after=0))
    assert_same(timm_load(), model, images)


def test_without_a_network_what_was_loaded_before(published, model, images, monkeypatch):
    timm_load()
    published.faults.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert_same(timm_load(), model, images)
    assert_same(load_model(f'hf-hub:{REPO}'), model, images)
    with pytest.raises(SFormerError, match='not in the local cache, .* offline mode'):
        load_model('hf-hub:my-org/another')


def test_cache_dir(published, tmp_path, model, images):
    for load in (timm_load, lambda **k: load_model(f'hf-hub:{REPO}', **k)):
        assert_same(load(cache_dir=tmp_path / 'elsewhere'), model, images)
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_loading_with_other_arguments(published):
    assert timm_load(num_classes=3)(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert load_model(f'hf-hub:{REPO}', num_classes=3)(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert timm.create_model(f'hf-hub:{REPO}')(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_evaluate_from_the_hub(published, run_here, tmp_path, evaluated):
    result = run_here('evaluate', f'hf-hub:{REPO}@{published.commit}', '--dataset', 'digits',
                 '--results-file', tmp_path / 'r.json')
    assert result.code == 0, result.err
    there, here = json.loads((tmp_path / 'r.json').read_text()), json.loads((evaluated / 'eval.json').read_text())
    for key in ('top1', 'weights_sha256', 'dataset_fingerprint', 'agreement'):
        assert there[key] == here[key]


# faults of the Hub and of the connection while loading --------------------------------------------------------------

def test_connection_cut_for_a_moment(published, model, images):
    published.cut('/cdn/', keep=100_000)
    assert_same(timm_load(), model, images)


@pytest.mark.parametrize('load', [timm_load, lambda: load_model(f'hf-hub:{REPO}')], ids=['timm', 'load_model'])
def test_connection_cut_for_good(published, model, images, load):
    published.cut('/cdn/', keep=100, times=1000)
    with pytest.raises(SFormerError, match=f'{REPO}.*: the connection to 127.0.0.1 failed'):
        load()
    published.faults.clear()
    assert_same(load(), model, images)


def test_connection_cut_on_the_command_line(published, run_here):
    published.cut('/cdn/', keep=100, times=1000)
    result = run_here('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits')
    assert result.code == 1 and 'connection' in result.err


@pytest.mark.parametrize('load', [timm_load, lambda: load_model(f'hf-hub:{REPO}')], ids=['timm', 'load_model'])
def test_corrupted_file(published, model, images, load):
    published.corrupt('/cdn/', times=1)
    assert_same(load(), model, images)  # noticed, and downloaded again
    shutil.rmtree(constants.HF_HUB_CACHE)
    published.corrupt('/cdn/', times=100)
    with pytest.raises(SFormerError, match=r'downloaded twice: .*model\.safetensors is not the file .*SHA-256 differs'):
        load()
    published.faults.clear()
    assert_same(load(), model, images)


def test_corrupted_cache(published, model, images):
    timm_load()
    path = next(Path(constants.HF_HUB_CACHE).rglob('model.safetensors')).resolve()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert_same(timm_load(), model, images)


def test_weights_that_the_config_does_not_record(published, evaluated_other, run_here):
    """A repository with two halves that do not belong together."""
    files = published.files(REPO)
    published.put(REPO, dict(files, **{'model.safetensors': (evaluated_other / 'model.safetensors').read_bytes()}))
    for load in (timm_load, lambda: load_model(f'hf-hub:{REPO}')):
        with pytest.raises(SFormerError, match=r'model\.safetensors is not the file that config\.json belongs to'):
            load()
    assert run_here('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits').code == 1


def test_weights_in_a_folder_that_the_config_does_not_record(folder, other_folder):
    """The same check where timm loads from a folder."""
    shutil.copy(other_folder / 'model.safetensors', folder)
    with pytest.raises(SFormerError, match=r'out/model\.safetensors is not the file that config\.json belongs to'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_spoilt_steps(published, tmp_path):
    """By a publisher who has the hash right."""
    for value in (0., float('nan'), -1.):
        state = load_file(next(iter([published_file(published, tmp_path)])))
        state['blocks.1.mlp.fc1.neuron.step'].fill_(value)
        save_file(state, tmp_path / 'spoilt.safetensors')
        published.put(REPO, dict(published.files(REPO), **{
            'model.safetensors': (tmp_path / 'spoilt.safetensors').read_bytes()}))
        change_config(published, sformer=dict(weights_sha256=file_hash(tmp_path / 'spoilt.safetensors')))
        with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.neuron\.step is'):
            load_model(f'hf-hub:{REPO}')
        with pytest.raises(RuntimeError, match=r'blocks\.1\.mlp\.fc1\.neuron\.step is'):
            timm_load()


def published_file(hub, tmp_path, name='model.safetensors'):
    (tmp_path / name).write_bytes(hub.files(REPO)[name])
    return tmp_path / name


@pytest.mark.parametrize('load', [timm_load, lambda: load_model(f'hf-hub:{REPO}')], ids=['timm', 'load_model'])
def test_disk_full(published, model, images, load, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'blob')
    with monkeypatch.context() as patch:
        patch.setattr(file_download, 'http_get', full)
        with pytest.raises((SFormerError, OSError), match='No space left|disk is full'):
            load()
    assert_same(load(), model, images)


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds no model."""
    mount = tmp_path / 'disk'
    mount.mkdir()
    tool = shutil.which('mount')
    command = [tool, '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(mount)]
    if not tool or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('a small file system cannot be mounted here (root only)')
    yield mount
    subprocess.run(['umount', str(mount)], check=True)


def test_full_disk_for_the_cache(published, small_disk, run_here, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(small_disk / 'cache'))
    with pytest.raises(SFormerError, match=f'{REPO}.*: the disk is full'):
        timm_load()
    result = run_here('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits')
    assert result.code == 1 and 'the disk is full' in result.err


# nothing downloaded is executed, unpickled or obeyed ------------------------------------------------------------------

class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


LOADERS = pytest.mark.parametrize(
    'load', [timm_load, lambda: load_model(f'hf-hub:{REPO}')], ids=['timm', 'load_model'])


@LOADERS
@pytest.mark.parametrize('name', ['pytorch_model.bin', 'pytorch_model.pth', 'model.pth', 'open_clip_pytorch_model.bin'])
def test_pickle_instead_of_weights(published, tmp_path, load, name):
    files = published.files(REPO)
    del files['model.safetensors']
    published.put(REPO, dict(files, **{name: pickle.dumps(Bomb(tmp_path / 'boom'))}))
    with pytest.raises(SFormerError, match=r'there is no model\.safetensors. Pickled weights are not loaded'):
        load()
    assert not (tmp_path / 'boom').exists()
    assert published.count('GET', name) == 0, 'it was even downloaded'


def test_pickle_instead_of_weights_in_a_folder(folder, tmp_path, images, model):
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Bomb(tmp_path / 'boom')))
    assert_same(load_model(folder), model, images)
    (folder / 'model.safetensors').unlink()
    for load in (load_model, lambda f: timm.create_model(f'local-dir:{f}', pretrained=True)):
        with pytest.raises(SFormerError, match=r'there is no model\.safetensors'):
            load(folder)
    assert not (tmp_path / 'boom').exists()


@LOADERS
def test_pickle_by_the_name_of_weights(published, tmp_path, load):
    data = pickle.dumps(Bomb(tmp_path / 'boom'))
    published.put(REPO, dict(published.files(REPO), **{'model.safetensors': data}))
    change_config(published, sformer=dict(weights_sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(Exception, match='[Hh]eader|truncated or corrupted|cannot be loaded'):
        load()
    assert not (tmp_path / 'boom').exists()


@pytest.mark.parametrize('changes, message', [
    (dict(pretrained_cfg=dict(file='/etc/passwd')), 'pretrained_cfg sets file'),
    (dict(pretrained_cfg=dict(url='http://127.0.0.1:9/x.pth')), 'pretrained_cfg sets url'),
    (dict(pretrained_cfg=dict(state_dict={'a': 1})), 'pretrained_cfg sets state_dict'),
    (dict(pretrained_cfg=dict(hf_hub_filename='pytorch_model.bin')), 'pretrained_cfg sets hf_hub_filename'),
    (dict(pretrained_cfg=dict(hf_hub_filename='../../../secret.safetensors')), 'pretrained_cfg sets hf_hub_filename'),
    (dict(pretrained_cfg=dict(hf_hub_filename='x.npz', custom_load='hf')), 'hf_hub_filename, custom_load'),
    (dict(pretrained_cfg=dict(custom_load=True)), 'pretrained_cfg sets custom_load'),
    (dict(pretrained_cfg=dict(hf_hub_id='their-org/x')), 'pretrained_cfg sets hf_hub_id'),
    (dict(pretrained_cfg=dict(source='local-dir', file='/')), 'pretrained_cfg sets file, source'),
    (dict(pretrained_cfg=dict(num_classes=7)), 'contradicts itself about num_classes'),
    (dict(model_args=dict(num_classes=7)), 'contradicts itself about num_classes'),
    (dict(model_args=dict(checkpoint_path='/etc/passwd')), 'model_args sets checkpoint_path'),
    (dict(model_args=dict(pretrained=False)), 'model_args sets pretrained'),
    (dict(model_args=dict(pretrained_cfg=dict(file='/x'))), 'model_args sets pretrained_cfg'),
    (dict(model_args=dict(pretrained_cfg_overlay=dict(file='/x'))), 'model_args sets pretrained_cfg_overlay'),
    (dict(model_args=dict(pretrained_strict=False)), 'model_args sets pretrained_strict'),
    (dict(model_args=dict(pretrained_filter_fn='os.system')), 'model_args sets pretrained_filter_fn'),
    (dict(model_args=dict(cache_dir='/tmp')), 'model_args sets cache_dir'),
    (dict(model_args=dict(depth=10 ** 9)), 'model_args sets depth to 1000000000, which no vision transformer has'),
    (dict(pretrained_cfg=dict(interpolation='foo')), "unknown interpolation 'foo'"),
    (dict(pretrained_cfg=dict(std=[0])), 'std must lie in'),
    (dict(pretrained_cfg=dict(mean='0.5')), "mean must be a list of numbers, got '0.5'"),
    (dict(pretrained_cfg=dict(crop_pct='x')), "crop_pct must lie in .* got 'x'"),
    (dict(sformer=dict(version=1)), 'has version 1, this sformer reads 4'),
    (dict(model_args=dict(pruned=True)), 'model_args sets pruned'),
    (dict(model_args=dict(features_only=True)), 'model_args sets features_only'),
    (dict(architecture='sformer_custom', model_args=dict(source='hf-hub:their-org/x')), "source 'hf-hub:"),
    (dict(architecture='sformer_custom', model_args=dict(source='local-dir:/')), "source 'local-dir:/'"),
    (dict(architecture='sformer_custom', model_args=dict(source='antigravity.x')),
     "source 'antigravity.x' is not the name of a timm architecture"),
    (dict(architecture='sformer_custom', model_args=dict(source=['vit_tiny_patch16_224'])), 'source '),
    (dict(architecture='sformer_from_the_future'), 'is not an SFormer of this version|Unknown model'),
    (dict(architecture='../sformer'), 'is not an SFormer of this version|Unknown model'),
], ids=str)
def test_configs_that_direct_the_loader(published, changes, message):
    change_config(published, **changes)
    with pytest.raises(SFormerError, match=f'config.json.*{message}'):
        load_model(f'hf-hub:{REPO}')
    with pytest.raises((SFormerError, TypeError, RuntimeError)) as caught:
        timm_load()
    # what timm refuses by itself, before it asks us, is an error of its own
    assert re.search(message, str(caught.value)) or 'multiple values' in str(caught.value), caught.value
    assert not any('their-org' in r.path or 'passwd' in r.path for r in published.log)
    assert published.count('GET', '/cdn/') == 0, 'the weights were loaded first'


@pytest.mark.parametrize('changes', [
    dict(model_args=dict(norm_layer='antigravity.x')), dict(model_args=dict(act_layer='antigravity.x')),
    dict(model_args=dict(block_fn='antigravity.x')), dict(model_args=dict(embed_layer='antigravity.x')),
    dict(model_args=dict(mlp_layer='subprocess.Popen')), dict(model_args=dict(no_such_argument=1)),
    dict(model_args=dict(sfn=dict(levels='__import__("os")'))), dict(model_args=dict(depth=[1])),
    dict(pretrained_cfg=dict(no_such_key=1)),
    dict(pretrained_cfg=dict(input_size=3)),
    dict(pretrained_cfg=dict(mean=['a'])), dict(pretrained_cfg=dict(std='x'))], ids=str)
def test_configs_that_fit_nothing(published, run_here, changes):
    """One line that names the model; whatever timm makes of a string, it imports nothing."""
    change_config(published, **changes)
    with pytest.raises(SFormerError, match=f'{REPO} cannot be loaded|config.json') as caught:
        load_model(f'hf-hub:{REPO}')
    assert '\n' not in str(caught.value)
    assert run_here('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits').code == 1
    assert 'antigravity' not in sys.modules


def test_other_networks_are_not_loaded(hub, tmp_path, run_here):
    """A repository of timm's own is a source to convert, not an SFormer."""
    model = timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, embed_dim=48, depth=1, num_classes=2)
    timm.models.save_for_hf(model, str(tmp_path / 'x'), safe_serialization=False)
    hub.put('my-org/vit', {p.name: p.read_bytes() for p in (tmp_path / 'x').iterdir()})
    with pytest.raises(SFormerError, match="architecture 'vit_tiny_patch16_224' is not an SFormer"):
        load_model('hf-hub:my-org/vit')
    assert run_here('evaluate', 'hf-hub:my-org/vit', '--dataset', 'digits').code == 1
    assert hub.count('GET', 'pytorch_model') == 0
