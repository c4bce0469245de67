"""Conversion: what it makes of a source, what it records, what it refuses."""
import copy
import json
from importlib import metadata

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.prune
from conftest import NANO
from layer_tools import build, pixels
from timm.data import resolve_input_data_config

import sformer
from sformer import (
    FitConfig,
    SFNConfig,
    SFormer,
    SFormerError,
    UnsupportedLayerError,
    convert,
    is_calibrated,
    load_model,
    save_model,
    spiking_,
)
from sformer.conversion.record import CalibrationRecord
from sformer.conversion.sources import create_source, set_data_config_
from sformer.data import open_images
from sformer.files import state_hash
from sformer.layers import named_neurons
from sformer.neurons import GradedCoding, ScaleAndFire

NAME = 'vit_tiny_patch16_224'


def neuron_state(model):
    return {f'{name}.{key}': b for name, neuron in named_neurons(model) for key, b in neuron.named_buffers()}


def differing(a, b):
    """Names of the neuron buffers in which two models differ."""
    a, b = neuron_state(a), neuron_state(b)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# what it makes --------------------------------------------------------------------------------------------------------

def test_converted_model_computes_what_its_source_does(source, model, digits):
    images, labels = digits
    with torch.no_grad():
        a, b = model(images), source(images)
    assert type(model) is SFormer and is_calibrated(model) and not model.training
    assert (a - b).norm() / b.norm() < 0.05
    assert (a.argmax(1) == labels).float().mean() >= 0.97


@pytest.mark.parametrize('levels, bound', [(32, 0.05), (8, 0.2), (4, 0.4)])
def test_error_falls_with_levels(source, digits, levels, bound):
    model = convert(source, 'digits', SFNConfig(levels=levels), split='train', num_images=128)
    with torch.no_grad():
        a, b = model(digits[0]), source(digits[0])
    assert bound / 10 < (a - b).norm() / b.norm() < bound


def test_source_is_untouched(own_source, images):
    own_source.train()
    before = copy.deepcopy(own_source)
    convert(own_source, [images])
    assert own_source.training
    assert state_hash(own_source.state_dict()) == state_hash(before.state_dict())
    assert own_source.pretrained_cfg == before.pretrained_cfg
    assert own_source._model_args == before._model_args
    kinds = {name: type(module) for name, module in before.named_modules()}
    assert {name: type(module) for name, module in own_source.named_modules()} == kinds
    assert own_source.__dict__.keys() == before.__dict__.keys()


def test_failed_inplace_conversion_leaves_the_source(own_source, images):
    before = copy.deepcopy(own_source)
    with pytest.raises(SFormerError, match='NaN'):
        convert(own_source, [images, images * float('nan')], inplace=True)
    assert type(own_source) is type(before) and own_source.pretrained_cfg == before.pretrained_cfg
    assert own_source.training == before.training
    with torch.inference_mode():
        assert torch.equal(own_source(images), before(images))


def test_inplace(own_source, images):
    before = state_hash(own_source.state_dict())
    model = convert(own_source, [images], inplace=True)
    assert model is own_source and type(model) is SFormer and is_calibrated(model)
    assert state_hash(sformer.source_of(model).state_dict()) == before, 'conversion changed the weights'


