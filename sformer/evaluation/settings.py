"""What an evaluation is of and how it is done: the options of `evaluate`, in one place."""
import math
from dataclasses import dataclass, field

import torch

from ..data import ImageRequest
from ..data.names import known_data
from ..data.preprocessing import check_preprocessing
from ..errors import check, check_flag, check_integer, check_number, check_text
from .labels import check_benchmark

__all__ = ['AMP_DTYPES', 'EvaluationConfig']

AMP_DTYPES = {
    'bfloat16': torch.bfloat16, 'bf16': torch.bfloat16, 'float16': torch.float16, 'fp16': torch.float16,
    'half': torch.float16,
}
_MAX_TIMEOUT = 1e7  # [s]; beyond it clocks and timers overflow


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(ImageRequest):
    """Images, preprocessing and execution of an evaluation.

    Args:
        dataset: As of `sformer.data.ImageRequest`, like `split`, `num_images`, `seed`, `image_column`, `label_column`
            and `streaming`.
        needs_labels: Labels are always needed.
        batch_size: Images per batch and process.
        workers: Processes per process that decode images.
        activity_images: Spikes are counted on the first this many images, in whole batches.
        benchmark: One of `sformer.evaluation.labels.BENCHMARKS`; None for that of a well-known data set
            (`imagenet-real`), else for the data set's own labels.
        by_position: Take label i for class i of the model, whatever names they have.
        img_size: Height and width of the input [pixels]; position embeddings are resampled by timm.
        crop_pct: Centre crop, instead of the model's own.
        interpolation: Resize method, instead of the model's own.
        amp: Mixed precision: `bfloat16` or `float16`.
        channels_last: Use the channels-last memory format.
        torchcompile: Compile networks.
        retry: Halve batches that do not fit into memory.
        max_bad: Unreadable images that are left out, with their names in the result, before it is an error.
        device: Device to move the models to; where they are if None (one process), else one device per process.
        timeout: Seconds after which a rank that makes no progress, or a worker that delivers nothing, is lost.

    Raises:
        ConfigError: If a value is not usable; names it.
    """
    needs_labels: bool = field(default=True, init=False, repr=False)
    batch_size: int = 64
    workers: int = 0
    activity_images: int = 512
    benchmark: str | None = None
    by_position: bool = False
    img_size: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    amp: str | None = None
    channels_last: bool = False
    torchcompile: bool = False
    retry: bool = False
    max_bad: int = 0
    device: str | torch.device | None = None
    timeout: float = 600.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (('batch_size', 1), ('workers', 0), ('activity_images', 0), ('max_bad', 0)):
            check_integer(self, name, least)
        if self.img_size is not None:
            check_integer(self, 'img_size', 1)
        for name in ('interpolation', 'benchmark'):
            if getattr(self, name) is not None:
                check_text(self, name)
        for name in ('by_position', 'channels_last', 'torchcompile', 'retry'):
            check_flag(self, name)
        check_number(self, 'timeout', math.ulp(0.), _MAX_TIMEOUT, f'of seconds in (0, {_MAX_TIMEOUT:g}]')
        check(self.amp is None or self.amp in tuple(AMP_DTYPES), f'amp is bfloat16 or float16, not {self.amp!r}.')
        known = known_data(self.dataset)
        if self.benchmark is None and known:
            object.__setattr__(self, 'benchmark', known.benchmark)
        check_benchmark(self.benchmark)
        check_preprocessing(dict(crop_pct=self.crop_pct, interpolation=self.interpolation))
