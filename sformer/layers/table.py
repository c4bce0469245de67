"""The table from a layer to its spiking counterpart. A layer that is in neither part of it does not convert."""
from collections.abc import Callable
from typing import TypeVar

import torch.nn as nn
from timm import layers as tl
from timm.layers import norm_act, pool2d_same
from timm.models import beit, eva, gemma4_vit, qwen3_vit, xcit
from timm.models import vision_transformer as vit
from torchvision import ops
from torchvision.models.detection import anchor_utils, transform
from torchvision.ops import feature_pyramid_network as fpn

from ..neurons import SFNConfig
from .multiplying import Multiplying

__all__ = [
    'SpikingLayer', 'SPIKING_LAYERS', 'FLOATING_LAYERS', 'CONSTANT_LAYERS', 'become_', 'constant_children',
    'constant_modules', 'register_spiking', 'register_floating', 'replace_',
]


class SpikingLayer(Multiplying):
    """What a spiking counterpart adds to the layer that it subclasses, whose parameters and attributes it keeps.

    `spiking_` changes the class of a layer to that of its counterpart and calls `add_neurons`; `revert_` calls
    `remove_neurons` and changes the class back. `multiplies` says what those neurons are operands of.
    """
    spiking_parts: tuple[str, ...] = ()  # attributes that the source does not have
    constant_parts: tuple[str, ...] = ()  # children that make a table of nothing but their weights
    vetted = True  # whether its own forward is known to multiply nothing but spikes; of others calibration makes sure

    def add_neurons(self, config: SFNConfig) -> None:
        """Add the neurons of this layer, with default thresholds, on the device of its parameters."""

    def remove_neurons(self) -> None:
        for name in self.spiking_parts:
            self.__dict__.pop(name, None)
            self._modules.pop(name, None)


def become_(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module, in place: of a layer to its spiking counterpart, say, and back."""
    module.__class__ = kind


def replace_(network: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of a layer, in place, with the numbers and words of that layer (`stride`, say), which
    the forward of another one may read."""
    for key, value in vars(network.get_submodule(name)).items():
        if isinstance(value, (int, float, str, tuple)) and not key.startswith('_') and key not in vars(new):
            setattr(new, key, value)
    network.set_submodule(name, new)


# Exact types, not subclasses: a subclass may multiply in a forward of its own.
SPIKING_LAYERS: dict[type[nn.Module], type[nn.Module]] = {}

# Layers that stay as they are: they act on currents once per image (norms, activation functions, residual sums,
# LayerScale, rotary embedding, dropout, pooling and resampling) or only call their children. Batch norm in eval mode is
# a factor and an offset per output channel of the convolution before it, as the steps of int8 weights are: it stays
# where it is, under the names that its parameters have.
FLOATING_LAYERS: set[type[nn.Module]] = {
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.Sequential, nn.ModuleList, nn.Flatten,
    nn.LayerNorm, tl.LayerNorm, tl.RmsNorm, tl.SimpleNorm, tl.LayerNormFp32, tl.RmsNormFp32, tl.SimpleNormFp32,
    tl.LayerNorm2d, tl.LayerNorm2dFp32, nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, ops.FrozenBatchNorm2d,
    tl.GroupNorm, tl.GroupNorm1, tl.RmsNorm2d, tl.RmsNorm2dFp32, tl.SimpleNorm2d, tl.SimpleNorm2dFp32,
    # a norm, dropout, and an activation function
    norm_act.BatchNormAct2d, norm_act.SyncBatchNormAct, norm_act.FrozenBatchNormAct2d, norm_act.GroupNormAct,
    norm_act.GroupNorm1Act, norm_act.LayerNormAct, norm_act.LayerNormActFp32, norm_act.LayerNormAct2d,
    norm_act.LayerNormAct2dFp32, norm_act.RmsNormAct, norm_act.RmsNormActFp32, norm_act.RmsNormAct2d,
    norm_act.RmsNormAct2dFp32,
    nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, tl.GELU, tl.GELUTanh,
    tl.QuickGELU, tl.Sigmoid, tl.Tanh, tl.Swish, tl.HardSwish, tl.HardSigmoid,
    tl.DropPath, tl.LayerScale, tl.PatchDropout, tl.PatchDropoutWithIndices,
    tl.RotaryEmbedding, tl.RotaryEmbeddingCat, tl.RotaryEmbeddingMixed, tl.RotaryEmbeddingDinoV3,
    tl.RotaryEmbeddingMRope,
    vit.Block, vit.ResPostBlock, vit.ParallelThingsBlock,
    eva.EvaBlock, eva.EvaBlockPostNorm, beit.Block, beit.RelativePositionBias,
    qwen3_vit.Qwen3VitEncoder, gemma4_vit.Gemma4VitEncoder, gemma4_vit.Gemma4ClippableLinear,
    gemma4_vit.Gemma4VisionPooler,
    pool2d_same.MaxPool2dSame, pool2d_same.AvgPool2dSame, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.Upsample, nn.PixelShuffle, fpn.LastLevelMaxPool,
    ops.RoIAlign, ops.MultiScaleRoIAlign, anchor_utils.AnchorGenerator, transform.GeneralizedRCNNTransform,
}

# Layers that make a table of positions of nothing but their weights, whatever is on an image: what is below stays as it
# is, too.
CONSTANT_LAYERS: set[type[nn.Module]] = {
    tl.RelPosMlp, tl.RelPosBias, tl.RelPosBiasTf, gemma4_vit.Gemma4RotaryEmbedding2D, xcit.PositionalEncodingFourier}


def constant_children(module: nn.Module) -> set[nn.Module]:
    """Children of a layer that is in the table, or of its spiking counterpart, that are constant layers."""
    names = getattr(SPIKING_LAYERS.get(type(module), type(module)), 'constant_parts', ())
    return {child for name, child in module.named_children() if name in names or type(child) in CONSTANT_LAYERS}


def constant_modules(module: nn.Module) -> set[nn.Module]:
    """Constant layers of a module, and what is below them."""
    return {part for parent in module.modules() for child in constant_children(parent) for part in child.modules()}


Layer = TypeVar('Layer', bound=type[nn.Module])


def register_spiking(source: type[nn.Module]) -> Callable[[Layer], Layer]:
    """Register the decorated class, a `SpikingLayer` and a subclass of `source`, as its spiking counterpart."""
    def register(spiking: Layer) -> Layer:
        SPIKING_LAYERS[source] = spiking
        return spiking
    return register


def register_floating(*layers: type[nn.Module]) -> None:
    """Register layers that act on currents, or only call their children, and stay as they are."""
    FLOATING_LAYERS.update(layers)
