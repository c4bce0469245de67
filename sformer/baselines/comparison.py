"""What is measured of the rows of a comparison, each beside the source on the same images."""
import dataclasses
import functools
import statistics
import time
from typing import Any

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..data import ImageRequest, open_request
from ..data.names import find_data
from ..evaluation.labels import resolve_benchmark
from ..evaluation.schema import COUNT, PERCENT, POSITIVE, SHARE, TEXT, Figure, Result, Schema, mapping, number
from ..layers import named_neurons
from ..neurons import CODINGS, Neuron, ScaleAndFire
from ..profiling import energy, profile_model
from .counting import profile_steps
from .rows import Built
from .stepped import MultiStep
from .toolkits import Inference, openvino_float

__all__ = ['COMPARISON', 'Comparison']

PROFILED = 32  # images whose spikes are counted
MILLION = 1e6
POINTS = number(-100, 100, 'a difference of percentages')

COMPARISON = Schema('baselines', first='error', mark='baseline')
COMPARISON.register(
    Figure('baseline', 'row', TEXT, needed=True),
    Figure('top1', 'top-1 accuracy', PERCENT, unit='%', head='top-1 [%]'),
    Figure('drop', 'top-1 of the source minus that of the row', POINTS, unit='points', head='drop [points]'),
    Figure('drop_error', 'standard error of the drop, over the images, which are the same', POSITIVE, unit='points',
           head='+-'),
    Figure('agreement', 'images on which the row predicts what the source does', PERCENT, unit='%',
           head='agreement [%]'),
    Figure('error', '|source - row| / |source| over logits, or over all tokens of a network without a classifier',
           POSITIVE, digits=3, head='error'),
    Figure('spikes', 'spikes per image, pixels apart, by coding', mapping(POSITIVE), unit='M', head='spikes [M]',
           parts={coding: Figure(coding, '', POSITIVE, head=coding) for coding in CODINGS}),
    Figure('proxy', 'energy by the proxy of the literature', POSITIVE, unit='mJ', digits=3, head='proxy [mJ]'),
    Figure('account', 'energy by the account of `sformer profile`, in the coding of the row', POSITIVE, unit='mJ',
           digits=4, head='account [mJ]'),
    Figure('coding', 'coding that the account charges', TEXT),
    Figure('accounts', 'energy by the account, by coding', mapping(POSITIVE), unit='mJ',
           parts={coding: Figure(coding, '', POSITIVE) for coding in CODINGS}),
    Figure('unequal', 'share of neurons that fire another level than integrate-and-fire over T timesteps', SHARE),
    Figure('time', 'median of pairs of calls, in the time of the source on the same engine', POSITIVE,
           head='time / source'),
    Figure('time_min', 'least of the pairs', POSITIVE),
    Figure('time_max', 'most of the pairs', POSITIVE),
    Figure('source_seconds', 'time of the source', POSITIVE, unit='s'),
    Figure('timed_images', 'images per timed call', COUNT),
    Figure('threads', 'threads of timed calls', COUNT),
    Figure('engine', 'what ran it', TEXT))


