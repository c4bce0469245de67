"""What an evaluation runs: models and their sources, prepared for it, and each network only once.

Networks are views of the models that the caller has: they share parameters and buffers, but mode, hooks and layers are
their own, so a model may be in use by another thread, or be evaluated twice at once.
"""
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..errors import SFormerError, UncalibratedError, first_line, working_compiler
from ..files import Json, state_hash
from ..layers import is_calibrated, named_neurons, placed, shared_copy, source_view, uncalibrated, unwrapped
from .labels import Benchmark
from .settings import EvaluationConfig

__all__ = [
    'Network', 'Subject', 'build_networks', 'check_model', 'data_config_of', 'device_of', 'identity', 'network_of',
    'prepare_model', 'usable_device',
]


# what timm and torch note on a model and no forward reads
_NOTES = {'pretrained_cfg', 'default_cfg', 'pretrained_model_args', '_is_torch_compile'}


@dataclass
class Network:
    """Something that maps images to logits. Several subjects may share one.

    Args:
        model: The network, a view.
        transform: Index of its preprocessing.
        compiled: The same, compiled; None if it was not asked for.
    """
    model: nn.Module
    transform: int
    compiled: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, eager: bool = False) -> torch.Tensor:
        """Logits (B, C) of images (B, C, H, W); `eager` runs hooks, which compiled networks do not.

        Raises:
            SFormerError: If the network cannot be compiled here.
        """
        if eager or self.compiled is None:
            return self.model(x)
        with working_compiler('leave out --torchcompile (torchcompile=True)'):
            return self.compiled(x)


@dataclass
class Subject:
    """A model whose result is wanted.

    Args:
        model: The model, a view.
        network: Index of its network.
        source: Index of its source's network, None without one.
        benchmark: How it is scored.
        spiking: Whether it has neurons.
        index: Its place among the models.
        data_config: Its preprocessing, as timm resolves it.
    """
    model: nn.Module
    network: int
    source: int | None
    benchmark: Benchmark
    spiking: bool
    index: int
    data_config: Json


def check_model(model: nn.Module) -> None:
    """Raise SFormerError where evaluation would mean nothing: default thresholds, no classes; or could not be done."""
    if _is_spiking(model) and not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; its accuracy would mean nothing. Use sformer.convert().')
    if not getattr(model, 'num_classes', 1):
        raise SFormerError('the model has no classes to predict (num_classes=0).')


def network_of(model: nn.Module) -> nn.Module:
    """The network to evaluate, without what runs it on several devices or averages its weights.

    Raises:
        SFormerError: If it is compiled, or in a wrapper that does not say which preprocessing the network wants.
    """
    if hasattr(model, '_orig_mod'):
        raise SFormerError('the model is compiled: hand over the one that it was made of, with torchcompile=True.')
    model = unwrapped(model)
    inside = [(name, part) for name, part in model.named_modules() if getattr(part, 'pretrained_cfg', None)]
    if inside and not getattr(model, 'pretrained_cfg', None):
        name, part = inside[0]
        raise SFormerError(f'a {type(model).__name__} wraps the {type(part).__name__} at {name} and does not say which '
                           f'preprocessing that wants: hand over what it wraps, or give it a pretrained_cfg.')
    return model


def identity(model: nn.Module) -> Json:
    """What tells a network from others, as plain data: its weights, its architecture and the arguments of that."""
    arguments = getattr(model, '_model_args', None)
    return dict(
        weights_sha256=state_hash(model.state_dict()), architecture=_architecture(model),
        arguments=arguments if _is_plain(arguments) else None)


