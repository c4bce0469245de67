"""Model cards say what was recorded and nothing else."""
import copy
import json
from dataclasses import replace

import pytest
import torch
import yaml
from card_tools import MODEL_CARDS
from hub_server import HubServer
from huggingface_hub import ModelCard, constants, parse_eval_result_entries

from sformer import SFormerError, save_model
from sformer.evaluation.figures import CLASSIFICATION
from sformer.files import state_hash, write_json
from sformer.publishing.cards import render_card, render_eval_results, write_card
from sformer.publishing.model_record import ModelRecord, read_record
from sformer.publishing.plots import render_plots

pytestmark = pytest.mark.usefixtures('plots_are_drawn_once')

# metadata -------------------------------------------------------------------------------------------------------------

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


def test_cards_pass_the_validation_of_the_hub(record, monkeypatch):
    with HubServer() as hub:
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        for path in MODEL_CARDS.glob('sformer*.md'):
            ModelCard.load(path).validate()
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
    with pytest.raises(SFormerError, match="licence 'fair-noncommercial' is none of .*--base-model"):
        render_card(replace(record, license='fair-noncommercial', base_model=None))


def test_names_that_yaml_does_not_keep(record):
    """A folder may have a line break of Unicode in its name."""
    record.evaluations['eval.json'].update(dataset='a\x85b')
    with pytest.raises(SFormerError, match='the metadata of sformer_nano.digits do not survive YAML; see its records'):
        render_card(record)


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
    record.evaluations['eval.json'].update(dataset='digits', dataset_revision=None)
    assert render_eval_results(record) is None, 'these digits are not on the Hub'


