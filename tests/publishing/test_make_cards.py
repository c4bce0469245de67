"""scripts/make_cards.py, and the cards in model_cards/: they say what their records say."""
import copy
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest
import timm
from card_tools import MODEL_CARDS, committed, run_snippet
from huggingface_hub import ModelCard
from PIL import Image

import sformer
from sformer import SFormerError
from sformer.files import state_hash
from sformer.publishing.cards import render_card, write_card
from sformer.publishing.plots import render_plots

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('plots_are_drawn_once')


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'scripts' / f'{name}.py')
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_cards = script('make_cards')
EMBEDDED = [n for n in timm.list_models('sformer*', include_tags=True) if timm.get_pretrained_cfg(n).file]


def test_every_embedded_model_has_a_card():
    assert set(EMBEDDED) == set(make_cards.embedded()) == {p.stem for p in MODEL_CARDS.glob('sformer*.md')}


@pytest.mark.parametrize('name', [EMBEDDED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in EMBEDDED[1:])])
def test_card_is_what_the_record_says(name, tmp_path):
    """Byte by byte; otherwise run scripts/make_cards.py --render-only."""
    record = committed(name)
    assert write_card(record, tmp_path).read_bytes() == (MODEL_CARDS / f'{name}.md').read_bytes()
    plots = render_plots(record)
    assert {f'{name}.{file}' for file in plots} == {p.name for p in MODEL_CARDS.glob(f'{name}.*.png')}
    for file, (_, png) in plots.items():  # fonts differ between machines, numbers do not
        with Image.open(io.BytesIO(png)) as new, Image.open(MODEL_CARDS / f'{name}.{file}') as old:
            assert new.text['sformer'] == old.text['sformer'], file


@pytest.mark.parametrize('name', EMBEDDED)
def test_record_names_no_folder_of_a_machine(name):
    """Otherwise run scripts/make_cards.py where the data are, by a relative path."""
    shipped = ROOT / 'sformer/saving/weights' / f'{name}.json'
    for path in (MODEL_CARDS / f'{name}.json', MODEL_CARDS / f'{name}.md', shipped):
        assert re.findall(r'(?<=["=\s])/\w+/\S*', path.read_text()) == [], path.name


@pytest.mark.parametrize('name', EMBEDDED)
def test_record_is_of_the_weights_that_ship(name):
    """Otherwise run scripts/make_cards.py."""
    record, shipped = committed(name), json.loads((ROOT / 'sformer/saving/weights' / f'{name}.json').read_text())
    model = timm.create_model(name, pretrained=True).eval()
    assert record.weights_sha256 == state_hash(model.state_dict())
    assert {r['weights_sha256'] for r in record.evaluations.values()} == {record.weights_sha256}
    assert (record.conversion, record.training) == (shipped['conversion'], shipped['training'])
    cfg = model.pretrained_cfg
    assert (record.license, record.input_size) == (cfg['license'], [*cfg['input_size']])
    assert record.base_model is None, 'trained here, so there is no model on the Hub that it is of'
    noted = shipped['evaluation']  # what `sformer list` shows
    assert noted == {key: record.evaluations['eval.json'][key] for key in noted} and 'top1' in noted


def test_record_is_what_is_measured_now():
    """Another processor may round another way: one image of 540."""
    recorded = committed('sformer_nano.digits').evaluations['eval.json']
    now = sformer.evaluate(timm.create_model('sformer_nano.digits', pretrained=True).eval(), 'digits', 'test')
    for key in ('top1', 'source_top1', 'top5', 'agreement'):
        assert abs(recorded[key] - now[key]) < 0.2, key
    for key in ('dataset', 'split', 'num_images', 'dataset_fingerprint', 'weights_sha256', 'param_count'):
        assert recorded[key] == now[key]


def test_a_changed_number_is_noticed(tmp_path):
    """What the tests above would not be worth anything without."""
    before = str(render_card(committed('sformer_nano.digits')))
    for change in (
            lambda r: r.evaluations['eval.json'].update(top1=50.),
            lambda r: r.evaluations['eval.json'].update(num_images=9),
            lambda r: r.curve[0].update(top1=1.), lambda r: r.sfn.update(levels=9),
            lambda r: r.training.update(train_samples=9), lambda r: r.conversion['versions'].update(torch='0')):
        record = copy.deepcopy(committed('sformer_nano.digits'))
        change(record)
        assert str(render_card(record)) != before


def test_make_cards(tmp_path, monkeypatch):
    """The script writes what is committed: the same keys, with one N measured anew."""
    monkeypatch.setattr(make_cards, 'CURVE', (2,))
    make_cards.main(['sformer_nano.digits'], output=tmp_path)
    new = json.loads((tmp_path / 'sformer_nano.digits.json').read_text())
    old = json.loads((MODEL_CARDS / 'sformer_nano.digits.json').read_text())
    assert new.keys() == old.keys() and new['weights_sha256'] == old['weights_sha256']
    assert new['evaluations']['eval.json'].keys() >= old['evaluations']['eval.json'].keys() - {'curve'}
    assert new['curve'][0].keys() == old['curve'][1].keys() and new['curve'][0]['levels'] == 2
    assert abs(new['curve'][0]['top1'] - old['curve'][1]['top1']) < 2
    with pytest.raises(SFormerError, match="no model 'nothing' ships"):
        make_cards.main(['nothing'], output=tmp_path)


def test_stale_records_are_not_rendered(tmp_path):
    name = 'sformer_nano.digits'
    record = json.loads((MODEL_CARDS / f'{name}.json').read_text())
    path = tmp_path / f'{name}.json'
    path.write_text(json.dumps(record))
    make_cards.main([name], output=tmp_path, render_only=True)
    (tmp_path / f'{name}.md').unlink()
    path.write_text(json.dumps(dict(record, weights_sha256='0' * 64)))
    with pytest.raises(SFormerError, match='of other weights than ship now: measure it again, without --render-only'):
        make_cards.main([name], output=tmp_path, render_only=True)
    assert not (tmp_path / f'{name}.md').exists()


@pytest.mark.parametrize('name', EMBEDDED)
def test_snippet_runs(name):
    run_snippet((MODEL_CARDS / f'{name}.md').read_text())


@pytest.mark.parametrize('name', EMBEDDED)
def test_metadata_of_committed_cards(name):
    data = ModelCard.load(MODEL_CARDS / f'{name}.md').data
    record = committed(name)
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', record.license)
    assert data.model_name == name and 'spiking-neural-network' in data.tags and 'arxiv:2510.23383' in data.tags
    assert [r.metric_value for r in data.eval_results] == [
        record.evaluations['eval.json'][key] for key in ('top1', 'top5')]
