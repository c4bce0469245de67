"""SFormers as folders: what is written, what comes back, and what survives when writing fails."""
import copy
import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import timm
import torch
from cli_process import FORKS
from conftest import NANO
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import sformer
from sformer import SFNConfig, SFormer, SFormerError, UncalibratedError, convert, is_calibrated, load_model, save_model
from sformer.files import file_hash
from sformer.saving.folders import write_model
from sformer.tasks import open_model

FILES = {'model.safetensors', 'config.json'}


def timm_load(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def assert_same(a, b, images):
    """Bit for bit."""
    with torch.no_grad():
        assert torch.equal(a(images), b(images))
    state = b.state_dict()
    assert a.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in a.state_dict().items())


def snapshot(folder):
    """All files below a folder with their contents, and all folders."""
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob('*')}


@pytest.fixture(scope='session')
def other(source, images):
    """Another SFormer of the same source."""
    return convert(source, [images], SFNConfig(scale=1.25))


@pytest.fixture
def folder(model, tmp_path):
    """A folder that holds `model`."""
    return save_model(model, tmp_path / 'saved')


# there and back -------------------------------------------------------------------------------------------------------

def test_round_trip_through_timm(model, folder, images):
    reloaded = timm_load(folder)
    assert type(reloaded) is SFormer and is_calibrated(reloaded)
    assert_same(reloaded, model, images)
    assert reloaded.sfn_config == model.sfn_config


@pytest.mark.parametrize('config', [
    SFNConfig(levels=8), SFNConfig(levels=5, fire='density', attention_fire='density'),
    SFNConfig(levels=7, fire='power2', attention_fire='power2'), SFNConfig(initial_potential=0),
    SFNConfig(levels=1), SFNConfig(levels=127, fire='quadratic'), SFNConfig(scale=0.9, dead_zone=1.),
    SFNConfig(levels=8, silence=0.03)], ids=str)
def test_every_kind_of_neuron_comes_back(source, images, tmp_path, config):
    model = convert(source, [images], config)
    assert_same(timm_load(save_model(model, tmp_path / 'x')), model, images)


def test_load_model_brings_the_record(model, folder, images):
    loaded = load_model(folder)
    assert_same(loaded, model, images)
    assert not loaded.training
    assert loaded.conversion == dataclasses.replace(
        model.conversion, weights_sha256=file_hash(folder / 'model.safetensors'))
    assert_same(open_model(str(folder)), model, images)
    assert_same(open_model(f'local-dir:{folder}'), model, images)


def test_saving_what_was_loaded(folder, tmp_path):
    """Saving again writes the same: nothing accumulates, nothing is lost."""
    again = save_model(load_model(folder), tmp_path / 'again')
    configs = [json.loads((f / 'config.json').read_text()) for f in (again, folder)]
    assert configs[0] == configs[1]
    assert file_hash(again / 'model.safetensors') == file_hash(folder / 'model.safetensors')


