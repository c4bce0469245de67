"""`sformer export`, `sformer evaluate X.onnx` and `sformer benchmark`."""
import csv
import json
import sys

import pytest
import timm
from conftest import NANO, trained_state
from safetensors import safe_open

from sformer import convert, evaluate, named_neurons, save_model, to_integer_
from sformer.cli import export
from sformer.execution.integer import MAX_WEIGHT_ERROR
from sformer.files import state_hash

onnx = pytest.importorskip('onnx')
for package in ('onnxscript', 'onnxruntime', 'openvino'):
    pytest.importorskip(package)
pytestmark = pytest.mark.usefixtures('operators_read_once')


def test_defaults_are_those_of_the_library():
    assert export.WEIGHT_ERROR == MAX_WEIGHT_ERROR


def test_export_and_evaluate(run_inside, tmp_path):
    source = timm.create_model('vit_tiny_patch16_224', **dict(NANO, depth=1)).eval()  # exporting a block takes seconds
    source.load_state_dict({name: value for name, value in trained_state().items() if 'blocks.1' not in name})
    model = convert(source, 'digits', split='train')
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside(
        'export', 'out', 'graphs/m.onnx', '--calibration', 'digits', '--split', 'train', '--num-images', '40')
    assert code == 0 and '6 of 6 layers in integers, largest error of products with int8 weights 0.' in out, err
    args = ('evaluate', 'graphs/m.onnx', '--dataset', 'digits', '--split', 'test', '--num-images', '60')
    code, out, err = run_inside(*args, '--results-file', 'r.json', '--engine', 'onnxruntime')
    assert code == 0 and 'graphs/m.onnx on 60 images of digits (test)' in out, err
    result = json.loads((tmp_path / 'r.json').read_text())
    assert result['num_images'] == 60 and result['model'] == 'graphs/m.onnx'
    assert result['param_count'] == round(sum(p.numel() for p in model.parameters()) / 1e6, 4)
    assert result['exported_of_sha256'] == state_hash(model.state_dict())
    to_integer_(model)
    expected = evaluate(model, 'digits', 'test', num_images=60, source=False)['top1']
    assert expected > 30 and abs(result['top1'] - expected) <= 100 * 3 / 60  # by other int8 weights
    assert result['engine'].startswith('onnxruntime 1.')
    code, out, err = run_inside('compare', 'out', *args[1:])
    assert code == 0 and 'm.onnx' in out, err
    for bad, message in (
            (('export', 'out', 'graphs/m.onnx'), 'there already'), (('export', 'out', 'm.txt'), 'ends in .onnx'),
            (('export', 'out', 'out/config.json/m.onnx'), 'is a file, not a folder'),
            (('export', 'nothing', 'm.onnx'), "no model 'nothing'"), (('evaluate', 'no.onnx', *args[2:]), 'no graph'),
            ((*args, '--engine', 'tensorrt'), 'openvino, onnxruntime'),
            ((*args, '--amp'), 'm.onnx computes as it was exported: leave out --amp'),
            ((*args, '--channels-last'), 'leave out --channels-last'),
            (('evaluate', 'out', *args[2:], '--engine', 'openvino'), 'end in .onnx'),
            ((*args, '--img-size', '16'), 'cannot take images of 16 pixels: '),
            (('export', 'out', 'n.onnx', '--calibration', 'nowhere/'), 'nowhere'),
            (('export', 'out', 'n.onnx', '--calibration', 'digits', '--image-column', 'x'), "no columns, so 'x'"),
            (('benchmark', 'out', '--against', 'source:fp8'), 'source:fp32'),
            *((args, 'm.onnx is a graph, as sformer export writes it; what is wanted here is the model') for args in (
                ('benchmark', 'graphs/m.onnx'), ('profile', 'graphs/m.onnx'), ('sweep', 'graphs/m.onnx'),
                ('export', 'graphs/m.onnx', 'n.onnx'), ('convert', 'graphs/m.onnx', '-o', 'x'),
                ('convert', 'm.onnx', '-o', 'x'), ('convert', 'no/m.onnx', '-o', 'x'),
                ('distill', 'graphs/m.onnx', '--dataset', 'digits', '-o', 'x'),
                ('evaluate', 'out', *args[2:], '--source-model', 'graphs/m.onnx'))),
            (('benchmark', 'out', '--results-file', 'out/config.json'), 'holds no timings')):
        code, out, err = run_inside(*bad)
        assert code != 0 and message in err and err.count('\n') == 1 and 'Traceback' not in err, (bad, err)
    assert not (tmp_path / 'n.onnx').exists()


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    """A saved model; not to be changed."""
    return save_model(model, tmp_path_factory.mktemp('models') / 'model')


