"""Networks to convert: what is refused, by name."""
import argparse
import copy
import json
import os
import pickle

import pytest
import timm
import torch
from conftest import NANO
from evaluation_tools import class_folders
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.data import resolve_input_data_config

from sformer import SFormerError, UnsupportedLayerError, convert, load_model, save_model
from sformer.conversion.checkpoints import read_file
from sformer.conversion.sources import create_source, load_checkpoint_
from sformer.detection import DetectorConfig, create_detector
from sformer.execution import export_onnx, load_onnx
from sformer.files import state_hash

NAME = 'vit_tiny_patch16_224'
LFS_POINTER = f'version https://git-lfs.github.com/spec/v1\noid sha256:{"0" * 64}\nsize 21598816\n'


def save_changed(path, source, **changes):
    """Save the state dict of a source with some tensors replaced (None: left out)."""
    state = {**source.state_dict(), **changes}
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, path)
    return path


def test_unknown_model_comes_with_a_suggestion():
    with pytest.raises(SFormerError, match=r"no model 'vit_tiny_patch16_22'\..*vit_tiny_patch16_224"):
        convert('vit_tiny_patch16_22')
    with pytest.raises(SFormerError, match='list_models'):
        convert('xyzzyxyzzy')


def test_wrong_arguments_of_the_source(checkpoint, source):
    with pytest.raises(SFormerError, match='no_such_argument'):
        convert(NAME, checkpoint=checkpoint, no_such_argument=1)
    with pytest.raises(SFormerError, match='num_heads'):
        convert(NAME, checkpoint=checkpoint, **dict(NANO, num_heads=7))
    with pytest.raises(TypeError, match='img_size'):
        convert(source, img_size=8)


def test_model_without_spiking_counterpart(images):
    with pytest.raises(UnsupportedLayerError, match='EvoNorm'):
        convert(timm.create_model('test_efficientnet_evos', in_chans=1), [images])


def test_checkpoint_of_another_architecture(source, checkpoint, tmp_path):
    for changes, message in ((dict(depth=4), r'blocks\.2\.norm1\.weight is missing.*; and 21 more'),
                             (dict(depth=1), r'blocks\.1\.\S+ is not part of the model'),
                             (dict(num_classes=5), r'head\.weight is \(10, 64\) instead of \(5, 64\)'),
                             (dict(embed_dim=32), r'cls_token is \(1, 1, 64\) instead of \(1, 1, 32\)')):
        with pytest.raises(SFormerError, match=message):
            create_source(NAME, checkpoint, **dict(NANO, **changes))
    one = save_changed(tmp_path / 'one.safetensors', source, **{'norm.bias': None})
    with pytest.raises(SFormerError, match=r'one\.safetensors .*: norm\.bias is missing\.$'):
        create_source(NAME, one, **NANO)


def test_refused_checkpoint_leaves_the_model_alone(source, tmp_path):
    model = timm.create_model(NAME, **NANO)
    before = state_hash(model.state_dict())
    bad = save_changed(tmp_path / 'bad.safetensors', source, **{'norm.bias': None})
    with pytest.raises(SFormerError):
        load_checkpoint_(model, read_file(bad, NAME, NANO))
    assert state_hash(model.state_dict()) == before


@pytest.mark.parametrize('wrapped', ['', 'model', 'state_dict', 'state_dict_ema', 'model.state_dict'])
@pytest.mark.parametrize('suffix', ['.pth', '.bin', ''])
def test_pickle_of_tensors(source, images, tmp_path, suffix, wrapped):
    content = source.state_dict()
    for name in reversed(wrapped.split('.')) if wrapped else ():
        content = {name: content, 'epoch': 3}
    torch.save(content, tmp_path / f'digits{suffix}')
    found = create_source(NAME, tmp_path / f'digits{suffix}', **NANO)
    assert state_hash(found.network.state_dict()) == state_hash(source.state_dict())
    assert found.origins['weights'].startswith(wrapped.rpartition('.')[2])


