"""The zoo: every ViT, DeiT, BEiT and EVA of timm converts; the table names what there is."""
import copy
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import resolve_input_data_config
from timm.models.gemma4_vit import Gemma4Attention
from torch.overrides import TorchFunctionMode

import sformer
from sformer import SFNConfig, is_calibrated, named_neurons, source_of, source_view
from sformer.data import open_images
from sformer.errors import SFormerError
from sformer.execution import SPIKE_CODINGS, export_onnx, load_onnx
from sformer.layers import FLOATING_LAYERS, SPIKING_LAYERS, constant_modules
from sformer.layers.watch import ForwardWatch
from sformer.models import spiking_model_
from sformer.models.zoo import source_name
from sformer.neurons import GradedCoding, Neuron
from sformer.profiling import profile_operations

MODULES = (
    'vision_transformer', 'deit', 'beit', 'eva', 'qwen3_vit', 'gemma4_vit', 'deepseek_vit', 'naflexvit',
    'vision_transformer_sam', 'vision_transformer_relpos', 'vitamin', 'vision_transformer_hybrid')
SIZE = dict(img_size=32, patch_size=16, depth=1, num_classes=5, embed_dim=64)

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
    'Qwen3': ('qwen3_vit_88m', dict(num_heads=2)),
    'Qwen3 with its projector': ('qwen3_vit_88m_merge', dict(num_heads=2)),
    'Gemma': ('gemma4_vit_167m', dict(num_heads=2, head_dim=32, intermediate_size=96)),
    'Gemma, clamped, grouped queries': ('gemma4_vit_167m', dict(
        num_heads=4, head_dim=16, num_kv_heads=2, intermediate_size=96, use_clipped_linears=True, standardize=True,
        encoder_pool='soft', patch_size=8, pooling_kernel_size=2)),
    'DeepSeek': ('deepseek_vit_412m', dict(num_heads=2)),
    'flat patches': ('naflexvit_base_patch16_gap', dict(num_heads=2, img_size=None, patch_size=8)),
    'flat patches, EVA blocks': ('naflexvit_base_patch16_gap', dict(
        num_heads=2, img_size=None, patch_size=8, attn_type='eva', swiglu_mlp=True, rope_type='axial')),
    'flat patches, map pooling': ('naflexvit_base_patch16_map', dict(num_heads=2, img_size=None)),
    'SAM': ('samvit_base_patch16', dict(num_heads=2, patch_size=8, depth=2, window_size=3, global_attn_indexes=(1,))),
    'SAM classifier': ('samvit_base_patch16_224', dict(num_heads=2, window_size=2)),
    'relative bias by an MLP': ('vit_relpos_small_patch16_224', dict(num_heads=2)),
    'relative bias of a table': ('vit_relpos_base_patch16_cls_224', dict(num_heads=2, rel_pos_type='bias')),
    'relative bias shared': ('vit_srelpos_small_patch16_224', dict(num_heads=2)),
    'ViTamin': ('vitamin_small_224', dict(embed_dim=None, patch_size=None)),
    'standardised convolutions': ('vit_tiny_r_s16_p8_224', dict(num_heads=2, patch_size=4)),
    'convolutions with batch norm': ('vit_base_mci_224', dict(embed_dim=None, patch_size=None)),
}


def build(structure, **kwargs):
    name, args = STRUCTURES[structure]
    try:
        arguments = {**SIZE, **args, **kwargs}
        model = timm.create_model(name, **{key: value for key, value in arguments.items() if value is not None})
    except (TypeError, AssertionError, RuntimeError, ValueError) as e:
        pytest.fail(f'{name} is not built by these arguments: {e}')
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    for module in model.modules():
        if isinstance(module, Gemma4Attention):  # whose scale is in the gains of its norms, where it is trained
            for norm in (module.q_norm, module.k_norm):
                nn.init.constant_(norm.weight, module.head_dim ** -0.25)
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
    tables = constant_modules(model)
    for path, module in model.named_modules():
        if module in tables:
            continue
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
    """Checks that what enters a product is all zero: with silent neurons only an analog operand is not. But for tables
    that depend on no image, and what pools."""
    count = 0

    def __init__(self, watch):
        super().__init__()
        self.stack = watch.stack
        self.tables = constant_modules(watch.module)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d, torch.conv2d):
            operands = args[:1]
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm,
                      torch.baddbmm, torch.addmm, torch.mm, torch.Tensor.mm):
            operands = args[:2]
        elif func is torch.einsum:
            operands = args[1:2]  # on a table
        else:
            assert func is not F.scaled_dot_product_attention, 'attention on analog currents'
            return func(*args, **(kwargs or {}))
        _, module = self.stack[-1]
        if type(module) in FLOATING_LAYERS or module in self.tables:
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
    with torch.no_grad(), ForwardWatch(model) as watch, Products(watch) as products:
        model(inputs())
    blocks = len([m for m in source.modules() if hasattr(m, 'attn') or hasattr(m, 'in_proj')])
    assert products.count >= 5 * blocks  # qkv, QK^T, AV, proj and at least one more


