"""What a graph says of spikes, in the words of ONNX and in the form that engines execute fastest.

"Levels of step 1 times int8 weights with a step per output channel" is QuantizeLinear, DequantizeLinear and MatMul,
which engines multiply in int8. Levels that meet weights are unsigned bytes with a zero point, and weights as large as
that leaves them (`saturation`), so that every processor sums exactly. A neuron is written as few elementwise
operations, which engines fuse; its levels are those of `encode` but for currents within float rounding of a boundary.
"""
from collections.abc import Collection

import torch
import torch.nn as nn

from ..errors import SFormerError
from ..layers import Product, named_neurons, named_products
from ..layers.multiplying import AV, CONVOLUTION, GATE, LINEAR, QK, kinds_of
from ..layers.products import softmax_numerators
from ..neurons import MAX_BYTE_LEVEL, GradedCoding, Neuron, ScaleAndFire, SharedScaleAndFire, fire, firing_boundaries
from ..neurons.scale_and_fire import TINY
from .early import early_neurons
from .integer import folded_bias
from .operators import onnx_operator
from .saturation import Range, fits, upright, zero_point

__all__ = ['to_graph_']


def to_graph_(network: nn.Module, early: bool = True, portable: bool = True) -> None:
    """Replace what spikes in a network, in integers where it is so already, by what a graph says of it, in place.

    Args:
        network: Calibrated spiking network on the CPU.
        early: Let queries, keys and values fire in the layer that gives them, where that can be; of timm models.
        portable: As of `to_integer_`, which the network has been through.

    Raises:
        SFormerError: If a layer or a fire function has no form in ONNX; names it.
    """
    for _, neuron in named_neurons(network):
        _levels_of(neuron)  # which names what has no form, before the network is run
    layers = list(named_products(network))
    for name, layer, products in layers:
        if kinds_of(products) not in GRAPH_FORMS:
            raise SFormerError(f'{name or "(root)"} ({type(layer).__name__}) has no form in ONNX: it multiplies '
                               f'{" and ".join(kinds_of(products))}.')
    neurons: dict[str, ScaleAndFire] = {}
    fired: set[Neuron] = set()
    if early:
        attention = [products for _, _, products in layers if kinds_of(products) == (QK, AV)]
        floating = {neuron for scores, values in attention if portable and not levels_fit(scores)
                    for neuron in (*scores.operands, *values.operands)}
        neurons, fired = early_neurons(network, floating)
    for name, layer, products in layers:
        new: nn.Module | None = None
        kinds = kinds_of(products)
        product = products[0]
        step = layer._buffers.get('weight_step')
        if kinds == (LINEAR,):
            new = _Linear(product, step, layer._buffers.get('columns'), neurons.get(name))
        elif kinds == (CONVOLUTION,):
            new = _Conv2d(product, step)
        elif kinds == (QK, AV):
            new = _Attention(product, products[1], fired, portable)
        if new is not None:
            network.set_submodule(name, new)
    for name, neuron in list(named_neurons(network)):  # of gates, whose product is elementwise
        network.set_submodule(name, _Decoded(neuron))


GRAPH_FORMS = ((LINEAR,), (CONVOLUTION,), (QK, AV), (GATE,))


def _byte(k: torch.Tensor, dtype: torch.dtype, zero: int = 0, left: int = 0) -> torch.Tensor:
    """Levels, which are whole numbers or are rounded here, as bytes with a zero point, and what these stand for at a
    step of 1, but for a part of the zero point that is left in."""
    one = torch.ones(())
    point = torch.full((), zero, dtype=dtype)
    rest = torch.full((), zero - left, dtype=dtype)
    levels = onnx_operator('QuantizeLinear', k, dtype, k, one, point)
    return onnx_operator('DequantizeLinear', k, torch.float32, levels, one, rest)


def _beside_weights(k: torch.Tensor, levels: Range, left: int = 0) -> torch.Tensor:
    """Levels that meet weights, as unsigned bytes; plus `left`."""
    return _byte(k, torch.uint8, zero_point(levels), left)


def _beside_levels(k: torch.Tensor, levels: Range) -> torch.Tensor:
    """Levels that meet other levels: engines multiply these in int8 if they have no zero point."""
    return _byte(k, torch.uint8 if levels[0] >= 0 else torch.int8)


def _weights(weight: torch.Tensor, step: torch.Tensor, axis: int) -> torch.Tensor:
    """Int8 weights times the step of their output channel."""
    zero = torch.zeros(step.shape, dtype=torch.int8)
    return onnx_operator('DequantizeLinear', weight, torch.float32, weight, step, zero, axis=axis)


