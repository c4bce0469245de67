"""Errors that a user can mend, what turns the refusals of torch into them, and what keeps threads apart.

    SFormerError
    ├── ConfigError            a ValueError, too
    ├── UnsupportedLayerError
    ├── UncalibratedError
    ├── UnreadableImageError
    ├── RunInterruptedError
    └── RankError
"""
import contextlib
import logging
import math
import numbers
import threading
import warnings
from collections.abc import Iterator, Sequence

__all__ = [
    'SFormerError', 'ConfigError', 'UnsupportedLayerError', 'UncalibratedError', 'UnreadableImageError',
    'RunInterruptedError', 'RankError', 'alone', 'check', 'check_choice', 'check_flag', 'check_integer', 'check_number',
    'check_text', 'install_hint', 'needed_packages', 'enough_memory', 'working_compiler', 'first_line', 'quiet',
]


class SFormerError(Exception):
    """A mistake that the user can mend: one clear line that names it and says what to do."""


class ConfigError(SFormerError, ValueError):
    """A field of a config that is not what it has to be; names it."""


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


# Fields of configs. Each check reads a field of a dataclass and raises ConfigError if it is not what it has to be; what
# numpy calls a number becomes one that JSON knows.


def check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def check_integer(config: object, name: str, low: int, high: int | None = None) -> None:
    value = getattr(config, name)
    words = f'of at least {low}' if high is None else f'from {low} to {high}'
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    check(whole and low <= int(value) <= (2 ** 31 - 1 if high is None else high),
          f'{name} must be an integer {words}, got {value!r}.')
    object.__setattr__(config, name, int(value))


def check_number(config: object, name: str, low: float, high: float = math.inf, interval: str = '') -> None:
    """A finite number from `low` to `high`; `interval` says so in words where an end is not part of it."""
    value = getattr(config, name)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    words = interval or (f'of at least {low:g}' if high == math.inf else f'in [{low:g}, {high:g}]')
    fits = real and low <= float(value) <= high and math.isfinite(value)
    check(fits, f'{name} must be a number {words}, got {value!r}.')
    if not isinstance(value, (int, float)):
        object.__setattr__(config, name, float(value))


def check_flag(config: object, name: str) -> None:
    value = getattr(config, name)
    check(isinstance(value, bool), f'{name} must be True or False, got {value!r}.')


def check_text(config: object, name: str) -> None:
    value = getattr(config, name)
    check(isinstance(value, str), f'{name} must be a text, got {value!r}.')


def check_choice(config: object, name: str, choices: Sequence[str]) -> None:
    value = getattr(config, name)
    check(isinstance(value, str) and value in choices, f'{name} must be one of {", ".join(choices)}, got {value!r}.')


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


# Threads share filters of warnings, levels of loggers, `sys.stdout`, torch's default dtype and random state, what it
# unpickles, and functions of timm. Whoever changes one of them for a while holds this: of two that did so at once, the
# one that ends last would put back what the other had made of it. Re-entrant, as one happens inside of another.
alone = threading.RLock()


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without Python's warnings and those of some loggers, such as of optional packages that are missing."""
    loggers = [logging.getLogger(name) for name in names]
    with alone, warnings.catch_warnings(action='ignore'):
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
