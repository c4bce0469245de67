"""Whether weights moved: one answer, which save, load, conversion and training keep, and everything asks."""
import copy
import dataclasses
import io
import json

import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, relative_error, same_state, state_of
from timm.layers import Attention, Mlp

import sformer
from sformer import (
    FitConfig,
    SFNConfig,
    SFormerError,
    calibrate_,
    convert,
    load_model,
    save_model,
    source_of,
    source_view,
    spiking_,
)
from sformer.conversion import another_source, changed, network_inside
from sformer.conversion.distillation import DistillConfig, distill_
from sformer.conversion.search import Bench
from sformer.files import state_hash
from sformer.layers import named_neurons, without_neurons

COMPENSATE, SILENT = FitConfig(compensate=True), SFNConfig(levels=8, silence=0.02)


def move_(model, layer='blocks.0.mlp.fc1'):
    """What training does, without a word."""
    with torch.no_grad():
        model.get_submodule(layer).weight.mul_(1.01)
    return model


def distil_(model, teacher=None):
    return distill_(model, (pixels(8, seed=i) for i in range(2)), 2, DistillConfig(), teacher=teacher)


def again(model, path):
    return load_model(save_model(model, path))


@pytest.fixture(scope='module')
def models():
    """SFormers of one source whose weights have moved in every way, and why."""
    source, x = build(), pixels(16)
    plain, compensated = convert(source, [x], SILENT), convert(source, [x], SILENT, COMPENSATE)
    return {
        (): plain,
        ('compensated',): compensated,
        ('distilled',): distil_(copy.deepcopy(plain)),
        ('fine-tuned',): move_(copy.deepcopy(plain)),
        ('compensated', 'distilled'): distil_(copy.deepcopy(compensated), source),
        ('compensated', 'fine-tuned'): move_(copy.deepcopy(compensated)),
        ('distilled', 'fine-tuned'): move_(distil_(copy.deepcopy(plain))),
    }


REASONS = [(), ('compensated',), ('distilled',), ('fine-tuned',), ('compensated', 'distilled'),
           ('compensated', 'fine-tuned'), ('distilled', 'fine-tuned')]


@pytest.mark.parametrize('reasons', REASONS, ids='-'.join)
def test_reasons_are_kept(models, reasons, tmp_path):
    """In memory, on disk, in copies, views of wrappers, and pickles."""
    model = models[reasons]
    assert changed(model) == reasons
    loaded = again(model, tmp_path / 'a')
    assert loaded.conversion.changed == reasons == changed(loaded)
    assert json.loads((tmp_path / 'a' / 'config.json').read_text())['sformer']['changed'] == [*reasons]
    assert changed(again(loaded, tmp_path / 'b')) == reasons
    assert loaded.conversion.source_sha256 == models[()].conversion.source_sha256
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), nn.DataParallel(model), torch.load(file, weights_only=False)):
        assert changed(other) == reasons


@pytest.mark.parametrize('reasons', REASONS, ids='-'.join)
def test_a_source_is_handed_out_where_it_is_inside(models, reasons, tmp_path, caplog):
    for model in (models[reasons], again(models[reasons], tmp_path)):
        if not reasons:
            assert state_hash(source_of(model).state_dict()) == model.conversion.source_sha256
            assert not hasattr(source_of(model), 'conversion') or source_of(model).conversion is None
            continue
        with pytest.raises(SFormerError, match='so its source is not inside') as caught:
            source_of(model)
        for reason, words in (('compensated', 'compensate for its neurons'), ('distilled', 'to follow its source'),
                              ('fine-tuned', 'trained or set to other values')):
            assert (words in str(caught.value)) == (reason in reasons)
        plain = without_neurons(model)
        assert not [*named_neurons(plain)] and same_state(source_view(model), state_of(plain))
    assert not caplog.text


@pytest.mark.parametrize('reasons', REASONS, ids='-'.join)
def test_converting_again_keeps_them(models, reasons, tmp_path, caplog):
    model = again(models[reasons], tmp_path)
    if 'compensated' in reasons:
        with pytest.raises(SFormerError, match='compensate for its neurons, so .*: convert the source itself'):
            convert(model, [pixels(8)])
        with pytest.raises(SFormerError, match='compensate for its neurons .*: start from the source itself'):
            calibrate_(model, [pixels(8)])
        return
    other = convert(model, [pixels(8)], SFNConfig(levels=16))
    assert other.conversion.changed == reasons == changed(other)
    assert ('and its record goes on saying so' in caplog.text) == bool(reasons)
    before, after = model.conversion, other.conversion
    for name in ('source', 'source_tag', 'source_sha256', 'source_weights', 'distillation', 'state_sha256'):
        assert getattr(after, name) == getattr(before, name), name
    assert after.calibration.num_images == 8 and after.weights_sha256 is None
    assert calibrate_(other, [pixels(12)], FitConfig('max')) == 12
    assert other.conversion.fit == FitConfig('max') and other.conversion.calibration.num_images == 12
    assert other.conversion.changed == reasons


@pytest.mark.parametrize('reasons', REASONS, ids='-'.join)
def test_who_starts_from_it_is_told(models, reasons, caplog):
    """`sweep`, `distill` and a source that is named take what weights are without neurons, with a word; where they are
    fitted to the neurons that is no network, and they refuse."""
    model = copy.deepcopy(models[reasons])
    starts = [lambda: network_inside(model), lambda: Bench(model, pixels(4), pixels(4)), lambda: distil_(model),
              lambda: another_source(models[()], models[reasons])]
    for start in starts:
        caplog.clear()
        if 'compensated' in reasons:
            with pytest.raises(SFormerError, match='convert the source itself'):
                start()
            assert changed(model) == reasons
        else:
            start()
            assert ('is taken for its source' in caplog.text) == bool(reasons)
    if 'compensated' not in reasons:
        assert {*changed(model)} == {*reasons, 'distilled'}