@pytest.mark.parametrize('name', ['parallel.safetensors', 'parallel.pth'])
def test_checkpoint_of_a_parallel_model(source, images, tmp_path, name):
    """What DataParallel and torch.compile put before the names is no part of them."""
    state = torch.nn.DataParallel(source).state_dict()
    assert all(k.startswith('module.') for k in state)
    (save_file if name.endswith('safetensors') else torch.save)(state, tmp_path / name)
    model = convert(NAME, [images], checkpoint=tmp_path / name, **NANO)
    assert model.conversion.source_sha256 == state_hash(source.state_dict())


@pytest.mark.parametrize('name', ['pointer.safetensors', 'pointer.pth'])
def test_checkpoint_that_is_a_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(SFormerError, match=rf'{name} is a Git-LFS pointer, not the file itself: git lfs pull'):
        convert(NAME, checkpoint=tmp_path / name, **NANO)


class Payload:
    """What a malicious checkpoint holds: unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    'save', [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o, protocol=2))], ids=['torch', 'raw'])
@pytest.mark.parametrize('name', ['evil.pth', 'evil.safetensors'])
def test_code_in_a_pickle_never_runs(tmp_path, save, name):
    owned = tmp_path / 'owned'
    save({'head.weight': Payload(owned)}, tmp_path / name)
    with pytest.raises(SFormerError, match=f'{name} (cannot be unpickled safely|is truncated or corrupted)'):
        convert(NAME, checkpoint=tmp_path / name, **NANO)
    assert not owned.exists()


def test_damaged_safetensors(checkpoint):
    whole = checkpoint.read_bytes()
    damaged = dict(
        truncated=whole[:-1000], beheaded=whole[:100], empty=b'', longer=whole + b'x' * 1000,
        header=whole[:8] + whole[8:].replace(b'"F32"', b'"F3?"', 1),
        length=b'\xff' * 8 + whole[8:], text=b'<html>404 Not Found</html>')
    for name, content in damaged.items():
        checkpoint.write_bytes(content)
        with pytest.raises(SFormerError, match='digits.safetensors is truncated or corrupted'):
            convert(NAME, checkpoint=checkpoint, **NANO)
            pytest.fail(f'{name} was accepted')


def test_missing_checkpoint(tmp_path):
    for path in (tmp_path / 'no.safetensors', tmp_path):
        with pytest.raises(SFormerError, match='no checkpoint at'):
            convert(NAME, checkpoint=path, **NANO)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_broken_weights_are_named(source, images, tmp_path, value):
    weight = source.blocks[1].mlp.fc1.weight.detach().clone()
    weight[3, 5] = value
    path = save_changed(tmp_path / 'broken.safetensors', source, **{'blocks.1.mlp.fc1.weight': weight})
    with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.weight of .*broken\.safetensors'):
        convert(NAME, checkpoint=path, **NANO)
    broken = copy.deepcopy(source)
    broken.blocks[1].mlp.fc1.weight.data.copy_(weight)
    with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.weight of the source network has NaN or infinite'):
        convert(broken, [images])


def test_weights_without_values_are_named(source, images):
    with pytest.raises(SFormerError, match='cls_token of the source network has no values: it is on the meta device'):
        convert(copy.deepcopy(source).to('meta'), [images])


def test_overflow_inside_the_source_is_located(own_source, images):
    own_source.blocks[0].mlp.fc1.weight.data *= 1e30
    with pytest.raises(SFormerError, match=r'infinite currents at blocks\.\d\.\S+neuron'):
        convert(own_source, [images])


# what weights are of --------------------------------------------------------------------------------------------------

def overlay(source, tmp_path, **values):
    """The weights of a source as if they were published ones: with a tag, a licence and a number of classes."""
    save_file(source.state_dict(), tmp_path / 'published.safetensors')
    return dict(file=str(tmp_path / 'published.safetensors'), num_classes=10, hf_hub_id=None, url=None,
                custom_load=False, input_size=(1, 8, 8), **values)


@pytest.mark.parametrize('classes', [5, 1000])
def test_classes_that_the_pretrained_weights_have_not(source, tmp_path, classes):
    """timm leaves the classifier random, and says nothing."""
    kwargs = dict(NANO, num_classes=classes)
    with pytest.raises(SFormerError, match=rf'num_classes={classes}, but the pretrained weights of {NAME} are of 10 '
                                           r'classes: its head would be random'):
        convert(NAME, 'digits', **kwargs, pretrained_cfg_overlay=overlay(source, tmp_path))
    features = create_source(NAME, **dict(NANO, num_classes=0), pretrained_cfg_overlay=overlay(source, tmp_path))
    assert features.weights is None and state_hash(features.network.state_dict()) == state_hash(
        {key: value for key, value in source.state_dict().items() if not key.startswith('head.')})


def test_parameters_that_the_pretrained_weights_have_not(source, tmp_path):
    """Where there is no classifier timm is not strict with any of them."""
    kwargs = dict(NANO, num_classes=0, qk_norm=True)
    with pytest.raises(SFormerError, match=r'have no blocks\.0\.attn\.q_norm\.weight and 7 more, which would be random '
                                           'with these arguments'):
        create_source(NAME, **kwargs, pretrained_cfg_overlay=overlay(source, tmp_path))
    published = overlay(source, tmp_path)
    position = source.pos_embed.detach()[:, 1:].contiguous()
    save_file({**source.state_dict(), 'pos_embed': position}, tmp_path / 'published.safetensors')
    kwargs = dict(NANO, num_classes=0, reg_tokens=1, no_embed_class=True)
    with pytest.raises(SFormerError, match=f'pretrained weights of {NAME} have no reg_token, which would be random'):
        create_source(NAME, **kwargs, pretrained_cfg_overlay=published)


def test_pretrained_weights_that_are_not_there(source, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(SFormerError, match=f'weights of {NAME} cannot be loaded .*or make the Hub reach'):
        create_source(NAME, cache_dir=tmp_path, **NANO)


def test_a_tag_is_of_published_weights(source, checkpoint, images, tmp_path):
    """timm's config has tag, licence and papers of its own weights, whoever trained those that are converted."""
    published = create_source(NAME, **NANO, pretrained_cfg_overlay=dict(
        overlay(source, tmp_path), hf_hub_id='me/mine', tag='mine', license='mit'))
    published = type(published)(published.network, 'me/mine')  # as of the Hub
    own = create_source(NAME, checkpoint, **NANO)
    for of, tag, license in ((published, 'mine', 'mit'), (own, None, None), (source, None, None)):
        model = load_model(save_model(convert(of, [images]), tmp_path / 'saved', overwrite=True))
        config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
        assert config['sformer']['source_tag'] == tag == model.conversion.source_tag
        assert config['pretrained_cfg'].get('tag') == tag and config['pretrained_cfg'].get('license') == license
        assert 'augreg' not in json.dumps(config)
        again = convert(model, [images])
        assert (again.conversion.source_tag, again.conversion.source_weights) == (tag, 'me/mine' if tag else None)


