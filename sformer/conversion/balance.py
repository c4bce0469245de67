"""Balanced transforms: what queries, keys and values are written in such that neurons make the least noise.

Attention does not change where `q -> A q, k -> A^-T k` and `v -> A v, W_o -> W_o A^-1` in a head, for any invertible A,
which folds into the weights. What noise costs does: neurons have thresholds that are as large as their currents, so it
is `sum over c of (A S A')_cc (A^-T G A^-1)_cc`, with the power S of a current and what its errors cost, G: of queries
`S = E[q q']` and `G = Cov[k]`, which is the other way round for keys; of values, whose outputs o of attention fire next
in the same channels, `S = E[o o'] + 0.1 E[v v']` and `G = W_o' W_o` (with LayerScale). With `S^1/2 G S^1/2 = V L V'`
the least is at `A = F L^1/4 V' S^-1/2`, F any orthogonal matrix whose entries are of one magnitude: both diagonals are
constant, and the sum is `(tr L^1/2)^2 / D`.

Neurons with a price of activity are silent where a spike costs more than it brings. For them F = 1: both diagonals are
those of `L^1/2`, no two channels are correlated in what they carry nor in what their errors cost, and few of them carry
most of what there is.
"""
import math

import torch
import torch.nn as nn

from ..layers.heads import HeadWeights

__all__ = ['Moments', 'balance_', 'balanced', 'flat']

FLOOR = 1e-6  # of the largest eigenvalue: what is known of smaller ones is rounding
OF_VALUES = 0.1  # what the power of values counts beside that of their means over keys


def flat(size: int) -> torch.Tensor:
    """An orthogonal matrix, float64 (size, size), whose entries are of one magnitude if size is a power of two
    (Hadamard's); if not, they are on average over octaves (Hartley's of the odd part)."""
    odd = size // (size & -size)
    angle = 2 * math.pi / odd * torch.outer(*[torch.arange(odd, dtype=torch.float64, device='cpu')] * 2)
    out = (angle.cos() + angle.sin()) / math.sqrt(odd)
    pair = torch.tensor([[1., 1.], [1., -1.]], dtype=torch.float64, device='cpu') / math.sqrt(2)
    while len(out) < size:
        out = torch.kron(pair, out)
    return out


def balanced(power: torch.Tensor, cost: torch.Tensor, few: bool = False) -> torch.Tensor:
    """The transform A (D, D) of currents with this power S and this cost of errors G, both (D, D), float64; with `few`,
    that of which few channels carry most."""
    values, vectors = torch.linalg.eigh(power)
    if values[-1] <= 0:
        return torch.eye(len(power), dtype=torch.float64, device='cpu')
    values = values.clamp_min(values[-1] * FLOOR)
    root = (vectors * values.sqrt()) @ vectors.T
    met, directions = torch.linalg.eigh(root @ cost @ root)
    if met[-1] <= 0:
        return torch.eye(len(power), dtype=torch.float64, device='cpu')
    met = met.clamp_min(met[-1] * FLOOR)
    principal = (met ** 0.25)[:, None] * (directions.T @ (vectors / values.sqrt()) @ vectors.T)
    return principal if few else flat(len(power)) @ principal


class Moments(nn.Module):
    """Stands where a neuron is, lets currents pass, and sums up their second moments per head.

    Args:
        heads: Number of heads.

    Attributes:
        squares: Sum of `x x'`, float64 (H, D, D).
        sums: Sum of x, float64 (H, D).
        count: Number of tokens.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.heads, self.count = heads, 0
        self.squares: torch.Tensor | float = 0.
        self.sums: torch.Tensor | float = 0.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = x if x.ndim == 4 else x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, L, D)
        rows = each.transpose(0, 1).flatten(1, 2).to(torch.float32)
        self.squares = self.squares + (rows.mT @ rows).to('cpu', torch.float64)
        self.sums = self.sums + rows.sum(1).to('cpu', torch.float64)
        self.count += rows.shape[1]
        return x

    def power(self) -> torch.Tensor:
        """Mean of `x x'`, (H, D, D)."""
        return torch.as_tensor(self.squares) / max(1, self.count)

    def covariance(self) -> torch.Tensor:
        mean = torch.as_tensor(self.sums) / max(1, self.count)
        return self.power() - mean[:, :, None] * mean[:, None]


@torch.no_grad()
def balance_(layer: HeadWeights, moments: tuple[Moments, Moments, Moments, Moments], few: bool = False) -> None:
    """Write operands of attention in the way that makes the least noise, in place.

    Args:
        layer: Of an attention layer.
        moments: Of queries, keys, values and the output of attention, which stood where its neurons are.
        few: Write them such that few channels carry most instead.
    """
    q, k, v, o = moments
    if layer.queries is not None and layer.keys is not None:
        transforms = [balanced(*pair, few) for pair in zip(q.power(), k.covariance(), strict=True)]
        _turn_(layer.queries, transforms)
        _turn_(layer.keys, [torch.linalg.inv(a).T for a in transforms])
    if layer.values is not None:
        weight = layer.projection.to('cpu', torch.float64)
        seen = weight if layer.gamma is None else layer.gamma.to('cpu', torch.float64)[:, None] * weight
        columns = seen.unflatten(1, (layer.heads, -1)).transpose(0, 1)  # (H, C', D)
        # a silent channel rests at its centre
        powers = o.covariance() + OF_VALUES * v.covariance() if few else o.power() + OF_VALUES * v.power()
        transforms = [balanced(*pair, few) for pair in zip(powers, columns.mT @ columns, strict=True)]
        _turn_(layer.values, transforms)
        back = torch.stack([torch.linalg.inv(a) for a in transforms])
        turned = weight.unflatten(1, (layer.heads, -1)).transpose(0, 1) @ back
        layer.projection.copy_(turned.transpose(0, 1).flatten(1))


def _turn_(parts: list[torch.Tensor], transforms: list[torch.Tensor]) -> None:
    """Multiply the outputs of each head by a transform: rows of weights, and their biases."""
    stacked = torch.stack(transforms)
    for part in parts:
        rows = part.to('cpu', torch.float64).view(len(stacked), stacked.shape[1], -1)
        part.copy_((stacked @ rows).view(part.shape))
