"""`sformer export`, `sformer evaluate X.onnx` and `sformer benchmark`."""
import json

import pytest

from sformer import save_model
from sformer.cli import export
from sformer.execution.integer import MAX_WEIGHT_ERROR

for package in ('onnx', 'onnxscript', 'onnxruntime', 'openvino'):
    pytest.importorskip(package)


def test_defaults_are_those_of_the_library():
    assert export.MAX_WEIGHT_ERROR == MAX_WEIGHT_ERROR


def test_export_and_evaluate(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside(
        'export', 'out', 'graphs/m.onnx', '--calibration', 'digits', '--split', 'train', '--num-images', '40')
    assert code == 0 and '18 of 18 layers in integers' in out, err
    args = ('evaluate', 'graphs/m.onnx', '--dataset', 'digits', '--split', 'test', '--num-images', '60')
    code, out, err = run_inside(*args, '--results-file', 'r.json', '--engine', 'onnxruntime')
    assert code == 0 and 'graphs/m.onnx on 60 images of digits (test)' in out, err
    result = json.loads((tmp_path / 'r.json').read_text())
    assert result['top1'] > 80 and result['num_images'] == 60 and result['model'] == 'graphs/m.onnx'
    code, out, err = run_inside('compare', 'out', *args[1:])
    assert code == 0 and 'm.onnx' in out, err
    for bad, message in (
            (('export', 'out', 'graphs/m.onnx'), 'there already'), (('export', 'out', 'm.txt'), 'ends in .onnx'),
            (('export', 'out', 'out/config.json/m.onnx'), 'no folder that you may write'),
            (('export', 'nothing', 'm.onnx'), "no model 'nothing'"), (('evaluate', 'no.onnx', *args[2:]), 'no graph'),
            ((*args, '--engine', 'tensorrt'), 'openvino, onnxruntime'), ((*args, '--amp'), 'leave out --amp'),
            ((*args, '--channels-last'), 'leave out --channels-last'),
            (('evaluate', 'out', *args[2:], '--engine', 'openvino'), 'end in .onnx'),
            ((*args, '--img-size', '16'), 'exported for'),
            (('export', 'out', 'n.onnx', '--calibration', 'nowhere/'), 'nowhere'),
            (('benchmark', 'out', '--against', 'source:fp8'), 'source:fp32'),
            (('benchmark', 'out', '--results-file', 'out/config.json'), 'holds no timings'),
            (('benchmark', 'out', '--results-file', 'no/b.json'), 'no folder')):
        code, out, err = run_inside(*bad)
        assert code != 0 and message in err and err.count('\n') == 1 and 'Traceback' not in err, (bad, err)
    assert not (tmp_path / 'n.onnx').exists()


@pytest.mark.slow
def test_benchmark(run_inside, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run_inside(
        'benchmark', 'out', '--execution', 'openvino', 'onnxruntime', '--against', 'openvino:int8',
        '--batch-size', '1', '4', '--pairs', '2', '--results-file', 'b.json')
    assert code == 0 and 'batch 1' in out and 'batch 4' in out, err
    assert out.count('onnxruntime') == 3 and 'over' not in err
    result = json.loads((tmp_path / 'b.json').read_text())
    assert len(result['results']) == 6 and result['command'].startswith('sformer benchmark') and result['pairs'] == 2
