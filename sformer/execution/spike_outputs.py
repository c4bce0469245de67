"""Graphs that also say where they spike: how much each token makes the neurons of a block fire.

These are outputs beside the logits, of levels that the graph computes anyway.
"""
import re
from collections.abc import Mapping

import torch
import torch.nn as nn

from ..errors import SFormerError
from .fired import FiredLevels

__all__ = ['SPIKE_OUTPUTS', 'SpikeOutputs']

# per image, block and token: unary spikes per neuron, and the share of neurons that fire
SPIKE_OUTPUTS = ('spikes', 'activity')


class SpikeOutputs(nn.Module):
    """A network that `to_graph_` has been through, with where it spikes beside what it gives.

    Args:
        network: The network.
        neurons: Path in the network -> neuron that linear layers read from, in the order of computation.

    Attributes:
        blocks: Paths of the blocks, or of whatever repeated parts they are.
        neurons_per_token: Neurons of each block that are counted, per token.

    Shape:
        Images (B, C, H, W) to what the network gives, and `SPIKE_OUTPUTS`, each (B, blocks, tokens): means over the
        neurons of the linear layers of a block, the tokens of the prefix first.
    """

    def __init__(self, network: nn.Module, neurons: Mapping[str, FiredLevels]):
        super().__init__()
        self.network = network
        for name in ('pretrained_cfg', 'default_cfg', 'in_chans'):  # which timm finds the input of a network by
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        self.counted: dict[str, list[FiredLevels]] = {}
        for name, neuron in neurons.items():
            if block := re.match(r'(.*?\d+)\.', name):
                self.counted.setdefault(block[1], []).append(neuron)
        self.blocks: list[str] = []
        self.neurons_per_token: list[int] = []

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        levels: dict[FiredLevels, torch.Tensor] = {}

        def keep(neuron: FiredLevels, args: tuple[torch.Tensor], out: tuple[torch.Tensor, torch.Tensor | None]) -> None:
            levels[neuron] = neuron.whole(out[0]).abs()

        hooks = [neuron.register_forward_hook(keep) for neurons in self.counted.values() for neuron in neurons]
        try:
            given = self.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        self.blocks.clear()
        self.neurons_per_token.clear()
        spikes: list[torch.Tensor] = []
        activity: list[torch.Tensor] = []
        for block, neurons in self.counted.items():
            # of what is pooled or in windows, tokens are others than those of the patches
            of_tokens = [levels[neuron] for neuron in neurons if neuron in levels and levels[neuron].ndim == 3]
            of_tokens = [k for k in of_tokens if k.shape[1] == of_tokens[0].shape[1]]
            if not of_tokens or (spikes and of_tokens[0].shape[1] != spikes[0].shape[1]):
                continue
            width = sum(k.shape[2] for k in of_tokens)
            spikes.append(torch.stack([k.sum(2) for k in of_tokens]).sum(0) / width)
            activity.append(torch.stack([k.clamp(max=1).sum(2) for k in of_tokens]).sum(0) / width)
            self.blocks.append(block)
            self.neurons_per_token.append(width)
        if not spikes:
            raise SFormerError('the network has no blocks whose linear layers read tokens, so nothing says where it '
                               'spikes.')
        return given, torch.stack(spikes, 1), torch.stack(activity, 1)
