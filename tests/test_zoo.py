"""The zoo: every ViT, DeiT, BEiT and EVA of timm converts, and pretrained=True always works."""
import contextlib
import copy
import logging
import multiprocessing
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import sformer
from sformer import SFNConfig, SFormerError, bypass_neurons, is_calibrated, named_neurons, pretrained, source_of
from sformer.layers import SPIKING_LAYERS
from sformer.models import spiking_model_
from sformer.models.zoo import SMALL, SOURCES, ZOO, architecture_of, source_name
from sformer.neurons import Neuron
from sformer.sources import create_source

MODULES = ('vision_transformer', 'deit', 'beit', 'eva')
SIZE = dict(img_size=32, patch_size=16, depth=2, num_classes=5, embed_dim=64)

# one of each structure: timm model, its arguments
STRUCTURES = {
    'vit': ('vit_tiny_patch16_224', dict(num_heads=2)),
    'qk-norm': ('vit_tiny_patch16_224', dict(num_heads=2, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True)),
    'map pooling': ('vit_tiny_patch16_224', dict(num_heads=2, global_pool='map', class_token=False)),
    'prr pooling': ('vit_tiny_patch16_224', dict(num_heads=2, global_pool='prr')),
    'registers, LayerScale': ('vit_tiny_patch16_224', dict(num_heads=2, reg_tokens=2, init_values=0.1)),
    'post-norm': ('vit_base_patch16_rpn_224', dict(num_heads=2)),
    'parallel things': ('vit_base_patch16_18x2_224', dict(num_heads=2)),
    'parallel scaling': ('vit_base_patch16_xp_224', dict(num_heads=2)),
    'differential': ('vit_dlittle_patch16_reg1_gap_256', dict(num_heads=2)),
    'differential parallel': ('vit_dpwee_patch16_reg1_gap_256', dict(num_heads=2)),
    'SwiGLU': ('aimv2_large_patch14_224', dict(num_heads=2)),
    'packed SwiGLU': ('vit_giant_patch14_reg4_dinov2', dict(num_heads=2, embed_dim=96)),
    'SigLIP': ('vit_base_patch16_siglip_224', dict(num_heads=2)),
    'CLIP': ('vit_base_patch16_clip_quickgelu_224', dict(num_heads=2)),
    'DeiT distilled': ('deit_tiny_distilled_patch16_224', dict(num_heads=2)),
    'DeiT III': ('deit3_small_patch16_224', dict(num_heads=2)),
    'BEiT': ('beit_base_patch16_224', dict(num_heads=2)),
    'BEiT shared bias': ('beit_base_patch16_224', dict(num_heads=2, use_shared_rel_pos_bias=True)),
    'EVA': ('eva_giant_patch14_224', dict(num_heads=2)),
    'EVA-02': ('eva02_tiny_patch14_224', dict(num_heads=2)),
    'EVA-02 inner norm': ('eva02_large_patch14_224', dict(num_heads=2)),
    'EVA-02 post-norm': ('eva02_enormous_patch14_clip_224', dict(num_heads=2)),
    'rotary mixed': ('vit_base_patch16_rope_mixed_224', dict(num_heads=2)),
    'rotary': ('vit_base_patch16_rope_reg1_gap_256', dict(num_heads=2)),
    'PE': ('vit_pe_core_base_patch16_224', dict(num_heads=2)),
    'DINOv3': ('vit_small_plus_patch16_dinov3', dict(num_heads=2)),
    'grouped queries': ('vit_small_plus_patch16_dinov3', dict(
        num_heads=4, num_kv_heads=2, attn_type='rope', qkv_fused=False)),
}


def build(structure, **kwargs):
    name, args = STRUCTURES[structure]
    try:
        model = timm.create_model(name, **{**SIZE, **args, **kwargs})
    except (TypeError, AssertionError, RuntimeError, ValueError) as e:
        pytest.fail(f'{name} is not built by these arguments: {e}')
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def inputs(size=32, batch=4):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=STRUCTURES)
def pair(request):
    """A source and its SFormer, not to be changed."""
    source = build(request.param)
    return source, sformer.convert(source, [inputs()], SFNConfig(levels=64))


# coverage -------------------------------------------------------------------------------------------------------------

def assert_converts(name, **kwargs):
    with torch.device('meta'):
        model = timm.create_model(name, **kwargs)
        spiking_model_(model)
    for path, module in model.named_modules():
        assert type(module) not in SPIKING_LAYERS, f'{path} of {name} is analog'
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert isinstance(module.neuron, Neuron), f'{path} of {name} has no neuron'


