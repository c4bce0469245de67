"""Model cards say what was recorded and nothing else; those in model_cards/ say what their records say."""
import copy
import importlib.util
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from PIL import Image

import sformer
from sformer import SFormerError, cli, load_model, save_model
from sformer.cards import (
    SIDES,
    SINGLE,
    Record,
    read_record,
    recorded_results,
    render_card,
    render_eval_results,
    render_plots,
    write_card,
)
from sformer.utils import state_hash, write_json

ROOT = Path(__file__).parents[1]
MODEL_CARDS = ROOT / 'model_cards'


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'scripts' / f'{name}.py')
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_cards = script('make_cards')
EMBEDDED = [n for n in timm.list_models('sformer*', include_tags=True) if timm.get_pretrained_cfg(n).file]


def committed(name):
    return Record(**json.loads((MODEL_CARDS / f'{name}.json').read_text()))


@pytest.fixture
def record():
    """A record with everything in it, of the test's own."""
    record = copy.deepcopy(committed('sformer_nano.digits'))
    record.base_model, record.load_name = 'timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k', 'hf-hub:my-org/name'
    record.evaluations['eval.json'].update(
        dataset='uoft-cs/cifar10', dataset_revision='0123abc', nll=0.1234, source_nll=0.1111, ece=1.5, source_ece=1.25)
    return record


# the cards of this repository -----------------------------------------------------------------------------------------

def test_every_embedded_model_has_a_card():
    assert set(EMBEDDED) == set(make_cards.embedded()) == {p.stem for p in MODEL_CARDS.glob('sformer*.md')}


@pytest.mark.parametrize('name', EMBEDDED)
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
def test_record_is_of_the_weights_that_ship(name):
    """Otherwise run scripts/make_cards.py."""
    record, shipped = committed(name), json.loads((ROOT / 'sformer/weights' / f'{name}.json').read_text())
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
            lambda r: r.curve[0].update(top1=1.), lambda r: r.conversion['recipe'].update(levels=9),
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


@pytest.mark.parametrize('name', EMBEDDED)
def test_snippet_runs(name):
    run_snippet((MODEL_CARDS / f'{name}.md').read_text())


def run_snippet(card):
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    assert code.startswith('import sformer\n')
    names = {}
    exec(code, names)
    classes = int(re.search(r'# \(1, (\d+)\)', code)[1])
    assert names['logits'].shape == (1, classes) and torch.isfinite(names['logits']).all()


# metadata -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', EMBEDDED)
def test_metadata_of_committed_cards(name):
    data = ModelCard.load(MODEL_CARDS / f'{name}.md').data
    record = committed(name)
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', record.license)
    assert data.model_name == name and 'spiking-neural-network' in data.tags and 'arxiv:2510.23383' in data.tags
    assert [r.metric_value for r in data.eval_results] == [
        record.evaluations['eval.json'][key] for key in ('top1', 'top5')]


def test_metadata(record):
    data = ModelCard(str(render_card(record))).data
    assert data.base_model == record.base_model and data.base_model_relation == 'quantized'
    assert data.datasets == ['uoft-cs/cifar10'] and data.metrics == ['accuracy']
    top1 = data.eval_results[0]
    assert (top1.dataset_type, top1.dataset_split, top1.dataset_revision) == ('uoft-cs/cifar10', 'test', '0123abc')
    assert (top1.metric_type, top1.metric_value) == ('accuracy', record.evaluations['eval.json']['top1'])


def test_metadata_survive_a_second_reading(record):
    card = render_card(record)
    assert str(ModelCard(str(card))) == str(card)


@pytest.mark.parametrize('name', EMBEDDED)
def test_cards_pass_the_validation_of_the_hub(name, record, monkeypatch):
    with HubServer() as hub:
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        ModelCard.load(MODEL_CARDS / f'{name}.md').validate()
        for license in ('apache-2.0', None, 'dinov3-license'):
            render_card(replace(record, license=license)).validate()
        bad = render_card(record)
        bad.data.base_model_relation = 'converted'
        with pytest.raises(ValueError, match='base_model_relation'):
            bad.validate()


def test_license_that_the_hub_has_no_name_for(record):
    data = render_card(replace(record, license='fair-noncommercial')).data
    assert (data.license, data.license_name) == ('other', 'fair-noncommercial')
    assert data.license_link == f'https://huggingface.co/{record.base_model}'
    with pytest.raises(SFormerError, match="'fair-noncommercial' is none of .*--base-model"):
        render_card(replace(record, license='fair-noncommercial', base_model=None))


@pytest.mark.parametrize('base_model', ['a/b/c', 'no spaces', 'x/..', ''])
def test_base_model_that_can_not_be(record, base_model):
    if base_model:
        with pytest.raises(SFormerError, match='[Rr]epo'):
            render_card(replace(record, base_model=base_model))
    else:
        assert 'base_model' not in render_card(replace(record, base_model=base_model)).data.to_dict()


