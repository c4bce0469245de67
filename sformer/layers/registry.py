"""One table from timm layer to spiking layer, and the verb that applies it."""
import contextlib
from typing import Dict, Iterator, Tuple, Type

import torch
import torch.nn as nn
from timm import layers as tl
from timm.models import beit, eva
from timm.models import vision_transformer as vit

from ..errors import UnsupportedLayerError
from ..neurons import Neuron, SFNConfig
from . import attention, linear, mlp

__all__ = ['SPIKING_LAYERS', 'FLOATING_LAYERS', 'named_neurons', 'spiking_']

# Exact types, not subclasses: a subclass may multiply in a forward of its own.
SPIKING_LAYERS: Dict[Type[nn.Module], Type[nn.Module]] = {
    nn.Linear: linear.SpikingLinear,
    nn.Conv2d: linear.SpikingConv2d,
    tl.PatchEmbed: linear.SpikingPatchEmbed,
    tl.Mlp: mlp.SpikingMlp,
    tl.GluMlp: mlp.SpikingGluMlp,
    tl.SwiGLU: mlp.SpikingSwiGLU,
    tl.Attention: attention.SpikingAttention,
    tl.AttentionRope: attention.SpikingAttentionRope,
    tl.DiffAttention: attention.SpikingDiffAttention,
    tl.AttentionPoolLatent: attention.SpikingAttentionPoolLatent,
    tl.AttentionPoolPrr: attention.SpikingAttentionPoolPrr,
    eva.EvaAttention: attention.SpikingEvaAttention,
    beit.Attention: attention.SpikingBeitAttention,
    vit.ParallelScalingBlock: attention.SpikingParallelScalingBlock,
    vit.DiffParallelScalingBlock: attention.SpikingDiffParallelScalingBlock,
}

# Layers that stay as they are: they act on currents once per image (norms, activation functions, residual sums,
# LayerScale, rotary embedding, dropout) or only call their children.
FLOATING_LAYERS = {
    nn.Identity, nn.Dropout, nn.Sequential, nn.ModuleList,
    nn.LayerNorm, tl.LayerNorm, tl.RmsNorm, tl.SimpleNorm, tl.LayerNormFp32, tl.RmsNormFp32, tl.SimpleNormFp32,
    nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh, tl.GELU, tl.GELUTanh, tl.QuickGELU, tl.Sigmoid, tl.Tanh,
    tl.DropPath, tl.LayerScale, tl.PatchDropout, tl.PatchDropoutWithIndices,
    tl.RotaryEmbedding, tl.RotaryEmbeddingCat, tl.RotaryEmbeddingMixed, tl.RotaryEmbeddingDinoV3,
    tl.RotaryEmbeddingMRope,
    vit.Block, vit.ResPostBlock, vit.ParallelThingsBlock,
    eva.EvaBlock, eva.EvaBlockPostNorm, beit.Block, beit.RelativePositionBias,
}


def spiking_(module: nn.Module, config: SFNConfig = SFNConfig()) -> nn.Module:
    """Replace every layer by its spiking counterpart, in place.

    Parameters, their names and their values stay; each spiking layer gains the buffers of its neurons, with default
    thresholds until they are calibrated. Layers that spike already are left alone, so a head that was reset can be
    converted by a second call.

    Args:
        module: A timm model or any part of one.
        config: Neurons.

    Returns:
        The same module.

    Raises:
        UnsupportedLayerError: If a layer has no spiking counterpart or its forward was replaced; names the layers, and
            the module is unchanged.
    """
    done = set(SPIKING_LAYERS.values())
    unknown = []
    for name, child in module.named_modules():
        kind = type(child)
        if kind not in SPIKING_LAYERS and kind not in FLOATING_LAYERS and kind not in done \
                and not isinstance(child, Neuron):
            unknown.append(f'{name or "(root)"} ({kind.__module__}.{kind.__qualname__})')
        # hooks that were removed leave the layer's own forward behind
        forward = child.__dict__.get('forward')
        if kind in SPIKING_LAYERS and forward is not None and getattr(forward, '__func__', None) is not kind.forward:
            raise UnsupportedLayerError(
                f'the forward of {name or "(root)"} was replaced, by hooks of accelerate perhaps, so that it would not '
                f'spike. Remove them first (accelerate.hooks.remove_hook_from_submodules).')
    if unknown:
        more = f' and {len(unknown) - 4} more' if len(unknown) > 4 else ''
        raise UnsupportedLayerError(
            f'no spiking counterpart for {", ".join(unknown[:4])}{more}. '
            f'Register one in sformer.layers.SPIKING_LAYERS.')

    # layers without weights build their neurons where the others are
    device = next((p.device for p in module.parameters()), None)
    with contextlib.nullcontext() if device is None else torch.device(device):
        for child in reversed(list(module.modules())):  # children first, a parent may adjust their neurons
            if type(child) in SPIKING_LAYERS:
                child.__dict__.pop('forward', None)
                child.__class__ = SPIKING_LAYERS[type(child)]
                child.add_neurons(config)
            elif isinstance(child, linear.SpikingPatchEmbed):
                child.add_neurons(config)  # set_input_size() puts in a new convolution
        for child in module.modules():
            for part in child.children():
                if isinstance(part, Neuron):
                    part.train(child.training)
    return module


def named_neurons(module: nn.Module) -> Iterator[Tuple[str, Neuron]]:
    """Neurons of a spiking module with their paths, in the order of the modules."""
    for name, child in module.named_modules():
        if isinstance(child, Neuron):
            yield name, child
