"""Every product of a network, the spikes that enter it, and what it takes to add them up.

Products are found where they are computed: torch's own counter sees each matrix product and convolution, by module. A
product that no spikes enter is listed as floating.
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import flop_registry

from ..data.batches import num_images
from ..errors import SFormerError, UncalibratedError
from ..layers import (
    AttentionProduct,
    SpikingConv2d,
    SpikingConvTranspose2d,
    is_calibrated,
    named_neurons,
    shared_copy,
    uncalibrated,
)
from ..layers.watch import ForwardWatch
from ..neurons import CODINGS, MAX_LEVEL, Neuron, ScaleAndFire, count_levels, count_spikes, spikes_in
from .floating import Floating, FloatingCount

__all__ = ['Operation', 'Profile', 'Site', 'profile_model', 'profile_operations']


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
        histogram: How often each level was fired, with its sign.
    """
    name: str
    neurons: float
    activity: float
    saturation: float
    spikes: Dict[str, float]
    levels: Optional[int]
    planes: int = 1
    bits: int = 8
    top: int = MAX_LEVEL
    signed: bool = True
    dead: Optional[float] = None
    histogram: Dict[int, int] = field(default_factory=dict)


@dataclass
class Operation:
    """A product.

    Args:
        name: Path of the layer, and which of its products.
        kind: `linear`, `convolution`, `QK^T`, `AV`, `gate`; `floating` if no spikes enter.
        operands: Paths of the neurons whose spikes enter.
        macs: Multiply-accumulates per image of the source network.
        synaptic_operations: What spikes cause per image, in each coding: accumulations in unary and binary (of bit
            planes), multiply-accumulates in graded coding. Where both operands are spikes, pairs of spikes.
        weights: Weights that are read.
    """
    name: str
    kind: str
    operands: Tuple[str, ...]
    macs: float
    synaptic_operations: Dict[str, float] = field(default_factory=dict)
    weights: int = 0


class Profile(NamedTuple):
    """What an SFormer computes and fires, per image.

    Args:
        operations: Products, in the order of the modules.
        sites: Neurons, likewise.
        floating: Functions that act on currents, in the order in which they are met.
        images: Number of images.
    """
    operations: List[Operation]
    sites: List[Site]
    floating: List[Floating]
    images: int


class _Counts:
    """Sums over images of what a neuron fires, and of its spikes along the axes that a product shares."""

    def __init__(self, neuron: Neuron):
        self.neuron = neuron
        self.total, self.saturated = 0, 0
        self.spikes = dict.fromkeys(CODINGS, 0)
        self.histogram: Counter = Counter()
        self.fired: Optional[torch.Tensor] = None  # which neurons did so on any image
        self.varies = False
        self.latest: Optional[torch.Tensor] = None  # levels of the batch at hand
        self.tops: Optional[torch.Tensor] = None  # of each branch, (branches, *shape)
        if isinstance(neuron, ScaleAndFire):
            self.tops = neuron.top_levels.to(torch.int32)

    def add(self, x: torch.Tensor) -> None:
        k = self.latest = self.neuron.encode(x).levels
        self.total += k.numel()
        self.histogram.update(count_levels(k))
        for coding, count in count_spikes(k).items():
            self.spikes[coding] += count
        fired = k.ne(0).any(0)
        self.varies |= self.fired is not None and self.fired.shape != fired.shape
        self.fired = fired if self.fired is None or self.varies else self.fired | fired
        for sign, top in zip((1, -1), () if self.tops is None else self.tops, strict=False):
            self.saturated += int((k == sign * top).sum())


