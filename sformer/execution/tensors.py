"""An SFormer as plain tensors: int8 weights, steps, levels and thresholds, for whoever builds what computes them.

`docs/format.md` says what is in the file, `scripts/read_export.py` computes logits by it in numpy.
"""
import functools
import json
from pathlib import Path
from typing import Unpack

import torch
import torch.nn as nn
from safetensors.torch import save

from ..conversion import Images
from ..errors import SFormerError
from ..files import Json, write_file
from ..layers import Product, named_neurons, named_products, source_view, unwrapped
from ..neurons import GradedCoding, Neuron, ScaleAndFire, SharedScaleAndFire, firing_boundaries
from .integer import IntegerReport, folded_bias
from .prepared import METADATA, Rounding, check_output, integer_copy, plain_values

__all__ = ['FORMAT_VERSION', 'export_safetensors']

FORMAT_VERSION = 1
Tensors = dict[str, torch.Tensor]


def export_safetensors(
        model: nn.Module,
        path: str | Path,
        calibration: Images | None = None,
        *,
        overwrite: bool = False,
        **options: Unpack[Rounding],
) -> list[IntegerReport]:
    """Write a calibrated SFormer as safetensors: what its neurons fire by, and what their spikes are multiplied with.

    Args:
        model: As of `export_onnx`.
        path: File to write, aside and then renamed.
        calibration: As of `export_onnx`, and so are all further arguments.
        overwrite: Replace a file that is there.

    Returns:
        What became of each layer.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If the file is there, or a neuron is of a type that fires in a way of its own.
    """
    path = check_output(path, '.safetensors', overwrite)
    for name, neuron in named_neurons(model):
        _neuron_parts(name, neuron)  # before the work
    network, reports, about = integer_copy(model, calibration, **options)
    tensors, described = _tensors_of(network)
    modules = {name: dict(plain_values(_attributes(module)), type=type(module).__name__)
               for name, module in source_view(unwrapped(model)).named_modules()}
    about = dict(about, format_version=FORMAT_VERSION, **described, modules=modules)
    write_file(path, save(tensors, {METADATA: json.dumps(about, sort_keys=True)}))
    return reports


def _attributes(module: nn.Module) -> Json:
    """What a module is set to, apart from parameters and children."""
    return {name: value for name, value in vars(module).items() if not name.startswith('_') and name != 'training'}


def _tensors_of(network: nn.Module) -> tuple[Tensors, Json]:
    """Tensors of a network with int8 weights, and what they are: its neurons by name, and its products in order."""
    tensors: Tensors = {}
    neurons: dict[str, Json] = {}
    names: dict[Neuron, str] = {}
    for name, neuron in named_neurons(network):
        neurons[name], parts = _neuron_parts(name, neuron)
        names[neuron] = name
        tensors |= {f'{name}.{part}': tensor for part, tensor in parts.items()}
    products: list[Json] = []
    weighted = set()
    for name, layer, found in named_products(network):
        step, columns = layer._buffers.get('weight_step'), layer._buffers.get('columns')
        for product in found:
            about = dict(module=name, kind=product.kind, operands=[names[neuron] for neuron in product.operands])
            products.append(about | _geometry(product))
            if product.weight is not None:
                weighted.add(name)
                tensors |= {f'{name}.{part}': tensor
                            for part, tensor in _weight_parts(product, step, columns).items()}
    for name, tensor in network.state_dict().items():
        module = name.rpartition('.')[0]
        if module not in weighted and module not in neurons:  # norms, embeddings, LayerScale: they act on currents
            tensors[name] = tensor
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, dict(
        neurons=neurons, products=products)


def _neuron_parts(name: str, neuron: Neuron) -> tuple[Json, Tensors]:
    """What a neuron is, and the tensors that it fires by.

    Raises:
        SFormerError: If it fires in another way than the format knows; names it.
    """
    if isinstance(neuron, GradedCoding):
        return dict(kind='pixels'), dict(step=neuron.step, center=neuron.center)
    if not isinstance(neuron, ScaleAndFire) or type(neuron) not in (ScaleAndFire, SharedScaleAndFire):
        raise SFormerError(f'{name} is a {type(neuron).__name__}, which has no form in the file: a ScaleAndFire has.')
    config = neuron.config
    parts = dict(
        step=neuron.step, threshold=neuron.threshold, multiplier=neuron.multiplier.to(torch.uint8),
        levels=neuron.levels.to(torch.int16),
        boundaries=firing_boundaries(neuron.levels, config.initial_potential, config.dead_zone))
    if neuron.center is not None:
        parts['center'] = neuron.center
    if neuron.quiet is not None:
        parts['quiet'] = neuron.quiet
    if isinstance(neuron, SharedScaleAndFire):
        parts['counts'] = neuron.counts.to(torch.uint8)
    share = neuron.token_reach / int(neuron.levels[-1]) if neuron.token else None
    return dict(kind='scale-and-fire', signed=neuron.signed, fire_function=neuron.fire_function,
                token_share=share), parts


def _geometry(product: Product) -> Json:
    """How a product is computed, of a convolution: stride, padding and the like."""
    if not isinstance(product.compute, functools.partial):
        return {}
    return dict(plain_values(product.compute.keywords), transposed=product.transposed)


def _weight_parts(product: Product, step: torch.Tensor | None, columns: torch.Tensor | None) -> Tensors:
    """Weights that meet levels, with the step of these folded in, and the bias, with their centre folded in."""
    if step is None:  # in floating point, as int8 would lose too much
        beside = product.beside(product.operands[0].step)
        parts = dict(weight=product.by_output(product.by_output(product.weights) * beside))
        bias = folded_bias(product)
    else:
        parts = dict(weight=product.weights, weight_step=step.flatten())
        bias = product.bias
    if columns is not None:
        parts['columns'] = columns
    return parts if bias is None else dict(parts, bias=bias)
