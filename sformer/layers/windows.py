"""Attention within windows of a map: what ViTDet does in most blocks of its backbone, to save time on large images.

Paper: `Exploring Plain Vision Transformer Backbones for Object Detection` (Li et al. 2022)
    - https://arxiv.org/abs/2203.16527

The forward is that of the layer itself, of tokens that were sorted into windows. Its class is changed in place, as
`spiking_` does it, so the names of parameters stay.
"""
import contextlib
import contextvars
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import layers as tl
from timm.models import eva

from ..errors import SFormerError
from .attention import SpikingAttentionMixin
from .table import become_, register_spiking

__all__ = ['WindowedMixin', 'token_grid', 'windowed_']

# Tokens are a sequence, which does not say of which map they are. Not a state of the layers, that other threads share.
_GRID: contextvars.ContextVar[tuple[int, int]] = contextvars.ContextVar('grid')


@contextlib.contextmanager
def token_grid(height: int, width: int) -> Iterator[None]:
    """While entered, tokens that reach windowed attention in this thread are of a map of this size, row by row."""
    token = _GRID.set((height, width))
    try:
        yield
    finally:
        _GRID.reset(token)


class WindowedMixin(nn.Module):
    """Attention within windows of `window_size` tokens a side, or of the whole map where that is smaller.

    As in ViTDet, zeros fill up windows at the lower and the right border, and are attended to as tokens are. Each
    window has a copy of the prefix tokens (class, registers), which attends within it, and the mean of all copies
    goes on; so with one window this is attention over all tokens. A token keeps the rotary embedding of its place on
    the map, as scores with prefix tokens depend on it; what fills up windows has that of the border.

    Shape:
        Input and output (B, prefix + H W, C) in `token_grid(H, W)`.
    """
    window_size: int
    num_prefix_tokens: int

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor:
        torch._assert(kwargs.get('attn_mask') is None, 'a mask of the whole map says nothing of windows')
        if rope is not None:
            kwargs['rope'] = self._split_rope(rope, len(x))
        return self.join(super().forward(self.split(x), **kwargs))

    def _window(self) -> tuple[int, int]:
        height, width = _GRID.get()
        return min(self.window_size, height), min(self.window_size, width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, prefix + H W, C) as windows (B windows, prefix + tokens of a window, C)."""
        (height, width), (rows, columns) = _GRID.get(), self._window()
        prefix, x = x[:, :self.num_prefix_tokens], x[:, self.num_prefix_tokens:]
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % columns, 0, -height % rows))
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)  # B, rows, columns of windows
        x = x.flatten(3, 4).flatten(1, 2)
        prefix = prefix[:, None].expand(-1, x.shape[1], -1, -1)
        return torch.cat([prefix, x], dim=2).flatten(0, 1)

    def _split_rope(self, rope: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Embedding (H W, D) or (heads, H W, D) as (B windows, 1 or heads, tokens of a window, D)."""
        sizes = zip(_GRID.get(), self._window(), strict=True)
        y, x = (torch.arange(-(-side // part) * part, device=rope.device).clamp(max=side - 1).unflatten(0, (-1, part))
                for side, part in sizes)
        index = y[:, None, :, None] * _GRID.get()[1] + x[:, None]  # rows and columns of windows, and within them
        rope = rope[..., index.flatten(2).flatten(0, 1), :]
        return (rope[:, None] if rope.ndim == 3 else rope.transpose(0, 1)).repeat(batch_size, 1, 1, 1)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`, without what filled up windows; of prefix tokens the mean over windows."""
        (height, width), (rows, columns) = _GRID.get(), self._window()
        down, across = -(-height // rows), -(-width // columns)
        x = x.unflatten(0, (-1, down * across))
        prefix, x = x[:, :, :self.num_prefix_tokens].mean(1), x[:, :, self.num_prefix_tokens:]
        x = x.unflatten(2, (rows, columns)).unflatten(1, (down, across)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return torch.cat([prefix, x.flatten(1, 2)], dim=1)


class WindowedAttention(WindowedMixin, tl.Attention):  # type: ignore[misc]
    """timm's attention within windows."""


class WindowedAttentionRope(WindowedMixin, tl.AttentionRope):  # type: ignore[misc]
    """timm's attention with rotary embedding within windows."""


class WindowedEvaAttention(WindowedMixin, eva.EvaAttention):  # type: ignore[misc]
    """EVA's attention within windows."""


@register_spiking(WindowedAttention)
class SpikingWindowedAttention(SpikingAttentionMixin, WindowedAttention):  # type: ignore[misc]
    """Attention within windows on spikes."""


@register_spiking(WindowedAttentionRope)
class SpikingWindowedAttentionRope(SpikingAttentionMixin, WindowedAttentionRope):  # type: ignore[misc]
    """Attention with rotary embedding within windows on spikes."""


@register_spiking(WindowedEvaAttention)
class SpikingWindowedEvaAttention(SpikingAttentionMixin, WindowedEvaAttention):  # type: ignore[misc]
    """EVA's attention within windows on spikes."""


WINDOWED = {kind.__mro__[2]: kind for kind in (WindowedAttention, WindowedAttentionRope, WindowedEvaAttention)}


def windowed_(attention: nn.Module, window_size: int, num_prefix_tokens: int) -> nn.Module:
    """Let an attention layer of timm attend within windows, in place.

    Raises:
        SFormerError: If it has no windowed form.
    """
    if type(attention) not in WINDOWED:
        kind, *names = (f'{kind.__module__}.{kind.__name__}' for kind in (type(attention), *WINDOWED))
        raise SFormerError(f'{kind} has no windows: {", ".join(names)} have. Leave out window_size (--window-size).')
    become_(attention, WINDOWED[type(attention)])
    assert isinstance(attention, WindowedMixin)
    attention.window_size = window_size
    attention.num_prefix_tokens = num_prefix_tokens
    return attention
