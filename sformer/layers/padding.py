"""Tokens that only fill up a batch of images of different sizes, as NaFlex makes them: they neither fire nor count."""
import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..neurons import Neuron

__all__ = ['fired', 'present', 'valid_tokens']


class _Tokens(NamedTuple):
    valid: torch.Tensor  # (B, N), of patches
    prefix: int


# Currents do not say which tokens are padding. Not a state of the layers, that other threads share.
_TOKENS: contextvars.ContextVar[_Tokens | None] = contextvars.ContextVar('tokens', default=None)


@contextlib.contextmanager
def valid_tokens(valid: torch.Tensor, prefix: int) -> Iterator[None]:
    """While entered, only these patches (B, N), and so many tokens before them, fire in this thread."""
    token = _TOKENS.set(_Tokens(valid.bool(), prefix))
    try:
        yield
    finally:
        _TOKENS.reset(token)


def present(neuron: Neuron, x: torch.Tensor) -> torch.Tensor | None:
    """Which potentials of a neuron (B, ..., L, C) are of no padding, as a mask that broadcasts; None if no token is.

    Of softmax numerators, the only currents that know no sign, both L and C are tokens.
    """
    tokens = _TOKENS.get()
    if tokens is None or x.ndim < 3 or len(x) != len(tokens.valid):
        return None
    mask: torch.Tensor | None = None
    for dim in (-2,) if getattr(neuron, 'signed', True) else (-2, -1):
        before = x.shape[dim] - tokens.valid.shape[1]
        if before in (0, tokens.prefix):
            valid = torch.cat([tokens.valid.new_ones(len(x), before), tokens.valid], 1)
            valid = valid.view(len(x), *[1] * (x.ndim - 2), -1).transpose(-1, dim)
            mask = valid if mask is None else mask & valid
    return mask


def fired(neuron: Neuron, x: torch.Tensor) -> torch.Tensor:
    """What a neuron makes of a current (B, ..., L, C), without a spike where that is padding."""
    if not torch.compiler.is_compiling() and _TOKENS.get() is not None:  # what padding fires changes no other token
        mask = present(neuron, x)
        center = getattr(neuron, 'center', None)
        if mask is not None:
            x = torch.where(mask, x, x.new_zeros(()) if center is None else center.to(x.dtype))
    return neuron(x)
