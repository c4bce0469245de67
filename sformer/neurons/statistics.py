"""Streaming statistics of the current that enters a neuron.

Per neuron one histogram with logarithmic bins is kept, so memory does not depend on the number of images and no range
has to be known before. Every value counts: rare tokens are what thresholds have to reach.
"""

import torch

from ..errors import SFormerError

__all__ = ['CurrentStatistics', 'NUM_BINS', 'LOW', 'HIGH', 'SUB_BITS', 'bin_edges', 'check_finite']

# Bins are the leading bits of the float itself: 2^SUB_BITS of them per octave, from 2^LOW to 2^HIGH.
SUB_BITS = 3
LOW, HIGH = -28, 20
NUM_CENTERS, CENTER_STEPS = 65, 3  # candidates of a silent centre, and how often they are moved to the mean around them
NUM_BINS = (HIGH - LOW) << SUB_BITS


def bin_edges() -> torch.Tensor:
    """Edges of the histogram bins, float64, (NUM_BINS + 1,); the first is 0: tiny currents are silence."""
    base = (LOW + 127) << SUB_BITS
    bits = (torch.arange(NUM_BINS + 1, dtype=torch.int32, device='cpu') + base) << (23 - SUB_BITS)
    edges = bits.view(torch.float32).to(torch.float64)
    edges[0] = 0
    return edges