@pytest.mark.parametrize('module', MODULES)
def test_every_entrypoint_converts(module):
    names = timm.list_models(module=module)
    assert names
    for name in names:
        # one block shows all layers, but where blocks differ in their number of key heads
        assert_converts(name, **({} if 'sapiens2' in name else dict(depth=1)))


@pytest.mark.slow
@pytest.mark.parametrize('module', MODULES)
def test_every_entrypoint_converts_in_full_depth(module):
    for name in timm.list_models(module=module):
        assert_converts(name)


class Products(TorchFunctionMode):
    """Checks that what enters a product is all zero: with silent neurons only an analog operand is not."""
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d, torch.conv2d):
            operands = args[:1]
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm,
                      torch.einsum, torch.baddbmm, torch.addmm, torch.mm, torch.Tensor.mm):
            operands = args[:2]
        else:
            assert func is not F.scaled_dot_product_attention, 'attention on analog currents'
            return func(*args, **(kwargs or {}))
        self.count += 1
        for operand in operands:
            assert not operand.any(), 'an operand of a product does not come from neurons'
        return func(*args, **(kwargs or {}))


def silence(model):
    for _, neuron in named_neurons(model):
        neuron.forward = torch.zeros_like


def test_every_product_is_of_spikes(pair):
    source, model = pair
    model = copy.deepcopy(model)
    silence(model)
    with torch.no_grad(), Products() as products:
        model(inputs())
    blocks = len([m for m in source.modules() if hasattr(m, 'attn') or hasattr(m, 'in_proj')])
    assert products.count >= 5 * blocks  # qkv, QK^T, AV, proj and at least one more


def test_an_analog_product_would_be_found(pair):
    model = copy.deepcopy(pair[1])
    silence(model)
    model.patch_embed.proj.neuron.forward = lambda x: x
    with pytest.raises(AssertionError, match='does not come from neurons'), torch.no_grad(), Products():
        model(inputs())


# what they compute ----------------------------------------------------------------------------------------------------

def test_bypassed_model_is_the_source(pair):
    source, model = pair
    with torch.no_grad():
        expected = source(inputs())
        with bypass_neurons(model):
            torch.testing.assert_close(model(inputs()), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(source_of(model)(inputs()), expected)


def test_spikes_follow_the_source(pair):
    source, model = pair
    with torch.no_grad():
        expected = source(inputs())
        assert (model(inputs()) - expected).norm() < 0.1 * expected.norm()


def test_state_dict_moves_both_ways(pair):
    source, model = pair
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in source.state_dict().items())


def test_saved_and_reloaded(pair, tmp_path):
    _, model = pair
    reloaded = sformer.load_model(sformer.save_model(model, tmp_path / 'm'))
    with torch.no_grad():
        assert torch.equal(reloaded(inputs()), model(inputs()))


def test_new_classifier_spikes(pair):
    model = copy.deepcopy(pair[1])
    model.reset_classifier(3)
    assert model(inputs()).shape == (4, 3) and is_calibrated(model)
    for module in model.modules():
        assert type(module) not in SPIKING_LAYERS


def test_gradients_reach_every_parameter(pair):
    model = copy.deepcopy(pair[1])
    model(inputs()).sum().backward()
    expected = copy.deepcopy(pair[0])
    expected(inputs()).sum().backward()
    grads = {name: p.grad is not None for name, p in expected.named_parameters()}
    assert {name: p.grad is not None for name, p in model.named_parameters()} == grads


@pytest.mark.parametrize('structure', [
    'EVA-02', 'BEiT', *(pytest.param(s, marks=pytest.mark.slow) for s in STRUCTURES if s not in ('EVA-02', 'BEiT'))])
def test_torchscript(structure):
    model = sformer.convert(build(structure), [inputs()])
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(inputs()), model(inputs()))


# the named zoo --------------------------------------------------------------------------------------------------------

def test_pinned_tags_are_published_and_of_no_namespace_but_timm():
    for name, (source, tags) in ZOO.items():
        for tag in tags.split():
            cfg, published = timm.get_pretrained_cfg(f'{name}.{tag}'), timm.get_pretrained_cfg(f'{source}.{tag}')
            assert cfg.hf_hub_id == published.hf_hub_id == f'timm/{source}.{tag}'
            for key in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'num_classes', 'classifier',
                        'license'):
                assert getattr(cfg, key) == getattr(published, key), f'{name}.{tag}: {key}'
        assert timm.get_pretrained_cfg(name).tag == tags.split()[0]
        assert source_name(name) == f'{source}.{tags.split()[0]}'