MEAN, STD = [0.4], [0.3]


def said_by(path, source, metadata=None, **content):
    if path.suffix == '.safetensors':
        save_file(source.state_dict(), path, metadata=metadata)
    else:
        torch.save(dict(state_dict=source.state_dict(), **content), path)
    return path


CHECKPOINTS = {
    'values': ('a.safetensors', dict(metadata=dict(mean='[0.4]', std='[0.3]', crop_pct='1.0'))),
    'config': ('a.safetensors', dict(metadata=dict(pretrained_cfg='{"mean": [0.4], "std": [0.3], "crop_pct": 1.0}'))),
    'args of timm': ('a.pth', dict(args=argparse.Namespace(
        mean=MEAN, std=STD, crop_pct=1., lr=0.1, interpolation='', crop_mode=None))),
    'tuples': ('a.safetensors', dict(metadata=dict(mean='(0.4,)', std='(0.3,)', crop_pct='1.0'))),
    'entries': ('a.pth', dict(mean=MEAN, std=STD, crop_pct=1.)),
}


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_normalisation_of_a_checkpoint(name, source, images, tmp_path, caplog):
    file, said = CHECKPOINTS[name]
    path = said_by(tmp_path / file, source, **said)
    model = convert(NAME, [images], checkpoint=path, **NANO)
    assert ([*model.pretrained_cfg['mean']], [*model.pretrained_cfg['std']]) == (MEAN, STD)
    assert model.pretrained_cfg['crop_pct'] == 1. and model.conversion.origins['mean'] == file
    assert torch.allclose(model.patch_embed.proj.neuron.step, torch.tensor(1 / (255 * 0.3)))
    given = convert(NAME, [images], checkpoint=path, preprocessing=dict(mean=(0.2,)), **NANO)
    assert given.pretrained_cfg['mean'] == (0.2,) and [*given.pretrained_cfg['std']] == STD
    assert (given.conversion.origins['mean'], given.conversion.origins['std']) == ('given', file)
    assert 'does not say which mean and std' not in caplog.text