def test_global_random_state_is_untouched(source):
    torch.manual_seed(3)
    np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    convert(source, num_images=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_dead_leaves_need_no_data(source, digits):
    model = convert(source)
    assert (model.conversion.calibration.name, model.conversion.calibration.num_images) == ('dead-leaves', 256)
    assert is_calibrated(model)
    with torch.no_grad():
        accuracy = (model(digits[0]).argmax(1) == digits[1]).float().mean()
    assert accuracy >= 0.95


def test_by_name(source, model, checkpoint):
    """Of a model that timm creates, with a checkpoint; the same thresholds as from the instance."""
    named = convert(NAME, 'digits', split='train', num_images=4, checkpoint=checkpoint, **NANO)
    assert named.conversion.source == NAME
    # no preprocessing comes with a checkpoint, so only the instance knows that digits are grey in [-1, 1] as well
    assert named.pretrained_cfg['mean'] == (0.5,) and named.pretrained_cfg['interpolation'] == 'bicubic'
    images, _ = next(open_images('digits', 'train', data_config=resolve_input_data_config(model)).batches(64))
    by_name = convert(NAME, [images], checkpoint=checkpoint, **NANO)
    assert differing(by_name, convert(source, [images])) == []


def test_by_local_folder(source, model, tmp_path):
    """A pretrained source of a folder brings its preprocessing along, as one of the Hub does."""
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    named = convert(f'local-dir:{tmp_path}', 'digits', split='train')
    assert differing(named, model) == []


def test_batches_may_carry_labels(source, images, plain):
    labelled = convert(source, [(images, torch.zeros(32))])
    assert differing(labelled, plain) == [] == differing(convert(source, iter([images])), plain)
    assert labelled.conversion.calibration == CalibrationRecord(num_images=32)


def test_folder_of_images(source, images, tmp_path):
    from PIL import Image
    pixels = (images * 127.5 + 127.5).round().to(torch.uint8)
    for i, image in enumerate(pixels[:8]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f'{i}.png')
    from_folder = convert(source, tmp_path, num_images=8)
    as_png = pixels[:8].float() / 127.5 - 1
    assert from_folder.conversion.calibration.name == str(tmp_path)
    with torch.no_grad():
        a, b = from_folder(images), convert(source, [as_png])(images)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope='module')
def plain(source, images):
    """What a conversion on `images` makes without a config; not to be changed."""
    return convert(source, [images], None, None)


@pytest.mark.parametrize('config, fit', [
    (dict(fire='density', attention_fire='density'), {}), (dict(fire='quadratic'), {}),
    (dict(levels=7, fire='power2'), {}), (dict(initial_potential=0), {}), (dict(dead_zone=1.), {}),
    (dict(levels=1), {}), (dict(levels=127), {}), ({}, dict(estimator='max')),
    ({}, dict(estimator='quantile', quantile=0.9))], ids=str)
def test_recipes(source, images, plain, config, fit):
    model = convert(source, [images], config, fit)
    config, fit = SFNConfig(**config), FitConfig(**fit)
    assert model.conversion.fit == fit.settled() and model.sfn_config == config
    neurons = [n for _, n in named_neurons(model) if isinstance(n, ScaleAndFire)]
    assert all(n.config == config and len(n.levels) == config.levels for n in neurons)
    with torch.no_grad():
        out = model(images)
        assert torch.isfinite(out).all()
        assert not torch.equal(out, plain(images)), 'it changes nothing'


def test_lambda_scales_every_fitted_threshold(source, images):
    plain, scaled = (dict(named_neurons(convert(source, [images], SFNConfig(scale=s)))) for s in (1., 1.5))
    for name, neuron in plain.items():
        # the softmax numerators lie in (0, 1] whatever lambda is, and pixels are coded without loss
        factor = 1.5 if isinstance(neuron, ScaleAndFire) and neuron.signed else 1
        torch.testing.assert_close(scaled[name].step, neuron.step * factor, rtol=1e-3, atol=0)


def test_configs_that_are_none(source, images):
    for kwargs in (dict(config=dict(no_such_field=1)), dict(fit=dict(levels=8)), dict(config=8)):
        with pytest.raises(TypeError):
            convert(source, [images], **kwargs)
    with pytest.raises(ValueError, match='levels must be'):
        convert(source, [images], dict(levels=0))


def test_thresholds_are_sound(model):
    for name, neuron in named_neurons(model):
        assert neuron.step.dtype == torch.float32 and torch.isfinite(neuron.step).all(), name
        assert (neuron.step > 0).all(), name
        assert neuron.calibrated, name