def test_zoo_is_listed_as_pretrained():
    listed = timm.list_models('sformer*', pretrained=True)
    assert {f'{name}.{tag}' for name, (_, tags) in ZOO.items() for tag in tags.split()} <= set(listed)
    assert not any('_test_' in name for name in listed)
    assert {'sformer_base.augreg_in21k_ft_in1k', 'sformer_eva02_large_448.mim_m38m_ft_in22k_in1k',
            'sformer_eva_giant_336.m30m_ft_in22k_in1k', 'sformer_nano.digits'} <= set(listed)


@pytest.mark.parametrize('name', sorted({*ZOO, *SMALL}))
def test_entrypoint_is_its_source(name):
    model = timm.create_model(name, device='meta')
    kwargs = SMALL[name][1] if name in SMALL else {}
    cfg = timm.get_pretrained_cfg(name)
    source = timm.create_model(
        SOURCES[name], device='meta', **{'img_size': cfg.input_size[-1], 'in_chans': cfg.input_size[0],
                                         'num_classes': cfg.num_classes, **kwargs})
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in source.named_parameters()}
    assert name in SMALL or architecture_of(SOURCES[name]) == name


def test_unknown_entry():
    with pytest.raises(KeyError):
        source_name('sformer_gigantic')


# pretrained=True ------------------------------------------------------------------------------------------------------

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
    monkeypatch.setattr(sformer.conversion, 'convert', refuse)
    with caplog.at_level(logging.INFO, 'sformer'):
        second = timm.create_model(NAME, pretrained=True, cache_dir=cache).eval()
    assert [m for m in caplog.messages if 'neurons of' in m] and [m for m in caplog.messages if HUB_ID in m]
    assert is_calibrated(first) and is_calibrated(second)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in published.items())
    assert second.conversion['calibration']['name'] == 'dead-leaves'
    assert second.conversion['source'] == 'vit_tiny_patch16_224'
    with torch.no_grad():
        assert torch.equal(first(inputs(224, 1)), second(inputs(224, 1)))


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
    monkeypatch.setattr(sformer.conversion, 'convert', refuse)
    model = timm.create_model('sformer_tiny', pretrained=True, cache_dir=warm[0], **kwargs)
    x = inputs(kwargs.get('img_size', 224), 1)[:, :kwargs.get('in_chans', 3)]
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
    assert is_calibrated(model) and model.blocks[0].attn.qkv.neuron.num_levels == 4
    threshold = model.blocks[0].attn.qkv.neuron.threshold
    assert not torch.equal(threshold, warm[1].blocks[0].attn.qkv.neuron.threshold)


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


def test_new_weights_of_a_source_are_fitted_anew(published, offline, tmp_path):
    publish(tmp_path, published)
    old = timm.create_model('sformer_tiny', pretrained=True, cache_dir=tmp_path)
    publish(tmp_path, {k: v * 2 if 'patch_embed' in k else v for k, v in published.items()}, commit='1' * 40)
    new = timm.create_model('sformer_tiny', pretrained=True, cache_dir=tmp_path)
    key = 'blocks.0.attn.qkv.neuron.threshold'
    assert not torch.equal(old.state_dict()[key], new.state_dict()[key])


def test_only_published_weights_are_called_so(published, offline, tmp_path):
    publish(tmp_path, published)
    save_file(published, tmp_path / 'mine.safetensors')
    mine, source = str(tmp_path / 'mine.safetensors'), HUB_ID.partition('/')[2]
    assert create_source(source, cache_dir=tmp_path).published_weights == HUB_ID
    for kwargs in (dict(num_classes=10), dict(checkpoint_path=mine), dict(pretrained_cfg_overlay=dict(file=mine))):
        assert not hasattr(create_source(source, cache_dir=tmp_path, **kwargs), 'published_weights'), kwargs


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
    assert 'can not be written' in caplog.text
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
    assert record['source_weights'].startswith(f'{hub_id}@') and 'changed' not in record
    model = timm.create_model(f'local-dir:{headless}', pretrained=True, num_classes=5)
    assert [n for n, neuron in named_neurons(model) if not neuron.calibrated] == ['head.neuron']


@pytest.mark.parametrize('damage', [
    lambda data: data[:1000], pytest.param(lambda data: b'', marks=pytest.mark.slow),
    pytest.param(lambda data: data[:8] + b'x' * 99, marks=pytest.mark.slow)], ids=['truncated', 'empty', 'header'])