@torch.inference_mode(False)  # parameters that are made in inference mode could not be trained afterwards
def prepare_model(model: nn.Module, config: EvaluationConfig, device: torch.device | None) -> nn.Module:
    """A view of a model in eval mode, on a device; a copy where the model would have to change or to move.

    Raises:
        SFormerError: If the model cannot take images of `config.img_size`.
    """
    copied = config.img_size is not None or config.channels_last
    if copied:
        model = copy.deepcopy(model)
    if config.img_size is not None:
        try:
            resizable: Any = model
            resizable.set_input_size(img_size=(config.img_size, config.img_size))
        except (AttributeError, AssertionError, ValueError, RuntimeError) as e:
            raise SFormerError(f'the model cannot take images of {config.img_size} pixels: {e}') from e
    if device is not None:
        model = placed(model, device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return (model if copied else shared_copy(model)).eval()


def data_config_of(model: nn.Module, config: EvaluationConfig) -> Json:
    """Preprocessing of a model as timm resolves it, with the overrides of the config.

    Raises:
        SFormerError: If it does not fit the model.
    """
    try:
        return resolve_input_data_config(
            model, args=dict(img_size=config.img_size, crop_pct=config.crop_pct, interpolation=config.interpolation))
    except (ValueError, AssertionError) as e:
        raise SFormerError(f'the preprocessing does not fit the model: {e}') from e


def build_networks(
        models: Sequence[nn.Module],
        sources: Sequence[bool | nn.Module],
        configs: Sequence[Json],
        benchmarks: Sequence[Benchmark],
        torchcompile: bool,
) -> tuple[list[Subject], list[Network]]:
    """Networks of all models and their sources; models with the same source share it.

    Args:
        models: Prepared models.
        sources: Per model a prepared source, True for the one inside of an SFormer, False for none.
        configs: Preprocessing per model.
        benchmarks: How each model is scored.
        torchcompile: Whether to compile networks.
    """
    networks: list[Network] = []
    subjects: list[Subject] = []
    known: dict[object, int] = {}
    distinct = distinct_configs(configs)

    def add(model: nn.Module, transform: int) -> int:
        networks.append(Network(model, transform, torch.compile(model) if torchcompile else None))
        return len(networks) - 1

    for model, source, config, benchmark in zip(models, sources, configs, benchmarks, strict=True):
        transform = distinct.index(config)
        index, reference = add(model, transform), None
        if isinstance(source, nn.Module) or source and _is_spiking(model):
            source = source if isinstance(source, nn.Module) else source_view(model)
            key = _source_key(source) if len(models) > 1 else None
            reference = None if key is None else known.get((key, transform))
            if reference is None:
                reference = add(source, transform)
                known[key, transform] = reference
        subjects.append(Subject(model, index, reference, benchmark, _is_spiking(model), len(subjects), config))
    return subjects, networks


def distinct_configs(configs: Sequence[Json]) -> list[Json]:
    """Each preprocessing once, in the order of its first model."""
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device('cpu'))


def usable_device(
        asked: str | torch.device | None = None,
        picked: torch.device | None = None,
) -> torch.device:
    """The device that was asked for; an accelerator if there is one, or the CPU, if none was.

    Args:
        asked: What the user wants.
        picked: The device of this process among several, which is meant where no index says otherwise.

    Raises:
        SFormerError: If it cannot be used.
    """
    try:
        device = torch.device(asked or picked or torch.accelerator.current_accelerator(check_available=True) or 'cpu')
        if picked is not None and (device.type, device.index) == (picked.type, None):
            device = picked
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        raise SFormerError(f'device {str(asked)!r} cannot be used: {first_line(e)}') from e


def _source_key(source: nn.Module) -> tuple[str, tuple] | None:
    """What two sources have to share to be one: tensors, architecture, arguments, and in each layer its type and plain
    attributes, such as `num_heads`. None if something else may tell them apart: then nothing is shared."""
    architecture, arguments = _architecture(source), getattr(source, '_model_args', None)
    if architecture is None or not _is_plain(arguments):
        return None
    layers, types = {}, []
    for name, module in source.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module):
            return None
        layers[name] = {key: value for key, value in vars(module).items() if key not in _NOTES and _is_plain(value)}
        types.append(type(module))
    tensors = dict([*source.named_parameters(), *source.named_buffers()])  # those that are not saved, too
    return json.dumps([state_hash(tensors), architecture, arguments, layers], sort_keys=True), tuple(types)


def _is_plain(value: object) -> bool:
    """Whether JSON can hold a value."""
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return False
    return True


def _architecture(model: nn.Module) -> str | None:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')


def _is_spiking(model: nn.Module) -> bool:
    return any(True for _ in named_neurons(model))