def test_pixels_are_coded_without_loss(source):
    """Any 8-bit image, under any normalisation of the source: conversion adds no error there."""
    source = copy.deepcopy(source)
    set_data_config_(source, mean=(0.4,), std=(0.3,))
    model = convert(source, 'digits', num_images=16, split='train')
    coding = next(n for _, n in named_neurons(model) if isinstance(n, GradedCoding))
    pixels = torch.arange(256.).view(1, 1, 16, 16)
    x = (pixels / 255 - 0.4) / 0.3
    assert torch.equal(coding.encode(x).levels.int() + 128, pixels.int())
    torch.testing.assert_close(coding(x), x)


# determinism ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('calibration, split', [('dead-leaves', None), ('digits', 'train')])
def test_seed_decides(source, calibration, split):
    a, b, c = (convert(source, calibration, split=split, num_images=64, seed=seed) for seed in (0, 0, 1))
    assert differing(a, b) == []
    assert differing(a, c)
    assert a.conversion == b.conversion
    assert a.conversion.calibration.fingerprint != c.conversion.calibration.fingerprint


def test_batch_size_does_not_matter(source):
    a, b = (convert(source, 'digits', split='train', num_images=60, batch_size=size) for size in (7, 60))
    assert differing(a, b) == []


def test_labels_are_not_read(source, images):
    class Labels:
        def __getattr__(self, name):
            raise AssertionError(f'a label was read ({name})')
    assert is_calibrated(convert(source, [(images, Labels())]))


# the record -----------------------------------------------------------------------------------------------------------

def test_record(source, model):
    record = json.loads(json.dumps(model.conversion.to_dict()))
    assert record['version'] == 4 and record['changed'] == []
    assert record['source'] == NAME and record['source_tag'] is None
    assert record['source_sha256'] == state_hash(source.state_dict())
    assert record['recipe'] == 'default' and record['fit'] == dict(
        estimator='mse', quantile=0.999, floor=0., margin=1., unbiased=True, compensate=False, balance=False,
        concentrate=False, effort='usual')
    assert record['source_weights'] is None
    images = open_images(
        'digits', 'train', data_config=resolve_input_data_config(source), num_images=256, seed=0)
    assert record['calibration'] == dict(
        name='digits', split='train', seed=0, num_images=256, fingerprint=images.fingerprint, local_copy=False)
    for name in ('torch', 'timm', 'sformer'):
        assert record['versions'][name] == metadata.version(name)
    assert record['versions'].keys() >= {'python', 'datasets', 'safetensors', 'huggingface_hub'}


def test_record_tells_sources_apart(own_source, images, model):
    own_source.head.bias.data[3] += 1e-6
    assert convert(own_source, [images]).conversion.source_sha256 != model.conversion.source_sha256


def test_config_points_away_from_the_weights_of_the_source(model):
    cfg = model.pretrained_cfg
    assert cfg['architecture'] == 'sformer_tiny'
    assert not {'url', 'hf_hub_id', 'file'} & cfg.keys(), 'pretrained=True would load the weights of the source'
    assert cfg['mean'] == (0.5,) and cfg['crop_pct'] == 1.0 and cfg['interpolation'] == 'bilinear'


def test_converting_an_sformer_again(model, digits):
    """New neurons replace the old ones; the record and the layers tell the same story."""
    again = convert(model, 'digits', SFNConfig(levels=8), split='train', num_images=32)
    expected = convert(sformer.source_of(model), 'digits', SFNConfig(levels=8), split='train', num_images=32)
    assert {len(n.levels) for _, n in named_neurons(again) if isinstance(n, ScaleAndFire)} == {8}
    assert again.sfn_config == SFNConfig(levels=8) and again.conversion == expected.conversion
    assert differing(again, expected) == []


# refused: images ------------------------------------------------------------------------------------------------------

