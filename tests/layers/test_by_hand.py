"""Attention that multiplies by hand: its products are met in its own forward, and spike in every execution."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from layer_tools import relative_error, rng, spiking, state_of, tokens
from timm.models import cait, crossvit, davit, gcvit, swin_transformer_v2, swin_transformer_v2_cr, xcit

import sformer
from sformer import SFNConfig, UnsupportedLayerError, named_neurons, to_integer_, to_spikes_
from sformer.execution import SPIKE_CODINGS, export_onnx, load_onnx
from sformer.layers import MixedProduct, ScoreProduct, constant_modules, named_products, revert_
from sformer.profiling import profile_operations

DIM = 32
WINDOW = dict(window_size=(4, 4), num_heads=2)
MAPS = ['QK^T', 'AV']

# layer -> how it is made, kinds of the products of activations
LAYERS = {
    'Swin V2': (lambda: swin_transformer_v2.WindowAttention(DIM, **WINDOW), MAPS),
    'Swin V2 CR': (lambda: swin_transformer_v2_cr.WindowMultiHeadAttention(DIM, **WINDOW), MAPS),
    'DaViT channels': (lambda: davit.ChannelAttention(DIM, 2, qkv_bias=True), MAPS),
    'DaViT channels, other scale': (lambda: davit.ChannelAttentionV2(DIM, 2), MAPS),
    'DaViT windows': (lambda: davit.WindowAttention(DIM, (4, 4), 2), MAPS),
    'CaiT talking heads': (lambda: cait.TalkingHeadAttn(DIM, 4, qkv_bias=True), ['QK^T', 'maps V']),
    'CaiT class': (lambda: cait.ClassAttn(DIM, 2, qkv_bias=True), MAPS),
    'CrossViT': (lambda: crossvit.CrossAttention(DIM, 2, qkv_bias=True), MAPS),
    'GCViT': (lambda: gcvit.WindowAttentionGlobal(DIM, 2, (4, 4), use_global=False), MAPS),
    'XCiT': (lambda: xcit.XCA(DIM, 2, qkv_bias=True), MAPS),
}


def build(name):
    """A layer with random weights, and a channel of its input that is far larger than the others."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layer = LAYERS[name][0]()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng()))
        for linear in (m for m in layer.modules() if isinstance(m, nn.Linear) and m.in_features == DIM):
            linear.weight[:, 3] /= 10
    return layer.eval()


def currents(seed=2):
    x = tokens(32, 16, DIM, seed)
    x[..., 3] *= 30
    return x


@pytest.fixture(scope='module', params=LAYERS)
def pair(request):
    """A source in a module, and its spiking copy at N = 127, not to be changed."""
    source = nn.Sequential(build(request.param)).eval()
    return source, spiking(source, currents(), SFNConfig(levels=127)), LAYERS[request.param][1]


def test_products_spike(pair):
    _, model, kinds = pair
    operations, *_ = profile_operations(model, [currents()])
    assert not [operation.name for operation in operations if operation.kind == 'floating']
    assert [operation.kind for operation in operations if operation.kind != 'linear'] == kinds
    assert all(operation.macs > 0 for operation in operations)


@torch.no_grad()
def test_spikes_follow_the_source(pair):
    source, model, _ = pair
    x = currents(3)  # which thresholds were not fitted to
    assert relative_error(model(x), source(x)) < 0.05
    assert relative_error(spiking(source, currents(), SFNConfig(levels=32))(x), source(x)) < 0.15


@torch.no_grad()
def test_silent_neurons_leave_no_product(pair):
    """With all neurons silent nothing of the input is left in any product."""
    model = copy.deepcopy(pair[1])
    for _, neuron in named_neurons(model):
        neuron.forward = torch.zeros_like
    assert torch.equal(model(currents(3)), model(currents(4)))


@torch.no_grad()
def test_executions_agree(pair):
    model = copy.deepcopy(pair[1])
    x = currents(3)
    expected = model(x)
    graded, binary = (to_spikes_(copy.deepcopy(model), coding)(x) for coding in SPIKE_CODINGS)
    assert torch.equal(graded, binary) and relative_error(graded, expected) < 0.01
    to_integer_(model)
    assert relative_error(model(x), expected) < 0.1


