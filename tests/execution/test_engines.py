"""Graphs in ONNX: both engines agree with integers in torch, for every family and fire function; files are checked."""
import copy
import importlib
import json
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from execution_tools import NETWORKS
from layer_tools import build, pixels, relative_error

import sformer
from sformer import SFNConfig, SFormerError, UncalibratedError, convert, export_onnx, load_onnx, spiking_, to_integer_
from sformer.execution import EXECUTIONS, benchmark, engines
from sformer.execution.engines import openvino_config
from sformer.execution.prepared import METADATA
from sformer.layers import is_calibrated
from sformer.neurons import Neuron

onnx = pytest.importorskip('onnx')
for package in ('onnxscript', 'onnxruntime', 'openvino'):
    pytest.importorskip(package)
ENGINES = ('openvino', 'onnxruntime')
pytestmark = pytest.mark.usefixtures('operators_read_once')


def agree(networks, whole, images):
    """Logits are the same to float rounding, but where a current within it of a boundary fires another level, which
    moves what follows. OpenVINO approximates exponentials and GELU, so there it is more of them."""
    with torch.no_grad():
        expected = whole(images)
        for network in networks:
            out = network(images)
            assert out.shape == expected.shape
            each = (out - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
            if network.engine == 'onnxruntime':
                assert (each < 1e-4).float().mean() >= 0.5, each
            assert each.median() < 0.05 and each.max() < 0.15, (network.engine, each)


@pytest.fixture(scope='module')
def model_and_graph(exported):
    return exported('vit', SFNConfig(), 1)


@pytest.fixture(scope='module')
def model(model_and_graph):
    return model_and_graph[0]


@pytest.fixture(scope='module')
def graph(model_and_graph):
    return model_and_graph[1]


@pytest.mark.parametrize('family, config, depth', NETWORKS)
def test_engines_agree_with_torch(exported, family, config, depth):
    model, path = exported(family, config, depth)
    to_integer_(model)
    networks = [load_onnx(path, engine) for engine in ENGINES]
    agree(networks, model, pixels(12))
    agree(networks, model, pixels(1))


def test_a_fire_function_without_a_form_is_named(tmp_path):
    model = convert(build(depth=1), [pixels()], SFNConfig(6, fire='density', initial_potential=0.3))
    with pytest.raises(SFormerError, match='density firing with initial_potential=0.3 has no form'):
        export_onnx(model, tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs', [
    ('vit_tiny_patch16_224', {}), ('deit3_small_patch16_224', {}), ('eva02_tiny_patch14_224', {}),
    ('vit_small_patch16_dinov3', dict(img_size=224)), ('vit_tiny_patch16_384', {}), ('beit_base_patch16_224', {}),
])
def test_token_counts_of_real_networks(name, kwargs, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(name, depth=2, num_classes=9, **kwargs).eval()
    images = torch.randn(2, *source.pretrained_cfg['input_size'][:1], *source.patch_embed.img_size).clamp(-2, 2)
    source.pretrained_cfg['input_size'] = tuple(images.shape[1:])
    model = convert(source, [images])
    export_onnx(model, tmp_path / 'model.onnx')
    to_integer_(model)
    with torch.no_grad():
        for engine in ENGINES:
            assert relative_error(load_onnx(tmp_path / 'model.onnx', engine)(images), model(images)) < 0.1


def test_every_product_with_weights_is_of_int8(graph):
    model = onnx.load(graph)
    made_by = {out: node for node in model.graph.node for out in node.output}
    constants = {init.name: init for init in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ('MatMul', 'Conv')]
    assert len(products) == 1 + (4 + 2) + 1  # patches; per block four layers, QK^T and AV; head
    wide = 0
    for node in products:
        for name in node.input[:2]:
            node_in = made_by[name]
            while node_in.op_type in ('Transpose', 'Reshape'):
                node_in = made_by[node_in.input[0]]
            if node_in.op_type != 'DequantizeLinear':
                wide += 1  # softmax levels of 14 bits
                continue
            source = node_in.input[0]
            assert constants[source].data_type == onnx.TensorProto.INT8 if source in constants else (
                made_by[source].op_type == 'QuantizeLinear')
    assert wide == 1


def test_openvino_multiplies_int8(graph):
    import openvino
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), 'CPU', openvino_config())
    compiled(pixels(2).numpy())
    kinds = [(info['layerType'], info['primitiveType']) for info in (
        {key: value.astype(str) if hasattr(value, 'astype') else str(value) for key, value in op.get_rt_info().items()}
        for op in compiled.get_runtime_model().get_ops())]
    products = [primitive for kind, primitive in kinds if kind.startswith(('FullyConnected', 'Convolution'))]
    assert len(products) == 1 + 4 + 1 and all(primitive.lower().endswith('i8') for primitive in products), products


