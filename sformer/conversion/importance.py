"""What errors of what a block gives cost: to second order, by the gradient g of an output there, `e' E[g g'] e`.

A class token may matter more than all patches together, and a few directions of it more than all others; squared errors
alone know nothing of that, and most of what they are is noise that costs nothing.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

from ..layers import shared_copy
from .silence import add_gradients, without_gradients_

__all__ = ['ForwardFn', 'Importance', 'importance_of']

ForwardFn = Callable[[nn.Module, Any], object]  # of a network and a batch, of whatever it reads
ANY = 0.1  # what errors of any direction count, in standard deviations of each token, beside those that cost something
LEAST = 0.01  # standard deviation of a token, as a share of the root mean square of all
LEAST_OF_ALL = 1e-12  # where all tokens are zero
FLAT = 3  # dimensions of what has channels in the last one: tokens (B, L, C), or what was pooled, (B, C)


class Importance:
    """What errors of what a block gives cost the output of a network.

    Of tokens (B, L, C), prefix tokens each have a matrix (C, C), and all others have one together; of what has another
    shape, each element has a number.

    Args:
        num_prefix: Number of prefix tokens.
    """

    def __init__(self, num_prefix: int = 0):
        self.num_prefix = num_prefix
        self.sums: list[torch.Tensor] = []
        self.roots: list[torch.Tensor] = []
        self.elements = False

    def add(self, gradient: torch.Tensor) -> None:
        """Add gradients (B, ...) of an output."""
        self.elements = gradient.ndim > FLAT
        moments = [_second_moments(part) for part in self._parts(gradient.float())]
        if not self.sums:
            self.sums = moments
        elif [old.shape for old in self.sums] == [new.shape for new in moments]:  # maps of other sizes are left out
            self.sums = [old + new for old, new in zip(self.sums, moments, strict=True)]

    def settle(self, power: float) -> None:
        """Take what was added, of images whose outputs have this sum of squares, for what errors cost."""
        self.roots = [_factor(moments / power, self.elements) for moments in self.sums]

    def error(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Squared relative error of the network's output that is to be expected, and a share (`ANY`) of the mean
        squared error in standard deviations of the target: of each token, or of each map."""
        e = (out - target).float()
        cost = e.new_zeros(())
        for part, root in zip(self._parts(e), self.roots, strict=bool(self.roots)):
            if part.ndim <= FLAT:
                cost = cost + (part @ root).square().sum() / len(e)
            elif part.shape[1:] == root.shape:
                cost = cost + (part * root).square().sum() / len(e)
        of = (-1,) if target.ndim < 4 else tuple(range(1, target.ndim))
        std = target.float().std(of, correction=0, keepdim=True)
        least = (LEAST * target.float().square().mean().sqrt()).clamp_min(LEAST_OF_ALL)  # padding may be constant
        return cost + ANY * (e / std.clamp_min(least)).square().mean()

    def _parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        if x.ndim != 3:
            return [x]
        first = min(self.num_prefix, x.shape[1])
        return [*x[:, :first].unbind(1), x[:, first:]]


def _second_moments(gradient: torch.Tensor) -> torch.Tensor:
    """Second moments of gradients, summed over images: of channels (C, C), the mean over tokens; or of each element."""
    if gradient.ndim > FLAT:
        return gradient.square().sum(0)
    rows = gradient.flatten(0, -2)
    return rows.T @ rows * (len(gradient) / max(1, len(rows)))


def _factor(moments: torch.Tensor, elements: bool) -> torch.Tensor:
    """A factor R of errors such that squares of `e R` are what they cost."""
    if elements:
        return moments.sqrt()
    values, vectors = torch.linalg.eigh(moments.double().cpu())
    return (vectors * values.clamp_min(0.).sqrt()).to(moments)


def importance_of(
        network: nn.Module,
        names: Sequence[str],
        batches: list[object],
        forward: ForwardFn,
) -> dict[str, Importance]:
    """What errors of what some blocks give cost the output of a network.

    Args:
        network: The source.
        names: Paths of its blocks, each of which gives one tensor.
        batches: Images.
        forward: Runs a network on a batch.

    Raises:
        SFormerError: If the output is no tensor, or zero throughout.
    """
    view = without_gradients_(shared_copy(network).eval())
    found = {name: Importance(getattr(network, 'num_prefix_tokens', 0)) for name in names}

    def watched(name: str) -> Callable[..., torch.Tensor]:
        def watch(block: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
            out = out.view_as(out) if out.requires_grad else out.detach().requires_grad_()
            out.register_hook(found[name].add)
            return out
        return watch

    for name in names:
        view.get_submodule(name).register_forward_hook(watched(name))
    power = add_gradients(batches, lambda batch: forward(view, batch))
    for importance in found.values():
        importance.settle(power)
    return found
