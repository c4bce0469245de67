"""`sformer card`."""
import sys
from pathlib import Path

import pytest
from card_tools import run_snippet
from huggingface_hub import ModelCard

import sformer
from sformer import load_model, save_model
from sformer.files import write_json


@pytest.fixture
def saved(model, tmp_path):
    return save_model(model, tmp_path / 'out')


@pytest.fixture
def run(run_here):
    def run(*args):
        result = run_here(*args)
        return result.code, result.out, result.err
    return run


def test_card_command(run, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = sformer.evaluate(load_model(saved), 'digits', 'test', num_images=50)
    result['command'] = 'sformer evaluate'
    write_json(saved / 'eval.json', result)
    write_json(saved / 'theirs.json', dict(result, weights_sha256='0'))
    code, out, err = run('card', 'out')
    assert (code, out) == (0, 'card in model_cards/out.md\n') and 'theirs.json is not used' in err
    text = Path('model_cards/out.md').read_text()
    assert f'| top-1 [%] | {result["source_top1"]:.2f} | {result["top1"]:.2f} |' in text and '50 images' in text
    assert {p.name for p in Path('model_cards').iterdir()} == {'out.md', 'out.activity.png'}
    run_snippet(text)
    code, _, _ = run('card', 'out', '--name', 'x', '--repo', 'my-org/y', '--license', 'mit', '--base-model', 'me/mine',
                     '--dataset-id', 'digits=me/digits', '-o', 'cards')
    data = ModelCard.load(Path('cards/x.md')).data
    assert code == 0 and (data.license, data.base_model, data.datasets) == ('mit', 'me/mine', ['me/digits'])
    assert "create_model('hf-hub:my-org/y'" in Path('cards/x.md').read_text()


@pytest.mark.parametrize('options, message', [
    (['nowhere'], 'holds no SFormer'), (['out', '--repo', 'x'], 'org/name'),
    (['out', '--license', 'mine'], "licence 'mine' is none of"), (['out', '--base-model', 'a b'], 'Repo id'),
    (['out', '--dataset-id', 'x'], 'NAME=org/dataset'), (['out', '-o', 'out/config.json'], 'config.json'),
], ids=str)
def test_bad_options_of_card(run, saved, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run('card', *options)
    assert code == 1 and out == '' and len(err.splitlines()) == 1 and message in err
    assert {p.name for p in tmp_path.iterdir()} == {'out'}


def test_missing_package(run, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    monkeypatch.chdir(tmp_path)
    code, _, err = run('card', 'out')
    assert (code, err) == (1, "sformer: error: jinja2 is missing: pip install '.[pages]' in a clone of sformer.\n")
    assert not (tmp_path / 'model_cards').exists()


def test_edited_card(run, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run('card', 'out')[0] == run('card', 'out')[0] == 0
    card = Path('model_cards/out.md')
    card.write_text(card.read_text() + 'mine')
    code, out, err = run('card', 'out')
    assert code == 1 and out == '' and 'out.md is there and holds no card' in err and card.read_text().endswith('mine')
    assert run('card', 'out', '--overwrite')[0] == 0 and 'mine' not in card.read_text()[-5:]
