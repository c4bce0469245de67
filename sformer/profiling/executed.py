"""Whether it spikes in the code, too: a batch through bit planes; and which patches of an image spike."""
import functools
import re
from typing import TypedDict

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..execution import to_spikes_
from ..layers import named_products, shared_copy
from ..layers.multiplying import LINEAR
from ..neurons import Neuron

__all__ = ['CodingsCompared', 'compare_codings', 'pixels_of', 'spike_maps']


class CodingsCompared(TypedDict):
    """What `compare_codings` finds.

    Args:
        images: Number of images.
        equal: Whether logits by bit planes equal those by graded spikes bit for bit.
        difference: The largest difference that there is.
        simulation: The largest difference of both to the simulation, relative to its largest logit.
    """
    images: int
    equal: bool
    difference: float
    simulation: float


@torch.no_grad()
def compare_codings(model: nn.Module, images: torch.Tensor) -> CodingsCompared:
    """Run images through bit planes, through graded spikes, and through the simulation.

    Args:
        model: Calibrated SFormer; it is not changed.
        images: Normalised images (B, C, H, W); a plane at a time they take minutes where networks are large.
    """
    model = shared_copy(model).eval()
    simulated = model(images)
    binary, graded = (to_spikes_(model, coding)(images) for coding in ('binary', 'graded'))
    difference = (binary - simulated).abs().max() / simulated.abs().max().clamp_min(1e-12)
    return CodingsCompared(
        images=len(images), equal=torch.equal(binary, graded), difference=(binary - graded).abs().max().item(),
        simulation=difference.item())


@torch.no_grad()
def spike_maps(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Spikes per neuron and patch of an image, block by block.

    Args:
        model: Calibrated SFormer of a network that embeds patches.
        image: Normalised image (C, H, W).

    Returns:
        Path of a block, or of whatever repeated part it is -> mean unary spikes per neuron of the linear layers in it,
        (rows, columns) of patches; empty where tokens are no grid of patches.
    """
    view = shared_copy(model).eval()
    grid: tuple[int, int] = tuple(getattr(getattr(view, 'patch_embed', None), 'grid_size', None) or ())
    if len(grid) != 2:
        return {}
    patches = grid[0] * grid[1]
    sums: dict[str, list[torch.Tensor]] = {}

    def keep(block: str, neuron: Neuron, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        levels = neuron.encode(args[0]).levels
        if levels.ndim == 3 and levels.shape[1] >= patches:  # prefix tokens come first
            sums.setdefault(block, []).append(levels[0, -patches:].abs().double())

    for name, _, products in named_products(view):
        block = re.match(r'(.*?\d+)\.', name)
        for product in products:
            if block and product.kind == LINEAR:
                product.operands[0].register_forward_hook(functools.partial(keep, block[1]))
    view(image[None])
    return {block: torch.cat(parts, 1).mean(1).view(grid) for block, parts in sums.items()}


def pixels_of(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """A normalised image (C, H, W) as it was before, in [0, 1] but for what resizing overshoots."""
    config = resolve_input_data_config(model)
    std, mean = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('std', 'mean'))
    return image * std + mean