def test_the_record_says_what_was_exported(graph, model):
    network = load_onnx(graph)
    about = network.about
    assert about['levels'] == [63] and about['floating'] == [] and about['command'] == 'sformer export a b'
    assert about['input_size'] == [3, 32, 32] and about['num_classes'] == network.num_classes == 7
    assert about['weights_sha256'] == sformer.files.state_hash(model.state_dict())
    assert tuple(network.pretrained_cfg['mean']) == model.pretrained_cfg['mean']
    assert 'openvino' in repr(network)
    assert copy.deepcopy(network).run is network.run


@pytest.mark.slow
def test_a_compiled_network_is_exported_as_what_it_was_made_of(model, graph, tmp_path):
    whole = load_onnx(graph, 'onnxruntime').about
    for network in (torch.compile(model, backend='eager'), nn.DataParallel(model)):
        export_onnx(network, tmp_path / 'model.onnx', overwrite=True)
        about = load_onnx(tmp_path / 'model.onnx', 'onnxruntime').about
        for key in ('graph_sha256', 'weights_sha256', 'input_size'):
            assert about[key] == whole[key], key
    assert is_calibrated(model)


def test_what_is_compiled_is_not_pickled(graph, tmp_path):
    network = load_onnx(graph, 'onnxruntime')
    for send in (pickle.dumps, lambda network: torch.save(network, tmp_path / 'network.pt')):
        with pytest.raises(SFormerError, match=r'cannot be pickled .* by its path \(load_onnx\)'):
            send(network)
    assert copy.deepcopy(network).run is network.run


@pytest.mark.slow
def test_a_graph_is_evaluated_like_any_model(tmp_path):
    model = timm.create_model('sformer_nano.digits', pretrained=True).eval()
    export_onnx(model, tmp_path / 'model.onnx')
    whole = copy.deepcopy(model)
    to_integer_(whole)
    options = dict(dataset='digits', split='test', num_images=64, source=False)
    expected = sformer.evaluate(whole, **options)
    for engine in ENGINES:
        result = sformer.evaluate(load_onnx(tmp_path / 'model.onnx', engine), **options)
        assert abs(result['top1'] - expected['top1']) <= 100 * 2 / 64  # an image at a boundary
        assert result['num_images'] == 64 and result['model'] == model.pretrained_cfg['architecture']
        assert 'activity' not in result and result['engine'].startswith(engine)
    with pytest.raises(SFormerError, match='exported for images'):
        sformer.evaluate(load_onnx(tmp_path / 'model.onnx'), img_size=16, **options)


@pytest.mark.slow
def test_size_of_a_file(tmp_path):
    model = convert(build(embed_dim=192, depth=3), [pixels()])
    export_onnx(model, tmp_path / 'model.onnx')
    floating = sum(4 * parameter.numel() for parameter in model.parameters())
    assert (tmp_path / 'model.onnx').stat().st_size < 0.35 * floating  # 0.26 of a ViT-B


