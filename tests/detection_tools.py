"""A small data set in COCO format, and a small detector with random weights."""
import json

import timm
import torch
from PIL import Image, ImageDraw
from timm.models import register_model

from sformer.detection import DetectorConfig, build_detector

CATEGORIES = [dict(id=3, name='disc'), dict(id=7, name='square')]


def write_coco(root, split='train', num=6, sizes=((64, 96), (96, 64))):
    """Discs and squares with boxes and polygons on grey, images of two sizes; returns what is in the JSON file."""
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    rng = torch.Generator().manual_seed(len(split))
    for i in range(num):
        height, width = sizes[i % len(sizes)]
        image = Image.new('RGB', (width, height), (90, 90, 90))
        for category in CATEGORIES:
            side = int(torch.randint(16, 30, (), generator=rng))
            x, y = (int(torch.randint(0, limit - side, (), generator=rng)) for limit in (width, height))
            draw = ImageDraw.Draw(image)
            shape = draw.ellipse if category['name'] == 'disc' else draw.rectangle
            shape((x, y, x + side - 1, y + side - 1), fill=(220, 40, 40) if category['id'] == 3 else (40, 40, 220))
            annotations.append(dict(
                id=len(annotations) + 1, image_id=10 + i, category_id=category['id'], bbox=[x, y, side, side],
                area=side * side, iscrowd=0,
                segmentation=[[x, y, x + side, y, x + side, y + side, x, y + side]]))
        image.save(root / split / f'{i}.png')
        images.append(dict(id=10 + i, file_name=f'{i}.png', width=width, height=height))
    data = dict(images=images, annotations=annotations, categories=[dict(category) for category in CATEGORIES])
    write_annotations(root, data, split)
    return data


def write_annotations(root, data, split='train'):
    (root / f'{split}.json').write_text(json.dumps(data))


@register_model
def test_vit_short(pretrained=False, **kwargs):
    """timm's smallest ViT with two of its six blocks."""
    return timm.create_model('test_vit', pretrained, **{'depth': 2, **kwargs})


def small_config(**kwargs):
    """Of a backbone of two blocks, or of six where most attend within windows."""
    backbone = 'test_vit' if 'window_size' in kwargs else 'test_vit_short'
    return DetectorConfig(**{**dict(
        backbone=backbone, categories={c['id']: c['name'] for c in CATEGORIES}, image_size=(64, 96), channels=8,
        hidden=16, max_detections=10), **kwargs})


def small_detector(seed=16, depth=None, **kwargs):
    """A detector with random weights that detects something: no score is too small. With this seed, some is there.
    Of a backbone with fewer blocks than timm gives it, if a depth is named, which no config rebuilds."""
    config = small_config(**kwargs)
    torch.manual_seed(seed)
    vit = None
    if depth:
        vit = timm.create_model(config.backbone, depth=depth, num_classes=0, img_size=config.image_size, patch_size=16,
                                dynamic_img_size=True)
    detector = build_detector(config, vit).eval()
    detector.roi_heads.score_thresh = 0.
    return detector
