"""Calibration: observe the currents of the source network, fit thresholds to them.

Observation streams: per neuron it keeps one histogram with logarithmic bins, so memory does not depend on the number
of images and no range has to be known before. Neither the order of images nor the batch size matters to the counts,
but for two things: keys are centred on the mean of the first batch, and currents of more than a million values per
batch are observed at every n-th token or image.
"""
import contextlib
import functools
from typing import Callable, Dict, Iterable, Iterator, Optional, Tuple

import torch
import torch.nn as nn

from .errors import SFormerError
from .layers import named_neurons
from .neurons import DirectCoding, Neuron, ScaleAndFire, SFNConfig, firing_boundaries, level_values

__all__ = ['SiteStatistics', 'bypass_neurons', 'observe', 'fit_thresholds_', 'fit_density_levels', 'MIN_THRESHOLD']

# Bins are the leading bits of the float itself: 2^SUB_BITS of them per octave, from 2^LOW to 2^HIGH.
SUB_BITS = 3
LOW, HIGH = -28, 20
NUM_BINS = (HIGH - LOW) << SUB_BITS
MIN_THRESHOLD = 2. ** LOW
SUB_CANDIDATES = 4  # candidate thresholds per bin
MAX_VALUES = 1 << 20  # per site and batch; larger currents are observed at every n-th token or image


def bin_edges() -> torch.Tensor:
    """Edges of the histogram bins, float64, (NUM_BINS + 1,); the first is 0: tiny currents are silence."""
    base = (LOW + 127) << SUB_BITS
    bits = (torch.arange(NUM_BINS + 1, dtype=torch.int32, device='cpu') + base) << (23 - SUB_BITS)
    edges = bits.view(torch.float32).to(torch.float64)
    edges[0] = 0
    return edges


