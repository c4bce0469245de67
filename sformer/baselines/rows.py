"""The rows of a comparison: networks that are made of one source without training."""
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from ..conversion import convert
from ..execution import export_onnx, load_onnx
from ..neurons import SFNConfig
from .quantised import quantised, quantised_twin, twin_bits
from .stepped import MultiStep, integrate_and_fire_network, multi_threshold_network
from .toolkits import nncf_int8, torchao_int8

__all__ = ['Built', 'Build', 'comparison_rows']

Batches = list[torch.Tensor]


@dataclasses.dataclass
class Built:
    """A row.

    Args:
        run: Images to outputs.
        coding: By which the account charges it; `quantised` where it fires nothing, empty where that is not known.
        model: Network of one timestep, whose operations are counted.
        steps: Network of several timesteps that was made of it.
        engine: What runs it.
        equal_to: Layer-synchronous network that is to fire the same.
    """
    run: Callable[[torch.Tensor], torch.Tensor]
    coding: str = ''
    model: nn.Module | None = None
    steps: MultiStep | None = None
    engine: str = 'torch'
    equal_to: MultiStep | None = None


Build = Callable[[nn.Module, Batches], Built]  # of a source and images to calibrate with


def _step_by_step(source: nn.Module, batches: Batches, steps: int, signed: bool) -> Built:
    network, model = integrate_and_fire_network(source, batches, steps, signed=signed)
    return Built(network, 'unary', model, network)


def _synchronous(source: nn.Module, batches: Batches, steps: int) -> Built:
    network, model = integrate_and_fire_network(source, batches, steps, synchronous=True)
    return Built(model, 'unary', model, equal_to=network)


def _multi_threshold(source: nn.Module, batches: Batches, steps: int) -> Built:
    network, model = multi_threshold_network(source, batches, steps)
    return Built(network, 'binary', model, network)


def _scale_and_fire(source: nn.Module, batches: Batches, levels: int) -> Built:
    model = convert(source, batches, SFNConfig(levels=levels))
    return Built(model, 'graded', model)


def _scale_and_fire_int8(source: nn.Module, batches: Batches, levels: int) -> Built:
    model = convert(source, batches, SFNConfig(levels=levels))
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder, 'model.onnx'), batches)
        return Built(load_onnx(Path(folder, 'model.onnx'), 'openvino'), engine='openvino')


def _twin(source: nn.Module, batches: Batches, levels: int) -> Built:
    model = quantised_twin(source, batches, levels)
    return Built(model, 'quantised', model)


def _plain_quantised(source: nn.Module, batches: Batches, activation: int, weight: int | None) -> Built:
    model = quantised(source, batches, activation, weight)
    return Built(model, 'quantised' if weight == 8 else '', model)


def _nncf(source: nn.Module, batches: Batches) -> Built:
    return Built(nncf_int8(source, batches), engine='openvino')


def _torchao(source: nn.Module, batches: Batches) -> Built:
    return Built(torchao_int8(source))


def _itself(source: nn.Module, batches: Batches) -> Built:
    return Built(source)


def comparison_rows(levels: Sequence[int], timesteps: Sequence[int]) -> dict[str, Build]:
    """How each row is built, by its name.

    Args:
        levels: Numbers of levels N of SFormers, and of their quantised twins.
        timesteps: Numbers of timesteps T of networks that have several.
    """
    rows: dict[str, Build] = {'source': _itself}
    for n in levels:
        rows[f'SFN, N = {n}'] = functools.partial(_scale_and_fire, levels=n)
    for n in levels:
        rows[f'twin of N = {n}: A{twin_bits(n)}, a step per channel'] = functools.partial(_twin, levels=n)
    for weight, activation in ((8, 8), (None, 6), (6, 6), (4, 4)):
        rows[f'W{weight or 32}A{activation}'] = functools.partial(
            _plain_quantised, activation=activation, weight=weight)
    rows['W8A8, NNCF'] = _nncf
    for n in levels:
        rows[f'SFN, N = {n}, int8 weights'] = functools.partial(_scale_and_fire_int8, levels=n)
    rows['W8A8, torchao (linear layers)'] = _torchao
    for t in timesteps:
        rows[f'multi-threshold (ECMT), T = {t}'] = functools.partial(_multi_threshold, steps=t)
    for t in timesteps:
        rows[f'IF layer-synchronous = MTN, T = {t}'] = functools.partial(_synchronous, steps=t)
    for t in timesteps:
        rows[f'IF step by step, T = {t}'] = functools.partial(_step_by_step, steps=t, signed=False)
    for t in timesteps:
        rows[f'signed IF step by step, T = {t}'] = functools.partial(_step_by_step, steps=t, signed=True)
    return rows