def test_unknown_dataset(source, tmp_path):
    for name in (str(tmp_path / 'nowhere'), 'no/such/dataset'):
        with pytest.raises(SFormerError, match=f"'{name}' is not a folder"):
            convert(source, name)
    with pytest.raises(SFormerError, match='no images'):
        convert(source, str(tmp_path))


def test_too_few_images(source):
    with pytest.raises(SFormerError, match='1258 images asked for, .* only 1257'):
        convert(source, 'digits', split='train', num_images=1258)
    with pytest.raises(SFormerError, match='at least 1'):
        convert(source, 'digits', split='train', num_images=0)
    with pytest.raises(SFormerError, match="no split 'validation'"):
        convert(source, 'digits', split='validation')


def test_calibration_does_not_default_to_evaluation_images(source):
    assert convert(source, 'digits', num_images=8).conversion.calibration.split == 'train'


@pytest.mark.parametrize('batches', [[], iter(()), [torch.zeros(0, 1, 8, 8)]], ids=['list', 'iterator', 'batch'])
def test_no_images(source, batches):
    with pytest.raises(SFormerError, match='calibration needs at least one image, got none'):
        convert(source, batches)


@pytest.mark.parametrize('batch', [
    torch.zeros(1, 8, 8), torch.zeros(2, 2, 1, 8, 8), np.zeros((2, 1, 8, 8)), {'image': torch.zeros(2, 1, 8, 8)},
    'image.png', torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 8, 8)],
    ids=['3d', '5d', 'numpy', 'dict', 'str', 'size', 'channels'])
def test_wrong_batches(source, batch):
    with pytest.raises(SFormerError, match=r'calibration batches must be tensors \(B, 1, 8, 8\), got|not fit'):
        convert(source, [batch])


def test_nan_images(source, images):
    images = images.clone()
    images[3, 0, 2, 2] = float('nan')
    with pytest.raises(SFormerError, match='NaN or infinite currents at patch_embed'):
        convert(source, [images])


def test_preprocessing_that_does_not_fit(own_source):
    with pytest.raises(SFormerError, match='mean needs 1 values for 1 channels, got 3'):
        set_data_config_(own_source, mean=(0.5, 0.5, 0.5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'meen'"):
        set_data_config_(own_source, meen=(0.5,))
    with pytest.raises(SFormerError, match='std must lie in'):
        set_data_config_(own_source, std=(0.,))
    with pytest.raises(SFormerError, match='interpolation|nearest-ish'):
        set_data_config_(own_source, interpolation='nearest-ish')
        convert(own_source, 'digits', num_images=4)


def test_dead_zone_that_silences_the_attention(source, images):
    """Above the top level nothing would ever fire, and rows of attention would be 0 / 0."""
    with pytest.raises(ValueError, match='dead_zone'):
        convert(source, [images], dict(levels=8, dead_zone=500.))


@pytest.mark.parametrize('levels', [1, 8])
def test_difficult_images(source, images, levels):
    """Constant images, one image, pixels of another normalisation: thresholds stay sound."""
    for batch in (torch.zeros(4, 1, 8, 8), images[:1], images * 50, torch.full((2, 1, 8, 8), -1.)):
        model = convert(source, [batch], SFNConfig(levels=levels))
        for name, neuron in named_neurons(model):
            assert torch.isfinite(neuron.step).all() and (neuron.step > 0).all(), name
        with torch.no_grad():
            assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1.00 GiB'), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory_is_one_line_and_leaves_the_source(own_source, images, error):
    def fail(x):
        raise error
    own_source.patch_embed.norm = nn.Identity()
    own_source.patch_embed.norm.register_forward_pre_hook(lambda module, args: fail(args[0]))
    with pytest.raises(SFormerError, match='^out of memory: .*16 images at a time.*img_size'):
        convert(own_source, [images], inplace=True)
    assert not list(named_neurons(own_source))


# real data ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def cifar(test_data):
    """Source, folder of the images."""
    source = create_source(
        NAME, test_data / 'checkpoints/vit_micro_cifar10.safetensors',
        img_size=32, patch_size=4, depth=6, num_classes=10).network
    set_data_config_(source, mean=(.4914, .4822, .4465), std=(.2470, .2435, .2616), crop_pct=1.0)
    return source, str(test_data / 'data/cifar10')


def logits(model, images):
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(100)])


