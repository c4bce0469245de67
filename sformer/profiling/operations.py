"""Every product of a network, the spikes that enter it, and what it takes to add them up.

Products are found where they are computed: torch's own counter sees each matrix product and convolution, by module. A
product that no spikes enter is listed as floating.
"""
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
import torch.nn as nn
from torch.utils.flop_counter import flop_registry

from ..data.batches import num_images
from ..errors import SFormerError, UncalibratedError
from ..layers import (
    FLOATING_LAYERS,
    Product,
    constant_modules,
    is_calibrated,
    named_neurons,
    named_products,
    present,
    shared_copy,
    uncalibrated,
)
from ..layers.watch import ForwardWatch
from ..neurons import (
    CODINGS,
    MAX_LEVEL,
    LateralScaleAndFire,
    Neuron,
    ScaleAndFire,
    Spikes,
    count_levels,
    count_spikes,
    spikes_in,
)
from .floating import Floating, FloatingCount

__all__ = ['FEEDBACK', 'Operation', 'Profile', 'Site', 'profile_model', 'profile_operations']

FEEDBACK = 'feedback'  # kind of a product of lateral spikes with what neurons feed back, which no source has

Batch = TypeVar('Batch')  # images, or whatever else a model reads


@dataclass
class Site:
    """What a neuron fires.

    Args:
        name: Path of the neuron.
        neurons: Potentials per image.
        activity: Share of them that fire a level other than 0.
        saturation: Share that fire the top level of a branch.
        spikes: Spikes per neuron in each coding.
        levels: Number of levels N per branch.
        planes: Bytes that hold a level: 2 for softmax levels beyond 127.
        bits: Bits that tell its levels apart, ceil(log2(2 N + 1)): those of the bit-matched activation.
        top: Largest level that it can fire.
        signed: Whether it has a negative branch.
        dead: Share of neurons that were silent on all images; None where their number differs between images.
        counted: Whether it counts in the activity of the model, which leaves pixels out: they always fire.
        histogram: How often each level was fired, with its sign.
        lateral: Whether these are lateral spikes, by which neurons of a site tell one another what they left out.
    """
    name: str
    neurons: float
    activity: float
    saturation: float
    spikes: dict[str, float]
    levels: int | None
    planes: int = 1
    bits: int = 8
    top: int = MAX_LEVEL
    signed: bool = True
    dead: float | None = None
    counted: bool = True
    histogram: dict[int, int] = field(default_factory=dict)
    lateral: bool = False


@dataclass
class Operation:
    """A product.

    Args:
        name: Path of the layer, and which of its products.
        kind: That of the `Product`, such as `linear` or `QK^T`; `feedback` of lateral spikes; `floating` if no spikes
            enter.
        operands: Paths of the neurons whose spikes enter.
        macs: Multiply-accumulates per image of the source network, which has no feedback.
        synaptic_operations: What spikes cause per image, in each coding: accumulations in unary and binary (of bit
            planes), multiply-accumulates in graded coding. Where both operands are spikes, pairs of spikes.
        weights: Weights that are read.
    """
    name: str
    kind: str
    operands: tuple[str, ...]
    macs: float
    synaptic_operations: dict[str, float] = field(default_factory=dict)
    weights: int = 0


class Profile(NamedTuple):
    """What an SFormer computes and fires, per image.

    Args:
        operations: Products, in the order of the modules.
        sites: Neurons, likewise.
        floating: Functions that act on currents, in the order in which they are met.
        images: Number of images.
    """
    operations: list[Operation]
    sites: list[Site]
    floating: list[Floating]
    images: int


class _Counts:
    """Sums over images of what a neuron fires; of spikes that are none of its levels where there is no neuron."""

    def __init__(self, name: str, neuron: Neuron | None):
        self.name, self.neuron = name, neuron
        self.total, self.saturated = 0, 0
        self.spikes = dict.fromkeys(CODINGS, 0)
        self.histogram: Counter[int] = Counter()
        self.fired: torch.Tensor | None = None  # which neurons did so on any image
        self.varies = False
        self.latest: torch.Tensor | None = None  # levels of the batch at hand
        self.present: torch.Tensor | None = None  # which of these are of no padding, if not all are
        self.tops: torch.Tensor | None = None  # of each branch, (branches, *shape)
        if isinstance(neuron, ScaleAndFire):
            self.tops = neuron.top_levels.to(torch.int32)
        self.lateral = _LateralCounts(name, neuron) if isinstance(neuron, LateralScaleAndFire) else None

    def observe(self, spikes: Spikes, current: torch.Tensor) -> None:
        assert self.neuron is not None
        self.present = None if self.neuron is None else present(self.neuron, current)
        self.add(spikes.levels)
        if self.lateral is not None and spikes.lateral is not None:
            self.lateral.add(spikes.lateral)

    def add(self, k: torch.Tensor) -> None:
        self.latest, mask = k, self.present
        self.histogram.update(count_levels(k if mask is None else k[mask.expand_as(k)]))
        self.total += k.numel() if mask is None else int(mask.expand_as(k).sum())
        for coding, count in count_spikes(k).items():
            self.spikes[coding] += count
        fired = k.ne(0).any(0)
        self.varies |= self.fired is not None and self.fired.shape != fired.shape
        self.fired = fired if self.fired is None or self.varies else self.fired | fired
        for sign, top in zip((1, -1), () if self.tops is None else self.tops, strict=False):
            self.saturated += int((k == sign * top).sum())


