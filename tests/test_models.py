"""SFormers as timm models: construction, timm's model interface, gradients, dtypes, pretrained loading."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg
from timm.models._features_fx import GraphExtractNet, create_feature_extractor
from timm.models.vision_transformer import VisionTransformer

import sformer
from sformer import SFNConfig, SFormer, SFormerError, UnsupportedLayerError, bypass_neurons, is_calibrated
from sformer.layers import FLOATING_LAYERS, SPIKING_LAYERS, named_neurons, source_of
from sformer.layers.linear import SpikingLinear
from sformer.models.zoo import SOURCES, ZOO, source_name
from sformer.neurons import DirectCoding, Neuron

MICRO = dict(img_size=16, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=5)


def micro_inputs(in_chans=3, size=16):
    return torch.randn(2, in_chans, size, size, generator=torch.Generator().manual_seed(0))


def neuron_of(model, name):
    return dict(named_neurons(model))[name]


def buffers(model):
    """State of all neurons, by name."""
    return {f'{name}.{key}': b for name, neuron in named_neurons(model) for key, b in neuron.named_buffers()}


def assert_everything_spikes(model):
    """No layer with weights is left analog, and each that spikes has a neuron."""
    for name, module in model.named_modules():
        assert type(module) not in SPIKING_LAYERS, f'{name} is analog'
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert isinstance(module.neuron, Neuron), f'{name} has no neuron'


# construction ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['sformer_tiny', 'sformer_small', 'sformer_base', 'sformer_large'])
def test_entrypoint_has_the_parameters_of_its_source(name):
    model = timm.create_model(name, device='meta')
    source = timm.create_model(SOURCES[name], device='meta')
    assert type(model) is SFormer
    assert all(t.is_meta for t in model.state_dict().values())
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert shapes == {n: p.shape for n, p in source.named_parameters()}
    assert list(model.state_dict().keys() - source.state_dict().keys() - buffers(model).keys()) == []
    assert_everything_spikes(model)


def test_meta_device_context():
    with torch.device('meta'):
        model = timm.create_model('sformer_tiny', **MICRO)
    assert all(t.is_meta for t in model.state_dict().values())


def test_meta_model_materialises_and_loads(model, images):
    empty = timm.create_model('sformer_nano', device='meta', img_size=8, in_chans=1, num_classes=10)
    empty.to_empty(device='cpu').load_state_dict(model.state_dict())
    assert is_calibrated(empty)
    assert torch.equal(empty.eval()(images), model(images))


def test_pixels_are_coded_as_the_config_normalises_them():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = timm.create_model('sformer_tiny', **MICRO, pretrained_cfg_overlay=dict(mean=mean, std=std))
    pixels = torch.arange(256.).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    x = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(model.patch_embed.proj.neuron(x), x)


def test_preprocessing_of_the_source_is_kept():
    names = [f'{name}.{tag}' for name, (_, tags) in ZOO.items() for tag in tags.split()]
    for name in names:
        cfg, expected = get_pretrained_cfg(name), get_pretrained_cfg(source_name(name))
        for key in ('mean', 'std', 'crop_pct', 'interpolation', 'input_size', 'num_classes'):
            assert getattr(cfg, key) == getattr(expected, key), (name, key)


OVERRIDES = dict(
    plain=dict(),
    img_size=dict(img_size=24),
    patch_size=dict(patch_size=8),
    depth=dict(depth=1),
    no_head=dict(num_classes=0),
    avg=dict(global_pool='avg'),
    avgmax=dict(global_pool='avgmax'),
    reg_tokens=dict(reg_tokens=2),
    qk_norm=dict(qk_norm=True),
    in_chans=dict(in_chans=4),
    dynamic=dict(dynamic_img_size=True, dynamic_img_pad=True),
    no_class_token=dict(class_token=False, global_pool='avg'),
    layer_scale=dict(init_values=1e-1),
    drop=dict(drop_rate=.1, drop_path_rate=.1, attn_drop_rate=.1, proj_drop_rate=.1, pos_drop_rate=.1),
    patch_drop=dict(patch_drop_rate=.25),
    pre_norm=dict(pre_norm=True),
    fc_norm=dict(fc_norm=True, global_pool='avg'),
    no_bias=dict(qkv_bias=False, proj_bias=False),
    no_embed_class=dict(no_embed_class=True),
    inner_norms=dict(scale_attn_norm=True, scale_mlp_norm=True),
    rms_norm=dict(norm_layer='rmsnorm'),
    silu=dict(act_layer='silu'),
)


@pytest.mark.parametrize('overrides', OVERRIDES.values(), ids=OVERRIDES.keys())
def test_constructor_overrides(overrides):
    """Every argument means what it means to the source: with its neurons bypassed the model is the source."""
    kwargs = dict(MICRO, **overrides)
    source = timm.create_model('vit_tiny_patch16_224', **kwargs).eval()
    model = timm.create_model('sformer_tiny', **kwargs).eval()
    model.load_state_dict(source.state_dict(), strict=False)
    assert_everything_spikes(model)
    x = micro_inputs(kwargs.get('in_chans', 3), kwargs['img_size'])
    with torch.no_grad():
        expected, spiking = source(x), model(x)
        with bypass_neurons(model):
            torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert spiking.shape == expected.shape and torch.isfinite(spiking).all()
    assert not torch.equal(spiking, expected), 'nothing spikes'


def test_dynamic_image_size_at_run_time():
    model = timm.create_model('sformer_tiny', **MICRO, dynamic_img_size=True).eval()
    assert model(micro_inputs(size=24)).shape == (2, 5)
    fixed = timm.create_model('sformer_tiny', **MICRO).eval()
    with pytest.raises(AssertionError, match="doesn't match"):
        fixed(micro_inputs(size=24))


def test_foreign_layers_are_refused_and_the_model_is_unchanged(own_source):
    own_source.blocks[1].mlp.act = nn.PReLU()
    own_source.blocks[2].attn.proj = nn.Bilinear(4, 4, 4)
    before = {name: type(module) for name, module in own_source.named_modules()}
    with pytest.raises(UnsupportedLayerError, match=r'blocks\.1\.mlp\.act .*PReLU.*blocks\.2\.attn\.proj .*Bilinear'):
        sformer.models.spiking_model_(own_source)
    assert {name: type(module) for name, module in own_source.named_modules()} == before


def test_model_of_another_class_is_refused():
    class Mine(VisionTransformer):  # may multiply in a forward of its own
        pass
    with pytest.raises(UnsupportedLayerError, match='Mine.*only for .*VisionTransformer'):
        sformer.models.spiking_model_(Mine(**MICRO))


def test_every_table_entry_keeps_the_parameters():
    for kind, spiking in SPIKING_LAYERS.items():
        assert issubclass(spiking, kind) and kind not in FLOATING_LAYERS


def test_unknown_arguments():
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model('sformer_tiny', **MICRO, no_such_argument=1)
    with pytest.raises(TypeError, match='no_such_field'):
        timm.create_model('sformer_tiny', **MICRO, sfn=dict(no_such_field=1))
    with pytest.raises(ValueError, match='levels .* got 0'):
        timm.create_model('sformer_tiny', **MICRO, sfn=dict(levels=0))


@pytest.mark.parametrize('sfn', [
    dict(levels=8), SFNConfig(levels=7, fire='power2'), dict(levels=4, attention_fire='density', firing='floor')])
def test_neuron_config_reaches_every_neuron(sfn):
    model = timm.create_model('sformer_tiny', **MICRO, sfn=sfn)
    config = sfn if isinstance(sfn, SFNConfig) else SFNConfig(**sfn)
    assert model.sfn_config == config
    neurons = {name: n for name, n in named_neurons(model) if not isinstance(n, DirectCoding)}
    assert len(neurons) == 8 * MICRO['depth'] + 1
    for name, neuron in neurons.items():
        assert (neuron.num_levels, len(neuron.levels)) == (config.levels, config.levels), name
        assert neuron.firing == config.firing
        fire = config.attention_fire if name.endswith('attn_neuron') else config.fire
        assert neuron.fire_function == fire, name


def test_printed_model_says_what_a_neuron_does(model):
    text = repr(model)
    assert 'levels=32, uniform, signed, threshold=' in text and 'levels=256, direct' in text
    assert 'uncalibrated' not in text
    assert 'uncalibrated' in repr(timm.create_model('sformer_tiny', **MICRO))


def test_untrained_model_is_uncalibrated():
    model = timm.create_model('sformer_tiny', **MICRO)
    assert not is_calibrated(model)
    assert not is_calibrated(nn.Linear(2, 2)), 'a model without neurons is not calibrated either'


# timm's model interface -----------------------------------------------------------------------------------------------

def test_features_only():
    model = timm.create_model('sformer_tiny', **MICRO, features_only=True)
    assert [f.shape for f in model(micro_inputs())] == [(2, 48, 4, 4)] * 3
    one = timm.create_model('sformer_tiny', **MICRO, features_only=True, out_indices=[1])
    assert [f.shape for f in one(micro_inputs())] == [(2, 48, 4, 4)]
    assert len(one.model.blocks) == 2, 'blocks that nobody reads are pruned'
    assert one.feature_info.channels() == [48]


def test_intermediates_are_the_outputs_of_the_blocks(model, images):
    outputs = []
    handles = [b.register_forward_hook(lambda m, i, o: outputs.append(o)) for b in model.blocks]
    with torch.no_grad():
        expected = model.forward_features(images)
        blocks, outputs = outputs, []
        final, tokens = model.forward_intermediates(images, output_fmt='NLC')
        maps = model.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
        last = model.get_intermediate_layers(images, n=2)
        normed = model.get_intermediate_layers(images, n=[3], norm=True, return_prefix_tokens=True)
    for handle in handles:
        handle.remove()
    assert torch.equal(final, expected)
    assert all(torch.equal(t, b[:, 1:]) for t, b in zip(tokens, blocks, strict=True))
    grid = blocks[3][:, 1:].transpose(1, 2).reshape(32, 64, 4, 4)
    assert len(maps) == 2 and torch.equal(maps[1], grid)
    assert all(torch.equal(t, b[:, 1:]) for t, b in zip(last, blocks[2:], strict=True))
    assert torch.equal(torch.cat([normed[0][1], normed[0][0]], dim=1), expected)


def test_prune_intermediate_layers(model, images):
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1], prune_norm=True, prune_head=True) == [1]
    assert len(pruned.blocks) == 2 and isinstance(pruned.head, nn.Identity)
    with torch.no_grad():
        a = pruned.forward_intermediates(images, indices=[1], intermediates_only=True)
        b = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert torch.equal(a[0], b[0])


def test_reset_classifier_spikes_and_keeps_thresholds(own_source, images):
    model = sformer.convert(own_source, [images], SFNConfig(levels=8))
    threshold = model.head.neuron.threshold.clone()
    model.reset_classifier(3)
    assert type(model.head) is SpikingLinear and model.head.neuron.num_levels == 8
    assert torch.equal(model.head.neuron.threshold, threshold) and is_calibrated(model)
    assert model(images).shape == (32, 3) and model.num_classes == 3

    model.reset_classifier(3, global_pool='avg')
    assert not is_calibrated(model), 'pooling changes what the head reads'
    model.reset_classifier(0)
    assert model(images).shape == (32, 64)
    model.reset_classifier(7, global_pool='avg')
    assert model(images).shape == (32, 7)
    assert model.head.neuron.num_levels == 8, 'layers that come later have the neurons of the model'
    assert_everything_spikes(model)


@pytest.mark.parametrize('kwargs', [dict(img_size=16), dict(img_size=16, patch_size=4)], ids=['size', 'patch'])
def test_set_input_size(source, model, kwargs):
    model, source = copy.deepcopy(model), copy.deepcopy(source)
    coding = copy.deepcopy(model.patch_embed.proj.neuron.state_dict())
    model.set_input_size(**kwargs)
    source.set_input_size(**kwargs)
    x = micro_inputs(1, 16)
    with torch.no_grad():
        spiking, expected = model(x), source(x)
        with bypass_neurons(model):
            torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(spiking, expected)
    assert is_calibrated(model)
    assert_everything_spikes(model)
    for key, value in model.patch_embed.proj.neuron.state_dict().items():
        assert torch.equal(value, coding[key]), f'{key} of the pixels has changed'


def test_source_of_inverts_conversion(source, model, images):
    back = source_of(model)
    assert type(back) is VisionTransformer
    kinds = {name: type(module) for name, module in source.named_modules()}
    assert {name: type(module) for name, module in back.named_modules()} == kinds
    assert back.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in back.state_dict().items())
    assert torch.equal(back(images), source(images))
    assert type(model) is SFormer and is_calibrated(model), 'source_of() works on a copy'


# gradients ------------------------------------------------------------------------------------------------------------

def gradients(model, images, checkpointing=False):
    model = copy.deepcopy(model).train()
    model.set_grad_checkpointing(checkpointing)
    model(images).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_reach_every_parameter(model, images):
    grads = gradients(model, images)
    dead = [name for name, g in grads.items() if g is None or not torch.isfinite(g).all() or not g.abs().sum() > 0]
    assert not dead


def test_gradient_checkpointing(model, images):
    plain, checkpointed = gradients(model, images), gradients(model, images, checkpointing=True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_gradients_resemble_those_of_the_source(source, model, images):
    """Straight-through: what the SFormer would learn is what its source would."""
    a, b = gradients(model, images), gradients(source, images)
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (a, b))
    assert torch.cosine_similarity(a, b, dim=0) > 0.9


def test_a_step_of_training_lowers_the_loss(model, digits):
    model, (x, y) = copy.deepcopy(model).train(), digits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x[:64]), y[:64])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


# compilers ------------------------------------------------------------------------------------------------------------

def test_graph_is_unbroken(model, images):
    compiled = torch.compile(copy.deepcopy(model), backend='eager', fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images), model(images))


@pytest.mark.slow
def test_torch_compile(model, images):
    compiled = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        a, b = compiled(images), model(images)
    # fused kernels round differently, and a current at a boundary may then fire one level more
    assert (a - b).norm() / b.norm() < 1e-2
    assert torch.equal(a.argmax(1), b.argmax(1))


def test_torchscript(model, images):
    scripted = torch.jit.script(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(scripted(images), model(images))


def test_torchscript_of_every_fire_function(own_source, images):
    small = copy.deepcopy(own_source)
    small.prune_intermediate_layers([0], prune_norm=False, prune_head=False)
    config = SFNConfig(levels=4, fire='density', attention_fire='power2', firing='floor', dead_zone=0.5)
    model = sformer.convert(small, [images], config)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(images), model(images))


def test_fx(model, images):
    with torch.no_grad():
        expected = model(images)
        out = create_feature_extractor(copy.deepcopy(model), {'head': 'logits', 'blocks.1': 'block'})(images)
        last = GraphExtractNet(copy.deepcopy(model), ['blocks.3'], squeeze_out=True)(images)
    assert torch.equal(out['logits'], expected) and out['block'].shape == (32, 17, 64)
    assert last.shape == (32, 17, 64)


# dtypes, copies -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_of_the_model_is_not_that_of_the_thresholds(model, digits, dtype):
    cast = copy.deepcopy(model).to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    for name, buffer in buffers(cast).items():
        assert torch.equal(buffer, buffers(model)[name]) and buffer.dtype == buffers(model)[name].dtype, name
    with torch.no_grad():
        out = cast(digits[0].to(dtype))
        same = (out.argmax(1) == model(digits[0]).argmax(1)).float().mean()
    assert out.dtype == dtype
    assert same > 0.97


def test_dtype_and_device_of_construction():
    model = timm.create_model('sformer_tiny', **MICRO, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in buffers(model).values()} == {torch.float32, torch.uint8, torch.bool}
    assert model(micro_inputs().bfloat16()).dtype == torch.bfloat16


def test_deepcopy_and_pickle(model, images):
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), expected)
            assert other.sfn_config == model.sfn_config and other.conversion == model.conversion
            neuron_of(other, 'blocks.0.attn.qkv.neuron').threshold.fill_(100.)
            assert not torch.equal(other(images), expected)
        assert torch.equal(model(images), expected), 'the copy shares its thresholds with the original'


def test_source_weights_uncalibrate(source, model):
    model = copy.deepcopy(model)
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert result.unexpected_keys == [] and set(result.missing_keys) == set(buffers(model))
    assert not any(neuron.calibrated for _, neuron in named_neurons(model)), 'old thresholds fit other weights'
    with pytest.raises(RuntimeError, match='blocks.0.attn.qkv.neuron.threshold'):
        copy.deepcopy(model).load_state_dict(source.state_dict())


def test_exporter_of_timm_keeps_the_neurons(source, images, tmp_path):
    from timm.models import save_for_hf
    model = sformer.convert(source, [images], SFNConfig(levels=16, firing='floor', dead_zone=1.5))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert 'sfn' not in source_of(model)._model_args


def test_hooks_that_replace_forward_are_refused(source, images):
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules
    hooked = dispatch_model(copy.deepcopy(source), {'': 'cpu'}, force_hooks=True)
    with pytest.raises(UnsupportedLayerError, match='forward of .* was replaced'):
        sformer.convert(hooked, [images])
    remove_hook_from_submodules(hooked)
    with torch.no_grad():
        assert torch.equal(sformer.convert(hooked, [images])(images), sformer.convert(source, [images])(images))


def test_models_without_values(source, model, images):
    assert not is_calibrated(copy.deepcopy(model).to('meta'))
    with pytest.raises(SFormerError, match='has no values: it is on the meta device'):
        sformer.convert(copy.deepcopy(source).to('meta'), [images])


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_traced_with_and_without_gradients(model, images):
    with torch.no_grad():
        expected = model(images[:2])
    torch.testing.assert_close(torch.jit.trace(model, (images[:2],))(images[:2]).detach(), expected)


def test_a_head_of_its_own_leaves_thresholds(source, model):
    model = copy.deepcopy(model)
    model.load_state_dict({k: v for k, v in source.state_dict().items() if k.startswith('head.')}, strict=False)
    assert is_calibrated(model)


def test_adapters_leave_thresholds(model):
    # what a library of adapters does: wrap a layer, and load what it added
    class Adapted(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.lora = base_layer, nn.Linear(base_layer.in_features, 2)

    model = copy.deepcopy(model)
    model.blocks[0].attn.qkv = Adapted(model.blocks[0].attn.qkv)
    adapters = {k: v for k, v in model.state_dict().items() if 'lora' in k}
    assert len(adapters) == 2
    model.load_state_dict(adapters, strict=False)
    assert is_calibrated(model)


def test_some_weights_of_a_source_uncalibrate(source, model):
    state = source.state_dict()
    del state['pos_embed']
    for weights in (state, *({k: state[k]} for k in ('cls_token', 'blocks.1.mlp.fc1.weight', 'blocks.1.norm1.bias'))):
        changed = copy.deepcopy(model)
        changed.load_state_dict(weights, strict=False)
        assert not is_calibrated(changed)


def test_weights_move_back_to_the_source(source, model):
    other = timm.create_model('vit_tiny_patch16_224', **dict(source._model_args)).eval()
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert result.missing_keys == [] and set(result.unexpected_keys) == set(buffers(model))


# pretrained -----------------------------------------------------------------------------------------------------------

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


THRESHOLD = 'blocks.2.mlp.fc1.neuron.threshold'
SPOILT = dict(
    missing=lambda t: None,
    nan=lambda t: torch.full_like(t, float('nan')),
    infinite=lambda t: torch.full_like(t, float('inf')),
    zero=lambda t: torch.cat([t[:1], torch.zeros_like(t[1:])]),
    negative=lambda t: -t,
    shape=lambda t: t[:, :-1].contiguous(),
)


@pytest.mark.parametrize('num_classes', [10, 5])
@pytest.mark.parametrize('spoil', SPOILT.values(), ids=SPOILT.keys())
def test_spoilt_thresholds_are_named(tmp_path, spoil, num_classes):
    """Also where timm loads non-strictly, which is where num_classes differs."""
    path = tmp_path / 'spoilt.safetensors'
    state = load_file(get_pretrained_cfg('sformer_nano.digits').file)
    state[THRESHOLD] = spoil(state[THRESHOLD])
    save_file({k: v for k, v in state.items() if v is not None}, path)
    with pytest.raises((SFormerError, RuntimeError), match=THRESHOLD):
        timm.create_model(
            'sformer_nano.digits', pretrained=True, num_classes=num_classes,
            pretrained_cfg_overlay=dict(file=str(path)))


@pytest.mark.parametrize('num_classes', [10, 5])
@pytest.mark.parametrize('levels', [[5, *range(1, 32)], [*range(1, 32), 200], [0, *range(2, 33)], [*range(2, 34)]])
def test_spoilt_levels_are_named(tmp_path, levels, num_classes):
    path = tmp_path / 'spoilt.safetensors'
    state = load_file(get_pretrained_cfg('sformer_nano.digits').file)
    state['blocks.0.attn.qkv.neuron.levels'] = torch.tensor(levels, dtype=torch.uint8)
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
    with pytest.raises(SFormerError, match=r'blocks\.2\.mlp\.fc1\.neuron\.threshold'):
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
    with pytest.raises(SFormerError, match='was converted with levels=32'):
        timm.create_model('sformer_nano.digits', pretrained=True, sfn=dict(levels=8))