class SiteStatistics:
    """Streaming statistics of the current that enters one neuron.

    Args:
        shape: Shape of one branch's threshold; its elements are the groups.
        signed: Keep a histogram of the negative branch too.
        center_shape: If given, `center` is the mean of the first batch over all but these dimensions, and the
            histogram is of what is left after subtracting it.

    Attributes:
        counts: Histograms, int32, (2 or 1, groups, NUM_BINS). They are complete once a bin could overflow, after 2^31
            currents per group.
        peak: Largest current per branch and group, (2 or 1, groups).
    """

    def __init__(self, shape: Tuple[int, ...], signed: bool, center_shape: Optional[Tuple[int, ...]] = None):
        self.shape = shape
        self.branches = 2 if signed else 1
        self.center_shape = center_shape
        self.center: Optional[torch.Tensor] = None
        groups = torch.Size(shape).numel()
        # on the CPU, whatever the default device is
        self.counts = torch.zeros(self.branches, groups, NUM_BINS, dtype=torch.int32, device='cpu')
        self.peak = torch.zeros(self.branches, groups, device='cpu')
        self.batches = 0
        self.counted = 0  # currents per group
        self.offset = (torch.arange(groups, dtype=torch.int32, device='cpu') * NUM_BINS).view(shape)

    def update(self, x: torch.Tensor) -> None:
        """Add a batch of currents (B, ...) that `shape` broadcasts against.

        Raises:
            SFormerError: If a current is NaN or infinite.
        """
        x = check_finite(x)
        if self.center_shape is not None:
            if self.center is None:
                dims = [d for d in range(x.ndim) if self._padded(self.center_shape, x.ndim)[d] == 1]
                self.center = x.mean(dim=dims, keepdim=True).reshape(self.center_shape)
            x = x - self.center
        groups = self._padded(self.shape, x.ndim)
        rest = [d for d in range(x.ndim) if groups[d] == 1]
        high = x.amax(dim=rest).reshape(-1)
        low = -x.amin(dim=rest).reshape(-1)
        self.peak = torch.maximum(self.peak, torch.stack([high, low][:self.branches]))

        stride = -(-x.numel() // MAX_VALUES)
        if stride > 1:  # of images or tokens, whichever are more; the offset lets every position have its turn
            dim = max((d for d in rest if d < x.ndim - 1), key=lambda d: x.shape[d])
            x = x[(slice(None),) * dim + (slice(self.batches % min(stride, x.shape[dim]), None, stride),)]
        self.batches += 1
        self.counted += x.numel() // self.offset.numel()
        if self.counted >= 2 ** 31:
            return
        bits = x.contiguous().view(torch.int32)
        base = (LOW + 127) << SUB_BITS
        index = ((bits & 0x7fffffff) >> (23 - SUB_BITS)).sub_(base).clamp_(0, NUM_BINS - 1).add_(self.offset)
        if self.branches == 2:
            index = torch.where(bits < 0, index + self.offset.numel() * NUM_BINS, index)
        counts = torch.bincount(index.flatten(), minlength=self.counts.numel()).view(self.counts.shape)
        self.counts += counts.to(torch.int32)

    @staticmethod
    def _padded(shape: Tuple[int, ...], ndim: int) -> Tuple[int, ...]:
        return (1,) * (ndim - len(shape)) + tuple(shape)


def check_finite(x: torch.Tensor) -> torch.Tensor:
    """Currents as float32 on the CPU.

    Raises:
        SFormerError: If a current is NaN or infinite.
    """
    x = x.detach().to('cpu', torch.float32)  # first: a sum of float16 currents can be infinite
    if not torch.isfinite(x.sum()):
        raise SFormerError('NaN or infinite currents')
    return x


@contextlib.contextmanager
def bypass_neurons(
        model: nn.Module,
        observer: Optional[Callable[[str, Neuron, torch.Tensor], None]] = None,
) -> Iterator[nn.Module]:
    """Let currents pass neurons unchanged: inside of the context a spiking model computes what its source does.

    Args:
        model: Spiking model.
        observer: Called with the name, the neuron and its input current.
    """
    def identity(name, neuron, x):
        if observer is not None:
            observer(name, neuron, x)
        return x

    neurons = list(named_neurons(model))
    outer = {name: neuron.__dict__.get('forward') for name, neuron in neurons}
    try:
        for name, neuron in neurons:
            neuron.forward = functools.partial(identity, name, neuron)
        yield model
    finally:
        for name, neuron in neurons:
            neuron.__dict__.pop('forward')
            if outer[name] is not None:
                neuron.forward = outer[name]


@torch.inference_mode()
def observe(model: nn.Module, batches: Iterable[torch.Tensor]) -> Tuple[Dict[str, SiteStatistics], int]:
    """Statistics of the source's currents at every neuron.

    Args:
        model: Spiking model; its neurons are bypassed.
        batches: Normalised images (B, C, H, W).

    Returns:
        Statistics per neuron name (none of neurons that read softmax numerators with fixed levels: there is nothing
        to fit), and the number of images seen.

    Raises:
        SFormerError: If there are no images, or a current is NaN or infinite; names the first such neuron.
    """
    statistics = {}
    for name, neuron in named_neurons(model):
        if isinstance(neuron, ScaleAndFire):
            if not neuron.signed and neuron.fire_function != 'density':
                continue
            center = tuple(neuron.center.shape) if neuron.centered else None
            statistics[name] = SiteStatistics(tuple(neuron.threshold.shape[1:]), neuron.signed, center)
        else:
            statistics[name] = SiteStatistics(tuple(neuron.threshold.shape), True)

    def observer(name, neuron, x):
        try:
            if name in statistics:
                statistics[name].update(x)
            else:
                check_finite(x)
        except SFormerError as e:
            raise SFormerError(f'{e} at {name}: the weights or the images of the source are broken.') from None

    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    num_images = 0
    training = model.training
    model.eval()
    try:
        with bypass_neurons(model, observer):
            for images in batches:
                try:
                    out = model(images.to(device, dtype))
                except AssertionError as e:  # timm's way to refuse an image size
                    raise SFormerError(f'calibration images {tuple(images.shape)} do not fit the model: {e}') from e
                if not torch.isfinite(out.float().sum()):
                    raise SFormerError('NaN or infinite values in the output of the source network.')
                num_images += len(images)
    finally:
        model.train(training)
    if not num_images:
        raise SFormerError('calibration needs at least one image, got none.')
    return statistics, num_images


def error_integral(u: torch.Tensor, values: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """Integral from 0 to u of the squared error (t - k(t))^2 of a branch that fires levels k(t).

    Args:
        u: Currents in steps, >= 0, any shape, float64.
        values: Level values, (N,).
        boundaries: Firing boundaries, (N,).

    Returns:
        Integrals, the shape of u.
    """
    y = torch.cat([values.new_zeros(1), values])
    constant = torch.cat([values.new_zeros(1), ((boundaries - y[:-1]) ** 3 - (boundaries - y[1:]) ** 3).cumsum(0) / 3])
    i = torch.bucketize(u, boundaries, right=True)
    return constant[i] + (u - y[i]) ** 3 / 3


@functools.lru_cache(maxsize=8)
def _error_matrix(values: Tuple[float, ...], boundaries: Tuple[float, ...]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Candidate tops of the firing range (T,) and mean squared error per bin and candidate (NUM_BINS, T)."""
    edges = bin_edges()
    lower, upper = edges[:-1, None], edges[1:, None]
    part = torch.arange(1, SUB_CANDIDATES + 1) / SUB_CANDIDATES
    tops = (lower + (upper - lower) * part).flatten()
    y = torch.tensor(values, dtype=torch.float64)
    b = torch.tensor(boundaries, dtype=torch.float64)
    steps = tops / y[-1]
    integral = error_integral(upper / steps, y, b) - error_integral(lower / steps, y, b)
    return tops, integral * steps ** 3 / (upper - lower)


def mse_threshold(counts: torch.Tensor, values: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """Threshold that minimises the squared error of a branch under its histogram.

    Within a bin currents are taken as uniformly distributed, which makes the error of a bin under a candidate
    threshold an integral in closed form, and the search over all candidates one matrix product.

    Args:
        counts: Histograms, (groups, NUM_BINS).
        values: Level values, (N,).
        boundaries: Firing boundaries, (N,).

    Returns:
        Thresholds, (groups,); NaN where a group is silent.
    """
    tops, matrix = _error_matrix(tuple(values.tolist()), tuple(boundaries.tolist()))
    mass = counts.to(torch.float64)
    best = tops[(mass @ matrix).argmin(dim=1)]
    silent = mass[:, 1:].sum(dim=1) == 0
    return (best / values[-1].item()).masked_fill(silent, float('nan')).to(torch.float32)


def quantile_threshold(counts: torch.Tensor, values: torch.Tensor, p: float) -> torch.Tensor:
    """Threshold whose firing range covers the share p of a branch's currents (top-p); NaN where silent."""
    edges = bin_edges()
    mass = counts.to(torch.float64)
    mass[:, 0] = 0  # of the currents on this branch; silence says nothing about their range
    total = mass.sum(dim=1, keepdim=True)
    cumulative = mass.cumsum(dim=1)
    j = torch.searchsorted(cumulative, p * total).clamp(max=NUM_BINS - 1)
    inside = mass.gather(1, j).clamp_min(1)
    share = ((p * total - (cumulative.gather(1, j) - mass.gather(1, j))) / inside).clamp(0, 1)
    top = (edges[j] + share * (edges[j + 1] - edges[j])).squeeze(1)
    return (top / values[-1].item()).masked_fill(total.squeeze(1) == 0, float('nan')).to(torch.float32)


def fit_density_levels(statistics: SiteStatistics, levels: int, firing: str = 'round') -> torch.Tensor:
    """Levels that follow the observed distribution: Lloyd-Max on the pooled histogram, snapped to integers <= 127.

    Groups share the levels, so their histograms are pooled after dividing each by its own peak.

    Args:
        statistics: Statistics of the site.
        levels: Number of levels N.
        firing: With `floor`, what falls below the first level does not count.

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
    top = mse_threshold(mass, uniform, firing_boundaries('uniform', uniform, firing)).to(torch.float64) * levels
    grid = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    pooled = torch.zeros(4096, dtype=torch.float64)
    for counts, t in zip(mass.split(256), top.split(256), strict=True):
        u = torch.arange(1, 4097, dtype=torch.float64) / 4096 * t[:, None]
        j = torch.bucketize(u, edges, right=True).clamp(1, NUM_BINS) - 1
        below, inside = (counts.cumsum(1) - counts).gather(1, j), counts.gather(1, j)
        # a bin is wider than a cell of the grid: its mass is spread evenly
        cdf = below + inside * ((u - edges[j]) / (edges[j + 1] - edges[j])).clamp(0, 1)
        pooled += cdf.diff(dim=1, prepend=cdf.new_zeros(len(cdf), 1)).sum(0)
        pooled[-1] += (counts.sum(1) - cdf[:, -1]).sum()
    pooled[0] = pooled[0] if firing == 'round' else 0
    # Panter-Dite initialisation: optimal levels have the density of the cube root of the distribution
    density = (pooled + 1e-9 * pooled.sum()).pow(1 / 3).cumsum(0)
    y = grid[torch.searchsorted(density / density[-1], (torch.arange(levels) + 0.7).to(torch.float64) / levels)]
    for _ in range(50):
        b = (y + torch.cat([y.new_zeros(1), y[:-1]])) / 2
        cell = torch.bucketize(grid, b, right=True)
        weight = torch.zeros(levels + 1, dtype=torch.float64).index_add_(0, cell, pooled)
        moment = torch.zeros(levels + 1, dtype=torch.float64).index_add_(0, cell, pooled * grid)
        y = torch.where(weight[1:] > 0, moment[1:] / weight[1:].clamp_min(1e-30), y).sort().values
    y = (y / y[-1] * 127).round().clamp_min(1)
    i = torch.arange(levels, dtype=torch.float64)
    y = torch.cummax(y - i, 0).values + i  # strictly increasing ...
    return torch.minimum(y, 127 - i.flip(0)).to(torch.float32)  # ... up to 127


def fit_thresholds_(model: nn.Module, statistics: Dict[str, SiteStatistics], config: SFNConfig) -> None:
    """Fit every neuron to what was observed at it, in place.

    Args:
        model: Spiking model.
        statistics: As `observe` returned them.
        config: Estimator and its parameters.
    """
    with torch.device('cpu'):  # where statistics are, whatever the default device is
        for name, neuron in named_neurons(model):
            if isinstance(neuron, DirectCoding):
                _fit_direct_coding(neuron, statistics[name])
            else:
                _fit_scale_and_fire(neuron, statistics.get(name), config)


def _fit_scale_and_fire(neuron: ScaleAndFire, site: Optional[SiteStatistics], config: SFNConfig) -> None:
    values = neuron.levels.to('cpu', torch.float32)
    if neuron.fire_function == 'density':
        values = fit_density_levels(site, neuron.num_levels, neuron.firing)
    if not neuron.signed:
        # softmax numerators: the strongest key is exactly 1 and fires at the top level, whatever the image;
        # one ulp lower, as 1 / (1 / y) may round to less than y
        top_step = (1 / values[-1]).nextafter(values.new_zeros(()))
        neuron.set_threshold(top_step.expand(neuron.threshold.shape), values)
        return
    boundaries = firing_boundaries(neuron.fire_function, values, neuron.firing, neuron.dead_zone)
    branches = []
    for counts, peak in zip(site.counts, site.peak, strict=True):
        if config.estimator == 'mse':
            fitted = mse_threshold(counts, values, boundaries)
        elif config.estimator == 'quantile':
            fitted = quantile_threshold(counts, values, config.quantile)
        else:
            fitted = torch.where(peak > 0, peak / values[-1].item(), torch.nan)
        branches.append(fitted)
    neuron.set_threshold(_revive(torch.stack(branches)).view(neuron.threshold.shape), values, site.center)


def _revive(threshold: torch.Tensor) -> torch.Tensor:
    """Give a silent branch the threshold of its other branch, and a silent group the median of the site."""
    threshold = torch.where(threshold.isnan(), threshold.flip(0), threshold)
    typical = threshold.nanmedian()
    return torch.where(threshold.isnan(), typical if typical > 0 else 1., threshold).clamp_min(MIN_THRESHOLD)


def _fit_direct_coding(neuron: DirectCoding, site: SiteStatistics) -> None:
    low = (neuron.center - 128 * neuron.threshold).flatten().cpu()
    high = (neuron.center + 127 * neuron.threshold).flatten().cpu()
    step = neuron.threshold.flatten().cpu()
    if (site.peak[0] > high + step).any() or (-site.peak[1] < low - step).any():
        # images of another normalisation than the model's: code what they span
        low, high = torch.minimum(low, -site.peak[1]), torch.maximum(high, site.peak[0])
    neuron.set_range(low, high)