@pytest.mark.parametrize('architecture, taken', [(NAME, True), ('vit_small_patch16_224', False)])
def test_normalisation_of_the_config_beside_a_checkpoint(source, checkpoint, architecture, taken, caplog):
    (checkpoint.parent / 'config.json').write_text(json.dumps(
        dict(architecture=architecture, pretrained_cfg=dict(mean=MEAN, std=STD))))
    found = create_source(NAME, checkpoint, **NANO)
    assert (found.origins['mean'] == f'config.json beside {checkpoint.name}') == taken
    assert (found.network.pretrained_cfg['mean'] == MEAN) == taken != bool(caplog.text)


def test_normalisation_that_a_checkpoint_does_not_say_is_told_of(source, images, checkpoint, tmp_path, caplog):
    """Which it is, and where it is from: a drop of 0.00 hides that both networks see other pixels than in training."""
    model = convert(NAME, [images], checkpoint=checkpoint, **NANO)
    default = f'default of {NAME}, nothing in the file says otherwise'
    assert model.conversion.origins['mean'] == model.conversion.origins['std'] == default
    assert f'does not say which mean and std it was trained with: mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5) are ' \
           f'taken, {default}. --mean and --std' in caplog.text
    caplog.clear()
    given = convert(NAME, [images], checkpoint=checkpoint, preprocessing=dict(mean=(0.4,), std=(0.3,)), **NANO)
    assert given.conversion.origins['mean'] == 'given' and given.pretrained_cfg['std'] == (0.3,)
    assert 'does not say' not in caplog.text
    pickled = said_by(tmp_path / 'args.pth', source, args=argparse.Namespace(mean=None, std=None))
    create_source(NAME, pickled, **NANO)
    assert caplog.text.count('does not say') == 1
    saved = load_model(save_model(given, tmp_path / 'saved'))
    assert saved.conversion.origins == given.conversion.origins
    overlaid = create_source(NAME, **NANO, pretrained_cfg_overlay=overlay(source, tmp_path))
    assert overlaid.origins['mean'] == default  # of a file of one's own, likewise
    again = convert(create_source(f'local-dir:{tmp_path / "saved"}'), [images])
    assert again.conversion.origins['mean'] == 'given' and again.pretrained_cfg['mean'] == [0.4]
    assert not create_source('sformer_nano.digits').origins  # weights and config in the package


def test_each_value_is_of_where_it_is_said_first(source, checkpoint, tmp_path):
    """A checkpoint with mean and std, its crop in the config beside it."""
    said_by(checkpoint, source, metadata=dict(mean='[0.4]', std='[0.3]'))
    (checkpoint.parent / 'config.json').write_text(json.dumps(
        dict(architecture=NAME, pretrained_cfg=dict(mean=[0.9], crop_pct=0.7, interpolation='bilinear'))))
    cfg = create_source(NAME, checkpoint, **NANO).network.pretrained_cfg
    assert (cfg['mean'], cfg['std'], cfg['crop_pct'], cfg['interpolation']) == ([0.4], [0.3], 0.7, 'bilinear')


NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
NAMED = {
    'metadata': ('a.safetensors', dict(metadata=dict(label_names=json.dumps(NAMES)))),
    'config in metadata': ('a.safetensors', dict(metadata=dict(pretrained_cfg=json.dumps(dict(
        label_names=dict(enumerate(NAMES))))))),
    'classes of torchvision': ('a.pth', dict(classes=NAMES)),
    'numbers of torchvision': ('a.pth', dict(class_to_idx={name: i for i, name in enumerate(NAMES)})),
}


