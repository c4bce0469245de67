"""What does not spike and is no product: functions on currents, counted where torch computes them, by element."""
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

__all__ = ['Floating', 'FUNCTIONS', 'FloatingCount']


@dataclass
class Floating:
    """A function that acts on currents, in floating point.

    Args:
        name: Path of the module in whose own forward it is.
        function: Name that torch gives it, such as `native_layer_norm`, `gelu`, `exp`, `add`.
        elements: Elements per image that it is applied to.
    """
    name: str
    function: str
    elements: float


# function -> multiply-adds, divisions (or roots), exponentials (or tanh, erf) per element, by the usual formulas
FUNCTIONS: dict[str, tuple[int, int, int]] = {
    **dict.fromkeys(('add', 'sub', 'rsub', 'mul', 'neg', 'abs', 'relu', 'clamp', 'clamp_min', 'clamp_max', 'maximum',
                     'minimum', 'addcmul', 'lerp'), (1, 0, 0)),
    **dict.fromkeys(('sum', 'mean', 'amax', 'amin', 'max', 'min'), (1, 0, 0)),  # of what they read
    'square': (1, 0, 0), 'pow': (1, 0, 0), 'var': (2, 0, 0), 'var_mean': (2, 0, 0), 'linalg_vector_norm': (1, 0, 0),
    'div': (0, 1, 0), 'reciprocal': (0, 1, 0), 'sqrt': (0, 1, 0), 'rsqrt': (0, 1, 0),
    'exp': (0, 0, 1), 'tanh': (0, 0, 1), 'erf': (0, 0, 1), 'sigmoid': (1, 1, 1),
    'gelu': (3, 0, 1),  # x (1 + erf(x / sqrt 2)) / 2
    'silu': (2, 1, 1),
    '_softmax': (2, 1, 1),
    'native_layer_norm': (5, 0, 0),  # sum, difference, sum of squares, scale, affine; a root per token
    '_fused_rms_norm': (3, 0, 0),
    'native_group_norm': (5, 0, 0), 'native_batch_norm': (2, 0, 0), '_native_batch_norm_legit_no_training': (1, 0, 0),
}
OF_INPUT = {'sum', 'mean', 'amax', 'amin', 'max', 'min', 'var', 'var_mean', 'linalg_vector_norm'}


class FloatingCount:
    """Elements of floating-point tensors that functions were applied to, by module and function."""

    def __init__(self) -> None:
        self.elements: dict[tuple[str, str], int] = {}

    def add(self, name: str, func: OpOverload, args: tuple[object, ...], out: object) -> None:
        """Count a call of `func`, an overload of aten, in the forward of the module `name`."""
        function = func._overloadpacket.__name__.rstrip('_')
        if function not in FUNCTIONS:
            return  # moves, shapes, comparisons; products are counted as such
        tensor = args[0] if function in OF_INPUT else out[0] if isinstance(out, tuple) else out
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            key = name, function
            self.elements[key] = self.elements.get(key, 0) + tensor.numel()

    def add_sum(self, name: str, args: tuple[object, ...]) -> None:
        """Count a sum over what is read, as of a pool that is written as a product with the places of its cells."""
        read = max(x.numel() for x in args if isinstance(x, torch.Tensor))
        self.elements[name, 'sum'] = self.elements.get((name, 'sum'), 0) + read

    def per_image(self, images: int) -> list[Floating]:
        return [Floating(name, function, count / images) for (name, function), count in self.elements.items()]
