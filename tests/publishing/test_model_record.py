"""What is recorded about a model, and what of it cannot be true."""
import json

import pytest

from sformer import SFormerError, load_model
from sformer.files import state_hash, write_json
from sformer.publishing.cards import render_card
from sformer.publishing.model_record import neuron_configs, read_record, recorded_results


def test_results_files(saved):
    own = state_hash(load_model(saved).state_dict())
    good, other = (dict(weights_sha256=h, dataset='digits', top1=99., num_images=3) for h in (own, 'ff'))
    write_json(saved / 'a.json', good)
    write_json(saved / 'b.json', other)
    write_json(saved / 'both.json', [other, dict(good, top1=98.)])
    write_json(saved / 'other.json', dict(top1=1, dataset='x'))
    (saved / 'broken.json').write_text('{')
    (saved / 'list.json').write_text('[1, null]')
    results, others = recorded_results(saved, own)
    assert {name: r['top1'] for name, r in results.items()} == {'a.json': 99., 'both.json': 98.}
    assert others == ['b.json']
    write_json(saved / 'a.json', dict(good, top1='very good'))
    with pytest.raises(SFormerError, match=r'a\.json is not as sformer evaluate wrote it'):
        recorded_results(saved, own)


def test_results_files_come_by_name(tmp_path):
    names = [f'{i * 7 % 12:02d}.json' for i in range(12)]  # none of a file system's orders is that by name
    for name in names:
        write_json(tmp_path / name, dict(weights_sha256='ab' if name < '06' else 'cd', dataset='digits', top1=1.))
    results, others = recorded_results(tmp_path, 'ab')
    assert [*results, *others] == sorted(names)


def test_source_that_was_not_published_is_no_base_model(saved, model):
    """The config of a ViT that timm builds has the tag and the license of timm's weights, whoever trained it."""
    assert model.conversion.source_tag is None
    record, _ = read_record(saved, model, repo_id='my-org/name')
    assert record.base_model is None and record.license is None
    record, _ = read_record(saved, model, license='mit', base_model='me/mine')
    data = render_card(record).data
    assert (data.license, data.base_model) == ('mit', 'me/mine')


def test_neurons_of_a_config(saved, model):
    sfn, fit = neuron_configs(json.loads((saved / 'config.json').read_text()))
    assert sfn['levels'] == model.sfn_config.levels and sfn['attention_fire'] == model.sfn_config.attention_fire
    assert fit['estimator'] == 'mse' and not sfn.keys() & fit.keys()
    record, _ = read_record(saved, model)
    assert (record.sfn, record.fit) == (sfn, fit)
    assert neuron_configs({}) == ({}, {})


@pytest.mark.parametrize('changes', [
    dict(top1=999), dict(top1=-5), dict(top1=True), dict(top1=None), dict(top1=float('nan')), dict(top5='99'),
    dict(source_ece=101), dict(agreement=[1]), dict(nll=-1), dict(nll=float('inf')), dict(relative_logit_error='small'),
    dict(num_images='540'), dict(num_images=1.5), dict(num_images=-1), dict(dataset=5), dict(split=['test']),
    dict(activity=1.5), dict(activity_per_site=[0.5]), dict(activity_per_site=dict(head=2)),
    dict(spikes_per_neuron=dict(unary=-1)), dict(spikes_per_neuron=3), dict(versions=dict(torch=2)), dict(command=1),
    dict(crop_pct='1'), dict(curve=dict(levels=4)), dict(curve=[4]), dict(curve=[dict(levels=4)]),
    dict(curve=[dict(levels='4', top1=1)]), dict(curve=[dict(levels=4, top1=101)]), dict(note=float('nan')),
], ids=str)
def test_results_that_cannot_be_true(tmp_path, changes):
    result = dict(weights_sha256='ab', dataset='digits', split=None, top1=99.5, nll=None, num_images=540,
                  activity_per_site=dict(head=0.5), curve=[dict(levels=4, top1=90)])
    write_json(tmp_path / 'r.json', result)
    assert recorded_results(tmp_path, 'ab')[0] == {'r.json': result}
    write_json(tmp_path / 'r.json', {**result, **changes})
    with pytest.raises(SFormerError, match=r'r\.json is not as sformer evaluate wrote it: ') as caught:
        recorded_results(tmp_path, 'ab')
    assert '\n' not in str(caught.value)
    assert recorded_results(tmp_path, 'cd') == ({}, ['r.json']), 'nobody publishes it'


@pytest.mark.parametrize('changes, key', [
    (dict(source_weights=5), 'source_weights'), (dict(source=['vit']), 'source'), (dict(command=1), 'command'),
    (dict(calibration=dict(num_images='many')), 'num_images'), (dict(calibration=dict(name=3)), 'name'),
    (dict(calibration=dict(num_images=-1)), 'num_images'), (dict(versions=dict(torch=None)), 'versions'),
], ids=str)
def test_conversions_that_cannot_be_true(saved, model, changes, key):
    config = json.loads((saved / 'config.json').read_text())
    write_json(saved / 'config.json', dict(config, sformer={**config['sformer'], **changes}))
    with pytest.raises(SFormerError, match=rf'config\.json.*: {key} is ') as caught:
        read_record(saved, model)
    assert '\n' not in str(caught.value)


def test_neurons_that_cannot_be_true(saved, model):
    config = json.loads((saved / 'config.json').read_text())
    config['model_args']['sfn']['levels'] = 'many'
    write_json(saved / 'config.json', config)
    with pytest.raises(SFormerError, match=r"config\.json cannot be published: levels is 'many'"):
        read_record(saved, model)
