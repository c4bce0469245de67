"""`sformer demo`."""
import re
import sys

import pytest
import torch
from cli_process import assert_mistake

import sformer
from sformer.cli import demo


def test_demo(run_apart, tmp_path):
    result = run_apart('demo', '-o', tmp_path / 'demo', curve=(1, 32))
    assert (result.code, result.err) == (0, '')
    assert 'the same logits, bit for bit' in result.out and 'convert [s]' in result.out
    names = {p.name for p in (tmp_path / 'demo').iterdir()}
    assert names == {'sformer_nano', 'accuracy.png', 'activity.png'}
    assert all((tmp_path / 'demo' / n).read_bytes()[:4] == b'\x89PNG' for n in names if n.endswith('png'))
    accuracy = dict(re.findall(r'SFormer, N = (\d+)\W+(\d+\.\d+) %', result.out))
    assert accuracy.keys() == {'4', '8', '32'} and float(accuracy['32']) >= 97
    assert sformer.is_calibrated(sformer.load_model(tmp_path / 'demo' / 'sformer_nano'))
    demo.check_own_folder(tmp_path / 'demo')  # which may be replaced


def test_demo_without_extras(run_here, tmp_path, monkeypatch):
    """What the README's first line installs is enough; only pictures need more."""
    for package in ('matplotlib', 'jinja2', 'sklearn', 'onnx', 'onnxruntime', 'openvino', 'optuna', 'pycocotools'):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(demo, 'CURVE', (8,))
    monkeypatch.setattr(demo, 'SHOWN_LEVELS', (8,))
    result = run_here('demo', '-o', tmp_path / 'demo')
    assert (result.code, result.err) == (0, '')
    assert "Without pictures: jinja2 is missing: pip install '.[pages]' in a clone of sformer." in result.out
    assert [p.name for p in (tmp_path / 'demo').iterdir()] == ['sformer_nano']


@pytest.mark.parametrize('name', ['accuracy.png', 'activity.png', 'sformer_nano/config.json'])
def test_files_of_others_are_kept(run_here, saved, tmp_path, name):
    """Noticed before any work."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes((saved / 'config.json').read_bytes())
    result = run_here('demo', '-o', tmp_path)
    assert_mistake(result, r"holds no (picture|model) of the demo's", 1)
    assert (tmp_path / name).read_bytes() == (saved / 'config.json').read_bytes()
    assert len([p for p in tmp_path.rglob('*') if p.is_file()]) == 1


def test_one_thread(tmp_path, monkeypatch):
    """Inside of the demo only, even if it fails."""
    before, during = torch.get_num_threads(), []

    def fail(output):
        during.append(torch.get_num_threads())
        raise OSError
    monkeypatch.setattr(demo, 'run_steps', fail)
    torch.set_num_threads(2)
    try:
        with pytest.raises(OSError):
            demo.run(tmp_path)
        assert (during, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
