"""Firing in closed form: integrate-and-fire, multi-threshold and scale-and-fire.

Implements the neurons of `One-Timestep is Enough: Achieving High-performance ANN-to-SNN Conversion via
Scale-and-Fire Neurons` - https://arxiv.org/abs/2510.23383
"""
import functools
import statistics

import torch

from .levels import EXPONENTS, MAX_LEVEL, QUARTERS, level_integers

__all__ = [
    'integrate_and_fire', 'multi_threshold', 'level_values', 'firing_boundaries', 'fire', 'token_reach',
    'straight_through',
]

# The largest float below 1/2. Added before the floor it rounds halves away from zero and nothing below them; 1/2
# itself would round the float just below 1/2 up to 1.
_BELOW_HALF = 0.49999997


def integrate_and_fire(
        x: torch.Tensor,
        threshold: float | torch.Tensor,
        initial_potential: float | torch.Tensor = 0.,
) -> torch.Tensor:
    """Integrate-and-fire over T timesteps with reset by subtraction.

    `h(t) = v(t-1) + x(t)`, `s(t) = [h(t) >= threshold]`, `o(t) = threshold * s(t)`, `v(t) = h(t) - o(t)`.

    Args:
        x: Input current, (T, ...).
        threshold: Firing threshold, broadcasts against x[0].
        initial_potential: Membrane potential v(0), in the unit of the threshold.

    Returns:
        Mean output current over the T timesteps, (...).
    """
    v = torch.zeros_like(x[0]) + initial_potential
    total = torch.zeros_like(x[0])
    for current in x:
        h = v + current
        o = (h >= threshold) * threshold
        total = total + o
        v = h - o
    return total / x.shape[0]


def multi_threshold(
        x: torch.Tensor,
        threshold: float | torch.Tensor,
        levels: int,
        initial_potential: float | torch.Tensor = 0.,
) -> torch.Tensor:
    """Multi-threshold neuron, one timestep: `o = threshold * clip(floor((v + x) / threshold), 0, levels)`.

    Temporal-to-spatial equivalence (arXiv 2510.23383): where `0 <= x(t) <= threshold` and `0 <= v(0) < threshold`,
    `integrate_and_fire(x, threshold, v)` over T steps equals
    `multi_threshold(x.mean(0), threshold / T, levels=T, initial_potential=v / T)`. Outside of these conditions it
    does not hold: a negative current cannot take back a spike that was already sent, a current above the threshold is
    left in the membrane when time is up.

    Args:
        x: Input current, any shape.
        threshold: Firing threshold, broadcasts against x.
        levels: Number of thresholds N.
        initial_potential: Membrane potential before the input.

    Returns:
        Output current, the shape of x.
    """
    return torch.floor((x + initial_potential) / threshold).clamp(0, levels) * threshold


def level_values(fire_function: str, levels: int, top: int = MAX_LEVEL) -> torch.Tensor:
    """Level values y_1 < ... < y_N as of `level_integers`: integers in float32, (N,), of `byte` (255,)."""
    values = level_integers(fire_function, levels, top)
    return torch.tensor(values, dtype=torch.float32, device='cpu')  # also inside of torch.device('meta')


def firing_boundaries(values: torch.Tensor, initial_potential: float = 0.5, dead_zone: float = 0.) -> torch.Tensor:
    """Firing boundaries b_1 <= ... <= b_N in steps: a current of h steps reaches level #{j : h >= b_j}.

    Args:
        values: Level values y_1 ... y_N, (N,).
        initial_potential: Membrane potential before the input, as a share of the distance to the next level:
            `b_j = y_j - initial_potential * (y_j - y_{j-1})`. 0 is the paper's floor, 1/2 rounds to the nearest level.
        dead_zone: No boundary lies below it.

    Returns:
        Boundaries in float32, (N,).
    """
    values = values.to(torch.float32)
    gaps = torch.cat([values[:1], values[1:] - values[:-1]])
    return (values - initial_potential * gaps).clamp_min(dead_zone)


