"""What a layer multiplies, as data: counters, executions, exports and drawings loop over this.

None of them asks of which type a layer is. So a layer of one's own that says what it multiplies is counted at once, and
an execution that has no form for its products refuses it by name.
"""
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn

from ..errors import UnsupportedLayerError
from ..neurons import FitConfig, Neuron
from ..neurons.base import Observed

__all__ = [
    'AV', 'CONVOLUTION', 'GATE', 'LINEAR', 'MAPS', 'POSITION', 'QK', 'Multiplying', 'Product', 'kinds_of',
    'named_products',
]

# Kinds, and what a module computes whose only products these are: another execution may take its place.
LINEAR = 'linear'  # weights (D, C) on spikes (..., C), and a bias (D,)
CONVOLUTION = 'convolution'  # weights on spikes (B, C, H, W), and a bias
# together, what `AttentionProduct` computes, called as it is; one by one, `ScoreProduct` and `ValueProduct`
QK, AV = 'QK^T', 'AV'
POSITION = 'positions'  # queries on tables of relative positions; an execution replaces the neuron
GATE = 'gate'  # by `products.multiply`, whose neurons an execution replaces
MAPS = 'maps V'  # likewise: mixed maps of attention on values


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Spikes times weights, or spikes times spikes.

    Args:
        kind: One of the kinds above if the module computes what is said there and nothing else; any other word if not.
        operands: Neurons whose spikes enter: one where there are weights, else two.
        compute: Result of two factors, linear in both: of what the first operand fires, or what that stands for, and of
            the weights or the same of the second operand. Of the kinds `linear` and `convolution` it takes a bias, too.
        total: Sum over the result of two factors, by a shorter way than through the result, if there is one.
        weight: Weights, rows of which are output channels (D, C / groups, ...).
        bias: Bias (D,).
        groups: Groups of channels that do not see one another.
        transposed: Whether weights are (C, D / groups, ...) instead; `compute` then takes `more`, rows and columns
            that the result is to have beyond the usual ones (`output_size` of torch).
        pads: What the product puts around its first factor: `zeros`, another word, or '' for nothing.
    """
    kind: str
    operands: tuple[Neuron, ...]
    compute: Callable[..., torch.Tensor]
    total: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    groups: int = 1
    transposed: bool = False
    pads: str = ''

    @property
    def weights(self) -> torch.Tensor:
        """The weights of a product that has some."""
        assert self.weight is not None
        return self.weight

    @property
    def in_channels(self) -> int:
        return self.weights.shape[0] if self.transposed else self.weights.shape[1] * self.groups

    def of_size(self, a: torch.Tensor, b: torch.Tensor, size: Sequence[int]) -> 'Product':
        """The product whose result of two factors has the height and width `size`, which a transposed convolution may
        be asked for."""
        usual = self.compute(torch.empty(a.shape, device='meta'), torch.empty(b.shape, device='meta')).shape[-2:]
        more = [asked - given for asked, given in zip(size, usual, strict=True)]
        if not any(more):
            return self
        return dataclasses.replace(self, compute=functools.partial(self.compute, more=more), total=None)

    def count(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """Sum over the result of two factors of whole numbers, exact below 2^53."""
        if self.total is not None:
            return self.total(a, b).item()
        return self.compute(a.double(), b.double()).sum().item()

    def by_output(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights as (D, C / groups, ...), or such ones as the module has them: the same both ways."""
        if not self.transposed:
            return weight
        # within each group, input and output channels change places
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def beside(self, values: torch.Tensor) -> torch.Tensor:
        """Values of input channels, the shape of a step, as they stand beside weights `by_output`."""
        grouped = values.flatten().expand(self.in_channels).view(self.groups, -1, *[1] * (self.weights.ndim - 2))
        if self.groups == 1:
            return grouped
        outputs = self.weights.shape[1] if self.transposed else len(self.weights) // self.groups
        return grouped.repeat_interleave(outputs, 0)


class Multiplying(nn.Module):
    """A module that may multiply spikes, and says so.

    What a class says holds for its forward. A subclass with a forward of its own says it anew.
    """
    max_scores: float = math.inf  # results that it computes at once, if it computes them in blocks
    executed = False  # in integers or spike by spike: by what its neurons encode, whose forward it does not call

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if 'forward' in vars(cls) and 'multiplies' not in vars(cls):
            cls.multiplies = Multiplying.multiplies  # type: ignore[method-assign]

    def multiplies(self) -> list[Product]:
        """Products that the forward of this module itself computes."""
        return []

    def fit_neurons(self, statistics: dict[str, Observed], config: FitConfig) -> None:
        """Fit the neurons to what was observed at them, by their names in this module."""
        for name, seen in statistics.items():
            neuron = self.get_submodule(name)
            assert isinstance(neuron, Neuron)
            neuron.fit(seen, config)


def kinds_of(products: list[Product]) -> tuple[str, ...]:
    """Kinds of the products of a module, by which an execution knows what takes its place."""
    return tuple(product.kind for product in products)


def named_products(module: nn.Module) -> Iterator[tuple[str, Multiplying, list[Product]]]:
    """Modules that multiply spikes, with their names and products, in the order of the modules.

    Raises:
        UnsupportedLayerError: If neurons of a module are operands of none of its products; names it.
    """
    for name, child in module.named_modules():
        products = child.multiplies() if isinstance(child, Multiplying) else []
        operands = {neuron for product in products for neuron in product.operands}
        neurons = {part for part in child.children() if isinstance(part, Neuron)}
        if neurons - operands and not isinstance(child, Neuron):
            raise UnsupportedLayerError(
                f'{name or "(root)"} ({type(child).__name__}) does not say what it multiplies its spikes by: a layer '
                f'with a forward of its own needs multiplies() of its own.')
        if isinstance(child, Multiplying) and products:
            yield name, child, products