@pytest.mark.parametrize('changes, ids, expected', [
    (dict(), {}, 'uoft-cs/cifar10'),
    (dict(dataset_revision=None), {}, None),
    (dict(dataset='cifar10'), {}, 'uoft-cs/cifar10'),
    (dict(dataset='cifar10', dataset_revision=None), {}, None),
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

LABELS = {'.'.join(leaf.path): leaf.label for figure in CLASSIFICATION.figures.values() if figure.label
          for leaf in figure.leaves()}


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


def test_weights_that_were_changed_after_conversion(saved, model):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.head.weight.mul_(1.1)
    for m, word, relation in ((model, 'without training', 'quantized'), (changed, 'changed afterwards', 'finetune')):
        record, _ = read_record(save_model(m, saved, overwrite=True), m, base_model='my-org/source')
        card = render_card(record)
        assert word in card.text and card.data.base_model_relation == relation


@pytest.mark.parametrize('reasons, words', [
    (('compensated',), ' without training, with weights that compensate for its neurons, with the'),
    (('balanced',), ' without training, with weights that are balanced for its neurons, with the'),
    (('concentrated',),
     ' without training, with weights that have few channels of the residual stream carry most of it, with the'),
    (('reconstructed',), 'source), with weights that were trained block by block to follow that network, with the'),
    (('distilled',), 'source), with weights that were trained to follow that network, with the'),
    (('compensated', 'distilled'),
     'source), with weights that compensate for its neurons and were trained to follow that network, with the'),
    (('compensated', 'fine-tuned'), 'compensate for its neurons and were changed afterwards, with the'),
    (('adapted',), 'source), with weights that were given other shapes or precision, with the'),
], ids=str)
def test_why_weights_have_moved(saved, model, reasons, words):
    """A card asks the record, and says that a network was compared with itself where that is so."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.head.weight.mul_(1.1)
    moved.conversion = replace(moved.conversion, changed=reasons, state_sha256=None)
    folder = save_model(moved, saved, overwrite=True)
    result = dict(weights_sha256=state_hash(moved.state_dict()), dataset='digits', top1=99., source_top1=99.5)
    for source, told in ((None, True), ('vit', False)):
        write_json(folder / 'eval.json', dict(result, source_model=source))
        record, _ = read_record(folder, moved, base_model='my-org/source')
        card = render_card(record)
        assert words in ' '.join(card.text.split()) and card.data.base_model_relation == 'finetune'
        assert ('network of the weights of this model without neurons' in card.text) == told


def test_everything_measured_is_there(record):
    card = str(render_card(record))
    result = record.evaluations['eval.json']
    for key, label in LABELS.items():
        assert f'| {label} |' in card, key
    for key, digits in (('top1', 2), ('top5', 2), ('nll', 4), ('ece', 2)):
        assert f'| {result[f"source_{key}"]:.{digits}f} | {result[key]:.{digits}f} |' in card
    for point in record.curve:
        assert f'| {point["levels"]} | {point["top1"]:.2f} |' in card
    for text in (result['command'], record.conversion['source'], *result['versions'].values(), '2510.23383',
                 record.curve_command, record.training['command'], '256 images of Digits (scikit-learn), split train'):
        assert text in card


@pytest.mark.parametrize('key', LABELS)
@pytest.mark.parametrize('value', ['absent', None])
def test_what_was_not_measured_is_absent(record, key, value):
    result = record.evaluations['eval.json']
    whole, _, part = key.partition('.')
    for values, name in ((result[whole], part),) if part else ((result, key), (result, f'source_{key}')):
        values.pop(name, None) if value == 'absent' else values.update({name: None})
    record.curve = []
    if key == 'top1':  # without it there is no result
        record.evaluations = {}
    card = str(render_card(record))
    assert LABELS[key] not in card and 'None' not in card


def test_nothing_recorded_nothing_said():
    record = ModelRecord('name', 'local-dir:out', 'sformer_tiny', 'abc', [3, 224, 224], 1000)
    card = str(render_card(record))
    assert render_plots(record) == {} and render_eval_results(record) is None
    assert 'was not evaluated' in card and 'None' not in card and 'nan' not in card.lower().replace('nano', '')
    for word in ('top-1', 'license', 'licence', 'base_model', 'model-index', 'datasets:', 'activity, ',
                 'spikes per neuron', '![', 'agreement'):
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
    line = next(line for line in card.splitlines() if line.startswith('Benchmark imagenet-real; images left out 3; '))
    said = {'image size 288', 'interpolation bilinear', 'mixed precision bfloat16', 'processes 4'}
    assert said <= {*line.rstrip('.').split('; ')}


def test_markdown_is_not_broken_by_what_is_recorded(record):
    record.sfn['note'] = 'a | b\nc'
    assert r'| note | a \| b c |' in str(render_card(record))


def test_the_coding_of_spikes_is_named(record):
    card = str(render_card(record))
    for coding, number in record.evaluations['eval.json']['spikes_per_neuron'].items():
        label = 'of them lateral, in graded coding' if coding == 'lateral' else f'{coding} coding'
        assert f'| spikes per neuron, {label} |  | {number:.3f} |' in card


# files ----------------------------------------------------------------------------------------------------------------

def test_written_again(record, tmp_path):
    """What was written here is replaced, whatever it says."""
    card = write_card(record, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert before.keys() == {f'{record.name}.{end}' for end in ('md', 'activity.png', 'accuracy.png')}
    write_card(record, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    record.evaluations['eval.json']['top1'] = 12.34
    assert '12.34' in write_card(record, tmp_path).read_text() and card.read_bytes() != before[card.name]


def test_edited_cards_are_kept(record, tmp_path):
    card = write_card(record, tmp_path)
    before = card.read_text()
    for text in (before.replace('## Limits', '## Known limits'), f'{before}\nMore of it.\n',
                 before.rsplit('<!--', 1)[0], 'mine', ''):
        card.write_text(text)
        with pytest.raises(SFormerError, match=rf'{record.name}\.md is there and holds no card .*; --overwrite'):
            write_card(record, tmp_path)
        assert card.read_text() == text != before
    assert write_card(record, tmp_path, overwrite=True).read_text() == before


def test_pictures_of_others_are_kept(record, tmp_path):
    picture = tmp_path / f'{record.name}.accuracy.png'
    picture.write_bytes(b'mine')
    with pytest.raises(SFormerError, match=r'accuracy\.png .* --overwrite'):
        write_card(record, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [picture.name] and picture.read_bytes() == b'mine'


def test_a_result_that_does_not_say_of_how_many_images(record):
    """It ended in a traceback of a format."""
    counted = next(iter(record.evaluations.values()))['num_images']
    assert f'{counted:,} images' in str(render_card(record))
    record.evaluations = {name: dict(result, num_images=None) for name, result in record.evaluations.items()}
    card = str(render_card(record))
    assert 'None' not in card
