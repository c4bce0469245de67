"""Embeddings of patches, which read 8-bit pixels as graded spikes: of images, or of flat patches."""
import contextlib

import torch
import torch.nn as nn
from timm.layers import PatchEmbed
from timm.models import gemma4_vit, naflexvit
from torch.overrides import TorchFunctionMode

from ..neurons import GradedCoding, PatchCoding, SFNConfig
from .linear import SpikingConv2d, SpikingLinear
from .table import SpikingLayer, register_spiking

__all__ = ['PixelEmbedMixin', 'SpikingPatchEmbed']


class PixelEmbedMixin(SpikingLayer):
    """An embedding whose projection reads pixels: a convolution those of images, a linear layer those of patches."""
    proj: nn.Module
    patch_size: tuple[int, int]
    channels_last = True  # of flat patches: (rows, columns, C), not (C, rows, columns)

    def add_neurons(self, config: SFNConfig) -> None:
        layer = self.projection
        if not isinstance(getattr(layer, 'neuron', None), GradedCoding):
            layer.neuron = self.coding(layer)

    @property
    def projection(self) -> nn.Module:
        return self.proj

    def coding(self, layer: nn.Module, **scaled: float) -> GradedCoding:
        """The code of the pixels that a projection reads, which were scaled since they were normalised."""
        if isinstance(layer, SpikingConv2d):
            return GradedCoding(layer.in_channels, device=layer.weight.device)
        assert isinstance(layer, SpikingLinear)
        rows, columns = self.patch_size
        in_chans = layer.in_features // (rows * columns)
        return PatchCoding(in_chans, rows * columns, self.channels_last, **scaled, device=layer.weight.device)


@register_spiking(PatchEmbed)
class SpikingPatchEmbed(PixelEmbedMixin, PatchEmbed):  # type: ignore[misc]
    """Patch embedding on graded spikes."""


@register_spiking(naflexvit.NaFlexEmbeds)
class SpikingNaFlexEmbeds(PixelEmbedMixin, naflexvit.NaFlexEmbeds):  # type: ignore[misc]
    """Embedding of flat patches of images of any size on graded spikes."""

    def add_neurons(self, config: SFNConfig) -> None:
        if self.norm_input is None:  # or it does not read pixels
            super().add_neurons(config)


class _KeptCurrent(TorchFunctionMode):
    """Leaves a current as it is where a forward, before all else, gives it the type of weights that are int8."""
    kept = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[1:] == (torch.int8,) and not self.kept:
            self.kept = True
            return args[0]
        return func(*args, **(kwargs or {}))


@register_spiking(gemma4_vit.Gemma4PatchEmbed)
class SpikingGemma4PatchEmbed(PixelEmbedMixin, gemma4_vit.Gemma4PatchEmbed):  # type: ignore[misc]
    """Embedding of flat patches on graded spikes."""
    channels_last = False

    def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        weight = self.input_proj.weight
        with contextlib.nullcontext() if weight.is_floating_point() else _KeptCurrent():
            return super().forward(*args, **kwargs)  # type: ignore[arg-type]

    def _position_embeddings(self, position_ids: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """What timm multiplies by one-hot positions is a look-up in a table."""
        x, y = position_ids.clamp(min=0).unbind(-1)
        positions = self.position_embedding_table[0][x] + self.position_embedding_table[1][y]
        return positions if padding is None else positions.masked_fill(padding.unsqueeze(-1), 0.)

    @property
    def projection(self) -> nn.Module:
        return self.input_proj

    def coding(self, layer: nn.Module, **scaled: float) -> GradedCoding:
        return super().coding(layer, gain=2., offset=-1.)  # its forward does so
