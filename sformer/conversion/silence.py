"""Where a network may be silent: how much each site matters to the output, and so what a spike on it is worth.

A potential h that is silent instead of fired costs `w h^2`, where w is the mean squared gradient of the output; a spike
costs its price. So silence is worth it for |h| < q with `w q^2 = price`: one price for the whole network puts silence
where it is cheapest, without a search (a Lagrangian over all neurons).

Softmax numerators are another matter: whatever is silent in a row is missed with one sign, so errors do not average out
(on a ViT-S they are 18 times what independent ones would be). There a row as a whole is what is counted.
"""
import math
from collections.abc import Callable

import torch
import torch.nn as nn

from ..errors import SFormerError
from ..neurons import ScaleAndFire
from ..neurons.scale_and_fire import TINY

__all__ = ['RowSensitivity', 'Sensitivity', 'add_gradients', 'set_quiet_', 'without_gradients_']


class Sensitivity(nn.Module):
    """Stands where a neuron is, lets currents pass, and sums up the squared gradients that come back.

    Attributes:
        squares: Sums per element of the neuron's step, float64, (*shape).
        count: Currents that passed.
    """

    def __init__(self, neuron: ScaleAndFire):
        super().__init__()
        self.neuron, self.count = neuron, 0
        self.squares = torch.zeros(neuron.step.shape, dtype=torch.float64, device=neuron.step.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += x.numel()
        # a node of its own, which has the gradient of this site alone; the first one of a path starts it
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        current = x.detach()
        x.register_hook(lambda gradient: self._add(current, gradient))
        return x

    def _add(self, current: torch.Tensor, gradient: torch.Tensor) -> None:
        rest = [d for d, n in enumerate((1,) * (gradient.ndim - self.squares.ndim) + self.squares.shape) if n == 1]
        self.squares += gradient.double().square().sum(rest, keepdim=True).view(self.squares.shape)

    def quiet(self, price: float, power: float) -> torch.Tensor:
        """Magnitude below which silence is worth it, (*shape).

        Args:
            price: Price of a spike, in squared relative errors of the output.
            power: Sum of squares of all outputs.
        """
        weight = self.squares / (self.count / self.squares.numel() * power)
        return (price / weight.clamp_min(TINY)).sqrt()


class RowSensitivity(Sensitivity):
    """The same of softmax numerators n (B, H, L, S), of which each row is divided by its own sum.

    Where those below a threshold t are silent, the output moves by `d = sum_(n < t) g n * sum(n) / sum_(n >= t) n`,
    with the gradient g: exactly that of AV, and to first order that of the network. Where silent keys count as the mean
    of all values (`keys_rest`), it moves by `d = sum_(n < t) (g - mean g) n`, as gradients of keys differ by values.
    What is left is alike in all rows that look at much the same, so they are summed up before they are squared: with
    random signs of outputs that is the error of all rows together, without bias.

    Attributes:
        errors: Sums of d^2 per head and threshold, float64, (H, K); with `keys_rest` of sums of d over an image.
        silent: Number of silent numerators likewise.
    """

    def __init__(self, neuron: ScaleAndFire):
        super().__init__(neuron)
        self.thresholds = 2. ** torch.linspace(-16, 0, 65, device=self.squares.device)
        self.errors = torch.zeros(len(self.squares), 65, dtype=torch.float64, device=self.squares.device)
        self.silent = torch.zeros_like(self.errors)

    def _add(self, current: torch.Tensor, gradient: torch.Tensor) -> None:
        n = current.float()
        index = torch.bucketize(n, self.thresholds, right=True).clamp_max(len(self.thresholds) - 1)
        zeros = n.new_zeros(*n.shape[:-1], len(self.thresholds))
        g = gradient.float()
        if self.neuron.config.keys_rest:
            seen = n > TINY  # of hidden keys nothing is left
            g = g - (g * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
        below = [zeros.scatter_add(-1, index, part).cumsum(-1) for part in (g * n, n, torch.ones_like(n))]
        self.silent[:, :-1] += below[2][..., :-1].double().sum((0, 2))
        if self.neuron.config.keys_rest:
            self.errors[:, :-1] += below[0][..., :-1].double().sum(2).square().sum(0)
            return
        # the strongest of a row is 1, and never below a threshold; it is in the last bin, where nothing is left
        total = below[1][..., -1:]
        moved = below[0] * total / (total - below[1]).clamp_min(TINY)
        self.errors[:, :-1] += moved[..., :-1].double().square().sum((0, 2))

    def quiet(self, price: float, power: float) -> torch.Tensor:
        cost = self.errors / power - price * self.silent
        best = cost[:, :-1].argmin(1)
        quiet = torch.where(cost.gather(1, best[:, None])[:, 0] < 0, self.thresholds[best], 0.)
        return quiet.view(self.squares.shape)


def without_gradients_(view: nn.Module) -> nn.Module:
    """Let the parameters of a view of a network take no gradients, for currents alone; those of the network itself do
    as ever."""
    for layer in list(view.modules()):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(parameter.detach(), requires_grad=False))
    return view


def add_gradients(batches: list[object], outputs: Callable[[object], object]) -> float:
    """Let what stands in a network see the gradient of its output on some batches, of which all sites together have a
    squared one that is estimated without bias by that of a sum of outputs with random signs (Hutchinson).

    Args:
        batches: Images, or whatever the network reads.
        outputs: Output of the source network on a batch, with a graph.

    Returns:
        Sum of squares of all outputs.

    Raises:
        SFormerError: If the output is no tensor, or is zero throughout.
    """
    generator, power = torch.Generator().manual_seed(0), 0.
    with torch.inference_mode(False), torch.enable_grad():
        for batch in batches:
            out = outputs(batch.clone() if isinstance(batch, torch.Tensor) and batch.is_inference() else batch)
            if not isinstance(out, torch.Tensor):
                raise SFormerError(f'a price of activity (silence), lateral spikes and effort=high need an output that '
                                   f'is one tensor, got a {type(out).__name__}: let forward_fn return it.')
            power += out.detach().double().square().sum().item()
            signs = torch.randint(0, 2, out.shape, generator=generator) * 2 - 1
            out.backward(signs.to(out))
    return power


def set_quiet_(
        sites: list[Sensitivity],
        batches: list[object],
        outputs: Callable[[object], object],
) -> None:
    """Set the magnitude below which each neuron is silent, by the price of activity in its config.

    Args:
        sites: Where neurons are in the network that `outputs` runs.
        batches: As of `add_gradients`.
        outputs: Likewise.

    Raises:
        SFormerError: If the output is no tensor.
    """
    power = add_gradients(batches, outputs)
    if not math.isfinite(power):
        return  # whoever observes the network next says where
    if not power:
        raise SFormerError('a price of activity (silence) is one of errors of the output, and all outputs of the '
                           'source are zero. Is its head trained?')
    total = sum(site.count for site in sites)
    for site in (site for site in sites if site.count):  # whoever observes the network says what nothing has reached
        site.neuron.set_quiet(site.quiet(site.neuron.config.silence / total, power))  # all neurons count alike
