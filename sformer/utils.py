"""Small things that several modules need: progress bars, versions, checks of preprocessing, PNGs that carry numbers, a
watch on forwards."""
import contextlib
import io
import json
import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from timm.data.transforms import str_to_interp_mode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from .errors import SFormerError

__all__ = [
    'ForwardWatch', 'progress', 'num_images', 'enough_memory', 'working_compiler', 'quiet', 'library_versions',
    'check_preprocessing', 'png_bytes', 'png_values',
]

CHUNK = 'sformer'  # text chunk of a PNG that holds its numbers


def progress(items: Iterable, description: str, total: Optional[int] = None) -> Iterator:
    """Iterate with a progress bar on stderr; without one where stderr is no terminal.

    Args:
        items: Any iterable; batches count by their length along dim 0, other items as one.
        description: What is going on.
        total: Number of images or items, if known.
    """
    with tqdm(desc=description, total=total, disable=None, leave=False) as bar:
        for item in items:
            yield item
            batch = item[0] if isinstance(item, (tuple, list)) else item
            bar.update(len(batch) if isinstance(batch, torch.Tensor) else 1)


def num_images(batch: Any) -> int:
    """Images of a batch: a tensor (B, ...), or a list of images as detectors read them; anything else is one."""
    return len(batch) if isinstance(batch, (torch.Tensor, list)) else 1


@contextlib.contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Say in one line that memory is not enough.

    Args:
        remedy: What to do.

    Raises:
        SFormerError: In the place of what torch and Python raise for it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        from accelerate.utils.memory import should_reduce_batch_size
        if not isinstance(e, MemoryError) and not should_reduce_batch_size(e):
            raise
        raise SFormerError(f'out of memory: {remedy}') from e


@contextlib.contextmanager
def working_compiler(remedy: str) -> Iterator[None]:
    """Say in one line that torch.compile cannot compile here.

    Args:
        remedy: What to do, other than to install a compiler.

    Raises:
        SFormerError: In the place of what torch raises for it.
    """
    try:
        yield
    except RuntimeError as e:
        if type(e).__module__ not in ('torch._dynamo.exc', 'torch._inductor.exc'):
            raise
        reason = str(getattr(e, 'inner_exception', e)).strip().partition('\n')[0].rstrip('.')
        raise SFormerError(
            f'the network cannot be compiled ({reason}): torch.compile needs a working compiler, for C++ on CPUs. '
            f'Install one, or {remedy}.') from e


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without the warnings of some loggers, such as of optional packages that are missing."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def library_versions() -> Dict[str, str]:
    """Versions of what a result depends on."""
    names = ('sformer', 'torch', 'timm', 'datasets', 'safetensors', 'huggingface_hub')
    versions = {'python': '.'.join(map(str, sys.version_info[:3]))}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def check_preprocessing(values: Dict[str, Any]) -> None:
    """Check what timm's transforms take without a question: those of mean, std, crop_pct and interpolation that are
    given.

    Raises:
        SFormerError: If a value is of the wrong kind or out of any sensible range; names it.
    """
    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    for key, low, high in (('mean', -1e4, 1e4), ('std', 1e-4, 1e4)):
        value = values.get(key)
        if value is None:
            continue
        if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
            raise SFormerError(f'{key} must be a list of numbers, got {value!r}.')
        if not all(low <= v <= high for v in value):
            raise SFormerError(f'{key} must lie in [{low:g}, {high:g}], got {", ".join(map(str, value))}.')
    crop_pct, interpolation = values.get('crop_pct'), values.get('interpolation')
    if crop_pct is not None and not (is_number(crop_pct) and 0.01 <= crop_pct <= 1):
        raise SFormerError(f'crop_pct must lie in [0.01, 1], got {crop_pct!r}.')
    if interpolation is not None:
        try:
            str_to_interp_mode(interpolation)
        except (KeyError, ValueError, AttributeError, TypeError):
            raise SFormerError(
                f'unknown interpolation {interpolation!r}: nearest, bilinear, bicubic, lanczos.') from None


def png_bytes(image: Image.Image, values: Dict[str, Any]) -> bytes:
    """An image as a PNG that carries values as JSON in a text chunk, and nothing that changes from one drawing to the
    next."""
    out, text = io.BytesIO(), PngInfo()
    text.add_text(CHUNK, json.dumps(values, sort_keys=True))
    image.convert('RGB').save(out, 'PNG', pnginfo=text)
    return out.getvalue()


def png_values(path: Path) -> Optional[Dict[str, Any]]:
    """Values that a PNG of `png_bytes` carries; None if it is no such file."""
    try:
        with Image.open(path, formats=['PNG']) as image:
            values = json.loads(image.info[CHUNK])
    except (OSError, SyntaxError, KeyError, ValueError, TypeError, Image.DecompressionBombError):  # as PIL raises
        return None
    return values if isinstance(values, dict) else None


class ForwardWatch(TorchDispatchMode):
    """While entered, knows in whose own forward each operation of torch is: `stack[-1]`, the name of a module below the
    watched one, and that module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.stack: List[Tuple[str, nn.Module]] = []
        self.handles: List[Any] = []

    def __enter__(self):
        for name, child in self.module.named_modules():
            self.handles.append(child.register_forward_pre_hook(
                lambda module, args, name=name: self.stack.append((name, module))))
            self.handles.append(child.register_forward_hook(lambda *args: self.stack.pop() and None, always_call=True))
        return super().__enter__()

    def __exit__(self, *args):
        while self.handles:
            self.handles.pop().remove()
        return super().__exit__(*args)
