"""Observation of the source network, and the verb that fits a spiking module to it.

The source is a view of the spiking module: the same parameters, with an observer in the place of each neuron. So the
module itself spikes on meanwhile, and has no state that says otherwise. Images are observed in batches of a fixed size,
whatever the size they come in, so that thresholds do not depend on it.
"""
import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn as nn

from ..data.batches import num_images
from ..errors import SFormerError, check
from ..files import Json
from ..layers import Product, named_neurons, named_products, shared_copy, without_neurons
from ..layers.spiking import fit_neurons
from ..neurons import FitConfig, LateralScaleAndFire, Neuron, ScaleAndFire, recipe_name
from ..neurons.base import Observer
from ..neurons.statistics import CurrentStatistics, check_finite
from .changes import in_words, record_of, recorded_as
from .compensation import Correlation, compensable, compensated
from .feedback import ErrorCost, cost_bytes
from .importance import ForwardFn
from .reconstruction import reconstruct_, take_weights_
from .record import COMPENSATED, RECONSTRUCTED, CalibrationRecord, library_versions, set_record_
from .silence import RowSensitivity, Sensitivity, add_gradients, set_quiet_, without_gradients_
from .transforms import write_balanced, write_concentrated
from .unreached import UnreachedProducts

__all__ = ['calibrate_', 'check_products', 'correct', 'observe', 'OBSERVED_IMAGES']

SENSITIVITY_BATCHES = 8
HELD_IMAGES = 1024  # in memory, for weights that compensate or are trained
SUMMED_BYTES = 2 ** 31  # of what is summed up at a time
OBSERVED_IMAGES = 16  # at a time; small enough that currents of a large network at 500 pixels are no burden


def calibrate_(
        module: nn.Module,
        batches: Iterable[object],
        fit: FitConfig = FitConfig(),
        forward_fn: ForwardFn | None = None,
) -> int:
    """Fit every neuron of a spiking module to the currents of its source network, in place.

    Args:
        module: A module that `spiking_` converted.
        batches: What the module reads. Tensors (B, ...) are observed in batches of `OBSERVED_IMAGES`; anything else,
            such as lists of images, as it comes. The first batch is read twice where the fit is `unbiased`, the first
            eight where weights are balanced or concentrated and, with gradients, where neurons have a price of activity
            or send lateral spikes; the first 1,024 images where weights compensate or are trained (`effort`).
        fit: How thresholds are fitted.
        forward_fn: Called with the source network and a batch; `network(batch)` if None.

    Returns:
        Number of images; a batch that is neither a tensor nor a list counts as one. `module.conversion` is the record.

    Raises:
        SFormerError: If weights compensate already, there are no images, a current is NaN or infinite, or none reached
            a neuron, such as that of a mask head on images without objects; names the first such neuron.
        UnsupportedLayerError: If a module multiplies currents in a forward of its own, or does not say what it
            multiplies its spikes by; names it.
    """
    record = record_of(module)
    if COMPENSATED in record.changed:
        raise SFormerError(f'the weights of this module {in_words(record.changed)} that were fitted before, so they '
                           f'are not those of the source: start from the source itself.')
    products = list(named_products(module))  # which names a layer that does not say what it multiplies
    batches = iter(_rebatched(batches))
    silent = _check_silence(module)
    trains = fit.effort == 'high'
    lateral = any(isinstance(neuron, LateralScaleAndFire) for _, neuron in named_neurons(module))
    first = list(itertools.islice(batches, SENSITIVITY_BATCHES if silent or lateral or fit.balance else 1))
    with contextlib.ExitStack() as undo:  # what was folded into weights, where anything fails
        if fit.balance or fit.concentrate:
            _transform(module, first, fit, forward_fn, silent, undo)
            record = record_of(module)
        source = without_neurons(module) if trains else module
        if silent:
            _fit_silence(module, first, forward_fn)
        held: list[object] = []
        batches = itertools.chain(first, batches)
        statistics, count = observe(module, _kept(batches, held) if fit.compensate or trains else batches, forward_fn)
        unmet = [name for name, seen in statistics.items() if isinstance(seen, CurrentStatistics) and not seen.counted]
        if unmet:
            more = f' and {len(unmet) - 1} more' if len(unmet) > 1 else ''
            raise SFormerError(
                f'no current reached {unmet[0]}{more}, so no threshold can be fitted. Use images on which all of the '
                f'network runs, such as ones with objects that a detector finds, or leave that part out (filter_fn of '
                f'spiking_).')
        with torch.device('cpu'):  # where statistics are, whatever the default device is
            fit_neurons(module, statistics, fit)
            if lateral and silent:
                _fit_feedback(module, first, forward_fn, price=True)
                fit_neurons(module, statistics, fit)
            _widen([product for _, _, found in products for product in found], fit)
        if fit.unbiased:
            correct(module, first[0], forward_fn)
        if lateral:
            _fit_feedback(module, first, forward_fn)
        set_record_(module, dataclasses.replace(
            record, source_sha256=record.source_sha256 or record.state_sha256, fit=fit,
            recipe=_recipe_followed(module, fit), calibration=CalibrationRecord(num_images=count),
            versions=library_versions(), command=None))
        if fit.compensate:
            with recorded_as(module, COMPENSATED):
                _compensate(module, held, forward_fn)
        if trains:
            undo.callback(take_weights_, module, source)
            with recorded_as(module, RECONSTRUCTED):
                reconstruct_(module, source, held, lambda view, batch: _forward(
                    module, view, copy.deepcopy(batch), forward_fn))
        undo.pop_all()
        return count


