"""The pyramid has the levels that it should, and torchvision takes them for what they are."""
import pytest
import torch
from detection_tools import small_detector
from timm.layers import LayerNorm2d

from sformer.detection import SimpleFeaturePyramid


@pytest.mark.parametrize('scales', [(4, 2, 1, 0.5), (2, 1), (0.5,)])
def test_levels(scales):
    pyramid = SimpleFeaturePyramid(16, 8, scales)
    levels = pyramid(torch.randn(2, 16, 6, 4))
    assert [*levels] == [str(i) for i in range(len(scales))]
    assert [level.shape for level in levels.values()] == [(2, 8, int(6 * s), int(4 * s)) for s in scales]
    assert all(isinstance(level[-1], LayerNorm2d) for level in pyramid.levels)


def test_a_level_sees_where_things_are():
    # pooling and transposed convolutions are of even strides: what is in a corner of the map stays there on all levels
    pyramid = SimpleFeaturePyramid(16, 8).eval()
    x = torch.zeros(1, 16, 8, 8)
    changed = x.clone()
    changed[..., 6:, 6:] = torch.randn(1, 16, 1, 1)
    for a, b in zip(pyramid(x).values(), pyramid(changed).values(), strict=True):
        where = (a != b).any(1)[0].nonzero() / a.shape[-1]
        assert where.min() >= 0.5 and where.max() >= 0.75


def test_torchvision_reads_strides_as_they_are():
    # it rounds strides to powers of two: those of patches of 14 pixels would shift what is pooled
    detector = small_detector(masks=True)
    assert detector.backbone.vit.patch_embed.patch_size == (16, 16)
    with torch.no_grad():
        detector([torch.rand(3, 64, 96)])
    assert detector.roi_heads.box_roi_pool.scales == detector.roi_heads.mask_roi_pool.scales == [1/4, 1/8, 1/16, 1/32]