class _LateralCounts(_Counts):
    """The same of lateral spikes, and what they cause."""

    def __init__(self, name: str, neuron: LateralScaleAndFire):
        super().__init__(f'{name.removesuffix(".neuron")} lateral', None)
        self.listeners = neuron.listeners
        self.largest, self.weights = neuron.largest_spike, neuron.feedback.numel()
        self.caused = dict.fromkeys(CODINGS, 0)

    def add(self, k: torch.Tensor) -> None:
        super().add(k)
        for coding in CODINGS:
            self.caused[coding] += int((spikes_in(k, coding) * self.listeners).sum())

    def operation(self, images: int) -> Operation:
        name = self.name.removesuffix(' lateral')
        caused = {coding: count / images for coding, count in self.caused.items()}
        return Operation(f'{name} {FEEDBACK}', FEEDBACK, (self.name,), 0., caused, self.weights)

    def site(self, images: int) -> Site:
        site = _site(self, images)
        site.top, site.bits = self.largest, (2 * self.largest).bit_length()
        site.lateral = True
        return site


class _Tally:
    """Sums over images of what a product takes."""

    def __init__(self, product: Product, operands: list[_Counts], watch: '_ProductWatch'):
        self.product = product
        self.operands = operands
        self.watch = watch
        self.macs = 0
        self.seen = 0  # of these, those that torch counts as a product of matrices or a convolution
        self.caused = dict.fromkeys(CODINGS, 0.)

    def add(self, layer: nn.Module, args: object, out: torch.Tensor) -> None:
        """Count what the operands fired last."""
        fired = [counts.latest for counts in self.operands if counts.latest is not None]
        if self.product.weight is not None:  # each of which is met
            fired.append(torch.ones((), dtype=torch.int64, device=fired[0].device).expand_as(self.product.weight))
        product = self.product
        if product.transposed:
            with self.watch.aside():
                product = product.of_size(fired[0], fired[1], out.shape[-2:])
        with self.watch.aside() as flops:
            result = product.compute(*(torch.empty(k.shape, device='meta') for k in fired))
            self.seen += sum(flops.values()) // 2
            if any(counts.present is not None for counts in self.operands):
                self.macs += int(product.count(*self._ones(fired)))
            else:
                self.macs += sum(flops.values()) // 2 or result.numel()
            for coding in CODINGS:
                self.caused[coding] += product.count(*(spikes_in(k, coding) for k in fired))


    def _ones(self, fired: list[torch.Tensor]) -> list[torch.Tensor]:
        """Factors of a product, one where there is no padding."""
        masks = [counts.present for counts in self.operands] + [None] * (len(fired) - len(self.operands))
        return [torch.ones_like(k) if mask is None else mask.expand_as(k).to(k.dtype)
                for k, mask in zip(fired, masks, strict=True)]


