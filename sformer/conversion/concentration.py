"""A residual stream in its principal components, of which few carry most: what the others carry need not fire.

Nothing but linear layers behind norms reads the residual stream of a vision transformer, and nothing but linear layers
writes to it. So any rotation Q of it folds into the weights that norms do not see: LayerNorm takes the mean of all
channels off, so Q has to leave the vector of ones where it is, and has factors and offsets of its own, which are
written into the weights that follow (SliceGPT, arXiv 2401.15024, cuts off what is small then). With the eigenvectors V
of the covariance of what norms give, of all layers together, currents `V' x` of most channels are small. A reflection R
that takes the first axis to the vector of ones makes `Q = R V'` of it: a channel has the C-th part of all others' sum.
"""
import math

import torch

from ..layers.stream import ResidualStream

__all__ = ['components', 'fold_norms_', 'turn_']


def components(covariance: torch.Tensor) -> torch.Tensor:
    """The rotation Q, float64 (C, C), which leaves the vector of ones, and takes principal components to channels but
    for a C-th part of the sum of them.

    Args:
        covariance: Of what LayerNorm gives, whose channels have the sum zero, float64 (C, C).
    """
    size = len(covariance)
    ones = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64, device='cpu')
    flat = torch.eye(size, dtype=torch.float64, device='cpu') - torch.outer(ones, ones)
    # the vector of ones first, whatever rounding makes of its eigenvalue
    inside = flat @ covariance @ flat
    _, vectors = torch.linalg.eigh(inside - (1 + inside.diagonal().sum()) * torch.outer(ones, ones))
    vectors[:, 0] = ones
    mirror = ones.clone()
    mirror[0] -= 1
    mirror /= mirror.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return vectors.T - 2 * torch.outer(mirror, mirror @ vectors.T)


@torch.no_grad()
def fold_norms_(stream: ResidualStream) -> None:
    """Write factors and offsets of norms, and of LayerScale, into the weights beside them, in place: what the network
    computes stays."""
    for norm, layers in stream.readers:
        factor, offset = (t.detach().to('cpu', torch.float64) for t in (norm.weight, norm.bias))
        for layer in layers:
            weight = layer.weight.to('cpu', torch.float64)
            layer.bias.add_((weight @ offset).to(layer.bias))
            layer.weight.copy_(weight * factor)
        norm.weight.fill_(1)
        norm.bias.zero_()
    for writer, scale in stream.writers:
        if scale is not None:
            _write_(writer, scale.gamma.detach().to('cpu', torch.float64).diag())
            scale.gamma.fill_(1)


@torch.no_grad()
def turn_(stream: ResidualStream, rotation: torch.Tensor) -> None:
    """Let a residual stream, whose norms are folded, be rotated, in place: what is behind the classifier stays.

    Args:
        stream: Of a vision transformer.
        rotation: Q, orthogonal and with `Q 1 = 1`, float64 (C, C).
    """
    for tokens in stream.tokens:
        tokens.copy_(tokens.to('cpu', torch.float64) @ rotation.T)
    for writer, _ in stream.writers:
        _write_(writer, rotation)
    for _, layers in stream.readers:
        for layer in layers:
            layer.weight.copy_(layer.weight.to('cpu', torch.float64) @ rotation.T)


def _write_(layer: torch.nn.Linear | torch.nn.Conv2d, matrix: torch.Tensor) -> None:
    """Multiply the outputs of a layer by a matrix."""
    layer.weight.copy_(torch.tensordot(matrix, layer.weight.to('cpu', torch.float64), 1))
    if layer.bias is not None:
        layer.bias.copy_(matrix @ layer.bias.to('cpu', torch.float64))
