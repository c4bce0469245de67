"""What `preprocessor_config.json` of transformers says of images, in timm's terms."""
import math
from typing import Any

from ..errors import SFormerError
from ..files import Json

__all__ = ['PREPROCESSING', 'preprocessing_of']

PREPROCESSING = ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')  # in the config of a timm model
RESAMPLING = {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicubic'}  # by PIL's number


def preprocessing_of(config: Json) -> Json:
    """Preprocessing as of `set_data_config_`, and `img_size`: what a config of an image processor says of them.

    Raises:
        SFormerError: If it scales pixels in a way that mean and std cannot say.
    """
    said: Json = {}
    mean, std = config.get('image_mean'), config.get('image_std')
    if config.get('do_normalize', True):
        said.update({key: value for key, value in (('mean', mean), ('std', std)) if value})
    else:
        said.update(mean=[0.0] * len(mean or 3 * [0]), std=[1.0] * len(std or 3 * [0]))
    factor = 255 * config.get('rescale_factor', 1 / 255) if config.get('do_rescale', True) else 255.
    if abs(factor - 1) > 1e-3:
        if not {'mean', 'std'} <= said.keys():
            raise SFormerError(f'its image processor scales pixels to {factor:g}, and does not normalise them.')
        said.update({key: [value / factor for value in said[key]] for key in ('mean', 'std')})
    if config.get('resample') in RESAMPLING:
        said['interpolation'] = RESAMPLING[config['resample']]
    return {**said, **_sizes(config)}


def _sizes(config: Json) -> Json:
    """Image size, and how images of other sizes become one of it."""
    size, crop = config.get('size'), config.get('crop_size')
    if not config.get('do_resize', True) or size is None:
        return {}
    kind = str(config.get('image_processor_type') or config.get('feature_extractor_type') or '')
    keeps_ratio = isinstance(size, dict) and 'shortest_edge' in size or \
        isinstance(size, int) and kind.startswith(('CLIP', 'Bit'))
    edges = _edges(size)
    target = _edges(crop) if crop and config.get('do_center_crop', True) else edges
    if edges is None or target is None:
        return {}
    said: Json = dict(img_size=target[0] if target[0] == target[1] else target)
    share = target[0] / edges[0]
    if share <= 1 and math.isclose(share, target[1] / edges[1]):
        # timm rounds the edge that it resizes to down
        exact = math.floor(target[0] / share) == edges[0]
        said.update(crop_pct=share if exact else target[0] / (edges[0] + 0.5),
                    crop_mode='center' if keeps_ratio else 'squash')
    return said


def _edges(size: Any) -> tuple[int, int] | None:
    """Height and width of a size as transformers writes it: a number, `height` and `width`, or the shortest edge."""
    if isinstance(size, dict):
        edge = size.get('shortest_edge')
        height, width = size.get('height', edge), size.get('width', edge)
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        height, width = size
    else:
        height = width = size
    return (height, width) if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0 else None