class _ProductWatch(ForwardWatch):
    """Floating-point operations of products, by the module in whose own forward they are, as torch counts them, and
    what else is computed outside of neurons."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.flops: dict[str, int] = {}
        self.floating = FloatingCount()
        self.constant = constant_modules(module)

    @contextlib.contextmanager
    def aside(self) -> Iterator[dict[str, int]]:
        """While entered, operations are not those of the module; yields their count."""
        kept = self.flops, self.floating
        self.flops, self.floating = {}, FloatingCount()
        try:
            yield self.flops
        finally:
            self.flops, self.floating = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if not self.stack or self.stack[-1][1] in self.constant:
            return out  # of whoever calls the network; the same for all images
        name, module = self.stack[-1]
        if not isinstance(module, Neuron):
            self.floating.add(name, func, args, out)
        if count is not None and type(module) in FLOATING_LAYERS:
            self.floating.add_sum(name, args)  # as of a pool that is written as a product
        elif count is not None:
            self.flops[name] = self.flops.get(name, 0) + count(*args, **(kwargs or {}), out_val=out)
        return out


def profile_operations(
        model: nn.Module,
        batches: Iterable[Batch],
        forward_fn: Callable[[nn.Module, Batch], object] | None = None,
) -> tuple[list[Operation], list[Site], int]:
    """Operations, neurons and number of images of `profile_model`."""
    profile = profile_model(model, batches, forward_fn)
    return profile.operations, profile.sites, profile.images


@torch.no_grad()  # in inference mode a linear layer is no matrix product yet
def profile_model(
        model: nn.Module,
        batches: Iterable[Batch],
        forward_fn: Callable[[nn.Module, Batch], object] | None = None,
) -> Profile:
    """Run a calibrated SFormer on images and count.

    Args:
        model: SFormer, or any module that `spiking_` and `calibrate_` have been through; it is not changed.
        batches: Normalised images (B, C, H, W), lists of images, or whatever else the model reads, which counts as one.
        forward_fn: Called with a view of the model and a batch; `model(batch)` if None.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If there are no images, or products are executed in integers or spike by spike.
    """
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; its spikes would mean nothing. Use sformer.convert().')
    view = shared_copy(model).eval()
    watch = _ProductWatch(view)
    counts = {neuron: _Counts(name, neuron) for name, neuron in named_neurons(view)}
    for neuron in counts:
        neuron.register_forward_hook(lambda neuron, args, out: counts[neuron].observe(neuron.encode(args[0]), args[0]))
    tallies: dict[str, list[_Tally]] = {}
    for name, layer, products in named_products(view):
        if layer.executed:
            raise SFormerError(f'{name} is executed in integers or spike by spike, where products are not counted: '
                               f'profile the model that to_integer_() or to_spikes_() was given.')
        layer.max_scores = math.inf  # or of its spikes the last block of queries alone would be at hand
        for product in products:
            tally = _Tally(product, [counts[neuron] for neuron in product.operands], watch)
            tallies.setdefault(name, []).append(tally)
            layer.register_forward_hook(tally.add)
    images = 0
    for batch in batches:
        with watch:
            view(batch) if forward_fn is None else forward_fn(view, batch)
        images += num_images(batch)
    if not images:
        raise SFormerError('a profile needs at least one image, got none.')
    operations: list[Operation] = []
    for name, layer in view.named_modules():
        lateral = counts[layer].lateral if isinstance(layer, Neuron) else None
        if lateral is not None:
            operations.append(lateral.operation(images))
        else:
            operations += _operations(name, layer, tallies.get(name, []), watch.flops.get(name, 0) // 2, images)
    sites: list[Site] = []
    for seen in counts.values():
        sites.append(_site(seen, images))
        if seen.lateral is not None:
            sites.append(seen.lateral.site(images))
    return Profile(operations, sites, watch.floating.per_image(images), images)


def _operations(
        name: str,
        layer: nn.Module,
        tallies: list[_Tally],
        macs: int,
        images: int,
) -> Iterator[Operation]:
    """Products of a module, in the forward of which torch counts some multiply-accumulates of all images."""
    for tally in tallies:
        product = tally.product
        if tally.macs:
            weights = 0 if product.weight is None else product.weight.numel()
            yield Operation(
                name if weights else f'{name} {product.kind}', product.kind,
                tuple(counts.name for counts in tally.operands), tally.macs / images,
                {coding: count / images for coding, count in tally.caused.items()}, weights)
    rest = macs - sum(tally.seen for tally in tallies)
    if rest > 0:
        own = sum(p.numel() for p in layer.parameters(recurse=False) if p.ndim > 1)
        yield Operation(name or '(root)', 'floating', (), rest / images, weights=own)


def _site(counts: _Counts, images: int) -> Site:
    total = max(counts.total, 1)
    neuron = counts.neuron
    site = Site(
        counts.name, counts.total / images, counts.spikes['graded'] / total, counts.saturated / total,
        {coding: counts.spikes[coding] / total for coding in CODINGS}, None,
        counted=neuron is not None and neuron.counted, histogram=dict(sorted(counts.histogram.items())))
    if isinstance(neuron, ScaleAndFire) and counts.tops is not None:
        site.levels = neuron.config.levels
        site.signed = neuron.signed
        site.top = int(counts.tops.max())
        site.bits = ((1 + site.signed) * site.levels).bit_length()
        site.planes = 1 if site.top <= MAX_LEVEL else 2
    elif counts.histogram:  # what was seen is all that is known
        site.top = max(map(abs, counts.histogram))
    if counts.fired is not None and not counts.varies:
        site.dead = 1 - counts.fired.double().mean().item()
    return site