def test_eval_results_of_the_hub(record):
    entry, = parse_eval_result_entries(yaml.safe_load(render_eval_results(record)))
    result = record.evaluations['eval.json']
    assert (entry.dataset_id, entry.value, entry.dataset_revision) == ('uoft-cs/cifar10', result['top1'], '0123abc')
    assert entry.notes == 'top-1 accuracy [%], split test, 540 images'
    assert render_eval_results(committed('sformer_nano.digits')) is None, 'these digits are not on the Hub'


@pytest.mark.parametrize('changes, ids, expected', [
    (dict(), {}, 'uoft-cs/cifar10'),
    (dict(dataset_revision=None), {}, None),
    (dict(dataset='data/cifar10', dataset_revision=None), {}, None),
    (dict(dataset='data/cifar10', dataset_revision=None), {'data/cifar10': 'uoft-cs/cifar10'}, 'uoft-cs/cifar10'),
    (dict(dataset='/home/me/cifar10'), {}, None),
    (dict(dataset='digits'), {}, None),
], ids=str)
def test_datasets_that_are_not_on_the_hub(record, changes, ids, expected):
    """A folder is not taken for a dataset of the Hub, nor a name of the Hub guessed."""
    record.evaluations['eval.json'].update(changes)
    record.dataset_ids = ids
    data = render_card(record).data.to_dict()
    assert data.get('datasets') == ([expected] if expected else None)
    assert bool(render_eval_results(record)) == bool(expected)
    assert '/home/me' not in json.dumps(data)


def test_folder_by_the_name_of_a_dataset(record, tmp_path, monkeypatch):
    """Of results that do not say where the images were from."""
    del record.evaluations['eval.json']['dataset_revision']
    assert render_eval_results(record)
    (tmp_path / 'uoft-cs' / 'cifar10').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert render_eval_results(record) is None


# what was not measured is absent --------------------------------------------------------------------------------------

LABELS = {key: label for label, key, *_ in (*SIDES, *SINGLE)}


