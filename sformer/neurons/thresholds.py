"""From observed currents to steps, branch multipliers and levels."""
import functools
import itertools
import math

import torch

from .config import FitConfig
from .functional import firing_boundaries, level_values
from .levels import MAX_LEVEL
from .statistics import HIGH, LOW, NUM_BINS, CurrentStatistics, bin_edges

__all__ = ['MIN_STEP', 'exact_step', 'fit_steps', 'fit_counts', 'fit_density_levels', 'error_integral', 'branch_error']

MIN_STEP = 2. ** LOW
PER_OCTAVE = 32  # candidate thresholds per octave
NUM_CANDIDATES = (HIGH - LOW) * PER_OCTAVE
# candidate steps between what the two branches would like: in all, and at least per pair of multipliers
NUM_BETWEEN, MIN_BETWEEN = 65, 9


def exact_step(step: torch.Tensor) -> torch.Tensor:
    """Step with the lowest 7 of its 24 significant bits dropped, so that its products with levels of int8 are exact."""
    return (step.to(torch.float32).contiguous().view(torch.int32) & ~0x7f).view(torch.float32)


def error_integral(u: torch.Tensor, values: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """Integral from 0 to u of the squared error (t - k(t))^2 of a branch that fires levels k(t).

    Args:
        u: Currents in thresholds, >= 0, any shape, float64.
        values: Level values, (N,).
        boundaries: Firing boundaries, (N,).

    Returns:
        Integrals, the shape of u.
    """
    y = torch.cat([values.new_zeros(1), values])
    constant = torch.cat([values.new_zeros(1), ((boundaries - y[:-1]) ** 3 - (boundaries - y[1:]) ** 3).cumsum(0) / 3])
    i = torch.bucketize(u, boundaries, right=True)
    return constant[i] + (u - y[i]) ** 3 / 3


def candidate_tops() -> torch.Tensor:
    """Candidate tops of the firing range, float64, (NUM_CANDIDATES,): PER_OCTAVE per octave."""
    return 2. ** (torch.arange(1, NUM_CANDIDATES + 1, dtype=torch.float64) / PER_OCTAVE + LOW)


@functools.lru_cache(maxsize=8)
def error_matrix(values: tuple[float, ...], boundaries: tuple[float, ...]) -> torch.Tensor:
    """Mean squared error per bin and candidate, (NUM_BINS, NUM_CANDIDATES)."""
    edges = bin_edges()[:, None]
    y = torch.tensor(values, dtype=torch.float64)
    b = torch.tensor(boundaries, dtype=torch.float64)
    thresholds = candidate_tops() / y[-1]
    return error_integral(edges / thresholds, y, b).diff(dim=0) * thresholds ** 3 / edges.diff(dim=0)


def branch_error(counts: torch.Tensor, values: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """Squared error of a branch under its histogram, for every candidate top of its firing range.

    Within a bin currents are taken as uniformly distributed, which makes the error of a bin under a candidate
    threshold an integral in closed form, and all candidates together one matrix product.

    Args:
        counts: Histograms, (groups, NUM_BINS).
        values: Level values, (N,).
        boundaries: Firing boundaries, (N,).

    Returns:
        Errors, (groups, NUM_CANDIDATES).
    """
    met = counts.any(0)  # a fifth of all bins
    return counts[:, met].to(torch.float64) @ error_matrix(tuple(values.tolist()), tuple(boundaries.tolist()))[met]


def quantile_top(counts: torch.Tensor, p: float) -> torch.Tensor:
    """Top of a firing range that covers the share p of a branch's currents (top-p), (groups,); NaN where silent."""
    edges = bin_edges()
    mass = counts.to(torch.float64)
    mass[:, 0] = 0  # of the currents on this branch; silence says nothing about their range
    total = mass.sum(dim=1, keepdim=True)
    cumulative = mass.cumsum(dim=1)
    j = torch.searchsorted(cumulative, p * total).clamp(max=NUM_BINS - 1)
    inside = mass.gather(1, j).clamp_min(1)
    share = ((p * total - (cumulative.gather(1, j) - mass.gather(1, j))) / inside).clamp(0, 1)
    top = (edges[j] + share * (edges[j + 1] - edges[j])).squeeze(1)
    return top.masked_fill(total.squeeze(1) == 0, float('nan'))


def fit_steps(
        statistics: CurrentStatistics,
        values: torch.Tensor,
        boundaries: torch.Tensor,
        config: FitConfig = FitConfig(),
        most: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step per group, and the multipliers of its two branches, whose thresholds are step times multiplier.

    `mse` takes the step and the pair of multipliers with the least squared error. `quantile` and `max` say how far each
    branch has to reach: the pair that does it and goes beyond it the least is taken. A silent branch goes along with
    the other, a silent group gets the median step of the site.

    Args:
        statistics: Signed statistics of the site.
        values: Level values y_1 ... y_N, (N,).
        boundaries: Firing boundaries, (N,).
        config: Estimator and its parameters.
        most: Largest multiplier; what int8 levels allow if None.

    Returns:
        Steps, float32, (groups,), and multipliers, uint8, (2, groups).
    """
    with torch.device('cpu'):  # where statistics are, whatever the default device is
        heard = statistics.counts[:, :, 1:].sum(-1) > 0  # (2, groups)
        pairs = torch.tensor(multiplier_pairs(most or MAX_LEVEL // int(values[-1])))  # (P, 2)
        shifts = pairs.to(torch.float64).log2()[:, :, None] * PER_OCTAVE
        if config.estimator == 'mse':
            errors = torch.stack([branch_error(counts, values, boundaries) for counts in statistics.counts])
            wanted = errors.argmin(-1).to(torch.float64)
        else:
            wanted = (_observed_tops(statistics, config).log2() - LOW) * PER_OCTAVE - 1
        # index of the candidate step (of its top) that each branch would like to have, (P, 2, groups)
        wish = torch.where(heard, wanted, wanted.flip(0)) - shifts
        low, high = wish.amin(1), wish.amax(1)
        if config.estimator == 'mse':
            between = max(MIN_BETWEEN, NUM_BETWEEN // len(pairs))
            share = torch.linspace(0, 1, between, dtype=torch.float64)[:, None]
            position = (low[:, None] + share * (high - low)[:, None]).round()  # (P, K, groups)
            index = (position[:, :, None] + shifts[:, None]).round().nan_to_num(0.).clamp(0, NUM_CANDIDATES - 1)
            positive, negative = (
                errors[b].gather(1, index[:, :, b].flatten(0, 1).long().T).T for b in (0, 1))
            cost = positive + negative
        else:
            position = high[:, None]
            cost = high - low  # one branch reaches as far as it has to, the other this much further
        best = cost.argmin(0)  # (groups,) among P * K
        step = 2. ** ((position.flatten(0, 1).gather(0, best[None])[0] + 1) / PER_OCTAVE + LOW) / values[-1].item()
        multiplier = pairs[best // position.shape[1]].T
        silent = ~heard.any(0)
        typical = step[~silent].median() if not silent.all() else torch.ones((), dtype=torch.float64)
        step = torch.where(silent, typical, step).clamp_min(MIN_STEP)
        return step.to(torch.float32), multiplier.masked_fill(silent, 1).to(torch.uint8)


def _observed_tops(statistics: CurrentStatistics, config: FitConfig) -> torch.Tensor:
    """How far each branch has to reach by `max` or `quantile`, float64, (2, groups); NaN or 0 where it is silent."""
    if config.estimator == 'max':
        return statistics.peak.to(torch.float64)
    return torch.stack([quantile_top(counts, config.quantile) for counts in statistics.counts])


def fit_counts(
        statistics: CurrentStatistics,
        levels: int,
        initial_potential: float = 0.5,
        config: FitConfig = FitConfig(),
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step per group, and how many of 2N uniform thresholds each of its branches has: the fewest that reach as far
    as the estimator says, of `mse` the top with the least squared error of either branch with all thresholds but one.

    Args:
        statistics: Signed statistics of the site.
        levels: Number of levels N.
        initial_potential: As of `firing_boundaries`.
        config: Estimator and its parameters.

    Returns:
        Steps, float32, (groups,), and counts, uint8, (2, groups).
    """
    with torch.device('cpu'):
        if config.estimator == 'mse':
            values = level_values('uniform', 2 * levels - 1)
            boundaries = firing_boundaries(values, initial_potential)
            errors = torch.stack([branch_error(counts, values, boundaries) for counts in statistics.counts])
            tops = candidate_tops()[errors.argmin(-1)]
        else:
            tops = _observed_tops(statistics, config)
        tops = torch.where(statistics.counts[:, :, 1:].sum(-1) > 0, tops, 0.)
        negative = (2 * levels * tops[1] / tops.sum(0)).nan_to_num(levels).round().clamp(1, 2 * levels - 1)
        counts = torch.stack([2 * levels - negative, negative])
        step = (tops / counts).amax(0)
        silent = step == 0
        typical = step[~silent].median() if not silent.all() else torch.ones((), dtype=torch.float64)
        step = torch.where(silent, typical, step).clamp_min(MIN_STEP)
        return step.to(torch.float32), counts.to(torch.uint8)


@functools.lru_cache
def multiplier_pairs(top: int) -> list[tuple[int, int]]:
    """Pairs (m+, m-) of coprime multipliers up to `top`, simplest first: with more levels to spare than 15 per branch,
    only ratios to 1 and 2, which leave no branch further than a factor of 4/3 from what it would like to have."""
    multipliers = range(1, top + 1)
    pairs = [pair for pair in itertools.product(multipliers, multipliers)
             if math.gcd(*pair) == 1 and (top <= 15 or min(pair) <= 2)]
    return sorted(pairs, key=lambda pair: (max(pair), pair))


def fit_density_levels(
        statistics: CurrentStatistics,
        levels: int,
        initial_potential: float = 0.5,
        top: int = MAX_LEVEL,
) -> torch.Tensor:
    """Levels that follow the observed distribution: Lloyd-Max on the pooled histogram, snapped to integers <= top.

    Groups share the levels, so their histograms are pooled after dividing each by its own firing range.

    Args:
        statistics: Statistics of the site.
        levels: Number of levels N.
        initial_potential: Below 1/2, what falls below the first level does not count.
        top: Largest level.

    Returns:
        Level values y_1 < ... < y_N, (N,).
    """
    edges = bin_edges()
    mass = statistics.counts.flatten(0, 1).to(torch.float64)
    mass = mass[mass[:, 1:].sum(dim=1) > 0]
    uniform = level_values('uniform', levels)
    if not len(mass):
        return uniform
    # the firing range, not the very largest current, decides where levels are needed
    ranges = candidate_tops()[branch_error(mass, uniform, firing_boundaries(uniform, initial_potential)).argmin(-1)]
    grid = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    pooled = torch.zeros(4096, dtype=torch.float64)
    for counts, t in zip(mass.split(256), ranges.split(256), strict=True):
        u = torch.arange(1, 4097, dtype=torch.float64) / 4096 * t[:, None]
        j = torch.bucketize(u, edges, right=True).clamp(1, NUM_BINS) - 1
        below, inside = (counts.cumsum(1) - counts).gather(1, j), counts.gather(1, j)
        # a bin is wider than a cell of the grid: its mass is spread evenly
        cdf = below + inside * ((u - edges[j]) / (edges[j + 1] - edges[j])).clamp(0, 1)
        pooled += cdf.diff(dim=1, prepend=cdf.new_zeros(len(cdf), 1)).sum(0)
        pooled[-1] += (counts.sum(1) - cdf[:, -1]).sum()
    pooled[0] = pooled[0] if initial_potential >= 0.5 else 0
    # Panter-Dite initialisation: optimal levels have the density of the cube root of the distribution
    density = (pooled + 1e-9 * pooled.sum()).pow(1 / 3).cumsum(0)
    y = grid[torch.searchsorted(density / density[-1], (torch.arange(levels) + 0.7).to(torch.float64) / levels)]
    for _ in range(50):
        b = (y + torch.cat([y.new_zeros(1), y[:-1]])) / 2
        cell = torch.bucketize(grid, b, right=True)
        weight = torch.zeros(levels + 1, dtype=torch.float64).index_add_(0, cell, pooled)
        moment = torch.zeros(levels + 1, dtype=torch.float64).index_add_(0, cell, pooled * grid)
        y = torch.where(weight[1:] > 0, moment[1:] / weight[1:].clamp_min(1e-30), y).sort().values
    y = (y / y[-1] * top).round().clamp_min(1)
    i = torch.arange(levels, dtype=torch.float64)
    y = torch.cummax(y - i, 0).values + i  # strictly increasing ...
    return torch.minimum(y, top - i.flip(0)).to(torch.float32)  # ... up to top
