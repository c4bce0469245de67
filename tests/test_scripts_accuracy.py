"""scripts/accuracy.py: a row per source and N, in a file and as a table."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / 'scripts'


@pytest.fixture(scope='module')
def accuracy():
    spec = importlib.util.spec_from_file_location('accuracy', SCRIPTS / 'accuracy.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows(accuracy, tmp_path, monkeypatch, capsys):
    arguments = ['sformer_nano.digits', '--dataset', 'digits', '--num-images', '40']
    monkeypatch.setattr(sys, 'argv', ['accuracy.py', *arguments])
    accuracy.main(['sformer_nano.digits'], dataset='digits', num_images=40, num_calibration=8, levels=[2, 16],
                  output=tmp_path / 'a.json', format=accuracy.Format.md)
    few, many = json.loads((tmp_path / 'a.json').read_text())
    assert (few['levels'], many['levels']) == (2, 16) and few['model'] == 'sformer_nano.digits'
    assert few['dataset'] == 'digits' and few['split'] == 'test' and few['num_images'] == 40
    assert few['source_top1'] == many['source_top1'] > 90 and few['relative_logit_error'] > many['relative_logit_error']
    assert few['command'] == 'python scripts/accuracy.py sformer_nano.digits --dataset digits --num-images 40'
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith('| sformer_nano.digits | 16 |') and '40 images of digits' in lines[0]