def test_index_lists_what_compares(record):
    """Other labels are no accuracy of the dataset, and a part of it none of the whole."""
    whole = record.evaluations['eval.json']
    record.evaluations.update({
        'real.json': dict(whole, top1=85.25, benchmark='imagenet-real'),
        'part.json': dict(whole, top1=50.5, num_images=whole['num_images'] // 2)})
    for text in (str(render_card(record).data), render_eval_results(record)):
        assert str(whole['top1']) in text and '85.25' not in text and '50.5' not in text
    card = render_card(record).text
    assert '85.25' in card and 'imagenet-real' in card and '50.50' in card


def test_weights_that_were_changed_after_conversion(folder, model):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.head.weight.mul_(1.1)
    for m, word, relation in ((model, 'without training', 'quantized'), (changed, 'changed afterwards', 'finetune')):
        record, _ = read_record(save_model(m, folder, overwrite=True), m, base_model='my-org/source')
        card = render_card(record)
        assert word in card.text and card.data.base_model_relation == relation


def test_everything_measured_is_there(record):
    card = str(render_card(record))
    result = record.evaluations['eval.json']
    for key, label in LABELS.items():
        assert f'| {label} |' in card, key
    for _, key, source, spec in SIDES:
        assert f'| {result[source]:{spec}} | {result[key]:{spec}} |' in card
    for point in record.curve:
        assert f'| {point["levels"]} | {point["top1"]:.2f} |' in card
    for text in (result['command'], record.conversion['source'], *result['versions'].values(), '2510.23383',
                 record.curve_command, record.training['command'], '256 images of Digits (scikit-learn), split train'):
        assert text in card


@pytest.mark.parametrize('key', LABELS)
@pytest.mark.parametrize('value', ['absent', None])
def test_what_was_not_measured_is_absent(record, key, value):
    result = record.evaluations['eval.json']
    for name in (key, f'source_{key}'):
        result.pop(name, None) if value == 'absent' else result.update({name: None})
    record.curve = []
    if key == 'top1':  # without it there is no result
        record.evaluations = {}
    card = str(render_card(record))
    assert LABELS[key] not in card and 'None' not in card


def test_nothing_recorded_nothing_said():
    record = Record('name', 'local-dir:out', 'sformer_tiny', 'abc', [3, 224, 224], 1000)
    card = str(render_card(record))
    assert render_plots(record) == {} and render_eval_results(record) is None
    assert 'was not evaluated' in card and 'None' not in card and 'nan' not in card.lower().replace('nano', '')
    for word in ('top-1', 'license', 'base_model', 'model-index', 'datasets:', 'firing rate', '![', 'agreement'):
        assert word not in card, word


def test_without_a_source_alongside(record):
    result = record.evaluations['eval.json']
    for key in [k for k in result if k.startswith('source_')] + ['agreement', 'relative_logit_error']:
        del result[key]
    card = str(render_card(record))
    assert '| | SFormer |' in card and '| | source |' not in card
    assert f'| top-1 [%] | {result["top1"]:.2f} |' in card


def test_settings_that_change_a_result_are_said(record):
    record.evaluations['eval.json'].update(
        benchmark='imagenet-real', amp='bfloat16', skipped_images=3, world_size=4, img_size=288)
    card = str(render_card(record))
    assert ('Benchmark imagenet-real; image size 288; crop 1.0; interpolation bilinear; mixed precision bfloat16; '
            'device cpu; processes 4') in card
    assert 'images left out 3' in card


def test_markdown_is_not_broken_by_what_is_recorded(record):
    record.conversion['recipe']['note'] = 'a | b\nc'
    assert r'| note | a \| b c |' in str(render_card(record))


def test_plots_carry_their_numbers(record):
    plots = render_plots(record)
    assert plots.keys() == {'firing_rates.png', 'accuracy.png'}
    assert render_plots(record) == plots, 'a plot that changes is a commit without a change'
    with Image.open(io.BytesIO(plots['accuracy.png'][1])) as image:
        assert json.loads(image.text['sformer'])['top1'] == {str(r['levels']): r['top1'] for r in record.curve}
    record.curve = []
    assert render_plots(record).keys() == {'firing_rates.png'}


# results files --------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(model, tmp_path):
    return save_model(model, tmp_path / 'out')


def test_results_files(folder):
    own = state_hash(load_model(folder).state_dict())
    good, other = (dict(weights_sha256=h, dataset='digits', top1=99., num_images=3) for h in (own, 'ff'))
    write_json(folder / 'a.json', good)
    write_json(folder / 'b.json', other)
    write_json(folder / 'both.json', [other, dict(good, top1=98.)])
    write_json(folder / 'other.json', dict(top1=1, dataset='x'))
    (folder / 'broken.json').write_text('{')
    (folder / 'list.json').write_text('[1, null]')
    results, others = recorded_results(folder, own)
    assert {name: r['top1'] for name, r in results.items()} == {'a.json': 99., 'both.json': 98.}
    assert others == ['b.json']
    write_json(folder / 'a.json', dict(good, top1='very good'))
    with pytest.raises(SFormerError, match=r'a\.json is not as sformer evaluate wrote it'):
        recorded_results(folder, own)


def test_source_that_was_not_published_is_no_base_model(folder, model):
    """The config of a ViT that was trained by somebody still has the tag and the license of timm's weights."""
    assert model.conversion['source_tag'] == 'augreg_in21k_ft_in1k'
    record, _ = read_record(folder, model, repo_id='my-org/name')
    assert record.base_model is None and record.license is None
    record, _ = read_record(folder, model, license='mit', base_model='me/mine')
    data = render_card(record).data
    assert (data.license, data.base_model) == ('mit', 'me/mine')


# command line ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(capsys):
    def run(*args):
        with pytest.raises(SystemExit) as done:
            cli.main([str(a) for a in args])
        return done.value.code, *capsys.readouterr()
    return run


def test_card_command(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = dict(sformer.evaluate(load_model(folder), 'digits', 'test', num_images=50), command='sformer evaluate')
    write_json(folder / 'eval.json', result)
    write_json(folder / 'theirs.json', dict(result, weights_sha256='0'))
    code, out, err = run('card', 'out')
    assert (code, out) == (0, 'card in model_cards/out.md\n') and 'theirs.json is not used' in err
    text = Path('model_cards/out.md').read_text()
    assert f'| top-1 [%] | {result["source_top1"]:.2f} | {result["top1"]:.2f} |' in text and '50 images' in text
    assert {p.name for p in Path('model_cards').iterdir()} == {'out.md', 'out.firing_rates.png'}
    run_snippet(text)
    code, _, _ = run('card', 'out', '--name', 'x', '--repo', 'my-org/y', '--license', 'mit', '--base-model', 'me/mine',
                     '--dataset-id', 'digits=me/digits', '-o', 'cards')
    data = ModelCard.load(Path('cards/x.md')).data
    assert code == 0 and (data.license, data.base_model, data.datasets) == ('mit', 'me/mine', ['me/digits'])
    assert "create_model('hf-hub:my-org/y'" in Path('cards/x.md').read_text()


@pytest.mark.parametrize('options, message', [
    (['nowhere'], 'holds no SFormer'), (['out', '--repo', 'x'], 'org/name'),
    (['out', '--license', 'mine'], "license 'mine' is none of"), (['out', '--base-model', 'a b'], 'Repo id'),
    (['out', '--dataset-id', 'x'], 'NAME=org/dataset'), (['out', '-o', 'out/config.json'], 'config.json'),
], ids=str)
def test_bad_options_of_card(run, folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run('card', *options)
    assert code == 1 and out == '' and len(err.splitlines()) == 1 and message in err
    assert {p.name for p in tmp_path.iterdir()} == {'out'}