def _by_branch(x: torch.Tensor, ratio: torch.Tensor | None) -> torch.Tensor:
    """x, of which what is negative is multiplied by a ratio per channel."""
    return x if ratio is None else onnx_operator('PRelu', x, x.dtype, x, ratio)


class _Levels(nn.Module):
    """Levels that a scale-and-fire neuron fires, in float32, and the factor per token.

    Args:
        neuron: The neuron.
        stand_up: Let levels be `upright`, by the factor `flip` per channel, None if that is 1 everywhere: so do the
            weights that they meet. Those of branches that share thresholds get a zero point per channel, `zeros`.

    Shape:
        As of `ScaleAndFire.encode`.
    """
    flip: torch.Tensor | None
    values: torch.Tensor
    inverse: torch.Tensor
    center: torch.Tensor | None
    quiet: torch.Tensor | None
    multiplier: torch.Tensor | None
    inward: torch.Tensor | None
    outward: torch.Tensor | None
    table: torch.Tensor | None
    zeros: torch.Tensor | None

    def __init__(self, neuron: Neuron, stand_up: bool = False):
        super().__init__()
        shares = type(neuron) is SharedScaleAndFire
        if not isinstance(neuron, ScaleAndFire) or not (shares or type(neuron) is ScaleAndFire):  # but in its own way
            raise SFormerError(f'a {type(neuron).__name__} has no form in ONNX: a ScaleAndFire has.')
        self.config = neuron.config
        self.fire_function = neuron.fire_function
        self.signed = neuron.signed
        self.token = neuron.token
        self.reach = neuron.reach
        self.top = neuron.top
        self.largest = int(neuron.levels[-1])
        self.range = neuron.level_range
        m = neuron.multiplier
        inverse = 1 / neuron.threshold[0]
        flip = None
        self.register_buffer('zeros', neuron.top_levels[1] if shares else None)
        self.stands_up = stand_up
        if stand_up and shares:
            self.range = (0, 2 * neuron.config.levels)
        elif stand_up:
            flipped, self.range, _ = upright(neuron.top_levels)
            if flipped.any():
                flip = torch.where(flipped, -1., 1.)
                m = torch.where(flipped, m.flip(0), m)
                inverse = flip / (m[0] * neuron.step / neuron.gain)
        self.register_buffer('flip', flip)
        uneven = self.signed and not torch.equal(m[0], m[1])
        self.register_buffer('values', neuron.levels.to(torch.float32))
        self.register_buffer('inverse', inverse)
        self.register_buffer('center', neuron.center)
        self.register_buffer('quiet', neuron.quiet)
        self.register_buffer('multiplier', None if (m[0] == 1).all() else m[0])
        self.register_buffer('inward', m[0] / m[1] if uneven else None)
        self.register_buffer('outward', m[1] / m[0] if uneven else None)
        self.register_buffer('table', self._table())

    def _table(self) -> torch.Tensor | None:
        """Level by twice the potential, where boundaries lie at or halfway between whole levels and no closed form
        exists."""
        if self.fire_function not in ('density', 'power2'):
            return None
        if self.config.initial_potential not in (0, 0.5):
            raise SFormerError(
                f'{self.fire_function} firing with initial_potential={self.config.initial_potential:g} has no form in '
                f'ONNX: 0 and 0.5 have.')
        halves = torch.arange(2 * self.largest + 1) / 2
        index = torch.bucketize(halves, firing_boundaries(self.values, self.config.initial_potential), right=True)
        return torch.cat([torch.zeros(1), self.values])[index]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        h = x if self.center is None else x - self.center
        if self.quiet is not None:
            h = torch.where(h.abs() < self.quiet, 0., h)
        u = _by_branch(h * self.inverse, self.inward)
        row = None
        if self.token:
            largest = torch.maximum(u.amax(-1, keepdim=True), -u.amin(-1, keepdim=True)).clamp_min(TINY)
            row = largest * (self.reach / self.largest)
            u = u * (1 / row)
        k = _by_branch(self._fire(u), self.outward)
        return k if self.multiplier is None else k * self.multiplier, row

    def _fire(self, u: torch.Tensor) -> torch.Tensor:
        rounds = self.config.initial_potential == 0.5
        dead_zone = self.config.dead_zone
        if self.zeros is not None:
            return self._fire_shared(u, self.zeros)
        if self.table is not None:
            k = self.table[(2 * u.abs()).clamp(max=2 * self.largest).to(torch.int64)]
            k = torch.where(u < 0, -k, k)
        elif self.fire_function in ('uniform', 'byte') and rounds:
            if self.signed:  # also where the largest potential is the top level: a graph says how large levels are
                u = u.clamp(-self.largest, self.largest)
            if self.multiplier is None and self.outward is None and not dead_zone:
                return u  # rounded as it becomes an int8; softmax numerators are not negative
            k = u.round()
        elif self.fire_function == 'quadratic' and rounds and not self.signed and self.largest == len(self.values) ** 2:
            # a power, which engines fuse with what is before, as they would not two factors that are one
            k = torch.pow((u - 0.25).clamp(min=0).sqrt().round(), 2.)
        else:
            k = fire(u, self.fire_function, self.values, self.config.initial_potential, 0., self.top)
        if dead_zone:
            k = torch.where(u.abs() >= dead_zone, k, 0.)
        return k if self.signed else k.clamp(min=0)

    def _fire_shared(self, u: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Levels of branches that share their thresholds."""
        if self.config.initial_potential != 0.5 or self.config.dead_zone:
            u = fire(u, 'uniform', self.values, self.config.initial_potential, self.config.dead_zone)
        k = (u + zeros).clamp(0, 2 * self.config.levels)
        return k if self.stands_up else k.round() - zeros


def _levels_of(neuron: Neuron) -> '_Levels | _Pixels':
    """Levels of a neuron of any type that has a form in ONNX."""
    return _Pixels(neuron) if isinstance(neuron, GradedCoding) else _Levels(neuron)


class _Decoded(nn.Module):
    """What the spikes of a neuron stand for."""
    step: torch.Tensor
    center: torch.Tensor | None

    def __init__(self, neuron: Neuron):
        super().__init__()
        self.levels = _levels_of(neuron)
        self.register_buffer('step', neuron.step)
        self.register_buffer('center', neuron.center)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, row = self.levels(x)
        out = _byte(k, torch.int8) * self.step
        out = out if row is None else out * row
        return out if self.center is None else out + self.center


class _Linear(nn.Module):
    """A linear layer, in integers or, where int8 weights would lose too much, on levels in floating point; and neurons
    that read what it gives, if they fire here.

    In integers, what the zero point adds to a sum is the same for all tokens, and is taken off that sum: engines
    multiply bytes without a zero point fastest.
    """
    weight: torch.Tensor
    step: torch.Tensor
    columns: torch.Tensor | None
    bias: torch.Tensor | None
    excess: torch.Tensor | None

    def __init__(
            self,
            product: Product,
            step: torch.Tensor | None,
            columns: torch.Tensor | None,
            fires: ScaleAndFire | None = None,
    ):
        super().__init__()
        neuron = product.operands[0]
        self.neuron = _Levels(neuron, stand_up=True)
        self.fires = None if fires is None else _Levels(fires)
        self.integer = step is not None
        weight = product.weights if self.integer else product.weights.detach() * neuron.step
        bias, excess = product.bias if self.integer else folded_bias(product), None
        self.register_buffer('columns', columns)
        if self.neuron.flip is not None:
            weight = weight * self._read(self.neuron.flip).to(weight.dtype)
        self.zero = zero_point(self.neuron.range) if self.integer else 0
        zeros = torch.tensor(float(self.zero)) if self.neuron.zeros is None else self._read(self.neuron.zeros)
        if zeros.any():
            excess = (zeros * weight.to(torch.float64)).sum(1) * (1 if step is None else step)
            if not self.neuron.token:
                bias, excess = (-excess if bias is None else bias - excess).to(torch.float32), None
        self.register_buffer('weight', weight.t().contiguous())
        self.register_buffer('step', step)
        self.register_buffer('bias', bias)
        self.register_buffer('excess', None if excess is None else excess.to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 2:  # OpenVINO 2026.4 takes a step per channel for one per row there
            return self.forward(x[:, None])[:, 0]
        k, row = self.neuron(x)
        k = self._read(k)  # before they are int8, or OpenVINO multiplies in float32
        if self.integer:
            out = _beside_weights(k, self.neuron.range, self.zero) @ _weights(self.weight, self.step, axis=1)
        else:
            out = _beside_weights(k, self.neuron.range) @ self.weight
        out = out if self.excess is None else out - self.excess
        out = out if row is None else out * row
        out = out if self.bias is None else out + self.bias
        return out if self.fires is None else _beside_levels(self.fires(out)[0], self.fires.range)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """What the columns of the weights read of the channels of the input."""
        return x if self.columns is None else x.index_select(-1, self.columns)


class _Conv2d(nn.Module):
    """A convolution, transposed or not, in integers or, where weights have no step, of what spikes stand for."""
    weight: torch.Tensor
    step: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, product: Product, step: torch.Tensor | None):
        super().__init__()
        neuron = product.operands[0]  # as it is: levels of padding have no sign to change
        levels = _levels_of(neuron)
        self.range = levels.range
        self.neuron: nn.Module = _Decoded(neuron) if step is None else levels
        self.compute, self.transposed = product.compute, product.transposed
        self.register_buffer('weight', product.weights.detach())
        self.register_buffer('step', None if step is None else step.flatten())
        self.register_buffer('bias', None if product.bias is None else product.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.step is None:
            return self.compute(self.neuron(x), self.weight, self.bias)
        levels = _beside_weights(self.neuron(x)[0], self.range)
        if not self.transposed:
            return self.compute(levels, _weights(self.weight, self.step, axis=0), self.bias)
        # ONNX has no axis for the output channels of its weights where they are grouped
        out = self.compute(levels, self.weight.to(torch.float32)) * self.step.view(-1, 1, 1)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


class _Pixels(nn.Module):
    """Levels of pixels, which QuantizeLinear rounds and clips to -128 ... 127."""
    step: torch.Tensor
    center: torch.Tensor

    def __init__(self, neuron: GradedCoding):
        super().__init__()
        self.range = neuron.level_range
        self.register_buffer('step', neuron.step)
        self.register_buffer('center', neuron.center)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (x - self.center) / self.step, None


class _Attention(nn.Module):
    """QK^T and AV, each row divided by its spike sum; arguments as of `AttentionProduct`.

    Levels that meet levels have no weights that could be made smaller: a product that not every processor would sum
    exactly in int8 is left to float32, if the graph is to be `portable`.
    """
    score_step: torch.Tensor
    v_step: torch.Tensor
    v_center: torch.Tensor | None

    def __init__(self, scores: Product, values: Product, fired: Collection[Neuron] = (), portable: bool = True):
        super().__init__()
        (q, k), (attn, v) = scores.operands, values.operands
        self.q = _Levels(q)
        self.k = _Levels(k)
        self.attn = _Levels(attn)
        self.v = _Levels(v)
        self.fired = [neuron in fired for neuron in (q, k, v)]  # which are levels by then
        self.int8_scores = not portable or levels_fit(scores)
        self.int8_values = self.attn.range[1] <= MAX_BYTE_LEVEL and (not portable or levels_fit(values))
        # powers of two per channel cancel, so what remains is one step per head
        self.register_buffer('score_step', (q.step * k.step)[..., :1].clone())
        self.register_buffer('v_step', v.step)
        self.register_buffer('v_center', v.center)

    def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.,
            is_causal: bool = False,
            scale: float | None = None,
    ) -> torch.Tensor:
        q, q_row = self._operand(0, self.q, query)
        k, k_row = self._operand(1, self.k, key, self.int8_scores)
        v, _ = self._operand(2, self.v, value)
        step = self.score_step * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = q @ k.transpose(-2, -1)
        scores = scores * (step if q_row is None else step * q_row)
        if k_row is not None:
            scores = scores * k_row.transpose(-2, -1)
        attn, _ = self.attn(softmax_numerators(scores, attn_mask, is_causal))
        # of wide levels in float32, which OpenVINO does faster than two planes of int8
        attn = _beside_levels(attn, self.attn.range) if self.int8_values else attn.round()
        out = attn @ v
        total = attn.sum(dim=-1, keepdim=True)
        out = out / total.clamp_min(1.) * self.v_step
        return out if self.v_center is None else out + self.v_center * total.clamp(max=1.)  # none of no key

    def _operand(
            self,
            index: int,
            neuron: _Levels,
            x: torch.Tensor,
            int8: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Levels of q, k or v, and their factor per token."""
        if self.fired[index]:
            return x, None
        levels, row = neuron(x)
        return _beside_levels(levels, neuron.range) if int8 else levels.round(), row


def levels_fit(product: Product) -> bool:
    """Whether every processor sums a product of spikes with spikes exactly in int8."""
    a, b = product.operands
    return fits(a.level_range, b.level_range)
