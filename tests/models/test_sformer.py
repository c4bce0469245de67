"""SFormers as timm models: construction, timm's model interface, gradients, dtypes, pretrained loading."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from conftest import NANO
from timm.models._features_fx import GraphExtractNet, create_feature_extractor
from timm.models.vision_transformer import VisionTransformer
from torch.optim.swa_utils import AveragedModel

import sformer
from sformer import SFNConfig, SFormer, SFormerError, UnsupportedLayerError, is_calibrated
from sformer.layers import FLOATING_LAYERS, SPIKING_LAYERS, named_neurons, source_view
from sformer.layers.linear import SpikingLinear
from sformer.models import SFormerMixin
from sformer.neurons import GradedCoding, Neuron

MICRO = dict(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5)


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

def test_meta_device_context():
    with torch.device('meta'):
        model = timm.create_model('sformer_tiny', **MICRO)
    for empty in (model, timm.create_model('sformer_tiny', **MICRO, device='meta')):
        assert type(empty) is SFormer and all(t.is_meta for t in empty.state_dict().values())
        assert_everything_spikes(empty)


def test_meta_model_materialises_and_loads(model, images):
    empty = timm.create_model('sformer_nano', device='meta', **NANO)
    empty.to_empty(device='cpu').load_state_dict(model.state_dict())
    assert is_calibrated(empty)
    assert torch.equal(empty.eval()(images), model(images))


def test_pixels_are_coded_as_the_config_normalises_them():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = timm.create_model('sformer_tiny', **MICRO, pretrained_cfg_overlay=dict(mean=mean, std=std))
    pixels = torch.arange(256.).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    x = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(model.patch_embed.proj.neuron(x), x)


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
    """Every argument means what it means to the source: without its neurons the model is the source."""
    kwargs = dict(MICRO, **overrides)
    source = timm.create_model('vit_tiny_patch16_224', **kwargs).eval()
    model = timm.create_model('sformer_tiny', **kwargs).eval()
    model.load_state_dict(source.state_dict(), strict=False)
    assert_everything_spikes(model)
    x = micro_inputs(kwargs.get('in_chans', 3), kwargs['img_size'])
    with torch.no_grad():
        expected, spiking = source(x), model(x)
        torch.testing.assert_close(source_view(model)(x), expected, atol=1e-4, rtol=1e-4)
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
    own_source.blocks[0].attn.proj = nn.Bilinear(4, 4, 4)
    before = {name: type(module) for name, module in own_source.named_modules()}
    with pytest.raises(UnsupportedLayerError, match=r'blocks\.0\.attn\.proj .*Bilinear.*blocks\.1\.mlp\.act .*PReLU'):
        sformer.models.spiking_model_(own_source)
    assert {name: type(module) for name, module in own_source.named_modules()} == before


class Mine(VisionTransformer):
    """A model class that nobody has heard of."""


def test_the_class_of_a_model_is_no_condition(images):
    source = Mine(**NANO).eval()
    model = sformer.convert(source, [images])
    assert type(model).__bases__ == (SFormerMixin, Mine) and type(model).__name__ == 'SFormerMine'
    expected = model(images)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model) and torch.equal(again(images), expected)
    assert type(sformer.source_of(model)) is Mine


def test_what_is_no_timm_model_is_refused():
    with pytest.raises(UnsupportedLayerError, match='Linear is no timm model: it has no num_classes'):
        sformer.models.spiking_model_(nn.Linear(4, 4))


@pytest.mark.parametrize('product', [lambda x: x @ (x.mT @ x), lambda x: x * x.mean(1, keepdim=True).sigmoid()],
                         ids=['matrices', 'gate'])
def test_products_in_the_forward_of_a_model_are_refused(images, product):
    class Multiplying(Mine):
        def forward_features(self, x, **kwargs):
            return product(super().forward_features(x, **kwargs))
    model = Multiplying(**NANO)
    refusal = r'\(root\) .*multiplies currents in its own forward \((mul|bmm|mat)'
    with pytest.raises(UnsupportedLayerError, match=refusal):
        sformer.convert(model, [images], inplace=True)
    assert type(model) is Multiplying, 'it is the source again'


def test_what_a_source_does_not_have_its_spiking_class_does_not_have():
    """timm asks by these names what a model can do."""
    encoder = timm.create_model('sformer_qwen3_88m_enc', embed_dim=64, depth=1, num_heads=2)
    assert not hasattr(encoder, 'reset_classifier') and not hasattr(encoder, 'set_input_size')
    assert hasattr(timm.create_model('sformer_tiny', **MICRO), 'set_input_size')


def test_every_table_entry_keeps_the_parameters():
    for kind, spiking in SPIKING_LAYERS.items():
        assert issubclass(spiking, kind), kind
        # whole models multiply nothing themselves, so some are layers of others that are left as they are
        assert kind not in FLOATING_LAYERS or issubclass(spiking, sformer.models.sformer.SFormerMixin), kind


def test_unknown_arguments():
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model('sformer_tiny', **MICRO, no_such_argument=1)
    with pytest.raises(TypeError, match='no_such_field'):
        timm.create_model('sformer_tiny', **MICRO, sfn=dict(no_such_field=1))
    with pytest.raises(ValueError, match='levels .* got 0'):
        timm.create_model('sformer_tiny', **MICRO, sfn=dict(levels=0))


@pytest.mark.parametrize('sfn', [
    dict(levels=8), SFNConfig(levels=7, fire='power2'), dict(levels=4, attention_fire='density', initial_potential=0)])
def test_neuron_config_reaches_every_neuron(sfn):
    model = timm.create_model('sformer_tiny', **MICRO, sfn=sfn)
    config = sfn if isinstance(sfn, SFNConfig) else SFNConfig(**sfn)
    assert model.sfn_config == config
    neurons = {name: n for name, n in named_neurons(model) if not isinstance(n, GradedCoding)}
    assert len(neurons) == 8 * MICRO['depth'] + 1
    for name, neuron in neurons.items():
        assert neuron.config == config and len(neuron.levels) == config.levels, name
        fire = config.softmax_fire if name.endswith('attn_neuron') else \
            config.mlp_fire if name.endswith('fc2.neuron') else config.signed_fire
        assert neuron.fire_function == fire, name


def test_printed_model_says_what_a_neuron_does(model):
    text = repr(model)
    assert 'levels=63, uniform, signed, threshold=' in text and 'levels=256, graded' in text
    assert 'uncalibrated' not in text
    assert 'uncalibrated' in repr(timm.create_model('sformer_tiny', **MICRO))


def test_untrained_model_is_uncalibrated():
    model = timm.create_model('sformer_tiny', **MICRO)
    assert not is_calibrated(model)
    assert not is_calibrated(nn.Linear(2, 2)), 'a model without neurons is not calibrated either'


# timm's model interface -----------------------------------------------------------------------------------------------

def test_features_only():
    deep = dict(MICRO, depth=4)
    model = timm.create_model('sformer_tiny', **deep, features_only=True)
    assert [f.shape for f in model(micro_inputs())] == [(2, 48, 4, 4)] * 3
    one = timm.create_model('sformer_tiny', **deep, features_only=True, out_indices=[1])
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
        maps = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
        last = model.get_intermediate_layers(images, n=1)
        normed = model.get_intermediate_layers(images, n=[1], norm=True, return_prefix_tokens=True)
    for handle in handles:
        handle.remove()
    assert torch.equal(final, expected)
    assert all(torch.equal(t, b[:, 1:]) for t, b in zip(tokens, blocks, strict=True))
    grid = blocks[1][:, 1:].transpose(1, 2).reshape(32, 64, 4, 4)
    assert len(maps) == 2 and torch.equal(maps[1], grid)
    assert all(torch.equal(t, b[:, 1:]) for t, b in zip(last, blocks[1:], strict=True))
    assert torch.equal(torch.cat([normed[0][1], normed[0][0]], dim=1), expected)


def test_prune_intermediate_layers(model, images):
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0], prune_norm=True, prune_head=True) == [0]
    assert len(pruned.blocks) == 1 and isinstance(pruned.head, nn.Identity)
    with torch.no_grad():
        a = pruned.forward_intermediates(images, indices=[0], intermediates_only=True)
        b = model.forward_intermediates(images, indices=[0], intermediates_only=True)
    assert torch.equal(a[0], b[0])


def test_reset_classifier_spikes_and_keeps_thresholds(own_source, images):
    model = sformer.convert(own_source, [images], SFNConfig(levels=8))
    step = model.head.neuron.step.clone()
    model.reset_classifier(3)
    assert type(model.head) is SpikingLinear and len(model.head.neuron.levels) == 8
    assert torch.equal(model.head.neuron.step, step) and is_calibrated(model)
    assert model(images).shape == (32, 3) and model.num_classes == 3

    model.reset_classifier(3, global_pool='avg')
    assert not is_calibrated(model), 'pooling changes what the head reads'
    model.reset_classifier(0)
    assert model(images).shape == (32, 64)
    model.reset_classifier(7, global_pool='avg')
    assert model(images).shape == (32, 7)
    # layers that come later have the neurons of the model
    assert model.head.neuron.config == model.sfn_config == SFNConfig(levels=8)
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
        torch.testing.assert_close(source_view(model)(x), expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(spiking, expected)
    assert is_calibrated(model)
    assert_everything_spikes(model)
    for key, value in model.patch_embed.proj.neuron.state_dict().items():
        assert torch.equal(value, coding[key]), f'{key} of the pixels has changed'


def test_source_of_inverts_conversion(source, model, images):
    back = sformer.source_of(model)
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

@pytest.fixture
def shallow(model):
    """One block of the model: compilers take seconds for each, which all are alike."""
    model = copy.deepcopy(model)
    model.blocks = model.blocks[:1]
    return model


def test_graph_is_unbroken(shallow, images):
    compiled = torch.compile(copy.deepcopy(shallow), backend='eager', fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images), shallow(images))


@pytest.mark.slow
def test_torch_compile(model, images):
    compiled = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        a, b = compiled(images), model(images)
    # fused kernels round differently, and a current at a boundary may then fire one level more
    assert (a - b).norm() / b.norm() < 1e-2
    assert torch.equal(a.argmax(1), b.argmax(1))


def test_torch_export(shallow, images):
    exported = torch.export.export(copy.deepcopy(shallow), (images[:2],)).module()
    with torch.no_grad():
        assert torch.equal(exported(images[:2]), shallow(images[:2]))


@pytest.mark.slow
def test_onnx_export(model, images, tmp_path):
    pytest.importorskip('onnxscript')
    onnx = pytest.importorskip('onnx')
    # in double precision, or the other order of sums would push currents over the boundaries of levels
    model, images = copy.deepcopy(model).double(), images[:2].double()
    torch.onnx.export(model, (images,), str(tmp_path / 'model.onnx'))
    outputs = onnx.reference.ReferenceEvaluator(str(tmp_path / 'model.onnx')).run(
        None, {onnx.load(tmp_path / 'model.onnx').graph.input[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(outputs[0]), model(images))


def test_fx(shallow, images):
    with torch.no_grad():
        expected = shallow(images)
        out = create_feature_extractor(copy.deepcopy(shallow), {'head': 'logits', 'blocks.0': 'block'})(images)
        last = GraphExtractNet(copy.deepcopy(shallow), ['blocks.0'], squeeze_out=True)(images)
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
    assert {b.dtype for b in buffers(model).values()} == {torch.float32, torch.int64, torch.int32}
    assert model(micro_inputs().bfloat16()).dtype == torch.bfloat16


def test_deepcopy_and_pickle(model, images):
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), expected)
            assert other.sfn_config == model.sfn_config and other.conversion == model.conversion
            neuron_of(other, 'blocks.0.attn.qkv.neuron').step.fill_(100.)
            assert not torch.equal(other(images), expected)
        assert torch.equal(model(images), expected), 'the copy shares its thresholds with the original'


def test_source_weights_uncalibrate(source, model):
    model = copy.deepcopy(model)
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert result.unexpected_keys == [] and set(result.missing_keys) == set(buffers(model))
    assert not any(neuron.calibrated for _, neuron in named_neurons(model)), 'old thresholds fit other weights'
    with pytest.raises(RuntimeError, match='blocks.0.attn.qkv.neuron.step'):
        copy.deepcopy(model).load_state_dict(source.state_dict())


def test_exporter_of_timm_keeps_the_neurons(source, images, tmp_path):
    from timm.models import save_for_hf
    model = sformer.convert(source, [images], SFNConfig(levels=16, initial_potential=0, dead_zone=1.5))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize('make', [
    lambda source, images: sformer.convert(source, [images]),
    lambda source, images: timm.create_model('sformer_nano.digits', pretrained=True),
    lambda source, images: sformer.convert(
        timm.create_model('vit_small_patch32_224', img_size=8, patch_size=4, in_chans=1, depth=1), [images]),
], ids=['converted', 'entry of the zoo', 'custom'])
def test_exporter_of_timm_writes_the_source_as_what_it_is(source, images, tmp_path, make):
    from timm.models import save_for_hf
    back = sformer.source_of(make(source, images)).eval()
    save_for_hf(back, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(again) is VisionTransformer and 'sfn' not in again._model_args
    assert again.pretrained_cfg['architecture'].startswith('vit_')
    with torch.no_grad():
        assert torch.equal(again(images), back(images))


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


def test_average_of_models_with_their_buffers(model, images):
    """As of stochastic weight averaging: torch subtracts buffers from one another, and bools cannot be."""
    average = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    assert is_calibrated(average) and average.module.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(average(images), model(images))
    assert model.state_dict()['head.neuron.calibrated'].dtype == torch.bool, 'the format of files'


def test_a_network_that_was_pruned_to_its_stem_has_a_head_again():
    """Nothing is left then that says how neurons fire."""
    model = timm.create_model('sformer_custom', source='resnet18', num_classes=3, sfn=SFNConfig(8)).eval()
    model.prune_intermediate_layers([0])
    assert model.sfn_config == SFNConfig()
    x = torch.randn(1, 3, 64, 64)
    assert model.forward_intermediates(x, indices=[0], intermediates_only=True)[0].shape[-1] == 32
