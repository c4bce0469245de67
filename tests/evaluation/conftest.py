"""Fixtures that several tests of evaluation share."""
import evaluation_tools
import pytest
import timm
import torch

import sformer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    evaluation_tools.use_cache(monkeypatch, tmp_path / 'cache')


@pytest.fixture(scope='session')
def coarse(source):
    """An SFormer that is wrong often enough for its mistakes to be counted."""
    return sformer.convert(source, 'digits', sformer.SFNConfig(levels=2, fire='uniform'), split='train')


@pytest.fixture(scope='session')
def result(coarse):
    return sformer.evaluate(coarse, 'digits', 'test', activity_images=540)


@pytest.fixture(scope='session')
def classifier():
    """An untrained classifier of ImageNet classes, as small as can be, with logits that depend on the image."""
    torch.manual_seed(0)
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=8, patch_size=4, in_chans=1, embed_dim=12, depth=1, num_heads=3)
    model.head.weight.data.normal_()
    return model.eval()


@pytest.fixture
def digit_files(tmp_path):
    """Writes the first digits as parquet: `digit_files(shards, num=200, damaged=())`."""
    return lambda *args, **kwargs: evaluation_tools.write_digits(tmp_path, *args, **kwargs)
