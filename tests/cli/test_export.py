"""`sformer export`, `sformer evaluate X.onnx` and `sformer benchmark`."""
import json

import pytest
from huggingface_hub import constants

from sformer import save_model
from sformer.cli import export
from sformer.execution.integer import MAX_WEIGHT_ERROR

for package in ('onnx', 'onnxscript', 'onnxruntime', 'openvino'):
    pytest.importorskip(package)


@pytest.fixture
def run(run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)  # nothing here is there, and it would try for a minute

    def run(*args):
        result = run_here(*args)
        return result.code, result.out, result.err
    return run


def test_defaults_are_those_of_the_library():
    assert export.MAX_WEIGHT_ERROR == MAX_WEIGHT_ERROR


def test_export_and_evaluate(run, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run(
        'export', 'out', 'graphs/m.onnx', '--calibration', 'digits', '--split', 'train', '--num-images', '40')
    assert code == 0 and '18 of 18 layers in integers' in out, err
    args = ('evaluate', 'graphs/m.onnx', '--dataset', 'digits', '--split', 'test', '--num-images', '60')
    code, out, err = run(*args, '--results-file', 'r.json', '--engine', 'onnxruntime')
    assert code == 0 and 'graphs/m.onnx on 60 images of digits (test)' in out, err
    result = json.loads((tmp_path / 'r.json').read_text())
    assert result['top1'] > 80 and result['num_images'] == 60 and result['model'] == 'graphs/m.onnx'
    code, out, err = run('compare', 'out', *args[1:])
    assert code == 0 and 'm.onnx' in out, err
    for bad, message in (
            (('export', 'out', 'graphs/m.onnx'), 'there already'), (('export', 'out', 'm.txt'), 'ends in .onnx'),
            (('export', 'out', 'out/config.json/m.onnx'), 'no folder that you may write'),
            (('export', 'nothing', 'm.onnx'), "no model 'nothing'"), (('evaluate', 'no.onnx', *args[2:]), 'no graph'),
            ((*args, '--engine', 'tensorrt'), 'openvino, onnxruntime'), ((*args, '--img-size', '16'), 'exported for'),
            (('export', 'out', 'n.onnx', '--calibration', 'nowhere/'), 'nowhere'),
            (('benchmark', 'out', '--against', 'source:fp8'), 'source:fp32'),
            (('benchmark', 'out', '--results-file', 'out/config.json'), 'holds no timings'),
            (('benchmark', 'out', '--results-file', 'no/b.json'), 'no folder')):
        code, out, err = run(*bad)
        assert code != 0 and message in err and err.count('\n') == 1 and 'Traceback' not in err, (bad, err)
    assert not (tmp_path / 'n.onnx').exists()


@pytest.mark.slow
def test_benchmark(run, model, tmp_path):
    save_model(model, tmp_path / 'out')
    code, out, err = run('benchmark', 'out', '--execution', 'openvino', 'onnxruntime', '--against', 'openvino:int8',
                         '--batch-size', '1', '4', '--pairs', '2', '--results-file', 'b.json')
    assert code == 0 and 'batch 1' in out and 'batch 4' in out and 'times openvino:int8' in ' '.join(out.split()), err
    result = json.loads((tmp_path / 'b.json').read_text())
    assert len(result['results']) == 6 and result['command'].startswith('sformer benchmark') and result['pairs'] == 2