def test_reload_with_other_arguments(folder):
    assert timm_load(folder, num_classes=3)(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert timm_load(folder, in_chans=3)(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert len(timm_load(folder, features_only=True, out_indices=[0, 1])(torch.rand(2, 1, 8, 8))) == 2
    half = timm_load(folder, dtype=torch.bfloat16)
    assert half(torch.rand(2, 1, 8, 8).bfloat16()).dtype == torch.bfloat16
    assert half.head.neuron.step.dtype == torch.float32


@pytest.mark.parametrize('change', [
    lambda m: m.reset_classifier(5), lambda m: m.reset_classifier(0), lambda m: m.set_input_size((16, 16)),
    lambda m: m.set_input_size((16, 16), patch_size=4)], ids=['head', 'no_head', 'size', 'patch'])
def test_models_that_were_changed_come_back(model, tmp_path, change):
    changed = copy.deepcopy(model)
    change(changed)
    changed.eval()
    size = changed.patch_embed.img_size[0]
    assert_same(timm_load(save_model(changed, tmp_path / 'x')), changed, torch.rand(4, 1, size, size) * 2 - 1)


def test_shipped_model_can_be_saved(tmp_path, images):
    model = timm.create_model('sformer_nano.digits', pretrained=True).eval()
    assert_same(timm_load(save_model(model, tmp_path / 'x')), model, images)


def test_source_without_an_entrypoint_of_its_own(tmp_path):
    """`sformer_custom` names the architecture in its model_args."""
    source = timm.create_model(
        'vit_small_patch32_224', img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=7, qk_norm=True)
    images = torch.randn(4, 3, 64, 64)
    model = convert(source, [images], SFNConfig(levels=8))
    folder = save_model(model, tmp_path / 'custom')
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'sformer_custom'
    assert config['model_args']['source'] == 'vit_small_patch32_224' and config['model_args']['qk_norm'] is True
    assert_same(timm_load(folder), model, images)
    assert load_model(folder).conversion.source == 'vit_small_patch32_224'


@pytest.mark.parametrize('levels', [32, 8])
def test_source_of_an_sformer_converts_and_comes_back(tmp_path, images, levels):
    source = sformer.source_of(timm.create_model('sformer_nano.digits', pretrained=True))
    model = convert(source, [images], SFNConfig(levels=levels))
    assert_same(timm_load(save_model(model, tmp_path / 'x')), model, images)


# what is written ------------------------------------------------------------------------------------------------------

def test_files(model, folder):
    assert {p.name for p in folder.iterdir()} == FILES, 'a stray file, or a pickle'
    weights = load_file(folder / 'model.safetensors')
    assert weights.keys() == model.state_dict().keys()
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, 'others cannot read it as they can other files'


def test_config(model, folder):
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'sformer_tiny' and config['num_classes'] == 10
    args = config['model_args']
    others = NANO.keys() - {'img_size', 'num_classes'}
    assert {k: args[k] for k in others} == {k: NANO[k] for k in others}
    assert 'num_classes' not in args, 'the one at the root is enough, and two are one too many for transformers'
    assert tuple(args['img_size']) == (8, 8)
    assert args['sfn'] == dataclasses.asdict(model.sfn_config)
    cfg = config['pretrained_cfg']
    assert (cfg['mean'], cfg['std'], cfg['crop_pct'], cfg['interpolation']) == ([0.5], [0.5], 1.0, 'bilinear')
    assert cfg['input_size'] == [1, 8, 8] and cfg['num_classes'] == 10
    record = config['sformer']
    assert record == dict(model.conversion.to_dict(), weights_sha256=file_hash(folder / 'model.safetensors'))
    assert {'version', 'source', 'source_sha256', 'fit', 'calibration', 'versions'} <= record.keys()


def test_uncalibrated_is_refused(tmp_path, source, model):
    with pytest.raises(UncalibratedError, match=r'blocks\.0\.attn\.qkv\.neuron.*sformer\.convert\(\) before saving'):
        save_model(timm.create_model('sformer_nano', img_size=8, in_chans=1), tmp_path / 'x')
    one = copy.deepcopy(model)
    one.blocks[1].mlp.fc2.neuron.calibrated.fill_(False)
    with pytest.raises(UncalibratedError, match=r'1 neurons .* blocks\.1\.mlp\.fc2\.neuron'):
        save_model(one, tmp_path / 'x')
    with pytest.raises(UncalibratedError, match='no spiking neurons'):
        save_model(source, tmp_path / 'x')
    assert list(tmp_path.iterdir()) == []


def pruned(model):
    model = copy.deepcopy(model)
    model.prune_intermediate_layers([0], prune_head=False)
    return model


def not_made_by_timm(model):
    return convert(VisionTransformer(**NANO), [torch.zeros(1, 1, 8, 8)])


def with_an_argument_that_json_does_not_know(model):
    source = timm.create_model('vit_tiny_patch16_224', **NANO, norm_layer=torch.nn.LayerNorm)
    return convert(source, [torch.zeros(1, 1, 8, 8)])


def tied(model):
    model = copy.deepcopy(model)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    return model


def on_the_meta_device(model):
    return copy.deepcopy(model).to('meta')


def partly_offloaded(model):
    model = copy.deepcopy(model)
    model.head.to('meta')
    return model


def feature_extractor(model):
    return timm.create_model('sformer_nano.digits', pretrained=True, features_only=True)


@pytest.mark.parametrize('make, message', [
    (pruned, 'no config can rebuild this model: it was changed after it was built'),
    (not_made_by_timm, 'not built by timm.create_model'),
    (with_an_argument_that_json_does_not_know, "no config can rebuild this model: .*'norm_layer' is not serializable"),
    (tied, r'blocks\.1\.mlp\.fc1\.weight and blocks\.0\.mlp\.fc1\.weight share their values'),
    (on_the_meta_device, 'cls_token has no values: it is on the meta device, or offloaded'),
    (partly_offloaded, r'head\.weight has no values'),
    (feature_extractor, 'no config can rebuild a FeatureGetterNet')])
def test_models_that_no_config_rebuilds_are_refused(tmp_path, model, make, message):
    with pytest.raises(SFormerError, match=message) as caught:
        save_model(make(model), tmp_path / 'x')
    assert '\n' not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_tensors_without_values_share_none(tmp_path):
    state = dict(a=torch.zeros(0), b=torch.zeros(0, 3))
    write_model(state, tmp_path / 'x', lambda aside, sha256: (aside / 'config.json').write_text('{}'), False)
    assert {name: value.shape for name, value in load_file(tmp_path / 'x' / 'model.safetensors').items()} == {
        name: value.shape for name, value in state.items()}


# what is there already ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('there', [FILES, {'config.json'}, {'model.safetensors'}], ids=lambda v: '+'.join(sorted(v)))
def test_existing_model_is_not_overwritten(folder, other, there):
    for name in FILES - there:
        (folder / name).unlink()
    before = snapshot(folder)
    with pytest.raises(SFormerError, match='holds a model already.*overwrite'):
        save_model(other, folder)
    assert snapshot(folder) == before


def test_overwrite_leaves_other_files_alone(folder, other, images):
    (folder / 'README.md').write_text('mine')
    (folder / 'sub').mkdir()
    (folder / 'sub' / 'model.safetensors').write_text('mine, too')
    save_model(other, folder, overwrite=True)
    assert_same(load_model(folder), other, images)
    assert (folder / 'README.md').read_text() == 'mine'
    assert (folder / 'sub' / 'model.safetensors').read_text() == 'mine, too'
    assert {p.name for p in folder.iterdir()} == FILES | {'README.md', 'sub'}


def test_folder_of_other_things_is_welcome(model, tmp_path, images):
    (tmp_path / 'notes.txt').write_text('mine')
    assert_same(load_model(save_model(model, tmp_path)), model, images)
    assert {p.name for p in tmp_path.iterdir()} == FILES | {'notes.txt'}


def test_output_that_cannot_be(model, tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(SFormerError, match='is a file'):
        save_model(model, tmp_path / 'file')
    with pytest.raises(SFormerError, match='cannot be written'):
        save_model(model, tmp_path / 'file' / 'sub')
    assert (tmp_path / 'file').read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_folder_without_permission(folder, other):
    before = snapshot(folder)
    folder.chmod(0o555)
    try:
        with pytest.raises(SFormerError, match='cannot be written'):
            save_model(other, folder, overwrite=True)
    finally:
        folder.chmod(0o755)
    assert snapshot(folder) == before


# failure while writing ------------------------------------------------------------------------------------------------

def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = {
    'weights': ('sformer.saving.folders.save_file', 1),
    'config': ('sformer.saving.folders.save_config_for_hf', 1),
    'first rename': ('os.replace', 1),
    'second rename': ('os.replace', 2),
}


def break_once(monkeypatch, where, nth, error):
    """The nth call of a function fails, and only that one: whatever cleans up may call it again."""
    module, _, name = where.rpartition('.')
    target = os if module == 'os' else sformer.saving.folders
    real, calls = getattr(target, name), itertools.count(1)

    def broken(*args, **kwargs):
        if next(calls) != nth:
            return real(*args, **kwargs)
        if name == 'save_file':  # half of it
            real(*args, **kwargs)
            os.truncate(args[1], 10_000)
        raise error
    monkeypatch.setattr(target, name, broken)
    return calls


@pytest.mark.parametrize('make_error, raised', [(full_disk, SFormerError), (KeyboardInterrupt, KeyboardInterrupt)],
                         ids=['disk full', 'ctrl-c'])
@pytest.mark.parametrize('fault', FAULTS.values(), ids=FAULTS.keys())
class TestInterruptedSave:

    def test_old_model_survives(self, model, other, folder, images, monkeypatch, fault, make_error, raised):
        (folder / 'README.md').write_text('mine')
        before = snapshot(folder)
        calls = break_once(monkeypatch, *fault, make_error())
        with pytest.raises(raised, match='No space left|^$'):
            save_model(other, folder, overwrite=True)
        assert next(calls) > fault[1], 'nothing was broken'
        assert snapshot(folder) == before
        assert_same(load_model(folder), model, images)

        save_model(other, folder, overwrite=True)  # and nothing is in the way of the next attempt
        assert_same(load_model(folder), other, images)

    def test_nothing_stays_where_nothing_was(self, model, tmp_path, monkeypatch, fault, make_error, raised):
        break_once(monkeypatch, *fault, make_error())
        with pytest.raises(raised):
            save_model(model, tmp_path / 'new')
        assert list(tmp_path.iterdir()) == []

    def test_no_parents_stay_either(self, model, tmp_path, monkeypatch, fault, make_error, raised):
        break_once(monkeypatch, *fault, make_error())
        with pytest.raises(raised):
            save_model(model, tmp_path / 'new' / 'and' / 'deep')
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds one model but not two."""
    mount = tmp_path / 'disk'
    mount.mkdir()
    tool = shutil.which('mount')
    command = [tool, '-t', 'tmpfs', '-o', 'size=700k', 'tmpfs', str(mount)]
    if not tool or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('a small file system cannot be mounted here (root only)')
    yield mount
    subprocess.run(['umount', str(mount)], check=True)


def test_full_disk(model, other, images, small_disk):
    """A real one: the old model survives, the error says why."""
    folder = save_model(model, small_disk / 'model')
    before = snapshot(small_disk)
    with pytest.raises(SFormerError, match='cannot be written: .*(No space left|os error 28)'):
        save_model(other, folder, overwrite=True)
    assert snapshot(small_disk) == before
    assert_same(load_model(folder), model, images)


def test_full_disk_before_the_first_model(model, small_disk):
    (small_disk / 'ballast').write_bytes(b'x' * 500_000)
    with pytest.raises(SFormerError, match='No space left|os error 28'):
        save_model(model, small_disk / 'model')
    assert [p.name for p in small_disk.iterdir()] == ['ballast']


def test_read_only_disk(model, other, images, small_disk):
    """Where root may not write, either."""
    folder = save_model(model, small_disk / 'model')
    before = snapshot(small_disk)
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    for name, overwrite in (('model', True), ('new', False)):
        with pytest.raises(SFormerError, match='cannot be written: .*read-only'):
            save_model(other, small_disk / name, overwrite=overwrite)
    assert snapshot(small_disk) == before
    assert_same(load_model(folder), model, images)


def save_slowly(source_folder, folder, reached, where='folders.save_file'):
    """In a process of its own: overwrite a model, and take a break when the new weights lie beside the old ones, or
    when only the first of two files is in its place."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    owner, name = (sformer.saving.folders, 'save_file') if where == 'folders.save_file' else (os, 'replace')
    real = getattr(owner, name)

    def slow(*args, **kwargs):
        real(*args, **kwargs)
        reached.set()
        time.sleep(60)
    setattr(owner, name, slow)
    save_model(load_model(source_folder), folder, overwrite=True)


def kill_while_saving(new, folder, where, sent=signal.SIGKILL):
    reached = FORKS.Event()
    process = FORKS.Process(target=save_slowly, args=(new, folder, reached, where))
    process.start()
    assert reached.wait(120), 'the process never got there'
    os.kill(process.pid, sent)
    process.join(30)
    assert process.exitcode not in (0, None)


@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_signal_while_saving(model, other, folder, images, tmp_path, sent):
    before = snapshot(folder)
    new = save_model(other, tmp_path / 'new')
    kill_while_saving(new, folder, 'folders.save_file', sent)
    after = snapshot(folder)
    if sent == signal.SIGKILL:  # nobody can clean up then
        assert after != before
        after = {path: content for path, content in after.items() if '.writing-' not in str(path)}
    assert after == before
    assert_same(load_model(folder), model, images)
    save_model(other, folder, overwrite=True)
    assert_same(load_model(folder), other, images)
    assert {p.name for p in folder.iterdir()} == FILES, 'what a killed process left is in the way'


@pytest.mark.parametrize('load', [load_model, timm_load])
@pytest.mark.parametrize('empty', [False, True], ids=['over another', 'into nothing'])
def test_killed_between_two_files(model, other, folder, images, tmp_path, load, empty):
    """A new config beside old weights: who reads it puts the new weights in their place."""
    new = save_model(other, tmp_path / 'new')
    if empty:
        shutil.rmtree(folder)
    kill_while_saving(new, folder, 'os.replace')
    configs = [json.loads((f / 'config.json').read_text()) for f in (folder, new)]
    assert configs[0] == configs[1]
    weights = folder / 'model.safetensors'
    assert not weights.exists() if empty else file_hash(weights) != file_hash(new / 'model.safetensors')

    assert_same(load(folder), other, images)
    assert file_hash(weights) == file_hash(new / 'model.safetensors')
    save_model(model, folder, overwrite=True)
    assert_same(load(folder), model, images)
    assert {p.name for p in folder.iterdir()} == FILES


# in other libraries ---------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings('ignore')
def test_transformers(model, folder, images):
    transformers = pytest.importorskip('transformers')
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert is_calibrated(wrapped)
    with torch.no_grad():
        assert torch.equal(wrapped(images).logits, model(images))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_not_saved(model, tmp_path, value):
    """As after a training that diverged: it loaded, and every logit was NaN."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.blocks[1].mlp.fc1.bias[3] = value
    with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.bias has NaN or infinite values, so it is not saved'):
        save_model(changed, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()