def test_no_product_is_of_currents(pair):
    operations, *_ = profile_operations(pair[1], [inputs()])
    assert len(operations) > 5 and not [o.name for o in operations if o.kind == 'floating']


def test_an_analog_product_would_be_found(pair):
    model = copy.deepcopy(pair[1])
    silence(model)
    pixels = next(neuron for _, neuron in named_neurons(model) if isinstance(neuron, GradedCoding))
    pixels.forward = lambda x: x
    with pytest.raises(AssertionError, match='does not come from neurons'), torch.no_grad():
        with ForwardWatch(model) as watch, Products(watch):
            model(inputs())


# what they compute ----------------------------------------------------------------------------------------------------

def test_the_source_is_inside(pair):
    source, model = pair
    with torch.no_grad():
        expected = source(inputs())
        assert torch.equal(source_view(model)(inputs()), expected)
        assert torch.equal(source_of(model)(inputs()), expected)


def test_spikes_follow_the_source(pair):
    source, model = pair
    with torch.no_grad():
        expected = source(inputs())
        assert (model(inputs()) - expected).norm() < 0.1 * expected.norm()


OUTLIERS = 30.  # times the scale of other channels, behind each norm
FIRST_TIER = list(STRUCTURES)[list(STRUCTURES).index('Qwen3'):]


def as_trained_(network, channel=37):
    """Give a channel behind each norm an outlier of a scale, which the weights that read it make up for in part, as
    networks that were trained at scale have them; and currents one scale, whatever the width."""
    norms = [module for module in network.modules() if isinstance(getattr(module, 'weight', None), nn.Parameter)
             and module.weight.ndim == 1 and len(module.weight) >= 64]  # not those of a head
    with torch.no_grad():
        for norm in norms:
            norm.weight[channel] *= OUTLIERS
        for layer in network.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.weight *= min(1., 8 / layer.weight[0].numel() ** 0.5)
                if layer.weight.shape[1] in {len(norm.weight) for norm in norms}:
                    layer.weight[:, channel] /= 10
    return network


CONVOLUTIONAL = ('convolutions with batch norm', 'ViTamin')  # whose images are large where they begin


@pytest.mark.parametrize('structure', [
    pytest.param(name, marks=pytest.mark.slow) if name in CONVOLUTIONAL else name for name in FIRST_TIER])
def test_error_of_networks_with_outliers_on_photographs(structure, test_data):
    """Of images that were not calibrated to."""
    source = as_trained_(build(structure))
    data = resolve_input_data_config(source) | dict(input_size=(3, 32, 32), crop_pct=1.)
    images = open_images(str(test_data / 'data' / 'cifar10'), 'test', data_config=data, num_images=288, seed=0)
    photographs = torch.cat([batch for batch, _ in images.batches(16)])
    with torch.no_grad():
        expected = source(photographs[256:])
        for levels, bar in ((127, 0.05), (32, 0.2 if 'Gemma' in structure else 0.15)):
            model = sformer.convert(source, [photographs[:256]], SFNConfig(levels=levels))
            error = (model(photographs[256:]) - expected).norm() / expected.norm()
            assert error <= bar, (levels, error)


def test_integers(pair):
    model = copy.deepcopy(pair[1])
    with torch.no_grad():
        expected = model(inputs())
        reports = sformer.to_integer_(model)
        assert sum(report.integer for report in reports) >= len(reports) / 2
        assert not [report.reason for report in reports if 'no form' in report.reason]
        assert (model(inputs()) - expected).norm() < 0.1 * expected.norm()


def test_tables_of_positions_meet_spikes_one_by_one():
    """As other weights do, in floating point and in integers."""
    model = sformer.convert(build('SAM'), [inputs()])
    whole = copy.deepcopy(model)
    sformer.to_integer_(whole)
    with torch.no_grad():
        for network, tolerance in ((model, 1e-2), (whole, 1e-3)):
            expected = network(inputs())
            graded, binary = (sformer.to_spikes_(copy.deepcopy(network), coding)(inputs()) for coding in SPIKE_CODINGS)
            assert torch.equal(graded, binary)
            assert (graded - expected).norm() < tolerance * expected.norm()
            again = sformer.to_spikes_(sformer.to_spikes_(network, 'graded'))  # the coding changes, no weight does
            assert torch.equal(again(inputs()), binary)


def test_a_current_that_was_cast_to_int8_is_refused():
    model = sformer.convert(build('vit'), [inputs()])
    sformer.to_integer_(model)
    for layer, current in ((model.head, torch.ones(1, 64)), (model.patch_embed.proj, torch.ones(1, 3, 32, 32))):
        with pytest.raises(SFormerError, match='int8 instead of a current: a forward that casts'):
            layer(current.to(torch.int8))