class _FanOut:
    """Spikes that enter a convolution by their place, of which those at a border may meet fewer weights."""

    def __init__(self, layer: Any, counts: _Counts):
        self.layer, self.counts = layer, counts
        self.spikes: Dict[Tuple[torch.Size, torch.Size], Dict[str, Any]] = {}  # by size of the input and of the output

    def add(self, layer: nn.Module, args: Any, out: torch.Tensor) -> None:
        k: Any = self.counts.latest
        sums = self.spikes.setdefault((k.shape[-2:], out.shape[-2:]), dict.fromkeys(CODINGS, 0))
        for coding in CODINGS:
            sums[coding] = sums[coding] + spikes_in(k, coding).flatten(0, -3).sum(0, dtype=torch.float64)

    def synaptic_operations(self, coding: str) -> float:
        layer, total = self.layer, 0.
        transposed = isinstance(layer, nn.ConvTranspose2d)
        ones = (nn.ConvTranspose2d if transposed else nn.Conv2d)(
            1, 1, layer.kernel_size, layer.stride, layer.padding, dilation=layer.dilation, bias=False,
            padding_mode=layer.padding_mode, device=self.counts.neuron.calibrated.device, dtype=torch.float64)
        nn.init.ones_(ones.weight)
        for (_, size), sums in self.spikes.items():
            met = ones(sums[coding][None, None], *([size] if transposed else []))
            total += met.sum().item() * layer.out_channels / layer.groups
        return total