def assert_refused(result, message, code=1):
    assert result[0] == code and result[2].count('\n') == 1 and message in result[2], result[2]
    assert result[2].startswith('sformer: error: ')


@pytest.mark.slow
def test_more_than_a_file_can_hold_is_refused(run_inside, model, folder, tmp_path, monkeypatch):
    """Protobuf said so at the very end, after hours. A graph of at most its bytes is written, of one less is not."""
    from sformer.execution import onnx as graphs
    from sformer.execution import prepared
    sizes = []
    to_onnx = graphs.to_onnx

    def written(network, *args):
        sizes.append(sum(value.numel() * value.element_size() for value in network.state_dict().values()))
        return to_onnx(network, *args)
    monkeypatch.setattr(graphs, 'to_onnx', written)
    code, out, err = run_inside('export', folder, 'm.onnx')
    assert code == 0 and 'largest error of int8 weights 0.' in out, err
    held = sum(len(value.raw_data) for value in onnx.load(tmp_path / 'm.onnx').graph.initializer)
    assert 0.9 < sizes[0] / held < 1.1  # values of neurons that it does not need are few where weights are many
    monkeypatch.setattr(graphs, 'to_onnx', to_onnx)
    monkeypatch.setattr('torch.onnx.export', lambda *args, **how: pytest.fail('too late'))
    monkeypatch.setattr(graphs, 'MAX_GRAPH', sizes[0] - 1)
    assert_refused(run_inside('export', folder, 'n.onnx'), 'file of ONNX holds no more than 0.00 GiB. Layers in')
    monkeypatch.setattr(prepared, 'to_integer_', lambda *args: pytest.fail('too late'))
    monkeypatch.setattr(graphs, 'MAX_GRAPH', sum(p.numel() for p in model.parameters()))
    assert_refused(run_inside('export', folder, 'n.onnx'), 'No option makes it fit: run it in torch.')
    assert not (tmp_path / 'n.onnx').exists()


def test_export_of_tensors(run_inside, folder, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)  # nobody needs it
    code, out, err = run_inside('export', folder, 'm.safetensors', '--max-error', '0.02', '--no-portable')
    assert code == 0 and '10 of 10 layers in integers' in out and 'VNNI' not in out, err
    with safe_open(tmp_path / 'm.safetensors', 'pt') as file:
        about = json.loads(file.metadata()['sformer'])
        assert {name for name, _ in named_neurons(model)} == {*about['neurons']}
        assert file.get_tensor('blocks.0.attn.qkv.weight').abs().max() == 127
    assert about['weights_sha256'] == state_hash(model.state_dict()) and about['format_version'] == 1
    assert about['max_error'] == 0.02 and about['portable'] is False and about['floating'] == []
    assert about['command'].startswith('sformer export ')
    assert_refused(run_inside('export', folder, 'm.safetensors'), 'm.safetensors is there already; --overwrite')
    assert_refused(run_inside('export', folder, 'm.txt', '--format', 'safetensors'), 'ends in .safetensors')
    assert_refused(run_inside('export', folder, 't.safetensors', '--spikes'), 'is of graphs, and tensors are none')
    assert_refused(run_inside('export', folder, 'm.safetensors', '--format', 'onnx'), 'ends in .onnx')