def test_source_is_kept(pair):
    source, model, _ = pair
    state = state_of(source)
    model = copy.deepcopy(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    revert_(model)
    assert list(model.state_dict()) == list(state) and torch.equal(model(currents()), source(currents()))


def test_gradients_reach_every_parameter(pair):
    source, model, _ = (copy.deepcopy(part) for part in pair)
    for network in (source, model):
        network(currents()).square().sum().backward()
    given = {name for name, parameter in source.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == given


def test_dropout_after_the_softmax_drops_what_was_fired():
    source = nn.Sequential(build('Swin V2'))
    model = spiking(source.eval(), currents())
    model[0].attn_drop.p = 1.
    expected = model(currents())
    assert torch.isfinite(expected).all()
    model.train()
    dropped = model(currents())
    assert torch.equal(dropped, model[0].proj.bias.expand_as(dropped))


def test_a_mask_of_shifted_windows_hides_keys():
    source = build('Swin V2')
    model = spiking(nn.Sequential(source).eval(), currents(), SFNConfig(levels=127))[0]
    mask = torch.zeros(2, 16, 16)
    mask[1, :8, 8:] = mask[1, 8:, :8] = -100.
    x = currents(3)
    with torch.no_grad():
        assert relative_error(model(x, mask), source(x, mask)) < 0.05
        assert relative_error(model(x), source(x, mask)) > 0.05


def test_tables_of_positions_stay_as_they_are():
    model = spiking(nn.Sequential(build('Swin V2')).eval(), currents())
    table = model[0].cpb_mlp
    assert set(table.modules()) <= constant_modules(model)
    assert not [name for name, _ in named_neurons(table)]


def test_weights_that_mix_heads_meet_spikes():
    model = spiking(nn.Sequential(build('CaiT talking heads')).eval(), currents())
    names = [name for name, _, products in named_products(model) if products[0].weight is not None]
    assert {'0.proj_l', '0.proj_w'} <= set(names)
    scores, maps = model[0].products
    assert type(scores) is ScoreProduct and scores.k_neuron.center is None  # what reads scores is no softmax
    assert type(maps) is MixedProduct and maps.attn_neuron.signed


def test_a_product_that_is_not_met_is_refused():
    model = spiking(nn.Sequential(build('Swin V2')).eval(), currents())[0]
    model.expected = lambda: ['product']
    with pytest.raises(UnsupportedLayerError, match='was not met on its way'):
        model(currents())


# networks -------------------------------------------------------------------------------------------------------------

NETWORKS = {
    'swinv2_tiny_window8_256': dict(
        img_size=64, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=32),
    'swinv2_cr_tiny_224': dict(img_size=64, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=32),
    'davit_tiny': dict(depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 4)),
    'cait_xxs24_224': dict(img_size=64, embed_dim=64, depth=2, init_values=0.5),
    'xcit_nano_12_p16_224': dict(img_size=64, depth=2, embed_dim=64),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_networks_convert_are_saved_and_are_exported(name, tmp_path):
    pytest.importorskip('onnxscript')
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        source = timm.create_model(name, num_classes=5, **NETWORKS[name]).eval()
    source.pretrained_cfg['input_size'] = (3, 64, 64)
    x = torch.rand(4, 3, 64, 64, generator=rng()) * 2 - 1
    with torch.no_grad():
        expected = source(x)
        model = sformer.convert(source, [x], SFNConfig(levels=63))
        fired = model(x)
        assert relative_error(fired, expected) < 0.1
        assert torch.equal(sformer.load_model(sformer.save_model(model, tmp_path / 'm'))(x), fired)
        operations, *_ = profile_operations(model, [x])
        assert not [operation.name for operation in operations if operation.kind == 'floating']
        export_onnx(model, tmp_path / 'm.onnx')
        for engine in ('openvino', 'onnxruntime'):
            pytest.importorskip(engine)
            assert relative_error(load_onnx(tmp_path / 'm.onnx', engine)(x), fired) < 0.05, engine
