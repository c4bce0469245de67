"""Evaluation: its numbers against ones that are counted here, and what it refuses."""
import copy
import json

import pytest
import timm
import torch
from PIL import Image

import sformer
from sformer import SFNConfig, SFormerError, UncalibratedError, bypass_neurons, convert, evaluate, firing_rates
from sformer.evaluation import FiringRates
from sformer.layers import named_neurons
from sformer.neurons import DirectCoding
from sformer.utils import state_hash


@pytest.fixture(scope='module')
def coarse(source):
    """An SFormer that is wrong often enough for its mistakes to be counted."""
    return convert(source, 'digits', SFNConfig(levels=2), split='train')


@pytest.fixture(scope='module')
def result(coarse):
    return evaluate(coarse, 'digits', 'test', firing_images=540)


def rate_by_hand(model, images):
    """Spikes and neurons per site, from the levels that the neurons say they fire."""
    fired, total = {}, {}

    def hook(name):
        def count(neuron, args):
            spikes = neuron.spikes(args[0])
            fired[name] = fired.get(name, 0) + int((spikes != 0).sum())
            total[name] = total.get(name, 0) + spikes.numel()
        return count
    handles = [n.register_forward_pre_hook(hook(name)) for name, n in named_neurons(model)
               if not isinstance(n, DirectCoding)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return fired, total


def test_numbers(coarse, source, digits, result):
    images, labels = digits
    with torch.no_grad():
        out, expected = coarse(images), source(images)

    def top(logits, k):
        order = logits.argsort(dim=1, descending=True)[:, :k]
        return 100 * sum(int(y) in row for row, y in zip(order.tolist(), labels, strict=True)) / 540
    assert result['num_images'] == 540 and result['dataset'] == 'digits' and result['split'] == 'test'
    assert result['top1'] == pytest.approx(top(out, 1), abs=1e-3)
    assert result['top5'] == pytest.approx(top(out, 5), abs=1e-3)
    assert result['source_top1'] == pytest.approx(top(expected, 1), abs=1e-3)
    assert result['source_top5'] == pytest.approx(top(expected, 5), abs=1e-3)
    same = (out.argmax(1) == expected.argmax(1)).double().mean().item()
    assert result['agreement'] == pytest.approx(100 * same, abs=1e-3)
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert result['relative_logit_error'] == pytest.approx(error.item(), rel=1e-3)
    assert result['top1_err'] == pytest.approx(100 - result['top1'])
    assert result['top5_err'] == pytest.approx(100 - result['top5'])
    # each of them says something else, or the comparison above would prove little
    values = [result[k] for k in ('top1', 'source_top1', 'agreement', 'top5')]
    assert len(set(values)) == 4, values


def test_what_was_measured(coarse, result):
    json.dumps(result)
    assert result['model'] == 'sformer_tiny' and result['batch_size'] == 64 and result['seed'] == 0
    assert result['weights_sha256'] == state_hash(coarse.state_dict())
    assert result['param_count'] == pytest.approx(0.2022)
    assert result['seconds'] > 0 and result['images_per_second'] == pytest.approx(540 / result['seconds'], rel=0.05)
    assert result['versions']['timm'] == timm.__version__


def test_source_comparison_is_an_evaluation_of_the_source(coarse, result):
    alone = evaluate(sformer.source_of(coarse), 'digits', 'test')
    assert alone['top1'] == result['source_top1'] and alone['top5'] == result['source_top5']
    assert not {'source_top1', 'firing_rate'} & alone.keys()
    explicit = evaluate(coarse, 'digits', 'test', source=sformer.source_of(coarse))
    for key in ('top1', 'source_top1', 'source_top5', 'agreement'):
        assert explicit[key] == result[key]
    assert explicit['relative_logit_error'] == pytest.approx(result['relative_logit_error'], rel=1e-4)


def test_without_a_source(coarse, result):
    alone = evaluate(coarse, 'digits', 'test', source=False)
    assert alone['top1'] == result['top1']
    assert not {'source_top1', 'source_top5', 'agreement', 'relative_logit_error'} & alone.keys()


def test_agreement_with_another_network(source, coarse):
    """The source may be any network, and then the agreement is with that one."""
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()
    r = evaluate(coarse, 'digits', 'test', source=Constant())
    assert r['source_top1'] == pytest.approx(100 * 55 / 540, abs=0.5)
    assert 5 < r['agreement'] < 15


def test_firing_rates(coarse, digits, result):
    fired, total = rate_by_hand(coarse, digits[0])
    assert result['firing_images'] == 540
    assert result['firing_rates'].keys() == fired.keys(), 'pixels are coded directly and do not count'
    for name, rate in result['firing_rates'].items():
        assert rate == pytest.approx(fired[name] / total[name], abs=1e-4), name
    assert result['firing_rate'] == pytest.approx(sum(fired.values()) / sum(total.values()), abs=1e-4)
    assert 0.1 < result['firing_rate'] < 0.9


def test_firing_rates_of_a_batch(coarse, images):
    fired, total = rate_by_hand(coarse, images)
    assert firing_rates(coarse, images) == {name: fired[name] / total[name] for name in fired}


def test_firing_rates_leave_no_hooks(model, images):
    rates = FiringRates()
    assert rates.mean() is None
    with pytest.raises(AssertionError), rates.observe(model):
        model(images[:, :, :3])
    assert not any(n._forward_hooks for _, n in named_neurons(model))


def test_fewer_levels_and_dead_zones_fire_less(source, images):
    rates = [evaluate(convert(source, [images], SFNConfig(**kwargs)), 'digits', source=False)['firing_rate']
             for kwargs in (dict(levels=32), dict(levels=32, dead_zone=3.), dict(levels=2))]
    assert rates[0] > rates[1] > 0 and rates[0] > rates[2] > 0


@pytest.mark.parametrize('batch_size', [7, 540])
def test_batch_size_does_not_matter(coarse, result, batch_size):
    other = evaluate(coarse, 'digits', 'test', batch_size=batch_size, firing_images=540)
    for key in ('top1', 'top5', 'source_top1', 'agreement', 'dataset_fingerprint', 'weights_sha256'):
        assert other[key] == result[key], key
    assert other['relative_logit_error'] == pytest.approx(result['relative_logit_error'], rel=1e-3)
    assert other['firing_rate'] == pytest.approx(result['firing_rate'], rel=1e-3)


def test_firing_is_counted_on_as_many_images_as_said(coarse, digits):
    result = evaluate(coarse, 'digits', 'test', batch_size=50, firing_images=120)
    assert result['firing_images'] == 150, 'whole batches'
    fired, total = rate_by_hand(coarse, digits[0][:150])
    assert result['firing_rate'] == pytest.approx(sum(fired.values()) / sum(total.values()), abs=1e-4)


def test_subset(coarse, result):
    a, b, c = (evaluate(coarse, 'digits', num_images=100, seed=seed) for seed in (0, 0, 1))
    assert a['num_images'] == 100
    assert a['dataset_fingerprint'] == b['dataset_fingerprint'] and a['top1'] == b['top1']
    assert len({r['dataset_fingerprint'] for r in (a, c, result)}) == 3


def test_workers(coarse, result):
    assert evaluate(coarse, 'digits', 'test', workers=1)['top1'] == result['top1']


def test_default_split_is_the_one_for_evaluation(coarse, result):
    default = evaluate(coarse, 'digits')
    assert (default['split'], default['dataset_fingerprint']) == ('test', result['dataset_fingerprint'])
    train = evaluate(coarse, 'digits', 'train', num_images=10)
    assert train['split'] == 'train'


def test_model_is_left_as_it_was(model):
    training = copy.deepcopy(model).train()
    training.head_drop.p = 0.9  # shows in the accuracy if it acts
    before = state_hash(training.state_dict())
    result = evaluate(training, 'digits', num_images=32)
    assert training.training and state_hash(training.state_dict()) == before
    assert all('forward' not in n.__dict__ and not n._forward_hooks for _, n in named_neurons(training))
    assert result['top1'] == evaluate(model, 'digits', num_images=32)['top1'], 'evaluated in training mode'


def test_bfloat16(model, result):
    half = evaluate(copy.deepcopy(model).bfloat16(), 'digits')
    assert half['top1'] > 97 and half['agreement'] > 97


def test_bypassed_neurons_are_the_source(model, source, images):
    with torch.no_grad():
        with bypass_neurons(model):
            torch.testing.assert_close(model(images), source(images), atol=1e-4, rtol=1e-4)
        assert not torch.equal(model(images), source(images))


# refused --------------------------------------------------------------------------------------------------------------

def test_uncalibrated_is_refused(model):
    with pytest.raises(UncalibratedError, match=r'33 neurons .* blocks\.0\.attn\.qkv\.neuron'):
        evaluate(timm.create_model('sformer_nano', img_size=8, in_chans=1, num_classes=10), 'digits')
    one = copy.deepcopy(model)
    one.head.neuron.calibrated.fill_(False)
    with pytest.raises(UncalibratedError, match=r'1 neurons .* head\.neuron'):
        evaluate(one, 'digits')


def test_labels_out_of_range(model):
    five = copy.deepcopy(model)
    five.reset_classifier(5)
    five.train()
    with pytest.raises(SFormerError, match=r'digits has label 9, the model has 5 classes'):
        evaluate(five, 'digits')
    assert five.training, 'an error leaves the model in eval mode'


def test_model_without_a_classifier(model):
    headless = copy.deepcopy(model)
    headless.reset_classifier(0)
    with pytest.raises(SFormerError, match='class'):
        evaluate(headless, 'digits')


def test_nan_logits_are_located(model):
    broken = copy.deepcopy(model)
    broken.head.bias.data[0] = float('nan')
    with pytest.raises(SFormerError, match=r'NaN or infinite logits on images 0 to 63 of digits'):
        evaluate(broken, 'digits')


def test_dataset_without_labels(model, tmp_path):
    with pytest.raises(SFormerError, match='no labels'):
        evaluate(model, 'dead-leaves')
    Image.new('L', (8, 8)).save(tmp_path / 'a.png')
    with pytest.raises(SFormerError, match='no labels'):
        evaluate(model, str(tmp_path))


def test_unknown_dataset_and_split(model, tmp_path):
    with pytest.raises(SFormerError, match='is not a folder'):
        evaluate(model, str(tmp_path / 'nowhere'))
    with pytest.raises(SFormerError, match="no split 'val'"):
        evaluate(model, 'digits', 'val')
    with pytest.raises(SFormerError, match='541 images asked for'):
        evaluate(model, 'digits', 'test', num_images=541)


def test_one_image(model):
    result = evaluate(model, 'digits', num_images=1)
    assert result['num_images'] == 1 and result['top1'] in (0, 100)


def test_two_classes(own_source, tmp_path, images):
    """Top-5 of fewer than five classes is top-2."""
    own_source.reset_classifier(2)
    for name in 'ab':
        (tmp_path / name).mkdir()
        Image.new('L', (8, 8), 100 + ord(name)).save(tmp_path / name / '0.png')
    result = evaluate(convert(own_source, [images]), str(tmp_path))
    assert result['top5'] == 100 and result['num_images'] == 2
