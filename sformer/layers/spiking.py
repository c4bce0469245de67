"""The verb that makes any torch module spike, and its inverse."""
import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn as nn
from timm.utils import ModelEmaV2, ModelEmaV3
from torch._dynamo import OptimizedModule
from torch.optim.swa_utils import AveragedModel

from ..errors import UnsupportedLayerError
from ..neurons import FitConfig, Neuron, SFNConfig
from ..neurons.base import Observed
from .embedding import PixelEmbedMixin
from .multiplying import Multiplying
from .products import AttentionProduct, MixedProduct, ScoreProduct, ValueProduct
from .table import CONSTANT_LAYERS, FLOATING_LAYERS, SPIKING_LAYERS, SpikingLayer, become_, constant_children

__all__ = [
    'check_weights_are_parameters', 'is_calibrated', 'named_neurons', 'ordinary_', 'ordinary_tensors', 'placed',
    'revert_', 'shared_copy', 'source_view', 'spiking_', 'uncalibrated', 'unwrapped', 'without_neurons',
]

# whose forward is that of the network in them
WRAPPERS = (
    nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, OptimizedModule, ModelEmaV2, ModelEmaV3)


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Leave inference mode, if that is on: what is made in it can never be trained."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary_(module: nn.Module) -> nn.Module:
    """Put ordinary tensors in the place of those that were made in inference mode, in place."""
    parameters: dict[int, nn.Parameter] = {}  # what is tied stays tied
    buffers: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_inference():
                clone = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                child._parameters[name] = parameters.setdefault(id(parameter), clone)
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_inference():
                child._buffers[name] = buffers.setdefault(id(buffer), buffer.detach().clone())
    return module


def check_weights_are_parameters(module: nn.Module) -> None:
    """Raise UnsupportedLayerError if weights are computed before each forward: pruned, or normalised by a hook."""
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if isinstance(value, torch.Tensor) and any(other.startswith(f'{key}_') for other in child._parameters):
                where = f'{name}.{key}'.lstrip('.')
                raise UnsupportedLayerError(
                    f'{where} is computed anew before each forward, as of a pruned layer. Make it a parameter first '
                    f'(torch.nn.utils.prune.remove, or remove_weight_norm ...).')


