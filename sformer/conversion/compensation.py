"""Compensation: weights that read spikes for what they stand for.

A layer gets spikes s in the place of currents x. What a neuron has left out of its own current is partly known to the
neurons beside it, as currents of a network are correlated. The best linear estimate of x from s, with the least squared
error on images, is a matrix A (and a shift), and folds into the weights that follow: `W x` is close to `(W A) s`. This
is a closed form, as errors of pruning and of rounded weights are compensated (OBS, Hassibi and Stork 1993; GPTQ, arXiv
2210.17323); nothing is trained, but weights are no longer those of the source.
"""
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn as nn

from ..layers import Product, named_products
from ..layers.multiplying import CONVOLUTION, LINEAR
from ..neurons import ScaleAndFire
from ..neurons.scale_and_fire import TINY

__all__ = ['Correlation', 'compensable', 'compensated']

RIDGE = 0.1  # of a channel's own power: what a few images say of many channels is not all true
ROUNDING = 1e-5  # of float32 sums


def compensable(module: nn.Module) -> Iterator[tuple[str, Product]]:
    """Linear layers and convolutions of a spiking module whose weights are theirs alone, with names; no grouped ones,
    whose weights do not see all channels."""
    read = Counter(id(parameter) for layer in module.modules() for parameter in layer._parameters.values())
    for name, _, products in named_products(module):
        for product in products:
            if (product.kind in (LINEAR, CONVOLUTION) and isinstance(product.operands[0], ScaleAndFire)
                    and product.groups == 1 and read[id(product.weight)] == 1
                    and (product.bias is None or read[id(product.bias)] == 1)):
                yield name, product


class Correlation(nn.Module):
    """Stands where a neuron is, lets currents x pass, and sums up how they go with the spikes s that would be there.

    Sums are of `d = s - center`: of a channel that rests at its centre, nothing but rounding would be left of others.

    Attributes:
        spikes: Sum of `d d^T` over positions, float32, (C, C).
        lost: Sum of `(x - s) d^T` likewise.
        sums: Sums of d and of x - s, float64, (2, C).
        count: Positions.
    """

    def __init__(self, neuron: ScaleAndFire):
        super().__init__()
        self.neuron, self.count = neuron, 0
        self.dim = -neuron.step.ndim  # of channels: the last, or before height and width
        channels, device = neuron.step.numel(), neuron.step.device
        self.spikes, self.lost = (torch.zeros(channels, channels, device=device) for _ in range(2))
        self.sums = torch.zeros(2, channels, device='cpu', dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.neuron(x).float()
        d, lost = (t.movedim(self.dim, -1).reshape(-1, len(self.spikes)) for t in (
            s if self.neuron.center is None else s - self.neuron.center, x.float() - s))
        self.spikes += d.T @ d
        self.lost += lost.T @ d
        self.sums += torch.stack([d.sum(0), lost.sum(0)]).cpu()
        self.count += len(d)
        return x

    def decoder(self, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The best estimate `A s + shift` of x, as A - 1, float64 (C, C), and shift (C,), of zeros unless
        `shifted`: not every layer has a bias to take it."""
        spikes = self.spikes.double().cpu()
        lost = self.lost.double().cpu()
        count = max(1, self.count)
        mean, mean_lost = self.sums / count
        center = torch.zeros_like(mean) if self.neuron.center is None else self.neuron.center.flatten().double().cpu()
        # second moments about means, or about zero; sums are about the centre
        origin, expected = (mean, mean_lost) if shifted else (-center, torch.zeros_like(mean))
        varied = spikes.diagonal() - count * mean ** 2
        constant = varied <= ROUNDING * spikes.diagonal() + TINY
        spikes -= count * (torch.outer(mean, origin) + torch.outer(origin, mean - origin))
        lost -= count * (torch.outer(mean_lost, origin) + torch.outer(expected, mean - origin))
        # a channel that never fires, or always the same, says nothing: a one on its diagonal, and no correlation
        spikes[constant] = 0
        spikes[:, constant] = 0
        lost[:, constant] = 0
        spikes.diagonal().add_(torch.where(constant, 1., RIDGE * spikes.diagonal()))
        a = torch.linalg.solve(spikes, lost.T).T
        return a, expected - a @ (mean + center) if shifted else expected


def compensated(product: Product, seen: Correlation) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights of a layer that read spikes for currents, and its bias.

    Args:
        product: One of `compensable`.
        seen: What stood in the place of its neuron.
    """
    weight, bias = product.weights.detach(), None if product.bias is None else product.bias.detach()
    flat = weight.double().cpu()
    if product.kind == LINEAR:
        a, shift = seen.decoder(bias is not None)
        bias = None if bias is None else bias + (flat @ shift).to(bias)
        flat = flat @ a
    else:  # zeros around an image stay zeros, so there is no shift
        a, _ = seen.decoder(False)
        into = 0 if product.transposed else 1  # where input channels are
        flat = torch.tensordot(flat, a, dims=([into], [0])).movedim(-1, into)
    return weight + flat.to(weight), bias
