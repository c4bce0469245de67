"""Networks: views of models and their sources, shared where they are the same, prepared alike."""
import copy
from collections import Counter

import pytest
import timm
import torch
from conftest import NANO
from evaluation_tools import steady
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel

import sformer
from sformer import EvaluationConfig, SFormer, SFormerError, convert, evaluate, evaluate_all
from sformer.files import state_hash
from sformer.layers import named_neurons, shared_copy, source_view


def test_source_comparison_is_an_evaluation_of_the_source(coarse, result):
    alone = evaluate(sformer.source_of(coarse), 'digits', 'test')
    assert alone['top1'] == result['source_top1'] and alone['top5'] == result['source_top5']
    assert not {'source_top1', 'activity', 'spikes_per_neuron'} & alone.keys()
    explicit = evaluate(coarse, 'digits', 'test', source=sformer.source_of(coarse))
    for key in ('top1', 'source_top1', 'source_top5', 'agreement', 'relative_logit_error', 'source_nll'):
        assert explicit[key] == result[key], 'the network that is inside'


def test_agreement_with_another_network(source, coarse):
    """The source may be any network, and then the agreement is with that one."""
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()
    r = evaluate(coarse, 'digits', 'test', source=Constant())
    assert r['source_top1'] == pytest.approx(100 * 55 / 540, abs=0.5)
    assert 5 < r['agreement'] < 15


def test_source_of_its_own_is_prepared_like_the_model(model, source):
    result = evaluate(model, 'digits', num_images=64, source=source, img_size=12)
    assert result['img_size'] == 12 and result['agreement'] > 80


def test_model_is_left_as_it_was(model):
    training = copy.deepcopy(model).train()
    training.head_drop.p = 0.9  # shows in the accuracy if it acts
    before = state_hash(training.state_dict())
    result = evaluate(training, 'digits', num_images=32)
    assert training.training and state_hash(training.state_dict()) == before
    assert not any('forward' in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in training.modules())
    assert result['top1'] == evaluate(model, 'digits', num_images=32)['top1'], 'evaluated in training mode'


def test_overrides(model):
    result = evaluate(model, 'digits', num_images=32, img_size=12, crop_pct=0.9, interpolation='bicubic')
    assert (result['img_size'], result['crop_pct'], result['interpolation']) == (12, 0.9, 'bicubic')
    usual = evaluate(model, 'digits', num_images=32)
    assert (usual['img_size'], usual['crop_pct'], usual['interpolation']) == (8, 1.0, 'bilinear')
    assert usual['weights_sha256'] == result['weights_sha256'] and usual['nll'] != result['nll']
    assert model.patch_embed.img_size == (8, 8), 'the model itself is left alone'
    for wrong in (dict(img_size=9, crop_pct=2.), dict(interpolation='cubist'), dict(amp='int3'), dict(batch_size=0)):
        with pytest.raises(SFormerError):
            evaluate(model, 'digits', num_images=8, **wrong)


def test_comparison_is_several_evaluations(model, coarse, source, digit_files, monkeypatch):
    """With another preprocessing for one of them, and one pass over the images for all."""
    other = copy.deepcopy(source)
    other.pretrained_cfg = dict(other.pretrained_cfg, mean=(0.4,), interpolation='nearest', crop_pct=0.9)
    folder = digit_files(1, 100)
    alone = [evaluate(m, folder) for m in (model, coarse, other)]
    reads, read = [], Image.open
    monkeypatch.setattr(Image, 'open', lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs))
    calls = count_forwards(monkeypatch)
    together = evaluate_all([model, coarse, other], EvaluationConfig(dataset=folder))
    assert [steady(r) for r in together] == [steady(r) for r in alone]
    assert len(reads) == 100
    assert calls == {SFormer: 4, VisionTransformer: 4}, 'the source of both, once per batch'
    assert len({r['nll'] for r in together}) == 3


def count_forwards(monkeypatch):
    """Forward passes by class."""
    calls, forward = Counter(), VisionTransformer.forward
    monkeypatch.setattr(
        VisionTransformer, 'forward', lambda self, *args: calls.update([type(self)]) or forward(self, *args))
    return calls


def smoothed(model):
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.norm1.eps = 1.
    return other


def hooked(model):
    other = copy.deepcopy(model)
    other.register_forward_hook(lambda module, args, out: -out)
    return other


def patched(model):
    other = copy.deepcopy(model)
    forward = other.norm.forward
    other.norm.forward = lambda x: -forward(x)
    return other


def rebuilt(model):
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.mlp.act = torch.nn.ReLU()
    return other