def test_damaged_cache_is_fitted_again(warm, published, offline, tmp_path, damage):
    publish(tmp_path, published)
    folder = pretrained.cache_folder(tmp_path)
    folder.mkdir()
    file = next(pretrained.cache_folder(warm[0]).glob('*.safetensors'))
    (folder / file.name).write_bytes(damage(file.read_bytes()))
    model = timm.create_model('sformer_tiny', pretrained=True, cache_dir=tmp_path)
    assert all(torch.equal(v, warm[1].state_dict()[k]) for k, v in model.state_dict().items())
    assert load_file(folder / file.name).keys() == load_file(file).keys()


@pytest.mark.parametrize('name', ['sformer_tiny', 'sformer_small.augreg_in1k'])
def test_offline_with_a_cold_cache_says_what_to_download(offline, tmp_path, name):
    hub_id = timm.get_pretrained_cfg(name).hf_hub_id
    with pytest.raises(SFormerError, match=f'not in the cache.*hf download {re.escape(hub_id)} model.safetensors'):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)


@pytest.fixture
def converted(published, offline, tmp_path):
    """A cache with a converted model with neurons of its own, and the model."""
    source = timm.create_model('vit_tiny_patch16_224')
    source.load_state_dict(published)
    model = sformer.convert(source, num_images=2, config=SFNConfig(levels=8, firing='floor', dead_zone=0.7))
    sformer.save_model(model, publish(tmp_path, repo_id=f'my-org/{NAME}'))
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
    assert model.conversion['source_sha256'] == expected.conversion['source_sha256']
    assert model.pretrained_cfg['crop_pct'] == (0.7 if how == 'overlay' else 0.9)
    with torch.no_grad():
        assert torch.equal(model(inputs(224, 1)), expected(inputs(224, 1)))
    with pytest.raises(SFormerError, match="was converted with levels=8, firing='floor', dead_zone=0.7"):
        timm.create_model(name, sfn=dict(levels=4), **kwargs)


@pytest.mark.parametrize('damage, message', [
    (lambda folder: save_file({k: v * 2 for k, v in load_file(folder / 'model.safetensors').items()},
                              folder / 'model.safetensors'), 'SHA-256 differs'),
    (lambda folder: (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin'), 'not in the local cache'),
    (lambda folder: (folder / 'config.json').write_text(
        (folder / 'config.json').read_text().replace('"sformer_tiny"', '"sformer_small"')), 'holds a sformer_small'),
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
    with pytest.raises(SFormerError, match="was converted with firing='round'"):
        timm.create_model('sformer_nano', pretrained=True, sfn=dict(firing='floor'))


def test_embedded_weights_do_not_come_from_a_namespace(monkeypatch):
    monkeypatch.setenv(pretrained.NAMESPACE_VARIABLE, 'my-org')
    model = timm.create_model('sformer_nano', pretrained=True)
    assert is_calibrated(model)


@pytest.mark.parametrize('name', ['sformer_nano', 'sformer_micro', 'sformer_eva02_micro'])
def test_record_of_embedded_weights(name, tmp_path):
    model = timm.create_model(name, pretrained=True)
    assert model.conversion['recipe']['levels'] == 32 and 'changed' not in model.conversion
    saved = sformer.load_model(sformer.save_model(model, tmp_path / 'out'))
    assert saved.conversion == dict(model.conversion, weights_sha256=saved.conversion['weights_sha256'])


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
    fit, fits = pretrained._fit, []
    pretrained._fit = lambda *args: fits.append(1) or fit(*args)
    barrier.wait()
    model = timm.create_model('sformer_tiny', pretrained=True, cache_dir=cache)
    results.put((index, len(fits), sformer.utils.state_hash(model.state_dict())))


def test_processes_that_start_at_once_fit_once(warm, published, tmp_path):
    publish(tmp_path, published)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['sformer'])
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=load_in_process, args=(tmp_path, i, barrier, results)) for i in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum(fits for _, fits, _ in found) == 1
    assert {digest for _, _, digest in found} == {sformer.utils.state_hash(warm[1].state_dict())}


def test_coverage_table_names_every_entrypoint():
    text = (Path(__file__).parents[1] / 'model_cards' / 'COVERAGE.md').read_text(encoding='utf-8')
    names = {name for module in MODULES for name in timm.list_models(module=module)}
    if f'of timm {timm.__version__} ' not in text:
        pytest.skip(f'model_cards/COVERAGE.md is of another timm than {timm.__version__}')
    rows = dict(re.findall(r'^\| `(\w+)` \| \w+ \| (yes|no: .*?) \|', text, re.MULTILINE))
    assert rows.keys() == names and set(rows.values()) == {'yes'}
