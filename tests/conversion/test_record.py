"""The record of a conversion as JSON data and back."""
import dataclasses
import json

import pytest

from sformer import FitConfig, SFormerError
from sformer.conversion.record import CalibrationRecord, Conversion

RECORD = Conversion(
    'vit_tiny_patch16_224', 'augreg_in21k_ft_in1k', 'ab' * 32, 'timm/x@0', 'token', FitConfig('quantile', 0.99),
    CalibrationRecord('digits', 'train', 3, 'ff', 8, True), dict(torch='2.8'),
    'sformer convert x', True, '10 steps', 'cd' * 32, 'y')


def test_there_and_back():
    assert None not in dataclasses.astuple(RECORD) + dataclasses.astuple(RECORD.calibration), 'a field is not tested'
    data = json.loads(json.dumps(RECORD.to_dict()))
    assert data['version'] == 2 and Conversion.from_dict(data) == RECORD
    for least in (Conversion('vit'), Conversion(source='vit', fit=FitConfig('max'))):
        assert Conversion.from_dict(json.loads(json.dumps(least.to_dict()))) == least


@pytest.mark.parametrize('changes, message', [
    (dict(version=1), 'has version 1, this sformer reads 2'), (dict(version=3), 'has version 3'),
    (dict(version='2'), "has version '2'"), (dict(source=None), 'source is None'), (dict(source=5), 'source is 5'),
    (dict(source_tag=['x']), "source_tag is"), (dict(weights_sha256=1), 'weights_sha256 is 1'),
    (dict(changed='no'), "changed is 'no'"), (dict(changed=1), 'changed is 1'),
    (dict(fit=5), 'mapping'), (dict(fit=dict(estimator='mean')), 'estimator must be'),
    (dict(fit=dict(levels=8)), 'levels'), (dict(calibration=dict(num_images='8')), "num_images is '8'"),
    (dict(calibration=dict(num_images=True)), 'num_images is True'), (dict(calibration=dict(seed=1.5)), 'seed is 1.5'),
    (dict(calibration=dict(name=3)), 'name is 3'), (dict(calibration=None), 'mapping'),
    (dict(versions=['torch']), 'versions is'), (dict(versions=dict(torch=2)), 'versions is'),
    (dict(recipe=dict(levels=8)), 'recipe'),
], ids=str)
def test_records_that_sformer_did_not_write(changes, message):
    with pytest.raises(SFormerError, match=f'record of the conversion .*{message}') as caught:
        Conversion.from_dict(dict(RECORD.to_dict(), **changes))
    assert '\n' not in str(caught.value)


def test_a_record_without_a_version_is_an_old_one():
    with pytest.raises(SFormerError, match='has version 1, this sformer reads 2: convert the source again'):
        Conversion.from_dict(dict(source='vit'))
