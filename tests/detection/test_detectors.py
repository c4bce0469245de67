"""Detectors on backbones with weights of their own."""
import pytest
import timm
import torch
from detection_tools import small_config, small_detector
from safetensors.torch import save_file

from sformer.detection import create_detector
from sformer.detection.pyramid import window_
from sformer.errors import SFormerError


@pytest.mark.parametrize('name, kwargs', [
    ('test_vit', dict(img_size=112, patch_size=14, num_classes=5)), ('test_vit3', dict(num_classes=0))])
def test_checkpoint_is_resized_to_the_input(name, kwargs, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(name, **kwargs)
    save_file(source.state_dict(), tmp_path / 'b.safetensors')
    detector = create_detector(small_config(backbone=name), tmp_path / 'b.safetensors')
    vit = detector.backbone.vit
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert vit.patch_embed.grid_size == (4, 6) and vit.num_classes == 0
    assert detector.config.mean == tuple(source.pretrained_cfg['mean'])
    assert detector.transform.image_mean == [*detector.config.mean]
    # a constant image looks the same in patches of any size, but for where borders are
    pixels = torch.full((1, 3, 64, 96), 0.7)
    embedded = source.patch_embed.proj(torch.full((1, 3, *source.patch_embed.img_size), 0.7))[..., 0, 0]
    torch.testing.assert_close(vit.patch_embed.proj(pixels)[..., 0, 0], embedded, rtol=1e-3, atol=1e-3)


def test_checkpoint_of_another_network(tmp_path):
    save_file(timm.create_model('test_vit3', num_classes=0).state_dict(), tmp_path / 'b.safetensors')
    with pytest.raises(SFormerError, match='not a checkpoint of test_vit2'):
        create_detector(small_config(backbone='test_vit2'), tmp_path / 'b.safetensors')


@pytest.mark.parametrize('kwargs, message', [
    (dict(scales=(1, 2)), 'largest first'), (dict(scales=(3,)), 'scales are of 4, 2, 1, 0.5'),
    (dict(image_size=(60, 64)), 'multiples of 32'),
    (dict(window_size=0), 'window_size must be an integer of at least 1'),
    (dict(categories={}), 'categories are names by whole numbers, at least one, not {}'),
    (dict(image_size=64), 'image_size has several values, not 64'),
    (dict(backbone=5), 'backbone must be a text, got 5')])
def test_values_that_make_no_detector(kwargs, message):
    with pytest.raises(SFormerError, match=message):
        small_config(**kwargs)


def test_backbone_has_to_be_a_plain_transformer(tmp_path):
    save_file(timm.create_model('test_convnext').state_dict(), tmp_path / 'b.safetensors')
    with pytest.raises(SFormerError, match='test_convnext'):
        create_detector(small_config(backbone='test_convnext'), tmp_path / 'b.safetensors')


@torch.no_grad()
def test_windows_leave_four_blocks_global():
    whole, windowed = (small_detector(window_size=size).backbone.vit for size in (None, 2))
    assert [hasattr(block.attn, 'window_size') for block in windowed.blocks] == [False, True, False, False, True, False]
    assert windowed.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize('backbone', ['test_vit', 'eva02_tiny_patch14_224'])
@torch.no_grad()
def test_windows_of_the_size_of_the_map_change_nothing(backbone):
    whole, far, near = (small_detector(backbone=backbone, window_size=size).backbone for size in (None, 6, 2))
    far.load_state_dict(whole.state_dict())
    near.load_state_dict(whole.state_dict())
    for size in ((64, 96), (96, 64), (64, 64)):
        x = torch.rand(1, 3, *size)
        expected = whole.features(x)
        torch.testing.assert_close(far.features(x), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(near.features(x), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('backbone, kwargs, message', [
    ('beit_base_patch16_224', dict(depth=5), 'timm.models.beit.Attention has no windows'),
    ('vit_base_patch16_18x2_224', dict(depth=5), 'ParallelThingsBlock has no'),
    ('test_vit', dict(depth=4), 'backbone of 4 blocks')])
def test_backbones_without_windows(backbone, kwargs, message):
    vit = timm.create_model(backbone, num_classes=0, **kwargs)
    with pytest.raises(SFormerError, match=message):
        window_(vit, window_size=14)


def test_backbone_without_dynamic_size():
    with pytest.raises(SFormerError, match='beit_base_patch16_224 cannot be the backbone of a detector: .*dynamic_i'):
        small_detector(backbone='beit_base_patch16_224')