def test_images_of_another_size(graph):
    with pytest.raises(SFormerError, match=r'the graph was exported for images \(3, 32, 32\), got \(3, 16, 16\)'):
        load_onnx(graph)(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_images_that_are_no_numbers(graph, value):
    images = pixels(2)
    images[1, 0, 3, 3] = value
    with pytest.raises(SFormerError, match='images have NaN or infinity'):
        load_onnx(graph, 'onnxruntime')(images)


@pytest.mark.parametrize('engine', ENGINES)
def test_threads_may_share_a_network(graph, engine):
    network, images = load_onnx(graph, engine), [pixels(4, seed=i) for i in range(4)]
    expected = [network(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(network, images), expected, strict=True))


def test_a_neuron_without_a_form_is_named(model, tmp_path):
    class Sign(Neuron):
        def __init__(self):
            super().__init__()
            self.register_buffer('step', torch.ones(()))
            self.calibrated.fill_(True)

    other = copy.deepcopy(model)
    other.blocks[0].attn.qkv.neuron = Sign()
    with pytest.raises(SFormerError, match='a Sign has no form in ONNX'):
        export_onnx(other, tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


def spoilt(graph, path, change):
    model = onnx.load(graph)
    change(model)
    onnx.save(model, path)
    return path


def flip(model):
    weights = next(init for init in model.graph.initializer if init.data_type == onnx.TensorProto.INT8 and init.dims)
    weights.raw_data = bytes([weights.raw_data[0] ^ 1]) + weights.raw_data[1:]


@pytest.mark.parametrize('change, message', [
    (flip, 'hash differs'), (lambda m: m.graph.node[0].ClearField('name'), 'hash differs'),
    (lambda m: m.ClearField('metadata_props'), 'not written by `sformer export`'),
    (lambda m: setattr(m.metadata_props[0], 'value', '[1]'), 'not written by `sformer export`'),
    (lambda m: setattr(m.metadata_props[0], 'value', '{"graph_sha256": ""}'), 'not written by `sformer export`'),
])
def test_a_changed_graph_is_refused(graph, tmp_path, change, message):
    with pytest.raises(SFormerError, match=message):
        load_onnx(spoilt(graph, tmp_path / 'spoilt.onnx', change))


@pytest.mark.parametrize('content', [b'', b'no graph at all', None])
def test_a_damaged_file_is_refused(graph, tmp_path, content):
    path = tmp_path / 'damaged.onnx'
    path.write_bytes(graph.read_bytes()[:5000] if content is None else content)
    with pytest.raises(SFormerError, match=r'is damaged, or no ONNX file \(|not written'):
        load_onnx(path)
    with pytest.raises(SFormerError, match='no graph at'):
        load_onnx(tmp_path / 'nothing.onnx')


def test_engines_that_are_not_there(graph, monkeypatch):
    with pytest.raises(SFormerError, match="no engine 'tensorrt': there are openvino, onnxruntime"):
        load_onnx(graph, 'tensorrt')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(SFormerError, match=r"openvino is not installed: pip install '\.\[openvino\]'"):
        load_onnx(graph, 'openvino')
    with pytest.raises(SFormerError, match=r"onnxruntime is not installed: pip install '\.\[onnx\]'"):
        load_onnx(graph, 'onnxruntime')
    with pytest.raises(SFormerError, match='no engine is installed'):
        load_onnx(graph)


def test_an_engine_that_does_not_know_an_operator(graph, tmp_path, monkeypatch):
    def old(graph, precision):
        raise RuntimeError('opset 20 is not supported\nand more')
    monkeypatch.setitem(engines.ENGINES, 'onnxruntime', old)
    with pytest.raises(SFormerError, match=r'onnxruntime \d.* cannot run this graph \(opset 20 is not supported\)'):
        load_onnx(graph, 'onnxruntime')


def test_an_engine_that_does_not_load(graph, monkeypatch):
    def broken(*args):
        raise ImportError('libonnxruntime.so: cannot open shared object file')
    monkeypatch.setitem(engines.ENGINES, 'onnxruntime', broken)
    with pytest.raises(SFormerError, match=r'onnxruntime is installed and does not load \(libonn.*--force'):
        load_onnx(graph, 'onnxruntime')


def test_files_are_replaced_only_if_asked(model, graph, tmp_path):
    (tmp_path / 'model.onnx').write_bytes(b'mine')
    with pytest.raises(SFormerError, match='is there already'):
        export_onnx(model, tmp_path / 'model.onnx')
    assert (tmp_path / 'model.onnx').read_bytes() == b'mine'
    for name, message in (('model.txt', 'ends in .onnx'), ('model', 'ends in .onnx')):
        with pytest.raises(SFormerError, match=message):
            export_onnx(model, tmp_path / name)


def test_an_uncalibrated_model_is_refused(tmp_path):
    with pytest.raises(UncalibratedError, match=r'calibrate_\(\) first'):
        export_onnx(spiking_(build()), tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_layers_that_stay_floating_are_listed(model, tmp_path):
    reports = export_onnx(model, tmp_path / 'model.onnx', max_error=1e-9)
    assert not any(report.integer for report in reports)
    with torch.no_grad():
        assert relative_error(load_onnx(tmp_path / 'model.onnx', 'onnxruntime')(pixels()), model(pixels())) < 0.05
    assert len(json.loads(onnx.load(tmp_path / 'model.onnx').metadata_props[0].value)['floating']) == len(reports)
    assert onnx.load(tmp_path / 'model.onnx').metadata_props[0].key == METADATA


def test_bytes_in(exported, tmp_path):
    model, plain = exported('vit', SFNConfig.recipe('fast'), 1)
    export_onnx(model, tmp_path / 'm.onnx', uint8_input=True)
    images = pixels(5)
    decoded = ((images + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).contiguous().numpy()
    given, = onnx.load(tmp_path / 'm.onnx').graph.input
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in given.type.tensor_type.shape.dim][1:] == [32, 32, 3]
    for engine in ENGINES:
        run = engines.compile_graph((tmp_path / 'm.onnx').read_bytes(), engine)
        expected = load_onnx(plain, engine)(images).numpy()
        assert np.abs(run(decoded) - expected).max() < 1e-3 * np.abs(expected).max()
        assert np.array_equal(load_onnx(tmp_path / 'm.onnx', engine)(images).numpy(), run(decoded))


def test_benchmark_names_what_there_is(model):
    with pytest.raises(SFormerError, match="no execution 'gpu': there are source:fp32"):
        benchmark(model, ['gpu'])
    assert {'simulate', 'integer', 'openvino', 'openvino:int8'} < set(EXECUTIONS)


@pytest.mark.slow
def test_benchmark(model):
    result = benchmark(model, ['openvino', 'integer'], ['source:fp32', 'openvino:int8'], [1, 3], pairs=2)
    for row in result['results']:
        by_engine = row['execution'].startswith('openvino')
        assert row['size'] > 1e4 and (1e7 < row['memory'] < 1e9 if by_engine else row['memory'] is None)
    assert [(row['batch_size'], row['execution']) for row in result['results']] == [
        (size, name) for size in (1, 3) for name in ('openvino', 'integer', 'source:fp32', 'openvino:int8')]
    for row in result['results']:
        assert set(row['speedup']) == {'source:fp32', 'openvino:int8'} - {row['execution']} and row['seconds'] > 0
        assert all(s['min'] <= s['median'] <= s['max'] for s in row['speedup'].values())
    assert result['threads'] and result['processor'] and {'torch', 'openvino'} <= set(result['versions'])


@pytest.mark.parametrize('config', [SFNConfig.recipe('fast'), SFNConfig()], ids=['fast', 'default'])
def test_operations_that_are_kept_out_of_kernels_give_the_same(exported, config):
    graph = exported('vit', config, 1)[1].read_bytes()
    images = pixels(3).numpy()
    fused, unfused = (engines.compile_graph(graph, 'openvino', unfused=unfused) for unfused in (False, True))
    assert np.abs(fused(images) - unfused(images)).max() < 0.1 * np.abs(fused(images)).max()  # spikes may move
    model = importlib.import_module('openvino').Core().read_model(graph)
    before = Counter(node.get_type_name() for node in model.get_ops())
    added = Counter(node.get_type_name() for node in engines.unfuse(graph).get_ops()) - before
    assert added['Minimum'] >= 2 and {*added} == {'Minimum', 'Constant'}
