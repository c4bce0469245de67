"""What tests of the data layer share: preprocessings, encoded images, everything that is delivered."""
import io

import pytest
import torch
from PIL import Image

from sformer.data import open_images
from sformer.errors import SFormerError


def config(size=(3, 32, 32), mean=None, std=None, **kwargs):
    mean, std = mean or (0.5,) * size[0], std or (0.25,) * size[0]
    return dict(
        input_size=size, interpolation='bicubic', mean=mean, std=std, crop_pct=1., crop_mode='center', **kwargs)


RGB, GREY = config(), config((1, 8, 8))


def all_images(images, batch_size=7, workers=0):
    batches = list(images.batches(batch_size, workers))
    labels = [y for _, y in batches]
    return torch.cat([x for x, _ in batches]), None if labels[0] is None else torch.cat(labels)


def encoded(level, mode='RGB', size=(32, 32), format='PNG'):
    buffer = io.BytesIO()
    Image.new(mode, size, level if mode == 'L' else (level,) * 3).save(buffer, format=format)
    return buffer.getvalue()


def error_of(*args, **kwargs):
    kwargs.setdefault('data_config', RGB)
    with pytest.raises(SFormerError) as info:
        open_images(*args, **kwargs)
    message = str(info.value)
    assert '\n' not in message
    return message
