"""Checkpoints that people have: what is read of each kind, with where it is said, and what is refused, in one line."""
import argparse
import collections
import json
import os
import pathlib

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_input_data_config

from sformer import SFormerError
from sformer.conversion.families import FAMILIES
from sformer.conversion.places import Place, named_place
from sformer.conversion.preprocessors import preprocessing_of
from sformer.conversion.sources import create_source
from sformer.saving import open_classifier

NAME = 'vit_tiny_patch16_224'
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3)
NAMES = ['airplane', 'bird', 'cat']


@pytest.fixture
def network():
    """A small network with no two weights alike."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(found, expected, images):
    with torch.no_grad():
        return torch.allclose(found(images), expected(images), rtol=1e-5, atol=1e-5)


def training(network, **more):
    """What timm's train.py writes."""
    kwargs = {key: value for key, value in SMALL.items() if key not in ('num_classes', 'img_size')}
    args = dict(model=NAME, model_kwargs=kwargs, num_classes=3, img_size=32, mean=[.4, .5, .6], std=None, crop_pct=0.9,
                interpolation='bilinear', gp=None, in_chans=None, input_size=None, lr=0.1)
    return dict(epoch=3, arch=NAME, state_dict=network.state_dict(), version=2, metric=97.5,
                args=argparse.Namespace(**{**args, **more}), optimizer=dict(state={}, param_groups=[dict(lr=0.1)]))


def test_training_of_timm(network, pixels, tmp_path, caplog):
    path = tmp_path / 'model_best.pth.tar'
    torch.save(training(network), path)
    source = create_source(str(path))
    assert same(source.network, network, pixels) and source.weights is None
    cfg = source.network.pretrained_cfg
    assert (cfg['mean'], cfg['crop_pct'], cfg['interpolation']) == ([.4, .5, .6], 0.9, 'bilinear')
    assert source.origins['architecture'] == 'arch in model_best.pth.tar'
    assert source.origins['weights'] == 'state_dict in model_best.pth.tar'
    assert source.origins['num_classes'] == 'num_classes in model_best.pth.tar'
    assert source.origins['img_size'] == 'img_size in model_best.pth.tar'
    assert source.origins['mean'] == 'model_best.pth.tar'
    assert source.origins['std'] == f'default of {NAME}, nothing in the file says otherwise'
    assert 'does not say which mean and std it was trained with: std' in caplog.text
    assert not {'tag', 'license', 'hf_hub_id', 'url'} & cfg.keys()  # which are of timm's own weights


def test_averaged_weights_of_a_training_are_those_that_it_validated(network, pixels, tmp_path):
    averaged = timm.create_model(NAME, **SMALL).eval()
    torch.save(dict(training(network), state_dict_ema=averaged.state_dict()), tmp_path / 'last.pth.tar')
    source = create_source(str(tmp_path / 'last.pth.tar'))
    assert same(source.network, averaged, pixels)
    assert source.origins['weights'] == 'state_dict_ema in last.pth.tar'


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', 'model.'])
def test_state_dicts_that_wrappers_left(prefix, network, pixels, tmp_path):
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save(dict(model=state), tmp_path / 'a.pth')
    save_file(state, tmp_path / 'a.safetensors')
    for name in ('a.pth', 'a.safetensors'):
        source = create_source(NAME, tmp_path / name, patch_size=8, embed_dim=32, depth=1, num_heads=2)
        assert same(source.network, network, pixels)
        assert source.origins['num_classes'] == f'classifier in {"model in " if name == "a.pth" else ""}{name}'
        assert source.origins['img_size'].startswith('position embeddings in ')
        assert source.origins['embed_dim'] == 'given'


def test_what_is_asked_for_counts_more_than_what_is_said(network, tmp_path):
    torch.save(training(network), tmp_path / 'a.pth')
    source = create_source(str(tmp_path / 'a.pth'), preprocessing=dict(mean=(.1, .2, .3), std=None), num_classes=0,
                           img_size=48)
    assert source.network.num_classes == 0 and source.origins['num_classes'] == 'given'
    assert resolve_input_data_config(source.network)['input_size'] == (3, 48, 48)
    assert source.network.pretrained_cfg['mean'] == (.1, .2, .3) and source.origins['mean'] == 'given'
    assert source.network(torch.zeros(1, 3, 48, 48)).shape == (1, 32)


def test_metadata_names_the_model(network, pixels, tmp_path):
    about = dict(architecture=NAME, model_kwargs=json.dumps(dict(SMALL, num_classes=3)), label_names=json.dumps(NAMES))
    save_file(network.state_dict(), tmp_path / 'a.safetensors', metadata=about)
    source = create_source(str(tmp_path / 'a.safetensors'))
    assert same(source.network, network, pixels) and source.network.pretrained_cfg['label_names'] == NAMES
    assert source.origins['architecture'] == 'architecture in a.safetensors'