@ordinary_tensors()
def spiking_(
        module: nn.Module,
        config: SFNConfig = SFNConfig(),
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Replace every layer by its spiking counterpart, in place.

    Parameters, their names and their values stay; each spiking layer gains the buffers of its neurons, with default
    thresholds until they are calibrated. Layers that spike already are left alone, so a head that was reset can be
    converted by a second call.

    Args:
        module: A torch module.
        config: Neurons.
        filter_fn: Called with a layer and its name; where it returns False, the layer and all below stay as they are.

    Returns:
        The same module.

    Raises:
        UnsupportedLayerError: If a layer has no spiking counterpart, its forward was replaced or its weights are
            computed; names the layers, and the module is unchanged.
    """
    check_weights_are_parameters(module)
    named = list(_filtered(module, filter_fn))
    _check_counterparts(named)
    # layers without weights build their neurons where the others are
    device = next((p.device for p in module.parameters()), None)
    with contextlib.nullcontext() if device is None else torch.device(device):
        for _, child in reversed(named):  # children first, a parent may replace their neurons
            spiking = SPIKING_LAYERS.get(type(child))
            if spiking is not None:
                child.__dict__.pop('forward', None)
                become_(child, spiking)
            if spiking is not None or isinstance(child, PixelEmbedMixin):  # whose projection timm may put in anew
                assert isinstance(child, SpikingLayer)
                child.add_neurons(config)
                for layer in (child, *child.children()):  # a parent may have given its children others
                    for name in getattr(layer, 'spiking_parts', ()):
                        part = getattr(layer, name)
                        if isinstance(part, nn.Module):
                            part.train(layer.training)
    return module


def _filtered(
        module: nn.Module,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        name: str = '',
) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their names, parents first, without neurons, and what is or is below a constant or filtered one."""
    if (isinstance(module, (Neuron, ScoreProduct, ValueProduct, MixedProduct)) or type(module) in CONSTANT_LAYERS
            or (filter_fn is not None and not filter_fn(module, name))):
        return
    yield name, module
    constant = constant_children(module)
    for child_name, child in module.named_children():
        if child in constant:
            continue
        yield from _filtered(child, filter_fn, f'{name}.{child_name}' if name else child_name)


def _check_counterparts(named: list[tuple[str, nn.Module]]) -> None:
    """Raise UnsupportedLayerError if a layer would stay analog."""
    unknown = []
    for name, child in named:
        kind = type(child)
        if kind in SPIKING_LAYERS:
            # hooks that were removed leave the layer's own forward behind
            forward = child.__dict__.get('forward')
            if forward is not None and getattr(forward, '__func__', None) is not kind.forward:
                raise UnsupportedLayerError(
                    f'the forward of {name or "(root)"} was replaced, by hooks of accelerate perhaps, so that it would '
                    f'not spike. Remove them first (accelerate.hooks.remove_hook_from_submodules).')
        elif _is_unknown(child):
            unknown.append(f'{name or "(root)"} ({kind.__module__}.{kind.__qualname__})')
    if unknown:
        more = f' and {len(unknown) - 4} more' if len(unknown) > 4 else ''
        raise UnsupportedLayerError(
            f'no spiking counterpart for {", ".join(unknown[:4])}{more}. '
            f'Register one with sformer.layers.register_spiking or, if it multiplies nothing, register_floating.')


def _is_unknown(module: nn.Module) -> bool:
    """Whether a layer that is no source has no place in the table either.

    Whatever only calls its children may pass; calibration watches for products in its own forward.
    """
    kind = type(module)
    return kind not in FLOATING_LAYERS and kind not in SPIKING_LAYERS.values() and (
        isinstance(module, tuple(SPIKING_LAYERS)) or next(module.children(), None) is None or has_tensors(module))


def multiplies_currents(module: nn.Module) -> bool:
    """Whether a product in the forward of a module is of no spikes, nor of what a filter left as it was: layers that
    `spiking_` would have converted or refused, of which none spikes."""
    known = {*SPIKING_LAYERS.values(), *FLOATING_LAYERS, AttentionProduct, ScoreProduct, ValueProduct, MixedProduct}
    if type(module) in known and getattr(module, 'vetted', True):
        return False
    layers = list(module.modules())
    return (any(isinstance(layer, SpikingLayer) for layer in layers)
            or not any(type(layer) in SPIKING_LAYERS or _is_unknown(layer) for layer in layers))


def has_tensors(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers of its own."""
    return any(True for _ in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False)))


def revert_(module: nn.Module) -> nn.Module:
    """Turn a spiking module, or one that was left half converted, back into its source, in place."""
    back = {spiking: source for source, spiking in SPIKING_LAYERS.items()}
    for child in list(module.modules()):
        if isinstance(child, SpikingLayer):
            child.remove_neurons()
            become_(child, back[type(child)])
    module.__dict__.pop('conversion', None)  # a record of neurons that are gone
    return module


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside of what compiles it, averages its weights or runs it on several devices; or the module itself.
    """
    while isinstance(module, WRAPPERS):
        inner = module._modules.get('_orig_mod', module._modules.get('module'))
        assert inner is not None
        module = inner
    return module


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of a module's structure that shares its parameters and buffers."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """A module whose tensors all lie on a device: itself, or a copy, so that it stays where it is."""
    def there(tensor: torch.Tensor) -> bool:
        return tensor.device.type == device.type and device.index in (None, tensor.device.index)

    tensors = itertools.chain(module.parameters(), module.buffers())
    return module if all(map(there, tensors)) else copy.deepcopy(module).to(device)


@ordinary_tensors()
def without_neurons(model: nn.Module) -> nn.Module:
    """What the weights of a spiking model are without neurons, as a copy: its source, where they have not moved."""
    return revert_(copy.deepcopy(model))


def source_view(model: nn.Module) -> nn.Module:
    """The source network of an SFormer as a view of its own, with the same parameters and no neurons.

    The model itself goes on spiking, in this thread and in others. What moves or replaces its parameters later does not
    reach the view. Where weights have moved since it was converted it is what they are without neurons.
    """
    return revert_(shared_copy(model))


def named_neurons(module: nn.Module) -> Iterator[tuple[str, Neuron]]:
    """Neurons of a spiking module with their paths, in the order of the modules."""
    for name, child in module.named_modules():
        if isinstance(child, Neuron):
            yield name, child


def fit_neurons(module: nn.Module, statistics: Mapping[str, Observed], config: FitConfig) -> None:
    """Fit the neurons of a spiking module to what was observed at each, by name; those of a layer together."""
    for name, child in module.named_modules():
        prefix = f'{name}.' if name else ''
        neurons = {part: neuron for part, neuron in child.named_children()
                   if isinstance(neuron, Neuron) and prefix + part in statistics}
        if isinstance(child, Multiplying):
            child.fit_neurons({part: statistics[prefix + part] for part in neurons}, config)
        else:
            for part, neuron in neurons.items():
                neuron.fit(statistics[prefix + part], config)


def is_calibrated(module: nn.Module) -> bool:
    """Whether every neuron of a spiking module has fitted thresholds, and there is at least one."""
    neurons = [neuron for _, neuron in named_neurons(module)]
    for neuron in neurons:
        neuron.undo_average_()
    return bool(neurons) and all(not neuron.calibrated.is_meta and bool(neuron.calibrated) for neuron in neurons)


def uncalibrated(module: nn.Module) -> str:
    """Sentence that says which neurons of a module are uncalibrated."""
    names = [name for name, neuron in named_neurons(module) if not neuron.calibrated]
    if not names:
        return 'the model has no spiking neurons'
    return (f'the model is uncalibrated ({len(names)} neurons have default thresholds, or averages of several, the '
            f'first is {names[0]})')
