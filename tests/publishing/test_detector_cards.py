"""Cards and publication of detectors, by the real client against a stand-in on the loopback interface."""
import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from detection_tools import small_detector, write_coco
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from sformer import SFNConfig, SFormerError
from sformer.detection import convert_detector, evaluate_detector, load_detector, open_coco, save_detector
from sformer.detection.drawing import draw_file
from sformer.files import write_json
from sformer.publishing.cards import render_card, render_eval_results
from sformer.publishing.model_record import load_recorded, read_record
from sformer.publishing.publish import publish

REPO = 'my-org/shapes'
FILES = {'model.safetensors', 'config.json', 'README.md', 'results/eval.json', 'plots/show.png'}
COMMAND = 'sformer evaluate det --data shapes --results-file det/eval.json'


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    """A folder with a detector that segments, its results and a picture; not to be changed."""
    root = tmp_path_factory.mktemp('recorded')
    write_coco(root / 'shapes', 'val', 2)
    data = open_coco(root / 'shapes', 'val', masks=True)
    detector = convert_detector(small_detector(masks=True), data, SFNConfig(levels=32), num_images=2, name='shapes')
    folder = save_detector(detector, root / 'det')
    write_json(folder / 'eval.json', dict(
        model='det', architecture='MaskRCNN', dataset='shapes', split='val', **evaluate_detector(detector, data),
        command=COMMAND))
    draw_file(detector, root / 'shapes' / 'val' / '0.png', folder / 'show.png', 0.)
    return folder


@pytest.fixture
def folder(recorded, tmp_path):
    return Path(shutil.copytree(recorded, tmp_path / 'det'))


@pytest.fixture(scope='module')
def whole_record(recorded):
    """The record of `recorded`, with figures that tell everything apart."""
    record, unused = read_record(recorded, load_recorded(recorded), repo_id=REPO)
    assert not unused

    def figures(first):
        return dict(mAP=first, mAP50=first + .25, mAP75=first + .5)
    record.evaluations['eval.json'].update({
        key: dict(figures(first), per_class=dict(disc=figures(first + 1), square=figures(first + 2)))
        for key, first in dict(boxes=10., masks=20., source_boxes=30., source_masks=40.).items()})
    return record


@pytest.fixture
def record(whole_record):
    return copy.deepcopy(whole_record)


# the card -------------------------------------------------------------------------------------------------------------


def test_everything_measured_is_there(record):
    card = str(render_card(record))
    for row in ('| boxes, mAP [%] | 30.00 | 10.00 |', '| boxes, mAP50 [%] | 30.25 | 10.25 |',
                '| masks, mAP75 [%] | 40.50 | 20.50 |', '| masks, square: mAP [%] | 42.00 | 22.00 |',
                '| detects | disc, square |', '| pyramid | 8 channels at strides of 4, 8, 16, 32 pixels |',
                '| architecture | `sformer_maskrcnn_test_vit_short` |', '| levels N per branch | 32 |',
                '### shapes, split val, 2 images', COMMAND, '2 images of shapes', 'a Mask R-CNN with a simple feature'):
        assert row in card, row
    assert 'top-1' not in card and 'logits' not in card and 'timm.create_model' not in card
    assert card.count('mAP [%]') == 2 + 4 + 2  # over all, by category, and for the index of the Hub


def test_what_was_not_measured_is_absent(record):
    result = record.evaluations['eval.json']
    for key in ('masks', 'source_masks', 'source_boxes'):
        del result[key]
    result['boxes'].update(mAP75=None, per_class={})
    card = str(render_card(record))
    assert '| boxes, mAP [%] | 10.00 |' in card and '| | SFormer |' in card
    assert 'mAP75' not in card and 'masks, mAP' not in card
    record.evaluations.clear()
    card = str(render_card(record))
    assert 'was not evaluated' in card and 'mAP' not in card