@pytest.mark.parametrize('change', [smoothed, hooked, patched, rebuilt])
def test_equal_weights_do_not_make_equal_sources(model, images, change, monkeypatch):
    other = change(model)
    alone = [evaluate(m, 'digits', num_images=64) for m in (model, other)]
    assert alone[0]['source_nll'] != alone[1]['source_nll'], 'or sharing would not show'
    calls = count_forwards(monkeypatch)
    again = copy.deepcopy(model)
    torch.compile(again)  # leaves a mark on what it compiles
    together = evaluate_all([model, other, again], EvaluationConfig(dataset='digits', num_images=64))
    assert [steady(r) for r in together] == [steady(r) for r in (*alone, alone[0])]
    assert calls[VisionTransformer] == 2, 'a copy shares its source'


@pytest.mark.parametrize('register', ['register_forward_hook', 'register_forward_pre_hook'])
def test_sources_with_hooks_are_not_shared(model, register):
    """Nobody knows what a hook does: two networks that have one each are two."""
    changed = []
    for factor in (1., -2.):
        other = copy.deepcopy(model)
        hook = {'register_forward_hook': lambda module, args, out, factor=factor: factor * out,
                'register_forward_pre_hook': lambda module, args, factor=factor: (factor * args[0],)}[register]
        getattr(other.head_drop, register)(hook)
        changed.append(other)
    plain, turned = evaluate_all(changed, EvaluationConfig(dataset='digits', num_images=64))
    assert plain['source_nll'] < turned['source_nll'] == evaluate(changed[1], 'digits', num_images=64)['source_nll']


def test_sources_of_other_heads(source, images):
    """Two networks that were built with the same weights and another number of heads."""
    models = []
    for heads in (4, 2):
        other = timm.create_model('vit_tiny_patch16_224', **dict(NANO, num_heads=heads)).eval()
        other.load_state_dict(source.state_dict())
        other.pretrained_cfg = dict(source.pretrained_cfg)
        models.append(convert(other, [images]))
    together = evaluate_all(models, EvaluationConfig(dataset='digits', num_images=64))
    alone = [evaluate(m, 'digits', num_images=64) for m in models]
    assert alone[0]['source_top1'] != alone[1]['source_top1']
    assert [r['source_top1'] for r in together] == [r['source_top1'] for r in alone]


def test_views_share_tensors_and_nothing_else(model, source, images):
    for view, original in ((shared_copy(model), model), (source_view(model), source)):
        names = [name for name, _ in view.named_parameters()]
        assert names == [name for name, _ in original.named_parameters()]
        own = dict(model.named_parameters())
        assert all(parameter is own[name] for name, parameter in view.named_parameters())
        with torch.inference_mode():
            torch.testing.assert_close(view(images), original(images), atol=1e-5, rtol=1e-5)
        view.train()
        view.head.register_forward_hook(lambda *args: None)
    assert not model.training and not model.head._forward_hooks
    assert type(source_view(model)) is VisionTransformer and list(named_neurons(model))


def test_module_that_timm_does_not_know(model, coarse):
    """Has no architecture to tell its source by, so each has one of its own."""
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.num_classes = 10
            self.pretrained_cfg = dict(inner.pretrained_cfg, architecture=None, input_size=(1, 8, 8))

        def forward(self, x):
            return self.inner(x)
    config = EvaluationConfig(dataset='digits', num_images=64)
    wrapped = evaluate_all([Wrapper(model), Wrapper(coarse)], config)
    plain = evaluate_all([model, coarse], config)
    but = 'model', 'weights_sha256', 'activity_per_site'
    assert [steady(r, *but) for r in wrapped] == [steady(r, *but) for r in plain]


@pytest.mark.parametrize('wrapper', [
    torch.nn.DataParallel, AveragedModel, ModelEmaV3, lambda m: torch.nn.DataParallel(AveragedModel(m))],
    ids=['DataParallel', 'AveragedModel', 'ModelEmaV3', 'both'])
def test_what_runs_or_averages_a_network_is_taken_off(wrapper, coarse):
    """It has no config of its own, so images were preprocessed by timm's defaults: another crop, another mean."""
    model = copy.deepcopy(coarse)
    model.pretrained_cfg = dict(model.pretrained_cfg, crop_pct=0.6, mean=(0.3,))
    config = EvaluationConfig(dataset='digits', split='test', num_images=100)
    plain = evaluate_all([model], config)[0]
    wrapped, = evaluate_all([wrapper(model)], config)
    assert steady(wrapped) == steady(plain) and plain['crop_pct'] == 0.6 and 'source_top1' in plain
    source = source_view(model)
    assert steady(evaluate_all([model], config, sources=[wrapper(source)])[0]) == steady(plain)


def test_other_wrappers_are_refused_by_name(model):
    class Normalising(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

        def forward(self, x):
            return self.module(2 * x - 1)
    message = 'a Normalising wraps the SFormer at module and does not say which preprocessing'
    for kwargs in (dict(model=Normalising(model)), dict(model=model, source=Normalising(source_view(model)))):
        with pytest.raises(SFormerError, match=message.replace('SFormer', '(SFormer|VisionTransformer)')):
            evaluate(dataset='digits', num_images=8, **kwargs)