def timm_folder(network, folder, **root):
    folder.mkdir()
    save_file(network.state_dict(), folder / 'model.safetensors')
    arguments = {key: value for key, value in SMALL.items() if key != 'num_classes'}
    config = dict(architecture=NAME, num_classes=3, num_features=32, model_args=arguments, **root, pretrained_cfg=dict(
        input_size=[3, 32, 32], mean=[.1, .2, .3], std=[.4, .5, .6], num_classes=3, classifier='head',
        first_conv='patch_embed.proj'))
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def test_folder_of_timm(network, pixels, tmp_path):
    folder = timm_folder(network, tmp_path / 'timm', label_names=NAMES)
    for name in (str(folder), f'local-dir:{folder}'):
        source = create_source(name)
        assert same(source.network, network, pixels) and source.network.pretrained_cfg['mean'] == [.1, .2, .3]
    assert same(open_classifier(str(folder)), network, pixels)  # as evaluate, compare and distill open it
    source = create_source(str(folder / 'model.safetensors'))
    assert same(source.network, network, pixels) and source.network.pretrained_cfg['mean'] == [.1, .2, .3]
    assert source.origins['architecture'] == source.origins['mean'] == 'config.json beside model.safetensors'


# open_clip ------------------------------------------------------------------------------------------------------------

def clip_state(width=32, depth=2, patch=8, size=32, out=16):
    """An image tower by the names of OpenAI and open_clip, and some of the text tower."""
    torch.manual_seed(0)
    shapes = {'class_embedding': (width,), 'positional_embedding': ((size // patch) ** 2 + 1, width),
              'conv1.weight': (width, 3, patch, patch), 'proj': (width, out)}
    for norm in ('ln_pre', 'ln_post'):
        shapes.update({f'{norm}.weight': (width,), f'{norm}.bias': (width,)})
    for i in range(depth):
        block = f'transformer.resblocks.{i}.'
        for part, rows, columns in (('attn.out_proj', width, width), ('mlp.c_fc', 4 * width, width),
                                    ('mlp.c_proj', width, 4 * width)):
            shapes.update({f'{block}{part}.weight': (rows, columns), f'{block}{part}.bias': (rows,)})
        for norm in ('ln_1', 'ln_2'):
            shapes.update({f'{block}{norm}.weight': (width,), f'{block}{norm}.bias': (width,)})
        shapes.update({f'{block}attn.in_proj_weight': (3 * width, width), f'{block}attn.in_proj_bias': (3 * width,)})
    state = {f'visual.{name}': 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return {**state, 'text_projection': torch.zeros(2, 2), 'logit_scale': torch.zeros(()),
            'positional_embedding': torch.zeros(7, 2), 'transformer.resblocks.0.ln_1.weight': torch.zeros(2)}


def clip_output(state, images, heads=4):
    """What open_clip computes, in plain torch."""
    state = {name.removeprefix('visual.'): t for name, t in state.items() if name.startswith('visual.')}
    width = state['class_embedding'].shape[0]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (width,), state[f'{name}.weight'], state[f'{name}.bias'], 1e-5)

    def linear(x, name):
        return torch.nn.functional.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])
    x = torch.nn.functional.conv2d(images, state['conv1.weight'], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state['class_embedding'].expand(len(x), 1, width), x], 1) + state['positional_embedding']
    x = norm(x, 'ln_pre')
    for i in range(2):
        block = f'transformer.resblocks.{i}.'
        y = torch.nn.functional.linear(norm(x, f'{block}ln_1'), state[f'{block}attn.in_proj_weight'],
                                       state[f'{block}attn.in_proj_bias'])
        q, k, v = y.reshape(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(y, f'{block}attn.out_proj')
        y = linear(norm(x, f'{block}ln_2'), f'{block}mlp.c_fc')
        x = x + linear(y * torch.sigmoid(1.702 * y), f'{block}mlp.c_proj')
    return norm(x[:, 0], 'ln_post') @ state['proj']


def test_image_tower_of_open_clip(pixels, tmp_path):
    state = clip_state()
    save_file(state, tmp_path / 'open_clip_model.safetensors')
    tower = dict(image_size=32, layers=2, width=32, patch_size=8, head_width=8)
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(dict(
        model_cfg=dict(embed_dim=16, quick_gelu=True, vision_cfg=tower, text_cfg=dict(width=2)),
        preprocess_cfg=dict(mean=[.1, .2, .3], std=[.4, .5, .6], interpolation='bicubic', resize_mode='shortest'))))
    source = create_source(str(tmp_path))
    expected = clip_output(state, pixels)
    with torch.no_grad():
        found = source.network(pixels)
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert source.network.pretrained_cfg['mean'] == [.1, .2, .3]
    assert source.origins['mean'] == 'preprocess_cfg of open_clip_config.json'
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(dict(
        model_cfg=dict(embed_dim=16, vision_cfg=dict(tower, layers=[3, 4, 6, 3])))))
    with pytest.raises(SFormerError, match='timm has no image tower of open_clip with these layers'):
        create_source(str(tmp_path))