def load_test_images(source, folder, num_images=None):
    data = open_images(
        folder, 'test', data_config=resolve_input_data_config(source), num_images=num_images, needs_labels=True)
    return next(data.batches(data.num_images))


@pytest.fixture(scope='module')
def cifar_test(cifar):
    """All test images, their labels, the logits of the source."""
    source, folder = cifar
    images, labels = load_test_images(source, folder)
    return images, labels, logits(source, images)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_cifar_error(cifar):
    source, folder = cifar
    images, _ = load_test_images(source, folder, 100)
    model = convert(source, folder, split='train', num_images=64)
    assert 0.003 < relative_error(logits(model, images), logits(source, images)) <= 0.03


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('levels, calibration, drop, error', [
    (32, 'real', 0.2, 0.03), (8, 'real', 0.8, 0.10), (4, 'real', 2.5, None), (32, 'dead-leaves', 0.4, 0.06)])
def test_cifar(cifar, cifar_test, levels, calibration, drop, error):
    source, folder = cifar
    images, labels, expected = cifar_test
    where = dict(split='train') if calibration == 'real' else {}
    model = convert(source, folder if where else calibration, SFNConfig(levels=levels), num_images=256, **where)
    out = logits(model, images)
    top1, source_top1 = (100 * (x.argmax(1) == labels).float().mean().item() for x in (out, expected))
    print(f'N = {levels}, {calibration}: drop {source_top1 - top1:+.2f} of {source_top1:.2f} %, '
          f'relative logit error {relative_error(out, expected):.4f}')
    assert len(labels) == 10_000 and source_top1 > 60
    assert source_top1 - top1 <= drop
    assert error is None or relative_error(out, expected) <= error


@pytest.mark.parametrize('how', ['copy', 'in place', 'made there', 'silent'])
def test_what_is_converted_in_inference_mode_can_be_trained(how, tmp_path):
    """It could not, and nothing said so before the first backward."""
    source = build(depth=1)
    with torch.inference_mode():
        images = pixels(8)
        if how == 'made there':
            source = build(depth=1)
        model = convert(source, [images], SFNConfig(8, silence=0.01 if how == 'silent' else 0.),
                        inplace=how in ('in place', 'made there'))
        loaded, inside = load_model(save_model(model, tmp_path / 'saved')), sformer.source_of(model)
    expected = convert(build(depth=1), [pixels(8)], model.sfn_config)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    for network in (model, loaded, inside):
        network.train()(pixels(4)).square().sum().backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
        torch.optim.SGD(network.parameters(), 0.01).step()
        assert not any(tensor.is_inference() for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize('inplace', [False, True])
def test_weights_that_are_computed_are_named(inplace):
    """A pruned layer has no weight but what a hook computes, which ended in a traceback of deepcopy."""
    source = build(depth=1)
    torch.nn.utils.prune.l1_unstructured(source.blocks[0].mlp.fc1, 'weight', amount=0.3)
    with pytest.raises(UnsupportedLayerError, match=r'blocks\.0\.mlp\.fc1\.weight is computed anew .*prune\.remove'):
        convert(source, [pixels(8)], inplace=inplace)
    with pytest.raises(UnsupportedLayerError, match=r'blocks\.0\.mlp\.fc1\.weight is computed'):
        spiking_(source)
    torch.nn.utils.prune.remove(source.blocks[0].mlp.fc1, 'weight')
    assert (convert(source, [pixels(8)], inplace=inplace).blocks[0].mlp.fc1.weight == 0).float().mean() > 0.29