@pytest.mark.parametrize('name', NAMED)
def test_names_of_classes_of_a_checkpoint(name, source, images, tmp_path):
    file, said = NAMED[name]
    model = convert(NAME, [images], checkpoint=said_by(tmp_path / file, source, **said), **NANO)
    assert model.pretrained_cfg['label_names'] == NAMES
    given = convert(model, [images], label_names=NAMES[::-1])
    assert (given.pretrained_cfg['label_names'], model.pretrained_cfg['label_names']) == (NAMES[::-1], NAMES)


def test_two_names_of_one_number(source, images, tmp_path):
    numbers = {name: i for i, name in enumerate(NAMES)} | {'another': 3}
    path = said_by(tmp_path / 'a.pth', source, class_to_idx=numbers)
    with pytest.raises(SFormerError, match=f"'{NAMES[3]}' and 'another' have one number, 3: each needs its own"):
        convert(NAME, [images], checkpoint=path, **NANO)


def test_names_of_classes_that_cannot_be(source, images, tmp_path):
    path = said_by(tmp_path / 'a.safetensors', source, metadata=dict(label_names='["a", "b"]'))
    assert 'label_names' not in convert(NAME, [images], checkpoint=path, **NANO).pretrained_cfg  # of another number
    for names, message in ((NAMES[1:], '9 names .* for a model of 10'), ([*NAMES[1:], ' '], 'none of them empty'),
                           ('abcdefghij', 'a list of texts'), ([*range(10)], 'a list of texts')):
        with pytest.raises(SFormerError, match=message):
            convert(source, [images], label_names=names)
    assert 'label_names' not in source.pretrained_cfg


def test_names_of_the_classes_that_were_calibrated_on(source, model, tmp_path):
    """Of weights of one's own, whose data has as many."""
    folder, few = (class_folders(tmp_path / name, names) for name, names in (('ten', NAMES), ('few', NAMES[:3])))
    assert convert(source, folder, num_images=10).pretrained_cfg['label_names'] == sorted(NAMES)
    again = convert(convert(source, folder, num_images=10, label_names=NAMES), folder, num_images=10)
    assert again.pretrained_cfg['label_names'] == NAMES
    for other in (convert(source, few, num_images=3), model):  # digits have numbers
        assert 'label_names' not in other.pretrained_cfg
    published = type(create_source('sformer_nano.digits'))(source, 'me/mine')
    assert 'label_names' not in convert(published, folder, num_images=10).pretrained_cfg


def test_normalisation_that_cannot_be(source, tmp_path):
    path = said_by(tmp_path / 'a.safetensors', source, metadata=dict(mean='[0.4]', std='[0]'))
    with pytest.raises(SFormerError, match=r'std must lie in'):
        create_source(NAME, path, **NANO)


def test_a_detector_takes_the_normalisation_of_its_backbone(tmp_path):
    vit = timm.create_model('test_vit2', num_classes=0)
    said = dict(mean='[0.1, 0.2, 0.3]', std='[0.4, 0.5, 0.6]')
    save_file(vit.state_dict(), tmp_path / 'b.safetensors', metadata=said)
    config = DetectorConfig('test_vit2', {1: 'x'}, image_size=(64, 64), channels=8, hidden=16)
    detector = create_detector(config, tmp_path / 'b.safetensors')
    assert (detector.config.mean, detector.config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize('size', [pytest.param(16, marks=pytest.mark.slow), (16, 24)])
def test_size_that_was_asked_for(size, tmp_path):
    """Of a model that takes any, too, timm's config says another one: images of it were calibrated on and exported."""
    kwargs = dict(img_size=size, dynamic_img_size=True, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    source = timm.create_model(NAME, **kwargs).eval()
    seen, expected = [], (size, size) if isinstance(size, int) else size
    source.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    model = convert(source, num_images=2)
    assert set(seen) == {expected} and model.pretrained_cfg['input_size'] == (3, *expected)
    assert tuple(resolve_input_data_config(load_model(save_model(model, tmp_path / 'a')))['input_size'][1:]) == expected
    named = timm.create_model('sformer_tiny', **kwargs)
    assert tuple(resolve_input_data_config(named)['input_size'][1:]) == expected
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    export_onnx(model, tmp_path / 'model.onnx')
    assert tuple(load_onnx(tmp_path / 'model.onnx', 'onnxruntime').about['input_size'][1:]) == expected