@pytest.mark.slow
@pytest.mark.parametrize('structure', FIRST_TIER)
def test_graphs_of_both_engines(structure, tmp_path):
    pytest.importorskip('onnxscript')
    model = sformer.convert(build(structure), [inputs()], SFNConfig(levels=63))
    model.pretrained_cfg['input_size'] = (3, 32, 32)
    export_onnx(model, tmp_path / 'm.onnx')
    sformer.to_integer_(model)
    with torch.no_grad():
        expected = model(inputs())
    for engine in ('openvino', 'onnxruntime'):
        pytest.importorskip(engine)
        out = load_onnx(tmp_path / 'm.onnx', engine)(inputs())
        assert (out - expected).norm() < 0.05 * expected.norm(), engine


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
    found = model.get_classifier()  # of distilled ones, two
    for classifier in found if isinstance(found, tuple) else (found,):
        assert any(isinstance(part, Neuron) for part in classifier.modules())


def test_gradients_reach_every_parameter(pair):
    model = copy.deepcopy(pair[1])
    model(inputs()).sum().backward()
    expected = copy.deepcopy(pair[0])
    expected(inputs()).sum().backward()
    grads = {name: p.grad is not None for name, p in expected.named_parameters()}
    assert {name: p.grad is not None for name, p in model.named_parameters()} == grads


@pytest.mark.slow  # one of each kind of attention is compiled and exported in tests/layers/test_compilers.py
@pytest.mark.parametrize('structure', STRUCTURES)
def test_compilers(structure):
    torch._dynamo.reset()  # which gives up on a forward after eight structures
    model = sformer.convert(build(structure), [inputs()])
    with torch.no_grad():
        expected = model(inputs())
        compiled = torch.compile(copy.deepcopy(model), backend='eager', fullgraph=True)(inputs())
        exported = torch.export.export(copy.deepcopy(model), (inputs(),)).module()(inputs())
    assert torch.equal(compiled, expected) and torch.equal(exported, expected)


# other families -------------------------------------------------------------------------------------------------------

OTHERS = {
    'swin_tiny_patch4_window7_224': dict(
        img_size=64, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=32),
    'hiera_tiny_224': dict(stages=(1, 2, 1, 1), embed_dim=32, num_heads=1, img_size=(64, 64)),
    'twins_svt_small': dict(depths=[1, 1, 1, 1], img_size=64),
    'pvt_v2_b0': dict(depths=(1, 1, 1, 1)),
    'coatnet_pico_rw_224': dict(img_size=64),
    'convnext_atto': {},
    'resnet18': {},
    'efficientnet_b0': {},
}


@pytest.mark.parametrize('name', [
    name if name in ('swin_tiny_patch4_window7_224', 'resnet18') else pytest.param(name, marks=pytest.mark.slow)
    for name in OTHERS])
def test_hierarchical_and_convolutional_networks(name):
    torch.manual_seed(0)
    source, x = timm.create_model(name, num_classes=5, **OTHERS[name]).eval(), inputs(64)
    with torch.no_grad():
        expected = source(x)
        model = sformer.convert(source, [x], SFNConfig(levels=127))
        assert (model(x) - expected).norm() < 0.1 * expected.norm()
        assert torch.equal(source_view(model)(x), expected)
    operations, *_ = profile_operations(model, [x])
    assert len(operations) > 5 and not [o.name for o in operations if o.kind == 'floating']
    assert any(isinstance(neuron, GradedCoding) for _, neuron in named_neurons(model))


# the table --------------------------------------------------------------------------------------------------------

def test_unknown_entry():
    with pytest.raises(KeyError):
        source_name('sformer_gigantic')


def test_coverage_names_every_entrypoint_of_timm():
    """A new release of timm is a diff of that page: `python scripts/make_coverage.py FAMILY ...`."""
    text = (Path(__file__).parents[2] / 'model_cards' / 'COVERAGE.md').read_text(encoding='utf-8')
    lists = text.partition('## Entrypoints')[2]
    named = {name for name in re.findall(r'`(\w+)`', lists) if not name.startswith('sformer_')}
    names = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('timm.models.')}
    assert not names - named, f'new in timm {timm.__version__}: {", ".join(sorted(names - named))}'
    assert not named - names, f'gone in timm {timm.__version__}: {", ".join(sorted(named - names))}'


def test_coverage_counts_what_it_lists():
    text = (Path(__file__).parents[2] / 'model_cards' / 'COVERAGE.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| (\w+) \| (\d+) \| (\d+) \| ', text, re.MULTILINE)
    total = [int(n) for n in re.search(r'(\d+) of (\d+) entrypoints of timm', text).groups()]
    assert total == [sum(int(row[2]) for row in rows), sum(int(row[1]) for row in rows)]
    converts = {family: int(converted) == int(count) for family, count, converted in rows}
    assert all(converts[module] for module in MODULES) and total[0] >= 326
    for family, count, converted in rows:
        listed, _, left = re.search(rf'^\*\*{family}\*\*: (.*)$', text, re.MULTILINE)[1].partition('. Not: ')
        sizes = [len([name for name in re.findall(r'`(\w+)`', part) if not name.startswith('sformer_')])
                 for part in (listed, left)]
        assert sizes == [int(converted), int(count) - int(converted)], family