class CurrentStatistics:
    """Histograms of the current that enters one neuron.

    Args:
        shape: Shape of the neuron's step; its elements are the groups.
        signed: Keep a histogram of the negative branch too.
        center_shape: If given, `center` is the mean of the first batch over all but these dimensions, and the
            histogram is of what is left after subtracting it.
        quiet: If given, magnitude below which the neuron is silent, `shape`: `center` is then what leaves the most of
            the first batch silent.

    Attributes:
        counts: Histograms, int32, (2 or 1, groups, NUM_BINS). They are complete once a bin could overflow, after 2^31
            currents per group.
        peak: Largest current per branch and group, (2 or 1, groups).
    """

    def __init__(
            self,
            shape: tuple[int, ...],
            signed: bool,
            center_shape: tuple[int, ...] | None = None,
            quiet: torch.Tensor | None = None,
    ):
        self.quiet = None if quiet is None else quiet.to('cpu')
        self.shape = shape
        self.branches = 2 if signed else 1
        self.center_shape = center_shape
        self.center: torch.Tensor | None = None
        groups = torch.Size(shape).numel()
        # on the CPU, whatever the default device is
        self.counts = torch.zeros(self.branches, groups, NUM_BINS, dtype=torch.int32, device='cpu')
        self.peak = torch.zeros(self.branches, groups, device='cpu')
        self.counted = 0  # currents per group
        self.offset = (torch.arange(groups, dtype=torch.int32, device='cpu') * NUM_BINS).view(shape)

    def update(self, x: torch.Tensor) -> None:
        """Add a batch of currents (B, ...), which may be empty, that `shape` broadcasts against.

        Raises:
            SFormerError: If a current is NaN or infinite.
        """
        x = check_finite(x)
        if not x.numel():  # no object was detected, say
            return
        if self.center_shape is not None:
            if self.center is None:
                dims = [d for d in range(x.ndim) if self._padded(self.center_shape, x.ndim)[d] == 1]
                self.center = x.mean(dim=dims, keepdim=True).reshape(self.center_shape)
                if self.quiet is not None:
                    rows = x.movedim(dims, [*range(len(dims))]).reshape(-1, self.center.numel())
                    self.center = silent_center(rows.T, self.quiet.flatten()).view(self.center_shape)
            x = x - self.center
        groups = self._padded(self.shape, x.ndim)
        rest = [d for d in range(x.ndim) if groups[d] == 1]
        high, low = x.amax(dim=rest).reshape(-1), -x.amin(dim=rest).reshape(-1)
        self.peak = torch.maximum(self.peak, torch.stack([high, low][:self.branches]))
        self.counted += x.numel() // self.offset.numel()
        if self.counted < 2 ** 31:
            for part in x.split(max(1, len(x) * 2 ** 22 // x.numel())):  # bounds the memory of the indices
                self._count(part)

    def _count(self, x: torch.Tensor) -> None:
        bits = x.contiguous().view(torch.int32)
        base = (LOW + 127) << SUB_BITS
        index = ((bits & 0x7fffffff) >> (23 - SUB_BITS)).sub_(base).clamp_(0, NUM_BINS - 1).add_(self.offset)
        if self.branches == 2:
            index = index.add_((bits < 0).to(torch.int32), alpha=self.offset.numel() * NUM_BINS)
        self.counts += torch.bincount(index.flatten(), minlength=self.counts.numel()).view(self.counts.shape)

    def rms(self) -> torch.Tensor:
        """Root mean square of the current per group, float64, `shape`; within 6 % of it, as a histogram knows."""
        edges = bin_edges()
        squares = ((edges[:-1] + edges[1:]) / 2) ** 2
        counts = self.counts.sum(0).to(torch.float64)
        return (counts @ squares / counts.sum(1).clamp_min(1)).sqrt().view(self.shape)

    def loud(self, quiet: torch.Tensor) -> 'CurrentStatistics':
        """Statistics of what is not silent; what is (of a magnitude below `quiet`, `shape`) counts as no current."""
        out = CurrentStatistics(self.shape, self.branches == 2, self.center_shape)
        out.center = self.center
        out.peak = self.peak
        out.counted = self.counted
        edges = bin_edges()
        silent = (edges[:-1] + edges[1:]) / 2 < quiet.to('cpu').flatten()[:, None]
        out.counts = self.counts.masked_fill(silent, 0)
        return out

    def pooled(self, octaves: torch.Tensor, shape: tuple[int, ...]) -> 'CurrentStatistics':
        """Statistics of the currents divided by powers of two, of groups put together.

        Args:
            octaves: Exponents e of the divisors 2^e, integers, `shape` of these statistics.
            shape: Shape of the groups that are wanted; broadcasts against the other.
        """
        out = CurrentStatistics(shape, self.branches == 2, self.center_shape)
        out.center, out.counted = self.center, self.counted
        target = torch.arange(torch.Size(shape).numel()).view(shape).expand(self.shape).flatten()
        bins = (torch.arange(NUM_BINS) - (octaves.flatten()[:, None].long() << SUB_BITS)).clamp(0, NUM_BINS - 1)
        index = (target[:, None] * NUM_BINS + bins).flatten()
        for counts, total in zip(self.counts, out.counts, strict=True):
            total.view(-1).index_add_(0, index, counts.flatten())
        peak = self.peak / 2. ** octaves.flatten()
        out.peak = torch.stack([p.new_zeros(out.offset.numel()).scatter_reduce_(0, target, p, 'amax') for p in peak])
        return out

    @staticmethod
    def _padded(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
        return (1,) * (ndim - len(shape)) + tuple(shape)


def silent_center(x: torch.Tensor, quiet: torch.Tensor) -> torch.Tensor:
    """Centre c of each row of currents around which silence brings the most: where `sum (q^2 - (x - c)^2)` over
    |x - c| < q is largest. A spike that costs q^2 is saved for an error of (x - c)^2, so this is the mode of a kernel
    density with Epanechnikov's kernel.

    Sorted currents have the sum over any window in closed form; the best of some quantiles is moved to the mean of its
    window.

    Args:
        x: Currents, (groups, n).
        quiet: Magnitude q below which a potential is silent, (groups,).

    Returns:
        Centres, (groups,).
    """
    x, q = x.to(torch.float64).contiguous().sort().values, quiet.to(torch.float64)[:, None]
    first, second = (torch.nn.functional.pad(power.cumsum(1), (1, 0)) for power in (x, x * x))
    quantiles = torch.linspace(0, x.shape[1] - 1, NUM_CENTERS).long()
    centers = torch.cat([x[:, quantiles], x.mean(1, keepdim=True)], 1)
    for _ in range(CENTER_STEPS):
        low, high = torch.searchsorted(x, centers - q), torch.searchsorted(x, centers + q)
        count = high - low
        s = first.gather(1, high) - first.gather(1, low)
        ss = second.gather(1, high) - second.gather(1, low)
        value = count * (q * q - centers * centers) + 2 * centers * s - ss
        best = centers.gather(1, value.argmax(1, keepdim=True))
        centers = torch.where(count > 0, s / count, centers)
    return best[:, 0].to(torch.float32)


def check_finite(x: torch.Tensor) -> torch.Tensor:
    """Currents as float32 on the CPU.

    Raises:
        SFormerError: If a current is NaN or infinite.
    """
    x = x.detach().to('cpu', torch.float32)  # first: a sum of float16 currents can be infinite
    if not torch.isfinite(x.sum()):
        raise SFormerError('NaN or infinite currents')
    return x
