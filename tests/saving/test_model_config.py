"""Folders that are not the SFormer that their config says."""
import dataclasses
import json
import os
import shutil

import pytest
import timm
from conftest import NANO
from safetensors.torch import load_file, save_file

from sformer import SFNConfig, SFormerError, convert, load_model, save_model
from sformer.files import file_hash, state_hash
from sformer.tasks import open_model

SFN = dataclasses.asdict(SFNConfig())  # how the neurons of `model` fire


@pytest.fixture
def folder(model, tmp_path):
    return save_model(model, tmp_path / 'saved')


def edit_config(folder, **changes):
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(dict(config, **changes)))


def test_weights_that_were_changed_are_noticed(folder):
    path = folder / 'model.safetensors'
    state = load_file(path)
    state['head.bias'] = state['head.bias'] + 1
    save_file(state, path, metadata={'format': 'pt'})
    with pytest.raises(SFormerError, match=r'model\.safetensors is not the file that config\.json belongs to.*SHA-256'):
        load_model(folder)


def test_weights_of_another_model_are_noticed(folder, source, images, tmp_path):
    other = convert(source, [images], SFNConfig(scale=1.25))
    shutil.copy(save_model(other, tmp_path / 'other') / 'model.safetensors', folder)
    with pytest.raises(SFormerError, match='SHA-256 differs'):
        load_model(folder)


@pytest.mark.parametrize('size', [0, 7, 1000, -1])
def test_truncated_weights(folder, size):
    path = folder / 'model.safetensors'
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(SFormerError, match=r'model\.safetensors is truncated or corrupted'):
        load_model(folder)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(SFormerError, match=f'holds no SFormer: there is no {name}'):
        load_model(folder)


def test_no_folder(tmp_path):
    for open_ in (load_model, lambda p: open_model(f'local-dir:{p}')):
        with pytest.raises(SFormerError, match='nowhere (holds no SFormer|is no folder)'):
            open_(tmp_path / 'nowhere')
    with pytest.raises(SFormerError, match='nowhere is no folder'):
        open_model(str(tmp_path / 'nowhere'))


@pytest.mark.parametrize('text', [b'', b'{"architecture": ', b'[1, 2]', b'"text"', b'{}', b'null', b'\xff\xfe\x00'])
def test_garbage_instead_of_a_config(folder, text):
    (folder / 'config.json').write_bytes(text)
    with pytest.raises(SFormerError, match=r'config\.json is not a timm config'):
        load_model(folder)


@pytest.mark.parametrize('changes, message', [
    (dict(architecture='resnet18'), "'resnet18' is not an SFormer"),
    (dict(architecture='sformer_from_the_future'), "'sformer_from_the_future' is not an SFormer"),
    (dict(architecture=None), 'is not an SFormer'),
    (dict(model_args=dict(no_such_argument=1, sfn=SFN)), 'no_such_argument'),
    (dict(model_args=dict(NANO, depth=1, sfn=SFN)), 'cannot be loaded'),
    (dict(model_args=dict(NANO, embed_dim=128, sfn=SFN)), 'cannot be loaded'),
    (dict(model_args=dict(NANO, sfn=dict(SFN, levels=8))), 'levels'),
    (dict(model_args=dict(NANO, sfn=dict(SFN, levels=1000))), 'levels must be'),
    (dict(model_args='garbage'), 'cannot be loaded|is not a timm config'),
    (dict(pretrained_cfg='garbage'), 'cannot be loaded|is not a timm config'),
    (dict(sformer='garbage'), 'is not'),
    (dict(model_args=dict(NANO, sfn=SFN, pruned=True, cache_dir='x', scriptable=True, exportable=True, no_jit=True)),
     'sets cache_dir, exportable, no_jit, pruned, scriptable, which is no argument of a network. Not loaded'),
    (dict(pretrained_cfg=dict(std=[0])), r'config\.json: std must lie in'),
], ids=str)
def test_configs_that_do_not_fit(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(SFormerError, match=message) as caught:
        load_model(folder)
    assert '\n' not in str(caught.value)


def test_config_that_does_not_say_how_neurons_fire(folder):
    """Weights and their hash are whole, and would load as neurons of the default config."""
    args = json.loads((folder / 'config.json').read_text())['model_args']
    for sfn, lacks in ((None, 'lacks levels, fire,'), ({}, 'lacks levels, fire,'),
                       ({k: v for k, v in args['sfn'].items() if k != 'dead_zone'}, r'lacks dead_zone\.')):
        edit_config(folder, model_args=dict(args, sfn=sfn))
        with pytest.raises(SFormerError, match=f'how its neurons fire: sfn {lacks}'):
            load_model(folder)
    first = ('levels', 'fire', 'attention_fire', 'activation_fire', 'initial_potential', 'dead_zone', 'scale',
             'token_scale')
    edit_config(folder, model_args=dict(args, sfn={k: args['sfn'][k] for k in first}))
    loaded = load_model(folder).sfn_config
    assert loaded == SFNConfig(**{k: args['sfn'][k] for k in first}), 'saved before there were other fields'


def test_record_of_another_version(folder):
    config = json.loads((folder / 'config.json').read_text())
    for version in (1, 5, None):
        record = dict(config['sformer'], version=version)
        edit_config(folder, sformer={k: v for k, v in record.items() if v is not None})
        with pytest.raises(SFormerError, match=rf'config\.json: the record .* has version {version or 1}, this sformer '
                                               r'reads 4: convert the source again') as caught:
            load_model(folder)
        assert '\n' not in str(caught.value)


def test_record_of_the_last_version(folder, model):
    """It only said whether weights had moved."""
    config = json.loads((folder / 'config.json').read_text())
    record = {key: value for key, value in config['sformer'].items() if key not in ('state_sha256', 'layout_sha256')}
    for moved, reasons in ((False, ()), (True, ('fine-tuned',))):
        edit_config(folder, sformer=dict(record, version=2, changed=moved))
        assert load_model(folder).conversion.changed == reasons
    assert state_hash(load_model(folder).state_dict()) == state_hash(model.state_dict())


def test_weights_that_are_a_git_lfs_pointer(folder):
    """A repository that was cloned without git-lfs."""
    digest = file_hash(folder / 'model.safetensors')
    (folder / 'model.safetensors').write_text(
        f'version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 843602\n')
    for load in (load_model, lambda f: timm.create_model(f'local-dir:{f}', pretrained=True)):
        with pytest.raises(SFormerError, match=r'model\.safetensors is a Git-LFS pointer, not the file itself'):
            load(folder)


@pytest.mark.parametrize('key, problem', [
    ('blocks.1.attn.proj.neuron.step', 'is not positive'),
    ('patch_embed.proj.neuron.step', 'of the checkpoint is not finite and positive')])
def test_spoilt_steps_are_named(folder, key, problem):
    """Even by somebody who has the hash right."""
    path = folder / 'model.safetensors'
    state = load_file(path)
    state[key].zero_()
    save_file(state, path)
    config = json.loads((folder / 'config.json').read_text())
    edit_config(folder, sformer=dict(config['sformer'], weights_sha256=file_hash(path)))
    with pytest.raises(SFormerError, match=f'{key} {problem}'):
        load_model(folder)
    with pytest.raises((RuntimeError, SFormerError), match=f'{key} {problem}'):
        timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3)
