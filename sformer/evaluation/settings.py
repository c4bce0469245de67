"""What an evaluation is of and how it is done: the options of `evaluate`, in one place."""
import math
import os
from dataclasses import dataclass
from typing import Optional, Union

import torch

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
class EvaluationConfig:
    """Images, preprocessing and execution of an evaluation.

    Args:
        dataset: `digits`, a folder of parquet files, of WebDataset archives or of images, or a data set's id on the
            Hugging Face Hub.
        split: Split of the data set.
        num_images: Size of a random subset (of a stream: the first ones); all images if None.
        batch_size: Images per batch and process.
        workers: Processes per process that decode images.
        seed: Seed of the subset.
        activity_images: Spikes are counted on the first this many images, in whole batches.
        image_column: Name of the image column, if it cannot be detected.
        label_column: Name of the label column, if it cannot be detected.
        streaming: Read shards as they are needed, without a copy on disk.
        benchmark: One of `sformer.evaluation.labels.BENCHMARKS`; None for the data set's own labels.
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
    dataset: str
    split: Optional[str] = None
    num_images: Optional[int] = None
    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    activity_images: int = 512
    image_column: Optional[str] = None
    label_column: Optional[str] = None
    streaming: bool = False
    benchmark: Optional[str] = None
    by_position: bool = False
    img_size: Optional[int] = None
    crop_pct: Optional[float] = None
    interpolation: Optional[str] = None
    amp: Optional[str] = None
    channels_last: bool = False
    torchcompile: bool = False
    retry: bool = False
    max_bad: int = 0
    device: Union[str, torch.device, None] = None
    timeout: float = 600.

    def __post_init__(self) -> None:
        check(isinstance(self.dataset, (str, os.PathLike)), f'dataset must be a name or a path, got {self.dataset!r}.')
        object.__setattr__(self, 'dataset', os.fspath(self.dataset))
        for name, least in (('batch_size', 1), ('workers', 0), ('activity_images', 0), ('max_bad', 0)):
            check_integer(self, name, least)
        check_integer(self, 'seed', -2 ** 63, 2 ** 63 - 1)
        for name in ('num_images', 'img_size'):
            if getattr(self, name) is not None:
                check_integer(self, name, 1)
        for name in ('split', 'image_column', 'label_column', 'interpolation', 'benchmark'):
            if getattr(self, name) is not None:
                check_text(self, name)
        for name in ('by_position', 'streaming', 'channels_last', 'torchcompile', 'retry'):
            check_flag(self, name)
        check_number(self, 'timeout', math.ulp(0.), _MAX_TIMEOUT, f'of seconds in (0, {_MAX_TIMEOUT:g}]')
        check(self.amp is None or self.amp in tuple(AMP_DTYPES), f'amp is bfloat16 or float16, not {self.amp!r}.')
        check_benchmark(self.benchmark)
        check_preprocessing(dict(crop_pct=self.crop_pct, interpolation=self.interpolation))
