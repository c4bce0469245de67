"""Errors that a user can mend."""

__all__ = ['SFormerError', 'UnsupportedLayerError', 'UncalibratedError']


class SFormerError(Exception):
    """A mistake that the user can mend: one clear line that names it and says what to do."""


class UnsupportedLayerError(SFormerError):
    """A layer of the source network has no spiking counterpart."""


class UncalibratedError(SFormerError):
    """A model whose thresholds were never fitted is used as if it were converted."""
