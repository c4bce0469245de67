"""Graphs that also say where they spike: how much each token makes the neurons of a block fire.

These are outputs beside the logits, of levels that the graph computes anyway.
"""
import contextlib
import re
from collections.abc import Iterator, Mapping

import torch
import torch.nn as nn

from ..errors import SFormerError
from .fired import FiredLevels

__all__ = ['SPIKE_OUTPUTS', 'SpikeOutputs']

# per image, block and token: unary spikes per neuron, and the share of neurons that fire
SPIKE_OUTPUTS = ('spikes', 'activity')

Fired = dict[FiredLevels, torch.Tensor]  # magnitudes of what neurons fire


class SpikeOutputs(nn.Module):
    """A network that `to_graph_` has been through, with where it spikes beside what it gives.

    Args:
        network: The network, in eval mode.
        neurons: Path in the network -> neuron that linear layers read from, in the order of computation.
        image: An image (1, C, H, W), to find out which of these read a vector per token of the whole image.
        patches: Tokens that there are at least.

    Attributes:
        blocks: Path of a block, or of whatever repeated part it is -> its neurons per token that are counted.

    Shape:
        Images (B, C, H, W) to what the network gives, and `SPIKE_OUTPUTS`, each (B, blocks, tokens): means over the
        neurons of the linear layers of a block, the tokens of the prefix first.

    Raises:
        SFormerError: If there are none.
    """

    def __init__(
            self,
            network: nn.Module,
            neurons: Mapping[str, FiredLevels],
            image: torch.Tensor,
            patches: int = 1,
    ):
        super().__init__()
        self.network = network
        for name in ('pretrained_cfg', 'default_cfg', 'in_chans'):  # which timm finds the input of a network by
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        self.counted: dict[str, list[FiredLevels]] = {}
        self.blocks: dict[str, int] = {}
        with torch.no_grad(), self._fired([*neurons.values()]) as fired:
            network(image)
        tokens = 0
        for name, neuron in neurons.items():
            block = re.match(r'(.*?\d+)\.', name)
            shape = fired[neuron].shape if neuron in fired else ()
            # of windows there are several per image, and of what is pooled there are fewer tokens
            if block is None or len(shape) != 3 or shape[0] > 1 or shape[1] < patches or tokens not in (0, shape[1]):
                continue
            tokens = shape[1]
            self.counted.setdefault(block[1], []).append(neuron)
            self.blocks[block[1]] = self.blocks.get(block[1], 0) + shape[2]
        if not self.blocks:
            raise SFormerError('the network has no blocks whose linear layers read a vector per patch, so nothing says '
                               'where it spikes.')

    @contextlib.contextmanager
    def _fired(self, neurons: list[FiredLevels]) -> Iterator[Fired]:
        """What neurons fire, as it is computed inside of the context."""
        fired: Fired = {}

        def keep(neuron: FiredLevels, args: tuple[torch.Tensor], out: tuple[torch.Tensor, torch.Tensor | None]) -> None:
            fired[neuron] = neuron.whole(out[0]).abs()

        hooks = [neuron.register_forward_hook(keep) for neuron in neurons]
        try:
            yield fired
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self._fired([neuron for neurons in self.counted.values() for neuron in neurons]) as fired:
            given = self.network(images)
        spikes: list[torch.Tensor] = []
        activity: list[torch.Tensor] = []
        for block, neurons in self.counted.items():
            width = self.blocks[block]
            spikes.append(torch.stack([fired[neuron].sum(2) for neuron in neurons]).sum(0) / width)
            activity.append(torch.stack([fired[neuron].clamp(max=1).sum(2) for neuron in neurons]).sum(0) / width)
        return given, torch.stack(spikes, 1), torch.stack(activity, 1)
