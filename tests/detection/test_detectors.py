"""Detectors on backbones with weights of their own."""
import pytest
import timm
import torch
from detection_tools import small_config
from safetensors.torch import save_file

from sformer.detection import create_detector
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
    (dict(image_size=(60, 64)), 'multiples of 32'), (dict(categories={}), 'at least one category')])
def test_values_that_make_no_detector(kwargs, message):
    with pytest.raises(SFormerError, match=message):
        small_config(**kwargs)


def test_backbone_has_to_be_a_plain_transformer(tmp_path):
    save_file(timm.create_model('test_convnext').state_dict(), tmp_path / 'b.safetensors')
    with pytest.raises(SFormerError, match='test_convnext'):
        create_detector(small_config(backbone='test_convnext'), tmp_path / 'b.safetensors')
