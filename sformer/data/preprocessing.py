"""From a PIL image to the tensors that models expect."""
import time
from collections.abc import Callable, Sequence

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from ..errors import ConfigError, SFormerError, UnreadableImageError
from ..files import Json
from .pixels import eight_bits

__all__ = ['Preprocessor', 'check_data_config', 'check_preprocessing', 'one_line', 'unreadable']

_MODES = {1: 'L', 3: 'RGB'}  # PIL mode by number of channels

Sample = tuple[list[torch.Tensor], Sequence[int] | None]  # one tensor per preprocessing, and accepted classes
Read = Callable[[], tuple[Image.Image, int | None, str | None]]  # an image, its label and its key


class Preprocessor:
    """From what an origin reads to tensors and labels.

    Errors are returned, not raised: a `DataLoader` worker would wrap them in its traceback.

    Args:
        title: What the images are called in errors.
        data_configs: Preprocessings, as `timm.data.resolve_data_config` returns them.
        generated: Whether images are of the size of the model, with nothing to resize or crop.
        needs_labels: Whether an image without a label is an error.
    """

    def __init__(self, title: str, data_configs: Sequence[Json], generated: bool, needs_labels: bool):
        self.title = title
        self.modes = [_MODES[check_data_config(config)[0][0]] for config in data_configs]
        self.transforms = [_create_transform(config, generated) for config in data_configs]
        self.needs_labels = needs_labels
        self.labels: Callable[[int, str | None], Sequence[int]] | None = None  # see ImageData.label_with

    def prepare(self, read: Read, what: str, times: list[float]) -> Sample | SFormerError | None:
        """Read one image.

        Args:
            read: Returns image, label and key.
            what: What the image is called in errors.
            times: Seconds of decoding and of preprocessing, which grow.

        Returns:
            Its tensors (C, H, W) and accepted classes, None to skip it, or an error: an `UnreadableImageError` if it is
            about this image alone.
        """
        start = time.perf_counter()
        try:
            image, label, key = read()
            if self.needs_labels and (label is None or label < 0):
                return SFormerError(f'{what} of {self.title} has no label ({label})')
            accepted = None if label is None else [label] if self.labels is None else self.labels(label, key)
            if accepted is not None and len(accepted) == 0:
                return None
            image.load()
            image = eight_bits(image)  # EXIF orientation is left alone, as in timm's evaluation
            images = [image.convert(mode) for mode in self.modes]
        except SFormerError as e:
            return e
        except Exception as e:  # damaged files raise about anything: OSError, SyntaxError, struct.error, ...
            return UnreadableImageError(f'cannot read {what} of {self.title}: {unreadable(e)}')
        decoded = time.perf_counter()
        tensors = [transform(image) for transform, image in zip(self.transforms, images, strict=True)]
        times[0] += decoded - start
        times[1] += time.perf_counter() - decoded
        return tensors, accepted


def check_data_config(data_config: Json) -> tuple[tuple[int, int, int], Sequence[float], Sequence[float]]:
    """Check size, mean and std of a preprocessing, and return them.

    Raises:
        SFormerError: The size is not of a grey or RGB image, or mean or std are of another number of channels.
    """
    size = tuple(data_config['input_size'])
    if len(size) != 3 or size[0] not in _MODES:
        raise SFormerError(f'input size {size} is not of an image: (1, H, W) is grey, (3, H, W) is RGB')
    mean = data_config.get('mean', IMAGENET_DEFAULT_MEAN)
    std = data_config.get('std', IMAGENET_DEFAULT_STD)
    for key, value in (('mean', mean), ('std', std)):
        # Three means would silently broadcast a grey image to three channels.
        if len(value) != size[0]:
            raise SFormerError(
                f'the {key} of the preprocessing has {len(value)} entries {tuple(value)}, '
                f'but the model takes {size[0]} channel(s): give {size[0]}')
    return size, mean, std


def _create_transform(data_config: Json, generated: bool) -> Callable[[Image.Image], torch.Tensor]:
    _, mean, std = check_data_config(data_config)
    if not generated:
        return create_transform(**data_config, is_training=False)
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


def unreadable(error: BaseException) -> str:
    """Why a file cannot be read as an image, by what was raised."""
    return 'not an image' if isinstance(error, UnidentifiedImageError) else one_line(error)


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its class name where it says nothing."""
    # `datasets` wraps what went wrong in errors that do not say it.
    if error.__cause__ is not None and type(error).__name__.startswith('DatasetGeneration'):
        error = error.__cause__
    return ' '.join(str(error).split()) or type(error).__name__


def check_preprocessing(values: Json) -> None:
    """Check what timm's transforms take without a question: those of mean, std, crop_pct and interpolation that are
    given.

    Raises:
        ConfigError: If a value is of the wrong kind or out of any sensible range; names it.
    """
    def is_number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    for key, low, high in (('mean', -1e4, 1e4), ('std', 1e-4, 1e4)):
        value = values.get(key)
        if value is None:
            continue
        if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
            raise ConfigError(f'{key} must be a list of numbers, got {value!r}.')
        if not all(low <= v <= high for v in value):
            raise ConfigError(f'{key} must lie in [{low:g}, {high:g}], got {", ".join(map(str, value))}.')
    crop_pct, interpolation = values.get('crop_pct'), values.get('interpolation')
    if crop_pct is not None and not (is_number(crop_pct) and 0.01 <= crop_pct <= 1):
        raise ConfigError(f'crop_pct must lie in [0.01, 1], got {crop_pct!r}.')
    if interpolation is not None:
        try:
            str_to_interp_mode(interpolation)
        except (KeyError, ValueError, AttributeError, TypeError):
            raise ConfigError(
                f'unknown interpolation {interpolation!r}: nearest, bilinear, bicubic, lanczos.') from None
