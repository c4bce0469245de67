"""Errors that a user can mend, what turns the refusals of torch into them, and what keeps others quiet.

    SFormerError
    ├── UnsupportedLayerError
    ├── UncalibratedError
    ├── UnreadableImageError
    ├── RunInterruptedError
    └── RankError
"""
import contextlib
import logging
from typing import Iterator

__all__ = [
    'SFormerError', 'UnsupportedLayerError', 'UncalibratedError', 'UnreadableImageError', 'RunInterruptedError',
    'RankError', 'install_hint', 'needed_packages', 'enough_memory', 'working_compiler', 'first_line', 'quiet',
]


class SFormerError(Exception):
    """A mistake that the user can mend: one clear line that names it and says what to do."""


class UnsupportedLayerError(SFormerError):
    """A layer of the source network has no spiking counterpart."""


class UncalibratedError(SFormerError):
    """A model whose thresholds were never fitted is used as if it were converted."""


class UnreadableImageError(SFormerError):
    """An image that is damaged, or no image at all."""


class RunInterruptedError(SFormerError):
    """Ctrl-C, where there is more to say than that."""


class RankError(SFormerError):
    """Another process of the run failed, and the error has been printed by somebody else."""


def install_hint(extra: str) -> str:
    """How to install what an extra of this package brings; no index has the package, so a clone has to."""
    return f"pip install '.[{extra}]' in a clone of sformer"


@contextlib.contextmanager
def needed_packages(extra: str) -> Iterator[None]:
    """Say in one line that a package is missing, or does not load.

    Args:
        extra: The extra of this package that brings it.

    Raises:
        SFormerError: In the place of an ImportError.
    """
    try:
        yield
    except ModuleNotFoundError as e:
        package = (e.name or str(e)).partition('.')[0]
        raise SFormerError(f'{package} is missing: {install_hint(extra)}.') from None
    except ImportError as e:
        raise SFormerError(f'what the extra {extra!r} brings does not load: {first_line(e)}.') from e


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


def first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')


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
