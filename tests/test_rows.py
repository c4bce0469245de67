"""Rows of README and docs are what their commands give now: five are measured again, on real data.

Another processor rounds another way, and then a current on a boundary moves a spike: an image or two of 500 may change
sides, errors move in their third digit.
"""
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from sformer.cli import main

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

PERCENT = 0.6  # of images that may change sides
SHARE = dict(rel=0.1, abs=0.003)  # of errors of logits
ACTIVITY = 0.005


@pytest.fixture
def run(tmp_path, monkeypatch, test_data):
    """Runs a command in an empty folder with a checkpoint in it, as somebody does who has a copy of CIFAR-10."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SFORMER_DATA', str(test_data / 'data'))
    shutil.copy(test_data / 'checkpoints/vit_micro_cifar10.safetensors', tmp_path)

    def run(command):
        with pytest.raises(SystemExit) as done:
            main(shlex.split(command)[1:])
        assert done.value.code == 0, command
    return run


def committed(file):
    return json.loads((ROOT / 'docs/figures' / f'{file}.json').read_text(encoding='utf-8'))


def documented(page, made):
    """The command of a page that makes a folder of this name."""
    text = (ROOT / page).read_text(encoding='utf-8').replace('\\\n', ' ')
    return next(line.split(' #')[0] for line in text.splitlines()
                if line.startswith('sformer convert ') and f'-o {made} ' in f'{line} ')


def alike(now, then):
    for key in ('dataset', 'split', 'num_images', 'dataset_fingerprint'):
        assert now[key] == then[key], key
    for key in ('top1', 'source_top1', 'agreement'):
        assert now[key] == pytest.approx(then[key], abs=PERCENT), key
    assert now['relative_logit_error'] == pytest.approx(then['relative_logit_error'], **SHARE)
    assert now['activity'] == pytest.approx(then['activity'], abs=ACTIVITY)


@pytest.mark.parametrize('file, name', [('compare_small', 'v32'), ('compare_silence', 's8_0.005')])
def test_a_small_network(run, file, name):
    """Converted and compared by the commands of docs/results.md, with one model in the place of several."""
    run(documented('docs/results.md', name))
    then = next(result for result in committed(file) if result['model'] == name)
    options = then['command'].partition(' --dataset ')[2]
    run(f'sformer compare {name} --dataset {re.sub(" --(source-model|results-file) [^ ]+", "", options)} '
        f'--results-file now.json')
    alike(json.loads(Path('now.json').read_text()), then)


def test_a_network_of_the_package(run):
    """By the card's figures."""
    record = json.loads((ROOT / 'model_cards/sformer_micro.cifar10.json').read_text(encoding='utf-8'))
    then = record['evaluations']['eval.json']
    run(f'sformer evaluate sformer_micro.cifar10 --dataset cifar10 --num-images {then["num_images"]} '
        f'--results-file now.json')
    now = json.loads(Path('now.json').read_text())
    alike(dict(now, dataset=then['dataset']), then)
    assert now['weights_sha256'] == then['weights_sha256']


def test_a_row_beside_others(run):
    then = committed('baselines_micro')
    command = re.sub(r"--(only|results-file) .*?(?= --|$)", '', then['command'])
    run(f"{command} --only source 'SFN, N = 8' --results-file now.json")
    now = json.loads(Path('now.json').read_text())
    assert now['settings'] == then['settings']
    for row in now['rows']:
        old = next(other for other in then['rows'] if other['baseline'] == row['baseline'])
        for key in ('top1', 'drop', 'agreement'):
            assert row[key] == pytest.approx(old[key], abs=PERCENT), key
        assert row['error'] == pytest.approx(old['error'], **SHARE)
        if 'account' in old:
            assert row['account'] == pytest.approx(old['account'], rel=0.02)


def test_a_profile(run):
    then = committed('profile_micro')
    run(then['command'])
    now = json.loads(Path('report/profile.json').read_text())
    for coding, parts in then['energy']['account'].items():
        assert now['energy']['account'][coding]['total'] == pytest.approx(parts['total'], rel=0.02), coding