def fire(
        u: torch.Tensor,
        fire_function: str,
        values: torch.Tensor,
        initial_potential: float = 0.5,
        dead_zone: float = 0.,
        top: int = MAX_LEVEL,
) -> torch.Tensor:
    """Level that a membrane potential reaches, on the branch of its sign: `k = sign(u) y_i`, `i = #{j : |u| >= b_j}`.

    `uniform` and `byte`, and `widening`, `quarter_square`, `quadratic` and `quartic` (levels i^2 and i^4) where they
    round, are closed forms (the latter four take square roots, those of the former add an initial potential: where
    these round, a potential within an ulp of a boundary may fall on either side of it). All others are one look-up,
    without a loop over thresholds.

    Args:
        u: Membrane potential in thresholds of its branch, any shape.
        fire_function: Name of the fire function.
        values: Level values y_1 ... y_N, (N,).
        initial_potential: As of `firing_boundaries`.
        dead_zone: No spike below this many thresholds.
        top: As of `level_values`.

    Returns:
        Levels, integers in the dtype and shape of u; NaN where u is.
    """
    levels = values.shape[0]
    whole = levels ** EXPONENTS.get(fire_function, 1) <= top  # levels are powers of i, not scaled down to fit
    if fire_function in ('uniform', 'byte'):
        shift = _BELOW_HALF if initial_potential == 0.5 else initial_potential
        k = u.abs().add_(shift).floor_().clamp_(max=levels)
    elif fire_function in QUARTERS and initial_potential == 0.5:
        # halfway between y_(i-1) and y_i lies ((i + c - 1/2)^2 - 1/4 - c^2) / 4
        c = QUARTERS[fire_function]
        i = u.abs().mul_(4).add_(c ** 2 + 0.25).sqrt_().sub_(c - 0.5).floor_().clamp_(max=levels)
        k = i.add_(c).square_().div_(4).floor_().sub_(c ** 2 / 4)
    elif fire_function == 'quadratic' and initial_potential == 0.5 and whole:
        # b_j = j^2 - j + 1/2 = (j - 1/2)^2 + 1/4
        i = u.abs().sub_(0.25).clamp_(min=0).sqrt_().add_(0.5).floor_().clamp_(max=levels)
        k = i.square_()
    elif fire_function == 'quartic' and initial_potential == 0.5 and whole:
        # with t = j - 1/2: b_j = ((j - 1)^4 + j^4) / 2 = t^4 + 3/2 t^2 + 1/16
        t = u.abs().add_(0.5).sqrt_().sub_(0.75).clamp_(min=0).sqrt_()
        i = t.add_(0.5).floor_().clamp_(max=levels).square_()
        k = i.square_()
    else:
        magnitude = u.abs().contiguous()  # as bucketize likes it
        index = torch.bucketize(magnitude, firing_boundaries(values, initial_potential), right=True)
        k = torch.cat([values.new_zeros(1), values]).to(u.dtype)[index]
        k = torch.where(magnitude.isnan(), magnitude, k)
    # copysign is the fastest, but has no form in ONNX
    exported = torch.compiler.is_compiling() or torch.jit.is_tracing()
    k = torch.where(u < 0, -k, k) if exported else k.copysign_(u)
    if dead_zone > 0:
        k = k * (u.abs() >= dead_zone)
    return k


@functools.lru_cache(maxsize=256)
def token_reach(fire_function: str, levels: int, width: int, initial_potential: float = 0.5) -> float:
    """Share of the largest potential of a token that fires the top level, in (0, 1].

    With many levels, 1: nothing clips. With few, a threshold that reaches the largest of `width` potentials would leave
    most of the others silent. Of normal potentials, the least squared error is at a top of so many standard deviations,
    and the largest is expected at so many others; their ratio is taken to the power of 0.8, because the errors of
    potentials that clip add up in the product, those of rounding do not (measured on a ViT-S at N = 4 and 8).

    Args:
        fire_function: Name of the fire function.
        levels: Number of levels N.
        width: Potentials of a token.
        initial_potential: As of `firing_boundaries`.
    """
    values = level_values(fire_function, levels).to(torch.float64)
    boundaries = firing_boundaries(values, initial_potential).to(torch.float64)
    z = torch.linspace(0, 6, 1201, dtype=torch.float64, device='cpu')
    tops = torch.linspace(0.4, 6, 281, dtype=torch.float64, device='cpu')
    u = z[:, None] / tops * values[-1]
    fired = torch.cat([values.new_zeros(1), values])[torch.bucketize(u, boundaries, right=True)]
    error = ((u - fired) * tops / values[-1]).square().mul((-z[:, None] ** 2 / 2).exp()).sum(0)
    largest = statistics.NormalDist().inv_cdf((1 + 0.5 ** (1 / width)) / 2)
    reach = min(1., tops[error.argmin()].item() / largest) ** 0.8
    if initial_potential == 0:  # the largest potential would lie on the top boundary, where float rounding decides
        reach = min(reach, 1 - 2 ** -16)
    return reach


def straight_through(out: torch.Tensor, h: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Let the gradient of `out` pass to `h` where lower <= h <= upper, and nowhere else; the values of `out` stay.

    Args:
        out: Output current of a neuron, without a gradient.
        h: Membrane potential that it fired on, the shape of `out`.
        lower: Lower end of the firing range, broadcasts against h.
        upper: Upper end of the firing range, broadcasts against h.
    """
    value = h.detach()  # compared in float32, as thresholds are
    inside = torch.where((value >= lower) & (value <= upper), h, torch.zeros_like(h))
    return out - (inside.detach() - inside).to(out.dtype)  # an exact zero, which leaves even -0. as it is