def _widen(products: list[Product], fit: FitConfig) -> None:
    """Widen the firing ranges of what comes from attention or an activation function (`floor` and `margin`)."""
    fit = fit.settled()
    floor, margin = fit.floor or 0., fit.margin or 1.
    if not floor and margin == 1:
        return
    for product in products:
        neuron = product.operands[0]
        if product.weight is not None and isinstance(neuron, ScaleAndFire) and neuron.unbounded:
            neuron.widen(product.weight.detach().to(torch.float32).norm(dim=0), floor, margin)


def _check_silence(module: nn.Module) -> bool:
    """Whether neurons have a price of activity; a ConfigError where neurons of one's own have one, which know none."""
    priced = [neuron for _, neuron in named_neurons(module) if hasattr(neuron, 'config') and neuron.config.silence]
    for neuron in priced:
        check(isinstance(neuron, ScaleAndFire), f'silence is a price of scale-and-fire neurons, which a '
                                                f'{type(neuron).__name__} does not know.')
    return bool(priced)


def _recipe_followed(module: nn.Module, fit: FitConfig) -> str | None:
    """Name of the recipe that all neurons are of."""
    configs = {neuron.config for _, neuron in named_neurons(module) if hasattr(neuron, 'config')}
    return recipe_name(configs.pop(), fit) if len(configs) == 1 else None


def _kept(batches: Iterable[object], held: list[object]) -> Iterator[object]:
    """Batches as they pass, the first of which are held."""
    count = 0
    for batch in batches:
        if count < HELD_IMAGES:
            held.append(copy.deepcopy(batch))  # a forward may write to what it reads
            count += num_images(batch)
        yield batch


def _transform(
        module: nn.Module,
        batches: list[object],
        fit: FitConfig,
        forward_fn: ForwardFn | None,
        silent: bool,
        undo: contextlib.ExitStack,
) -> None:
    """Write weights of the same function in which neurons fire better, by the source's currents on some batches."""
    check(silent or not fit.concentrate, 'concentrate is for neurons that may be silent: give a price of activity '
                                         '(silence), or leave it out.')

    def watch(stand_in: Callable[[str, Neuron], nn.Module | None]) -> Json:
        view, seen = _view(module, lambda name, neuron: stand_in(name, neuron) or _Observer(name, None))
        for batch in batches:
            _forward(module, view, copy.deepcopy(batch), forward_fn)
        return seen

    def output() -> object:
        view, _ = _view(module, lambda name, neuron: _Observer(name, None))
        return _forward(module, view, copy.deepcopy(batches[0]), forward_fn)

    if fit.balance:
        write_balanced(module, watch, undo, silent)
    if fit.concentrate:
        write_concentrated(module, watch, output, undo)