def test_image_tower_of_open_clip_that_is_of_timm(network, pixels, tmp_path):
    state = {f'visual.trunk.{name}': tensor for name, tensor in network.state_dict().items() if 'head' not in name}
    projection = torch.randn(5, 32)
    save_file({**state, 'visual.head.proj.weight': projection, 'text.x': torch.zeros(1)},
              tmp_path / 'open_clip_model.safetensors')
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(dict(model_cfg=dict(embed_dim=5, vision_cfg=dict(
        timm_model_name=NAME, timm_pool='token', timm_proj='linear', image_size=32)))))
    source = create_source(str(tmp_path), patch_size=8, embed_dim=32, depth=1, num_heads=2)
    with torch.no_grad():
        features = network.forward_head(network.forward_features(pixels), pre_logits=True)
        assert torch.allclose(source.network(pixels), features @ projection.T, rtol=1e-4, atol=1e-4)
    for tower, message in ((dict(timm_model_name='vit_of_mine'), "timm has no 'vit_of_mine'"),
                           (dict(timm_model_name=NAME, timm_proj='mlp'), "with a projection 'mlp'")):
        (tmp_path / 'open_clip_config.json').write_text(json.dumps(dict(model_cfg=dict(vision_cfg=tower))))
        with pytest.raises(SFormerError, match=message):
            create_source(str(tmp_path))


def test_original_weights_with_registers_by_the_filter_of_timm(pixels, tmp_path):
    """Of DINOv2, whose position of the class token timm adds to it."""
    kwargs = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)
    network = timm.create_model('vit_small_patch14_reg4_dinov2', img_size=32, **kwargs).eval()
    state = dict(network.state_dict())
    state['register_tokens'] = state.pop('reg_token')
    state['pos_embed'] = torch.cat([torch.ones(1, 1, 32), state['pos_embed']], 1)
    save_file(dict(state, mask_token=torch.zeros(1, 32)), tmp_path / 'a.safetensors')
    source = create_source('vit_small_patch14_reg4_dinov2', tmp_path / 'a.safetensors', **kwargs)
    network.cls_token.data += 1
    assert same(source.network, network, pixels) and source.origins['num_classes'] == 'no classifier in a.safetensors'


# what is refused ------------------------------------------------------------------------------------------------------

class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_that_need_code(network, tmp_path):
    for value, named in ((Payload(tmp_path / 'owned'), 'posix.mkdir'), (pathlib.PurePosixPath('a'), 'pathlib'),
                         (collections.deque(), 'collections.deque')):
        torch.save(dict(training(network), x=value), tmp_path / 'evil.pth.tar')
        with pytest.raises(SFormerError, match=rf'evil\.pth\.tar cannot be unpickled safely: .*{named}') as e:
            create_source(str(tmp_path / 'evil.pth.tar'))
        assert '\n' not in str(e.value)
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize('content, message', [
    (dict(epoch=3, lr=0.1), 'holds no state dict: its entries are epoch, lr'),
    ([torch.zeros(1)], 'holds no state dict: its content is a list'),
    ({}, 'holds no state dict'),
    (dict(state_dict={'a': torch.zeros(1)}), r'does not say which timm model it is of\. Name it: sformer convert NAME'),
    (dict(arch='resnet_of_mine', state_dict={'a': torch.zeros(1)}), "of 'resnet_of_mine' .*, which is no model of"),
    (dict(arch=NAME, args=argparse.Namespace(model_kwargs=dict(checkpoint_path='x')), state_dict={'a': torch.zeros(1)}),
     'model_kwargs sets checkpoint_path, which is no argument of a network'),
], ids=str)
def test_pickles_that_are_no_checkpoint(content, message, tmp_path):
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(SFormerError, match=rf'a\.pth.*{message}'):
        create_source(str(tmp_path / 'a.pth'))


def test_a_state_dict_alone_says_how_large_it_is(network, tmp_path):
    save_file(network.state_dict(), tmp_path / 'a.safetensors')
    with pytest.raises(SFormerError, match=r'\(1 blocks of 32 channels, patches of 8 pixels\)\. Name it: .*NAME'):
        create_source(str(tmp_path / 'a.safetensors'))


def write(folder, config, *files):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    for name in files:
        (folder / name).write_bytes(b'')
    return folder


