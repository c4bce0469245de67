"""What writes to the residual stream of a vision transformer, and what reads it: where a turn of it folds in."""
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn
from timm import layers as tl
from timm.models import deit, vision_transformer

from .linear import SpikingConv2d, SpikingLinear

__all__ = ['ResidualStream', 'stream_of']

HIDDEN = ('fc1', 'fc1_g', 'fc1_x')  # what reads the input of an MLP, gates too


@dataclass(frozen=True)
class ResidualStream:
    """A residual stream of C channels, whose basis nobody outside of the network knows.

    Args:
        tokens: What is added to it, (..., C): class tokens, registers, positions.
        writers: Layers whose outputs are added to it, each with its LayerScale, if there is one.
        readers: What reads it, each a norm and the linear layers that read its output: of the blocks in their order,
            and last of the classifier.
    """
    tokens: list[torch.Tensor]
    writers: list[tuple[SpikingLinear | SpikingConv2d, tl.LayerScale | None]]
    readers: list[tuple[nn.LayerNorm, list[SpikingLinear]]]

    def layers(self) -> list[SpikingLinear | SpikingConv2d]:
        """Layers that write to it or read it."""
        return [*(layer for layer, _ in self.writers), *(layer for _, layers in self.readers for layer in layers)]

    def tensors(self) -> list[torch.Tensor]:
        """All that may be written anew."""
        scales = [scale.gamma.detach() for _, scale in self.writers if scale is not None]
        norms = [norm for norm, _ in self.readers]
        layers: list[nn.Module] = [*norms, *self.layers()]
        return [*self.tokens, *scales, *(p.detach() for layer in layers for p in layer.parameters(recurse=False))]


def stream_of(model: nn.Module) -> ResidualStream | None:
    """The residual stream of a spiking vision transformer with a linear classifier, whose weights are its own; None
    where something else might read it or write to it."""
    if not isinstance(model, vision_transformer.VisionTransformer) or not _is_bare(model):
        return None
    heads = [model.head, *([model.head_dist] if isinstance(model, deit.VisionTransformerDistilled) else [])]
    embed, norm = model.patch_embed.proj, model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    writers: list[tuple[nn.Module, nn.Module]] = [(embed, nn.Identity())]
    readers: list[tuple[nn.Module, list[nn.Module]]] = []
    for block in model.blocks:
        if not _is_ordinary(block):
            return None
        writers += [(block.get_submodule('attn.proj'), block.get_submodule('ls1')),
                    (block.get_submodule('mlp.fc2'), block.get_submodule('ls2'))]
        hidden = [part for name, part in block.get_submodule('mlp').named_children() if name in HIDDEN]
        readers += [(block.get_submodule('norm1'), [block.get_submodule('attn.qkv')]),
                    (block.get_submodule('norm2'), hidden)]
    readers.append((norm, [*heads]))
    tokens = [getattr(model, name, None) for name in ('cls_token', 'dist_token', 'reg_token', 'pos_embed')]
    found = _turnable(writers, readers)
    if found is None:
        return None
    stream = ResidualStream([token.detach() for token in tokens if token is not None], *found)
    read = Counter(id(parameter) for layer in model.modules() for parameter in layer._parameters.values())
    own = all(read[id(parameter)] == 1 for layer in stream.layers() for parameter in layer.parameters(recurse=False))
    return stream if own else None


def _is_bare(model: vision_transformer.VisionTransformer) -> bool:
    """Whether a model has nothing between its embedding and its blocks, nor between these and its classifier, but one
    norm."""
    between = (model.norm_pre, model.patch_embed.norm)
    norms = [norm for norm in (model.norm, model.fc_norm) if not isinstance(norm, nn.Identity)]
    return (isinstance(model.patch_embed, tl.PatchEmbed) and all(isinstance(layer, nn.Identity) for layer in between)
            and len(norms) == 1 and getattr(model, 'attn_pool', None) is None and model.global_pool in ('token', 'avg'))


def _is_ordinary(block: nn.Module) -> bool:
    """Whether a block is one of attention and an MLP, each behind its norm."""
    return (type(block) is vision_transformer.Block and isinstance(block.attn, tl.Attention)
            and getattr(block.attn, 'gate', None) is None and isinstance(block.mlp, (tl.Mlp, tl.GluMlp, tl.SwiGLU)))


def _turnable(
        writers: list[tuple[nn.Module, nn.Module]],
        readers: list[tuple[nn.Module, list[nn.Module]]],
) -> tuple[list[tuple[SpikingLinear | SpikingConv2d, tl.LayerScale | None]],
           list[tuple[nn.LayerNorm, list[SpikingLinear]]]] | None:
    """The same, where all are of types whose weights can be turned; None if not."""
    write: list[tuple[SpikingLinear | SpikingConv2d, tl.LayerScale | None]] = []
    read: list[tuple[nn.LayerNorm, list[SpikingLinear]]] = []
    for layer, scale in writers:
        if not isinstance(layer, (SpikingLinear, SpikingConv2d)) or not isinstance(scale, (tl.LayerScale, nn.Identity)):
            return None
        write.append((layer, scale if isinstance(scale, tl.LayerScale) else None))
    for norm, layers in readers:
        linear = [layer for layer in layers if isinstance(layer, SpikingLinear) and layer.bias is not None]
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None or len(linear) < len(layers):
            return None
        read.append((norm, linear))
    return write, read
