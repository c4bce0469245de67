"""The zoo: every ViT, DeiT, BEiT and EVA of timm converts; the table names what there is."""
import copy
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import sformer
from sformer import SFNConfig, is_calibrated, named_neurons, source_of, source_view
from sformer.layers import SPIKING_LAYERS
from sformer.models import spiking_model_
from sformer.models.zoo import source_name
from sformer.neurons import Neuron

MODULES = ('vision_transformer', 'deit', 'beit', 'eva')
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


# the table --------------------------------------------------------------------------------------------------------

def test_unknown_entry():
    with pytest.raises(KeyError):
        source_name('sformer_gigantic')


def test_coverage_table_names_every_entrypoint():
    text = (Path(__file__).parents[2] / 'model_cards' / 'COVERAGE.md').read_text(encoding='utf-8')
    names = {name for module in MODULES for name in timm.list_models(module=module)}
    if f'of timm {timm.__version__} ' not in text:
        pytest.skip(f'model_cards/COVERAGE.md is of another timm than {timm.__version__}')
    rows = dict(re.findall(r'^\| `(\w+)` \| \w+ \| (yes|no: .*?) \|', text, re.MULTILINE))
    assert rows.keys() == names and set(rows.values()) == {'yes'}