@pytest.mark.parametrize('config, files, message', [
    (None, (), 'has no config.json, so nothing says what its weights are of'),
    ('{', (), 'config.json is no object of JSON'),
    ('[]', (), 'config.json is no object of JSON: it is a list'),
    (dict(model_type='swin'), (), "of a 'swin' of transformers, of which no names are known here. Known are: ViT"),
    (dict(hidden_size=3), (), "of a 'None' of transformers"),
    (dict(model_type='vit'), (), 'has no model.safetensors or pytorch_model.bin'),
    (dict(model_type='vit'), ('tf_model.h5',), 'has weights of TensorFlow alone'),
    (dict(model_type='vit'), ('flax_model.msgpack',), 'has weights of Flax alone'),
    (dict(model_type='vit'), ('model.safetensors',), 'is truncated or corrupted'),
    (dict(model_type='vit'), ('model.safetensors.index.json',), 'is no index of weights in parts'),
], ids=str)
def test_folders_that_cannot_be_read(config, files, message, tmp_path):
    with pytest.raises(SFormerError, match=message) as e:
        create_source(str(write(tmp_path / 'a', config, *files)))
    assert '\n' not in str(e.value) and str(tmp_path / 'a') in str(e.value)


def test_places():
    assert named_place('vit_tiny_patch16_224') is None and named_place('no/folder') is None
    assert named_place('hf-hub:me/mine@v1') == Place('hf-hub:me/mine@v1', repo_id='me/mine', revision='v1')
    assert named_place('local-dir:x').folder == pathlib.Path('x')
    with pytest.raises(SFormerError, match='is no folder'):
        create_source('local-dir:no/such')


def test_buffers_that_older_files_have(tmp_path):
    """No parameters, so no names of theirs are missed."""
    index = 'beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index'
    for kind, names in (('beit', (index,)),
                        ('clip', ('vision_model.embeddings.position_ids', 'text_model.embeddings.position_ids'))):
        assert not FAMILIES[kind].to_timm({name: torch.zeros(2, 2) for name in names})


# image processors -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('config, expected', [
    (dict(size=dict(height=224, width=224), image_mean=[.5] * 3, image_std=[.5] * 3, resample=2),
     dict(img_size=224, crop_pct=1.0, crop_mode='squash', mean=[.5] * 3, std=[.5] * 3, interpolation='bilinear')),
    (dict(size=dict(shortest_edge=256), crop_size=dict(height=224, width=224), do_center_crop=True, resample=3),
     dict(img_size=224, crop_pct=224 / 256, crop_mode='center', interpolation='bicubic')),
    (dict(size=256, crop_size=224, do_center_crop=True, feature_extractor_type='DeiTFeatureExtractor'),
     dict(img_size=224, crop_pct=224 / 256, crop_mode='squash')),
    (dict(size=224, crop_size=224, feature_extractor_type='CLIPFeatureExtractor'),
     dict(img_size=224, crop_pct=1.0, crop_mode='center')),
    (dict(size=256, crop_size=224, do_center_crop=False), dict(img_size=256, crop_pct=1.0, crop_mode='squash')),
    (dict(size=dict(height=64, width=32)), dict(img_size=(64, 32), crop_pct=1.0, crop_mode='squash')),
    (dict(do_resize=False, size=224), {}),
    (dict(size=dict(longest_edge=224)), {}),
    (dict(do_normalize=False), dict(mean=[0.0] * 3, std=[1.0] * 3)),
    (dict(image_mean=[1.0], image_std=[2.0], rescale_factor=2 / 255), dict(mean=[0.5], std=[1.0])),
    ({}, {}),
], ids=str)
def test_image_processors(config, expected):
    found = preprocessing_of(config)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value) if isinstance(value, (float, list)) else value), key


@pytest.mark.parametrize('edge, crop', [(256, 224), (248, 224), (518, 490), (73, 71), (1000, 999)])
def test_timm_resizes_to_the_edge_that_is_said(edge, crop):
    share = preprocessing_of(dict(size=dict(shortest_edge=edge), crop_size=crop))['crop_pct']
    assert int(crop / share) == edge


# names ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', FAMILIES)
def test_names_lead_both_ways(kind):
    """No pair of names hides another, and each name of timm leads back to those that it is made of."""
    family = FAMILIES[kind]
    for theirs, ours in family.names:
        name = theirs.replace('*', '1') if not theirs.endswith('.*') else theirs[:-1].replace('*', '1') + 'weight'
        single = not isinstance(ours, tuple) and not ours.endswith(']')
        names = [name] if single or isinstance(ours, tuple) else \
            family.from_timm(ours[:-3].replace('*', '1', 1).replace('*', 'weight'))
        found = family.to_timm({name: torch.ones(3, 1) for name in names})
        if not found:  # a part that this kind of network has and does not use
            assert 'with a classifier' in kind and theirs.startswith(('post_layernorm.', 'head.'))
        assert all({*names} <= {*family.from_timm(target)} for target in found if target not in
                             family.zeros.values())