def test_metadata(record):
    data = render_card(record).data
    assert (data.library_name, data.pipeline_tag) == ('sformer', 'image-segmentation') and 'timm' not in data.tags
    assert {(r.task_type, r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results} == {
        ('image-segmentation', 'mean_average_precision', f'{kind} {name} [%] on 2 images', value)
        for kind, first in (('masks', 20.), ('boxes', 10.))
        for name, value in (('mAP', first), ('mAP50', first + .25), ('mAP75', first + .5))}
    record.built['masks'] = False
    assert render_card(record).data.pipeline_tag == 'object-detection'
    record.base_model, record.license = 'timm/vit_small_patch14_dinov2.lvd142m', 'apache-2.0'
    card = render_card(record)
    assert (card.data.base_model_relation, card.data.license) == ('finetune', 'apache-2.0')
    assert '| backbone weights | [timm/vit_small_patch14_dinov2.lvd142m]' in str(card)


def test_eval_results_of_the_hub(record):
    assert render_eval_results(record) is None  # of no data set that is on the Hub
    record.dataset_ids = dict(shapes='me/shapes')
    text = render_eval_results(record)
    assert 'id: me/shapes' in text and 'value: 20.0' in text and 'masks mAP [%], split val, 2 images' in text


def test_many_categories_are_not_listed(record):
    names = [f'thing {i}' for i in range(80)]
    record.built['categories'] = dict(enumerate(names, start=1))
    record.evaluations['eval.json']['boxes']['per_class'] = {name: dict(mAP=1.) for name in names}
    card = str(render_card(record))
    assert '| detects | 80 categories |' in card and 'thing 1' not in card and '| boxes, mAP [%] |' in card


def test_markdown_is_not_broken_by_what_is_recorded(record):
    record.built['categories'] = {1: 'a|b\nc'}
    assert r'| detects | a\|b c |' in str(render_card(record))
    picture = dict(record.pictures['show.png'], image='a]b\n[c.png')
    card = str(render_card(record, {f'Detections: {picture["image"]}': 'plots/my show.png'}))
    assert '(plots/my%20show.png)' in card


def test_the_snippet_runs(recorded):
    record, _ = read_record(recorded, load_recorded(recorded))
    code = re.search(r'```python\n(.*?)```', str(render_card(record)), re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names['categories'] == [(3, 'disc'), (7, 'square')]
    assert {*names['found']} == {'boxes', 'labels', 'scores', 'masks'}


def test_card_command(recorded, run_here, tmp_path):
    done = run_here('card', recorded, '-o', tmp_path / 'cards')
    assert done.code == 0 and {p.name for p in (tmp_path / 'cards').iterdir()} == {'det.md', 'det.show.png'}
    text = (tmp_path / 'cards' / 'det.md').read_text()
    assert '![Detections of the source, of the SFormer, and the share of neurons that fire at each patch: 0.png]' \
           '(det.show.png)' in text
    assert run_here('card', recorded, '-o', tmp_path / 'cards').code == 0  # its own files are replaced


# publication ----------------------------------------------------------------------------------------------------------


def test_round_trip(hub, folder, run_here):
    done = run_here('publish', folder, REPO)
    assert done.code == 0 and f'{REPO}: published, {hub.url}/{REPO}/commit/' in done.out
    assert len(hub.repos[REPO].commits) == 2, 'the initial one and ours'
    files = hub.files(REPO)
    assert files.keys() == FILES | {'.gitattributes'}
    for name in ('model.safetensors', 'config.json'):
        assert files[name] == (folder / name).read_bytes()
    assert files['plots/show.png'] == (folder / 'show.png').read_bytes()
    assert json.loads(files['results/eval.json']) == json.loads((folder / 'eval.json').read_text())
    ModelCard(files['README.md'].decode()).validate()
    info = HfApi(endpoint=hub.url).model_info(REPO)
    assert info.pipeline_tag == 'image-segmentation' and info.library_name == 'sformer'
    here, there = load_detector(folder), load_detector(f'hf-hub:{REPO}')
    assert all(torch.equal(a, b) for a, b in zip(
        here.state_dict().values(), there.state_dict().values(), strict=True))
    assert 'nothing has changed' in run_here('publish', folder, REPO).out


def test_dry_run_needs_no_network(hub, folder, run_here, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    done = run_here('publish', folder, REPO, '--dry-run')
    assert done.code == 0 and hub.log == []
    assert {line.split()[2] for line in done.out.splitlines()[1:len(FILES) + 1]} == FILES


def test_private_and_proposed(hub, folder, run_here):
    assert run_here('publish', folder, REPO, '--private').code == 0 and hub.repos[REPO].private
    hub.put('my-org/other', {'mine.txt': b'mine'})
    done = run_here('publish', folder, 'my-org/other', '--create-pr')
    assert done.code == 0 and 'discussions/1' in done.out and set(hub.files('my-org/other')) == {'mine.txt'}
    assert load_detector('hf-hub:my-org/other@refs/pr/1').config.masks


def test_only_what_belongs_to_the_detector_is_published(hub, folder, recorded, run_here):
    """Pictures of other weights, of others, and JPEGs, which do not say of what they are, stay here."""
    with Image.open(recorded / 'show.png') as image:
        image.save(folder / 'theirs.jpg')
        image.save(folder / 'theirs.png')
    detector = load_detector(folder)
    detector.backbone.vit.norm.bias.data += 1
    draw_file(detector, recorded / 'show.png', folder / 'other.png', 0., False)
    result = json.loads((folder / 'eval.json').read_text())
    write_json(folder / 'other.json', dict(result, weights_sha256='0'))
    done = run_here('publish', folder, REPO)
    assert done.code == 0 and 'other.json is not used: it has results of other weights' in done.err
    assert set(hub.files(REPO)) == FILES | {'.gitattributes'}


@pytest.mark.parametrize('changes, message', [
    (dict(boxes=dict(mAP=999)), 'boxes is'), (dict(boxes=dict(mAP='good')), 'boxes is'), (dict(boxes=5), 'boxes is 5'),
    (dict(masks=dict(per_class=dict(disc=dict(mAP=-1)))), 'masks is'), (dict(masks=dict(per_class=[1])), 'masks is'),
    (dict(boxes=None), 'boxes is None'), (dict(source_boxes=dict(mAP50=True)), 'source_boxes is'),
    (dict(num_images=-1), 'num_images is -1'), (dict(problems=5), 'problems is 5'),
], ids=str)
def test_results_that_cannot_be_true(hub, folder, run_here, changes, message):
    result = json.loads((folder / 'eval.json').read_text())
    write_json(folder / 'eval.json', {**result, **changes})
    for options in ([], ['--dry-run', '--force']):
        done = run_here('publish', folder, REPO, *options)
        assert done.code == 1 and message in done.err and 'eval.json' in done.err and done.out == ''
    assert hub.log == []


def test_what_is_refused(hub, folder, run_here, tmp_path):
    source = save_detector(small_detector(), tmp_path / 'source')
    for command in (('publish', source, REPO, '--force'), ('card', source, '-o', tmp_path / 'cards')):
        done = run_here(*command)
        assert done.code == 1 and 'holds a detector without neurons: sformer convert makes an SFormer' in done.err
    leak = json.loads((folder / 'eval.json').read_text())
    write_json(folder / 'eval.json', dict(leak, command='HF_TOKEN=hf_writerWriter02 sformer evaluate det'))
    done = run_here('publish', folder, REPO)
    assert done.code == 1 and 'would publish an access token' in done.err
    (folder / 'eval.json').unlink()
    done = run_here('publish', folder, REPO)
    assert done.code == 1 and 'was not evaluated' in done.err
    config = json.loads((folder / 'config.json').read_text())
    write_json(folder / 'config.json', dict(config, sformer=dict(config['sformer'], calibration=dict(num_images=-1))))
    done = run_here('publish', folder, REPO, '--force')
    assert done.code == 1 and 'num_images is -1' in done.err
    (folder / 'model.safetensors').write_bytes(b'')
    with pytest.raises(SFormerError, match='truncated'):
        publish(folder, REPO)
    assert hub.log == [] and not (tmp_path / 'cards').exists()