def test_who_compares_is_told(model, caplog):
    """`evaluate` from Python, too."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.head.bias.add_(0.1)
    for network, told in ((model, False), (moved, True)):
        for source in (True, False, without_neurons(network)):
            caplog.clear()
            sformer.evaluate(network, 'digits', 'test', num_images=20, source=source)
            said = 'the weights of the model have moved since it was converted (fine-tuned)' in caplog.text
            assert said == (told and source is True)


def test_what_goes_back_to_the_source_has_not_moved(models):
    """Whatever was said: the hash knows better."""
    model = copy.deepcopy(models['distilled',])
    model.load_state_dict(dict(models[()].state_dict()))
    assert changed(model) == () and same_state(source_of(model), state_of(build()))


@pytest.mark.parametrize('adapt', [
    lambda model: model.half(), lambda model: model.reset_classifier(3), lambda model: model.set_input_size(64)],
    ids=['half', 'classes', 'size'])
def test_weights_of_another_shape_or_precision(models, adapt, caplog):
    """Nothing more can be told of them, and nothing is claimed."""
    model = copy.deepcopy(models[()])
    adapt(model)
    assert changed(model) == ('adapted',)
    source = source_of(model)
    assert 'whether they still have the values of the source is not known' in caplog.text
    assert not [*named_neurons(source)]


def test_a_training_that_fails(models):
    """In step 3, by a loss that is NaN, by too few batches, or by Ctrl-C: weights have moved, and the model says so."""
    def batches(last):
        yield from (pixels(8), pixels(8))
        if isinstance(last, BaseException):
            raise last
        yield from last

    for last, error in (([pixels(8) * float('nan')], SFormerError), ([], SFormerError),
                        (KeyboardInterrupt(), KeyboardInterrupt)):
        model = copy.deepcopy(models[()])
        with pytest.raises(error):
            distill_(model, batches(last), 3)
        assert model.conversion.changed == ('distilled',) == changed(model)
        assert relative_error(model.head.weight, models[()].head.weight) > 0
    model = copy.deepcopy(models[()])
    with pytest.raises(SFormerError, match='images of step 1 have NaN or infinity'):
        distill_(model, [pixels(8) * float('nan')], 3)
    assert changed(model) == () and same_state(model, state_of(models[()]))


def test_what_cannot_be_trained(models):
    with pytest.raises(SFormerError, match='all of them are frozen'):
        distil_(copy.deepcopy(models[()]).requires_grad_(False))
    with pytest.raises(SFormerError, match='steps must be an integer of at least 1, got 0'):
        distill_(models[()], [], 0)


# any module -----------------------------------------------------------------------------------------------------------

class Tower(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.attn, self.mlp = Attention(16, num_heads=2), Mlp(16, 32)

    def forward(self, x):
        return self.mlp(x + self.attn(x))


CURRENTS = torch.randn(32, 5, 16, generator=torch.Generator().manual_seed(0))


def tower(fit=FitConfig()):
    module = spiking_(Tower().eval(), SILENT)
    calibrate_(module, [CURRENTS], fit)
    return module


def test_any_module_has_a_record():
    module = tower()
    record = module.conversion
    assert (record.source, record.source_sha256) == ('Tower', state_hash(Tower().state_dict()))
    assert record.fit == FitConfig() and record.calibration.num_images == 32 and record.versions and not record.changed
    assert same_state(source_of(module), state_of(Tower())) and not hasattr(source_of(module), 'conversion')
    move_(module, 'mlp.fc1')
    assert changed(module) == ('fine-tuned',) == changed(nn.Sequential(module))
    with pytest.raises(SFormerError, match='its source is not inside'):
        source_of(module)


def test_compensation_travels_with_the_weights():
    """A state dict has no record; the neurons in it say so."""
    module = tower(COMPENSATE)
    other = spiking_(Tower(seed=1).eval(), SILENT)
    other.load_state_dict(module.state_dict())
    assert changed(module) == changed(other) == ('compensated',)
    for fails in (source_of, network_inside, lambda m: calibrate_(m, [CURRENTS])):
        with pytest.raises(SFormerError, match='compensate for its neurons'):
            fails(other)
    assert sformer.is_calibrated(other)
    saved = {key: value.dtype for key, value in module.state_dict().items() if key.endswith('calibrated')}
    assert set(saved.values()) == {torch.uint8, torch.bool}  # the format of others is as ever
    assert {value.dtype for key, value in tower().state_dict().items() if key.endswith('calibrated')} == {torch.bool}


def test_records_that_knew_no_hash_of_their_weights(models):
    """Those of version 2."""
    model = copy.deepcopy(models['fine-tuned',])
    old = dataclasses.replace(models[()].conversion, state_sha256=None, layout_sha256=None)
    model.conversion = old
    assert changed(model) == ('fine-tuned',)
    model.conversion = dataclasses.replace(old, changed=('distilled',))
    assert changed(model) == ('distilled',)
    model = copy.deepcopy(models[()])
    model.conversion = old
    assert changed(model) == ()


def test_a_source_with_classes_in_another_order_is_refused(model):
    """Its logits were compared with those of other classes."""
    named = copy.deepcopy(model)
    named.pretrained_cfg = dict(named.pretrained_cfg, label_names=[*'abcdefghij'])
    other = copy.deepcopy(named)
    other.pretrained_cfg = dict(named.pretrained_cfg, label_names=[*'bacdefghij'])
    assert another_source(named, copy.deepcopy(named)) is not None and another_source(model, other) is not None
    with pytest.raises(SFormerError, match='other names of classes, or in another order'):
        another_source(named, other)
