"""The record of a conversion as JSON data and back."""
import dataclasses
import json

import pytest

from sformer import FitConfig, SFormerError
from sformer.conversion.record import CalibrationRecord, Conversion

RECORD = Conversion(
    'vit_tiny_patch16_224', 'augreg_in21k_ft_in1k', 'ab' * 32, 'timm/x@0', 'token', 'few', FitConfig('quantile', 0.99),
    CalibrationRecord('digits', 'train', 3, 'ff', 8, True), dict(torch='2.8'),
    'sformer convert x', ('compensated', 'distilled'), '10 steps', 'cd' * 32, 'y', 'ef' * 32, '01' * 32,
    dict(mean='given'))


def test_there_and_back():
    assert None not in dataclasses.astuple(RECORD) + dataclasses.astuple(RECORD.calibration), 'a field is not tested'
    data = json.loads(json.dumps(RECORD.to_dict()))
    assert data['version'] == 4 and Conversion.from_dict(data) == RECORD
    for least in (Conversion('vit'), Conversion(source='vit', fit=FitConfig('max'))):
        assert Conversion.from_dict(json.loads(json.dumps(least.to_dict()))) == least


@pytest.mark.parametrize('changes, message', [
    (dict(version=1), 'has version 1, this sformer reads 4'), (dict(version=5), 'has version 5'),
    (dict(version='3'), "has version '3'"), (dict(source=None), 'source is None'), (dict(source=5), 'source is 5'),
    (dict(source_tag=['x']), "source_tag is"), (dict(weights_sha256=1), 'weights_sha256 is 1'),
    (dict(changed='no'), "changed is 'no'"), (dict(changed=1), 'changed is 1'), (dict(changed=True), 'changed is True'),
    (dict(changed=['moved']), r"changed is \('moved',\)"), (dict(changed=[['distilled']]), 'changed is'),
    (dict(version=2), 'has version 2'), (dict(version=2, changed=1), 'has version 2'),
    (dict(fit=5), '.* mapping'), (dict(fit=dict(estimator='mean')), 'estimator must be'),
    (dict(fit=dict(levels=8)), ".*'levels'"), (dict(calibration=dict(num_images='8')), "num_images is '8'"),
    (dict(calibration=dict(num_images=True)), 'num_images is True'), (dict(calibration=dict(seed=1.5)), 'seed is 1.5'),
    (dict(calibration=dict(name=3)), 'name is 3'), (dict(calibration=None), '.* mapping'),
    (dict(versions=['torch']), 'versions is'), (dict(versions=dict(torch=2)), 'versions is'),
    (dict(recipe=dict(levels=8)), 'recipe is'),
], ids=str)
def test_records_that_sformer_did_not_write(changes, message):
    message = f'^the record of the conversion (is not as sformer wrote it: )?{message}'
    with pytest.raises(SFormerError, match=message) as caught:
        Conversion.from_dict(dict(RECORD.to_dict(), **changes))
    assert '\n' not in str(caught.value)


def test_a_record_without_a_version_is_an_old_one():
    with pytest.raises(SFormerError, match='has version 1, this sformer reads 4: convert the source again'):
        Conversion.from_dict(dict(source='vit'))


def test_a_record_of_where_the_normalisation_is_from():
    """As version 3 had it."""
    record = dict(version=3, source='vit', normalisation='given')
    assert Conversion.from_dict(record).origins == dict(mean='given', std='given')
    assert Conversion.from_dict(dict(record, normalisation=None)) == Conversion('vit')


@pytest.mark.parametrize('changes, reasons', [
    (dict(changed=False), ()), (dict(changed=False, fit=dict(compensate=True)), ()),
    (dict(changed=True), ('fine-tuned',)),
    (dict(changed=True, fit=dict(compensate=True)), ('compensated',)),
    (dict(changed=True, distillation='9 steps'), ('distilled',)),
    (dict(changed=True, fit=dict(compensate=True), distillation='9 steps'), ('compensated', 'distilled')),
], ids=str)
def test_a_record_that_only_says_whether_weights_have_moved(changes, reasons):
    """As version 2 did."""
    record = Conversion.from_dict(dict(version=2, source='vit', **changes))
    assert record.changed == reasons and Conversion.from_dict(record.to_dict()) == record