@pytest.mark.parametrize('missing', ['onnx', 'onnxscript'])
def test_a_missing_package_is_noticed_before_the_work(run_inside, folder, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # importing it fails
    monkeypatch.setattr('sformer.execution.prepared.to_integer_', lambda *args: pytest.fail('too late'))
    assert_refused(run_inside('export', folder, 'm.onnx'), f"{missing} is missing: pip install '.[onnx]' in a clone")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('error, message, code', [
    (KeyboardInterrupt(), 'interrupted', 130), (OSError(28, 'No space left on device'), 'No space left on device', 1)])
def test_what_ends_while_a_graph_is_written(run_inside, folder, tmp_path, monkeypatch, error, message, code):
    def end(*args):
        raise error
    monkeypatch.setattr('sformer.execution.onnx.to_onnx', lambda *args: onnx.ModelProto())
    monkeypatch.setattr('pathlib.Path.write_bytes', end)
    assert_refused(run_inside('export', folder, 'new/m.onnx'), message, code)
    assert not list(tmp_path.iterdir())


def test_export_to_places_that_can_not_be(run_inside, folder, tmp_path, monkeypatch):
    (tmp_path / 'folder.onnx').mkdir()
    (tmp_path / 'nowhere.onnx').symlink_to('gone/m.onnx')
    assert_refused(run_inside('export', folder, 'folder.onnx'), 'folder.onnx is a folder')
    assert_refused(run_inside('export', folder, 'nowhere.onnx', '--overwrite'), 'link to gone/m.onnx, which does not')
    assert_refused(run_inside('export', folder, 'm.onnx', '--split', 'test'),
                   'split and image_column are of images to round weights for: name them (calibration)')
    assert_refused(run_inside('export', folder, 'm.onnx', '--num-images', '9'),
                   '--num-images and --seed are of images to round weights for: name them (--calibration)')
    assert_refused(run_inside('export', folder, 'm.onnx', '--seed', '1'), 'are of images to round weights for')
    assert_refused(run_inside('export', folder, 'm.onnx', '--max-error', 'nan'), "'--max-error'", 2)
    monkeypatch.setattr('os.access', lambda path, mode: False)
    assert_refused(run_inside('export', folder, 'm.onnx'), 'is read-only for you')


def test_timings_to_places_that_can_not_be(run_inside, folder, tmp_path, monkeypatch):
    (tmp_path / 'nowhere.json').symlink_to('gone/r.json')
    assert_refused(run_inside('benchmark', folder, '--results-file', '.'), 'is a folder')
    assert_refused(run_inside('benchmark', folder, '--results-file', 'nowhere.json'), 'which does not exist')
    monkeypatch.setattr('os.access', lambda path, mode: False)
    assert_refused(run_inside('benchmark', folder, '--results-file', 'r.json'), 'is read-only for you')


def test_absurd_sizes(run_inside, folder):
    for args in (('benchmark', '--batch-size', '100000000000000000000'), ('benchmark', '--pairs', '0'),
                 ('profile', '--num-images', '100000000000000000000'), ('profile', '--batch-size', '-1'),
                 ('profile', '--seed', '-1')):
        assert_refused(run_inside(args[0], folder, *args[1:]), f"Invalid value for '{args[1]}'", 2)


def test_benchmark(run_inside, folder, tmp_path, monkeypatch):
    monkeypatch.setattr('torch.compile', lambda network: network)  # which takes half a minute
    code, out, err = run_inside('benchmark', folder, '--execution', 'simulate', 'integer', '--against', 'source:fp32',
                                '--batch-size', '1', '--pairs', '1', '--results-file', 'b.json')
    assert code == 0 and 'batch 1' in out, err
    result = json.loads((tmp_path / 'b.json').read_text())
    assert [row['execution'] for row in result['results']] == ['simulate', 'integer', 'source:fp32']
    for row in result['results']:
        assert row['seconds'] <= row['p95'] and row['images_per_second'] == pytest.approx(1 / row['seconds'])
        assert row['size'] > 0 and row['memory'] is None
    assert out.endswith(f'{result["verdict"]}\n') and 'This processor has' in result['verdict']
    code, out, err = run_inside('benchmark', folder, '--execution', 'simulate', '--against', 'source:fp32',
                                '--pairs', '3', '--batch-size', '1', '2', '--threads', '1', '--format', 'csv')
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and [(row['execution'], row['batch_size'], row['threads']) for row in rows] == [
        ('simulate', '1', '1'), ('source:fp32', '1', '1'), ('simulate', '2', '1'), ('source:fp32', '2', '1')], err
    assert float(rows[0]['times_source:fp32']) > 0 == len(rows[1]['times_source:fp32']) and 'Take ' in err


@pytest.mark.slow
def test_benchmark_of_engines(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside(
        'benchmark', 'out', '--execution', 'openvino', 'onnxruntime', '--against', 'openvino:int8',
        '--batch-size', '1', '4', '--pairs', '2', '--results-file', 'b.json')
    assert code == 0 and 'batch 1' in out and 'batch 4' in out, err
    assert out.count('onnxruntime') == 3 and 'over' not in err
    result = json.loads((tmp_path / 'b.json').read_text())
    assert len(result['results']) == 6 and result['command'].startswith('sformer benchmark') and result['pairs'] == 2
