"""Fixtures of tests of records, cards and plots."""
import copy

import pytest
from card_tools import committed

from sformer import save_model


@pytest.fixture
def record():
    """A record with everything in it, of the test's own."""
    record = copy.deepcopy(committed('sformer_nano.digits'))
    record.base_model, record.load_name = 'timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k', 'hf-hub:my-org/name'
    record.evaluations['eval.json'].update(
        dataset='uoft-cs/cifar10', dataset_revision='0123abc', nll=0.1234, source_nll=0.1111, ece=1.5, source_ece=1.25,
        spikes_per_neuron=dict(unary=5.125, binary=1.75, graded=0.953, lateral=0.125))
    return record


@pytest.fixture
def saved(model, tmp_path):
    """Folder of an SFormer of the test's own, without results."""
    return save_model(model, tmp_path / 'out')