def _fit_silence(module: nn.Module, batches: list[object], forward_fn: ForwardFn | None) -> None:
    """Say below which current each neuron is silent, by the gradients of the source on some batches."""
    def stand_in(name: str, neuron: Neuron) -> nn.Module:
        if not isinstance(neuron, ScaleAndFire):
            return _Observer(name, None)
        return Sensitivity(neuron) if neuron.signed else RowSensitivity(neuron)

    view, sites = _gradient_view(module, stand_in)
    set_quiet_([site for site in sites.values() if isinstance(site, Sensitivity)], batches,
               lambda batch: _forward(module, view, batch, forward_fn))


def _fit_feedback(
        module: nn.Module,
        batches: list[object],
        forward_fn: ForwardFn | None,
        price: bool = False,
) -> None:
    """Set what neurons feed back to one another, by the gradients of the source on some batches; with `price`, let
    neurons be silent where that is worth it now: what the others take up of it costs nothing."""
    neurons = {name: neuron for name, neuron in named_neurons(module) if isinstance(neuron, LateralScaleAndFire)}
    for group in _in_groups({name: cost_bytes(neuron) for name, neuron in neurons.items()}):
        def stand_in(name: str, neuron: Neuron, group: list[str] = group) -> nn.Module:
            if name in group and isinstance(neuron, LateralScaleAndFire):
                return ErrorCost(neuron)
            return _Observer(name, None)

        view, sites = _gradient_view(module, stand_in)

        def outputs(batch: object, view: nn.Module = view) -> object:
            return _forward(module, view, batch, forward_fn)

        add_gradients(batches, outputs)
        for name in group:
            share = neurons[name].set_feedback(sites[name].cost)
            quiet = neurons[name].quiet
            if price and quiet is not None:
                neurons[name].set_quiet(quiet / share.to(quiet.device).sqrt())


def _in_groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in groups for whose sums there is memory at a time, by the bytes that each takes."""
    left = dict(sizes)
    while left:
        group: list[str] = []
        while left and (not group or sum(sizes[name] for name in (*group, next(iter(left)))) <= SUMMED_BYTES):
            name = next(iter(left))
            group.append(name)
            del left[name]
        yield group


def _gradient_view(module: nn.Module, stand_in: Callable[[str, Neuron], nn.Module]) -> tuple[nn.Module, Json]:
    """As `_view`, for gradients of currents alone, of which none are left on what others train."""
    view, sites = _view(module, stand_in)
    return without_gradients_(view), sites


@torch.no_grad()
def check_products(module: nn.Module, batch: object, forward_fn: ForwardFn | None = None) -> None:
    """Raise UnsupportedLayerError if a module multiplies currents in a forward of its own, as calibration does, on any
    device; arguments as of `calibrate_`."""
    def nothing(name: str, neuron: Neuron) -> nn.Module:
        return nn.Identity()

    view, _ = _view(module, nothing)
    with UnreachedProducts(view, batch):
        _forward(module, view, batch, forward_fn)


@torch.inference_mode()
def observe(
        module: nn.Module,
        batches: Iterable[object],
        forward_fn: ForwardFn | None = None,
) -> tuple[Json, int]:
    """Statistics of the source's currents at every neuron, and the number of images; arguments as of `calibrate_`."""
    view, observers = _view(module, lambda name, neuron: _Observer(name, neuron.statistics()))
    count = 0
    for batch in _rebatched(batches):
        with contextlib.nullcontext() if count else UnreachedProducts(view, batch):
            out = _forward(module, view, batch, forward_fn)
        if isinstance(out, torch.Tensor) and not torch.isfinite(out.float().sum()):
            raise SFormerError('NaN or infinite values in the output of the source network.')
        count += num_images(batch)
    if not count:
        raise SFormerError('calibration needs at least one image, got none.')
    return {name: observer.statistics for name, observer in observers.items()}, count