class _ProductWatch(ForwardWatch):
    """Floating-point operations of products, by the module in whose own forward they are, as torch counts them, and
    what else is computed outside of neurons."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.flops: Dict[str, int] = {}
        self.floating = FloatingCount()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        name, module = self.stack[-1]
        if not isinstance(module, Neuron):
            self.floating.add(name, func, args, out)
        if count is not None:
            self.flops[name] = self.flops.get(name, 0) + count(*args, **(kwargs or {}), out_val=out)
        return out


def profile_operations(
        model: nn.Module,
        batches: Iterable[Any],
        forward_fn: Optional[Callable[[nn.Module, Any], Any]] = None,
) -> Tuple[List[Operation], List[Site], int]:
    """Operations, neurons and number of images of `profile_model`."""
    profile = profile_model(model, batches, forward_fn)
    return profile.operations, profile.sites, profile.images


@torch.no_grad()  # in inference mode a linear layer is no matrix product yet
def profile_model(
        model: nn.Module,
        batches: Iterable[Any],
        forward_fn: Optional[Callable[[nn.Module, Any], Any]] = None,
) -> Profile:
    """Run a calibrated SFormer on images and count.

    Args:
        model: SFormer, or any module that `spiking_` and `calibrate_` have been through; it is not changed.
        batches: Normalised images (B, C, H, W), lists of images, or whatever else the model reads, which counts as one.
        forward_fn: Called with a view of the model and a batch; `model(batch)` if None.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If there are no images.
    """
    if not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; its spikes would mean nothing. Use sformer.convert().')
    view = shared_copy(model).eval()
    counts = {name: _Counts(neuron) for name, neuron in named_neurons(view)}
    names = {neuron: name for name, neuron in named_neurons(view)}
    pairs: Dict[str, Dict[str, Dict[str, int]]] = {}
    fan_outs: Dict[str, _FanOut] = {}
    for name, module in view.named_modules():
        add: Any = None
        operands: Tuple[str, ...] = ()
        if isinstance(module, Neuron):
            module.register_forward_hook(lambda neuron, args, out: counts[names[neuron]].add(args[0]))
        elif isinstance(module, AttentionProduct):
            module.max_scores = math.inf  # or of its spikes the last block of queries alone would be at hand
            add, operands = _add_attention, ('q', 'k', 'v', 'attn')
        elif isinstance(getattr(module, 'gate_neuron', None), Neuron):
            add, operands = _add_gate, ('gate', 'value')
        elif isinstance(module, (SpikingConv2d, SpikingConvTranspose2d)) and module.neuron is not None:
            fan_outs[name] = _FanOut(module, counts[f'{name}.neuron' if name else 'neuron'])
            module.register_forward_hook(fan_outs[name].add)
        if add is not None:
            pairs[name] = {}
            fired = [counts[f'{name}.{operand}_neuron' if name else f'{operand}_neuron'] for operand in operands]
            module.register_forward_hook(
                lambda module, args, out, add=add, sums=pairs[name], fired=fired: add(
                    sums, *(counts.latest for counts in fired)))
    images, watch = 0, _ProductWatch(view)
    for batch in batches:
        with watch:
            view(batch) if forward_fn is None else forward_fn(view, batch)
        images += num_images(batch)
    if not images:
        raise SFormerError('a profile needs at least one image, got none.')
    return Profile(_operations(view, counts, pairs, fan_outs, watch.flops, images),
                   [_site(name, c, images) for name, c in counts.items()], watch.floating.per_image(images), images)


def _add_attention(sums: Dict[str, Dict[str, int]], q: Any, k: Any, v: Any, attn: Any) -> None:
    """Pairs of spikes that meet in QK^T, of (B, H, L, D) and (B, H, S, D), and in AV."""
    scores, values = (sums.setdefault(kind, dict.fromkeys((*CODINGS, 'macs'), 0)) for kind in ('QK^T', 'AV'))
    scores['macs'] += q.numel() * k.shape[-2]
    values['macs'] += attn.numel() * v.shape[-1]
    for coding in CODINGS:  # whatever is summed over all partners may be summed first
        scores[coding] += int((spikes_in(q, coding).sum(-2) * spikes_in(k, coding).sum(-2)).sum())
        values[coding] += int((spikes_in(attn, coding).sum(-2) * spikes_in(v, coding).sum(-1)).sum())


def _add_gate(sums: Dict[str, Dict[str, int]], gate: Any, value: Any) -> None:
    """Pairs of spikes that meet where two currents are multiplied, whose shapes broadcast."""
    both = sums.setdefault('gate', dict.fromkeys((*CODINGS, 'macs'), 0))
    both['macs'] += max(gate.numel(), value.numel())
    for coding in CODINGS:
        both[coding] += int((spikes_in(gate, coding) * spikes_in(value, coding)).sum())


OPERAND_NAMES = {'QK^T': ('q', 'k'), 'AV': ('attn', 'v'), 'gate': ('gate', 'value')}


def _operations(
        view: nn.Module,
        counts: Dict[str, _Counts],
        pairs: Dict[str, Dict[str, Dict[str, int]]],
        fan_outs: Dict[str, _FanOut],
        flops: Dict[str, int],
        images: int,
) -> List[Operation]:
    found: List[Operation] = []
    module: Any
    for name, module in view.named_modules():
        macs = flops.get(name, 0) // 2
        for kind, sums in pairs.get(name, {}).items():
            found.append(Operation(
                f'{name} {kind}', kind, tuple(f'{name}.{o}_neuron' for o in OPERAND_NAMES[kind]), sums['macs'] / images,
                {coding: sums[coding] / images for coding in CODINGS}))
            macs -= sums['macs'] if kind != 'gate' else 0  # torch counts matrix products only
        if macs and isinstance(getattr(module, 'neuron', None), Neuron):
            neuron = f'{name}.neuron' if name else 'neuron'
            entered, weights, fan_out = counts[neuron], module.weight, fan_outs.get(name)
            caused = {coding: entered.spikes[coding] * macs / entered.total if fan_out is None
                      else fan_out.synaptic_operations(coding) for coding in CODINGS}
            found.append(Operation(
                name, 'linear' if fan_out is None else 'convolution', (neuron,), macs / images,
                {coding: caused[coding] / images for coding in CODINGS}, weights.numel()))
            macs = 0
        if macs > 0:
            own = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
            found.append(Operation(name or '(root)', 'floating', (), macs / images, weights=own))
    return found


def _site(name: str, counts: _Counts, images: int) -> Site:
    total = max(counts.total, 1)
    neuron: Any = counts.neuron
    site = Site(
        name, counts.total / images, counts.spikes['graded'] / total, counts.saturated / total,
        {coding: counts.spikes[coding] / total for coding in CODINGS}, None,
        histogram=dict(sorted(counts.histogram.items())))
    if isinstance(neuron, ScaleAndFire) and counts.tops is not None:
        site.levels, site.signed, site.top = neuron.config.levels, neuron.signed, int(counts.tops.max())
        site.bits = ((1 + site.signed) * site.levels).bit_length()
        site.planes = 1 if site.top <= MAX_LEVEL else 2
    elif counts.histogram:  # what was seen is all that is known
        site.top = max(map(abs, counts.histogram))
    if counts.fired is not None and not counts.varies:
        site.dead = 1 - counts.fired.double().mean().item()
    return site