class Comparison:
    """A source, images to calibrate with, and images that rows are measured on.

    Args:
        source: timm model in eval mode, which is kept: without a classifier, it gives all of its tokens from then on.
        calibration: Which images to calibrate with, and how many; none of them is measured on.
        images: Which images to measure on, and how many; they have labels, if the source has classes.
        batch_size: Images per batch.

    Raises:
        SFormerError: If images cannot be had, or their labels do not fit the source.
    """

    def __init__(self, source: nn.Module, calibration: ImageRequest, images: ImageRequest, batch_size: int = 32):
        network: Any = source
        cfg = resolve_input_data_config(source)
        self.source = source
        wanted = dataclasses.replace(images, needs_labels=bool(network.num_classes))
        same = (find_data(calibration.dataset), calibration.split) == (find_data(images.dataset), images.split)
        if same:  # drawn at once, so that no image is in both
            wanted = dataclasses.replace(wanted, num_images=_number(calibration) + _number(images))
        found = open_request(wanted, cfg)
        read = [*found.batches(batch_size)]
        pixels = torch.cat([batch for batch, _ in read])
        labels = torch.cat([labels for _, labels in read if labels is not None]) if network.num_classes else None
        if same:
            order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(images.seed))
            fitted, measured = order.split([_number(calibration), _number(images)])
            self.calibration = [*pixels[fitted].split(batch_size)]
            pixels, labels = pixels[measured], None if labels is None else labels[measured]
        else:
            self.calibration = [batch for batch, _ in open_request(calibration, cfg).batches(batch_size)]
        self.batches = [*pixels.split(batch_size)]
        self.labels: torch.Tensor | None = None
        if network.num_classes:
            classes = resolve_benchmark(None, source, found.name, found.class_names).label_map
            self.labels = labels if classes is None or labels is None else torch.tensor(classes)[labels]
        else:
            network.reset_classifier(0, '')
        self.expected = self._outputs(source)

    @torch.no_grad()
    def _outputs(self, run: Inference) -> torch.Tensor:
        return torch.cat([run(batch) for batch in self.batches])

    def measure(self, name: str, built: Built) -> Result:
        """Figures of a row but for its time."""
        actual, expected = self._outputs(built.run), self.expected
        found: Result = dict(error=((expected - actual).norm() / expected.norm()).item(), engine=built.engine)
        if self.labels is not None:
            predicted, sources = actual.argmax(1), expected.argmax(1)
            lost = (sources == self.labels).float() - (predicted == self.labels).float()
            # a drop is a difference of pairs: its standard error
            found |= dict(
                top1=100 * (predicted == self.labels).float().mean().item(), drop=100 * lost.mean().item(),
                drop_error=100 * lost.std().item() * len(lost) ** -0.5,
                agreement=100 * (predicted == sources).float().mean().item())
        if built.model is not None:
            if built.equal_to is not None:
                found['unequal'] = _unequal(built.model, built.equal_to, self._profiled()[0])
            found |= _cost(built, built.model, self._profiled())
        return COMPARISON.make({}, baseline=name, **found)

    def _profiled(self) -> list[torch.Tensor]:
        """Images whose spikes are counted, in batches."""
        return [*torch.cat(self.batches)[:PROFILED].split(len(self.batches[0]))]

    def timed(self, built: Built, batch_size: int, pairs: int) -> Result:
        """Time of a row in that of the source, by pairs of calls, one after the other."""
        images = torch.cat(self.batches)[:batch_size]
        return _timed(built.run, self.source if built.engine == 'torch' else openvino_float(self.source), images, pairs)


def _number(images: ImageRequest) -> int:
    assert images.num_images is not None
    return images.num_images


@torch.inference_mode()
def _timed(run: Inference, source: Inference, images: torch.Tensor, pairs: int) -> Result:
    measured: list[list[float]] = []
    for i in range(pairs + 1):
        times = []
        for call in (source, run):
            start = time.perf_counter()
            call(images)
            times.append(time.perf_counter() - start)
        if i:  # the first pair warms up
            measured.append(times)
    ratios = [mine / others for others, mine in measured]
    return dict(time=statistics.median(ratios), time_min=min(ratios), time_max=max(ratios), timed_images=len(images),
                source_seconds=statistics.median(others for others, _ in measured), threads=torch.get_num_threads())


@torch.no_grad()
def _unequal(model: nn.Module, network: MultiStep, images: torch.Tensor) -> float:
    """Share of neurons that fire another level than integrate-and-fire over T timesteps on the same current. Rounding
    of floats on a threshold is the only reason; what one such spike makes of later layers is not counted."""
    others = dict(named_neurons(network.network))
    counts = torch.zeros(2)

    def compare(neuron: Neuron, args: tuple[torch.Tensor], out: torch.Tensor, name: str) -> None:
        differs = (out - others[name](*args)).abs() > neuron.step / 2
        counts.add_(torch.tensor([float(differs.sum()), differs.numel()]))
    handles = [neuron.register_forward_hook(functools.partial(compare, name=name))
               for name, neuron in named_neurons(model) if isinstance(neuron, ScaleAndFire)]
    model(images)
    for handle in handles:
        handle.remove()
    return (counts[0] / counts[1]).item()


def _cost(built: Built, model: nn.Module, batches: list[torch.Tensor]) -> Result:
    """Spikes per image by coding, pixels apart, and energies."""
    profile = profile_model(model, batches if built.steps is None else batches[:1])
    if built.steps is not None:
        profile = profile_steps(built.steps, batches, profile)
    figures = energy(profile.operations, profile.sites, profile.floating)
    found: Result = {}
    if built.coding:
        found |= dict(coding=built.coding, account=figures['account'][built.coding]['total'])
    names = {name for name, neuron in named_neurons(model) if isinstance(neuron, ScaleAndFire)}
    if names:
        spiking = [site for site in profile.sites if site.name in names]
        spikes = {coding: sum(site.neurons * site.spikes[coding] for site in spiking) for coding in CODINGS}
        found |= dict(
            proxy=figures['proxy']['sformer'], spikes={coding: count / MILLION for coding, count in spikes.items()},
            accounts={coding: figures['account'][coding]['total'] for coding in CODINGS})
    return found