@torch.inference_mode()
def correct(module: nn.Module, batch: object, forward_fn: ForwardFn | None = None) -> None:
    """Let fitted neurons carry what rounding and clipping take from the source's currents on one batch of images."""
    view, comparisons = _view(module, lambda name, neuron: _Comparison(neuron))
    _forward(module, view, batch, forward_fn)
    for comparison in comparisons.values():
        if comparison.moments is not None:
            comparison.neuron.correct(comparison.moments)  # its buffers are those of the module


@torch.no_grad()
def _compensate(module: nn.Module, batches: list[object], forward_fn: ForwardFn | None) -> None:
    """Let weights make up for what neurons leave out of the source's currents, as far as other neurons know of it."""
    found = {product.operands[0]: product for _, product in compensable(module)}
    products = {name: found[neuron] for name, neuron in named_neurons(module) if neuron in found}
    made: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for group in _in_groups({name: 8 * product.in_channels ** 2 for name, product in products.items()}):
        def stand_in(name: str, neuron: Neuron, group: list[str] = group) -> nn.Module:
            return Correlation(neuron) if name in group and isinstance(neuron, ScaleAndFire) else _Observer(name, None)

        view, seen = _view(module, stand_in)
        with torch.inference_mode():
            for batch in batches:
                _forward(module, view, copy.deepcopy(batch), forward_fn)
        made.update({name: compensated(products[name], seen[name]) for name in group})
    for name, values in made.items():  # not before all of the source was seen
        product = products[name]
        for parameter, value in zip((product.weight, product.bias), values, strict=True):
            if parameter is not None and value is not None and not torch.equal(parameter, value):
                product.operands[0].mark_compensated()
                parameter.copy_(value)


def _view(module: nn.Module, stand_in: Callable[[str, Neuron], nn.Module]) -> tuple[nn.Module, Json]:
    """The source of a spiking module as a view with `stand_in(name, neuron)` in the place of each neuron, and what
    stands there by name."""
    view = shared_copy(module).eval()
    stand_ins = {name: stand_in(name, neuron).eval() for name, neuron in named_neurons(view)}
    for name, child in stand_ins.items():
        view.set_submodule(name, child)
    return view, stand_ins


def _forward(module: nn.Module, view: nn.Module, batch: object, forward_fn: ForwardFn | None) -> object:
    # a layer without parameters, such as a pool, has only what its neurons have
    tensors = itertools.chain(module.parameters(), module.buffers())
    parameter = next((t for t in tensors if t.is_floating_point()), torch.empty(0))

    def moved(x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return [moved(item) for item in x] if isinstance(x, list) else x
        return x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)

    batch = moved(batch)
    try:
        return view(batch) if forward_fn is None else forward_fn(view, batch)
    except AssertionError as e:  # timm's way to refuse an image size
        shape = tuple(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise SFormerError(f'calibration images {shape} do not fit the model: {e}') from e


class _Observer(nn.Module):
    """Stands where a neuron is, and lets currents pass."""

    def __init__(self, name: str, statistics: Observer | None):
        super().__init__()
        self.name, self.statistics = name, statistics

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            if self.statistics is None:
                check_finite(x)
            else:
                self.statistics.update(x)
        except SFormerError as e:
            raise SFormerError(f'{e} at {self.name}: the weights or the images of the source are broken.') from None
        return x


class _Comparison(nn.Module):
    """Lets currents pass, and sums up what the neuron would have made of them."""

    def __init__(self, neuron: Neuron):
        super().__init__()
        self.neuron = neuron
        self.moments: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moments = self.neuron.moments(x)
        if moments is not None:
            self.moments = moments if self.moments is None else self.moments + moments
        return x


def _rebatched(batches: Iterable[object]) -> Iterator[object]:
    """Tensors in batches of `OBSERVED_IMAGES` images of one size, whatever they come in."""
    held: torch.Tensor | None = None
    for batch in batches:
        if not isinstance(batch, torch.Tensor):
            yield batch
            continue
        if held is not None and (held.shape[1:] != batch.shape[1:] or held.dtype != batch.dtype):
            yield held
            held = None
        held = batch if held is None else torch.cat([held, batch])
        while len(held) >= OBSERVED_IMAGES:
            yield held[:OBSERVED_IMAGES]
            held = held[OBSERVED_IMAGES:]
        if not len(held):
            held = None
    if held is not None:
        yield held
