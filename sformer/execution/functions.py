"""Parts of a network that are alike, written to a graph once and called for each.

Neurons that feed back to one another are two hundred nodes a site, and torch's exporter takes twenty milliseconds for
each of them: seven minutes for a ViT-S, whose sites are of a handful of kinds. So a kind becomes a function of ONNX;
its inputs are what differs between sites, such as thresholds and feedback. Calls are inlined when the graph is there.
"""
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from .fired import LateralLevels

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto

__all__ = ['called_parts', 'inlined']

DOMAIN = 'sformer'
BATCH, TOKENS = 2, 3  # of what a part is exported with: any numbers that are no others
READ_BY_OTHERS = ('range', 'flip', 'zeros')  # of a part, not by its own computation

Kinds = dict[str, LateralLevels]  # by name of the function, one of the parts that call it
Export = Callable[[nn.Module, tuple[object, ...], tuple[object, ...]], 'ModelProto']


@contextlib.contextmanager
def called_parts(network: nn.Module) -> Iterator[Kinds]:
    """Let neurons that feed back be calls of functions while a network is exported; which functions these are."""
    kinds: Kinds = {}
    names: dict[str, str] = {}
    parts = [part for part in network.modules() if isinstance(part, LateralLevels)]
    try:
        for part in parts:
            name = names.setdefault(_structure(part), f'lateral{len(names)}')
            kinds.setdefault(name, part)
            vars(part)['forward'] = _FunctionCall(name, part)
        yield kinds
    finally:
        for part in parts:
            vars(part).pop('forward', None)


def _structure(part: nn.Module) -> str:
    """All that is no tensor in a part, and the shapes of its tensors: parts of the same structure compute the same way.
    """
    said = [f'{name}: {type(module).__name__} {key} = {value!r}' for name, module in part.named_modules()
            for key, value in sorted(vars(module).items()) if not key.startswith('_') and key not in READ_BY_OTHERS]
    return '\n'.join(said + [f'{name}: {value.dtype} {[*value.shape]}' for name, value in _tensors(part).items()])


def _tensors(part: nn.Module) -> dict[str, torch.Tensor]:
    """What a part computes with, by name."""
    return {name: value for name, value in part.named_buffers() if name not in READ_BY_OTHERS}


def _rank(part: LateralLevels) -> int:
    """Dimensions of currents that a function takes: (B, tokens, C), or (B, H, tokens, C) of heads."""
    return 3 if part.inverse.ndim == 1 else part.inverse.ndim + 1


class _FunctionCall:
    """What a part gives, by a call of its function."""

    def __init__(self, name: str, part: LateralLevels):
        self.name, self.part = name, part

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape, rank = x.shape, _rank(self.part)
        x = x.flatten(0, x.ndim - rank) if x.ndim > rank else x.view(*[1] * (rank - x.ndim), *shape)
        shapes = [x.shape, (*x.shape[:-1], 1)][:1 + self.part.token]
        values = [x, *_tensors(self.part).values()]
        k, *row = torch.onnx.ops.symbolic_multi_out(
            f'{DOMAIN}::{self.name}', values, dtypes=[torch.float32] * len(shapes), shapes=shapes, version=1)
        return k.view(shape), row[0].view(*shape[:-1], 1) if row else None


class _Part(nn.Module):
    """A part whose tensors are its inputs."""

    def __init__(self, part: LateralLevels):
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor, values: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        buffers = dict(zip(_tensors(self.part), values, strict=True))
        k, row = torch.func.functional_call(self.part, buffers, (x,))
        return (k,) if row is None else (k, row)


def inlined(model: 'ModelProto', kinds: Kinds, export: Export) -> 'ModelProto':
    """A graph in which functions of `called_parts` have taken the place of their calls.

    Args:
        model: The graph.
        kinds: As of `called_parts`, which is over.
        export: Writes a module as a graph: the module, what it is called with, and names of dimensions of any size.
    """
    if not kinds:
        return model
    from onnx import inliner
    model.functions.extend(_function(name, part, export) for name, part in kinds.items())
    return inliner.inline_local_functions(model)


def _function(name: str, part: LateralLevels, export: Export) -> 'FunctionProto':
    """A part as a function."""
    from onnx import helper
    x = torch.zeros(BATCH, *part.inverse.shape[:-2], TOKENS, part.inverse.shape[-1])
    values = [*_tensors(part).values()]
    sizes: dict[int, object] = {0: torch.export.Dim('batch'), x.ndim - 2: torch.export.Dim('tokens')}
    graph = export(_Part(part), (x, values), (sizes, [None] * len(values)))
    constants = [helper.make_node('Constant', [], [value.name], value=value) for value in graph.graph.initializer]
    return helper.make_function(
        DOMAIN, name, [value.name for value in graph.graph.input], [value.name for value in graph.graph.output],
        [*constants, *graph.graph.node], graph.opset_import)
