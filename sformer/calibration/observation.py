"""Observation of the source network, and the verb that fits a spiking module to it.

The source is a view of the spiking module: the same parameters, with an observer in the place of each neuron. So the
module itself spikes on meanwhile, and has no state that says otherwise. Images are observed in batches of a fixed size,
whatever the size they come in, so that thresholds do not depend on it.
"""
import itertools
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn

from ..errors import SFormerError, UnsupportedLayerError
from ..layers import FLOATING_LAYERS, SPIKING_LAYERS, AttentionProduct, shared_copy
from ..layers.spiking import left_alone
from ..neurons import FitConfig, Neuron
from ..neurons.statistics import check_finite

__all__ = ['calibrate_', 'observe', 'OBSERVED_BATCH']

OBSERVED_BATCH = 16  # images; small enough that currents of a large network at 500 pixels are no burden

Forward = Callable[[nn.Module, Any], Any]


def calibrate_(
        module: nn.Module,
        batches: Iterable[Any],
        fit: FitConfig = FitConfig(),
        forward_fn: Optional[Forward] = None,
) -> int:
    """Fit every neuron of a spiking module to the currents of its source network, in place.

    Args:
        module: Any module that `spiking_` converted.
        batches: What the module reads. Tensors (B, ...) are observed in batches of `OBSERVED_BATCH`; anything else as
            it comes.
        fit: How thresholds are fitted.
        forward_fn: Called with the source network and a batch; `network(batch)` if None.

    Returns:
        Number of images (of batches, if those are no tensors).

    Raises:
        SFormerError: If there are no images, or a current is NaN or infinite; names the first such neuron.
        UnsupportedLayerError: If a module multiplies currents in a forward of its own; names it.
    """
    statistics, count = observe(module, batches, forward_fn)
    with torch.device('cpu'):  # where statistics are, whatever the default device is
        for name, child in module.named_modules():
            if isinstance(child, AttentionProduct):
                child.fit({key: statistics.pop(f'{name}.{key}') for key, _ in child.named_children()}, fit)
            elif isinstance(child, Neuron) and name in statistics:
                child.fit(statistics[name], fit)
    return count


@torch.inference_mode()
def observe(
        module: nn.Module,
        batches: Iterable[Any],
        forward_fn: Optional[Forward] = None,
) -> Tuple[Dict[str, Any], int]:
    """Statistics of the source's currents at every neuron, and the number of images; arguments as of `calibrate_`."""
    view, statistics = _observing_view(module)
    # of a layer without parameters, such as a pool: what its neurons have
    tensors = itertools.chain(module.parameters(), module.buffers())
    parameter = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    count = 0
    for batch in _rebatched(batches):
        if isinstance(batch, torch.Tensor):
            batch = batch.to(parameter.device, parameter.dtype if batch.is_floating_point() else batch.dtype)
        try:
            with _ProductWatch(view, enabled=not count):
                out = view(batch) if forward_fn is None else forward_fn(view, batch)
        except AssertionError as e:  # timm's way to refuse an image size
            raise SFormerError(f'calibration images {tuple(batch.shape)} do not fit the model: {e}') from e
        if isinstance(out, torch.Tensor) and not torch.isfinite(out.float().sum()):
            raise SFormerError('NaN or infinite values in the output of the source network.')
        count += len(batch) if isinstance(batch, torch.Tensor) else 1
    if not count:
        raise SFormerError('calibration needs at least one image, got none.')
    return statistics, count


class _Observer(nn.Module):
    """Stands where a neuron is, and lets currents pass."""

    def __init__(self, name: str, statistics: Any):
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


def _observing_view(module: nn.Module) -> Tuple[nn.Module, Dict[str, Any]]:
    view, statistics = shared_copy(module).eval(), {}
    for parent_name, parent in list(view.named_modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, Neuron):
                name = f'{parent_name}.{child_name}' if parent_name else child_name
                statistics[name] = child.statistics()
                setattr(parent, child_name, _Observer(name, statistics[name]).eval())
    return view, statistics


def _rebatched(batches: Iterable[Any]) -> Iterator[Any]:
    """Tensors in batches of `OBSERVED_BATCH` images of one size, whatever they come in."""
    held: Optional[torch.Tensor] = None
    for batch in batches:
        if not isinstance(batch, torch.Tensor):
            yield batch
            continue
        if held is not None and (held.shape[1:] != batch.shape[1:] or held.dtype != batch.dtype):
            yield held
            held = None
        held = batch if held is None else torch.cat([held, batch])
        while len(held) >= OBSERVED_BATCH:
            yield held[:OBSERVED_BATCH]
            held = held[OBSERVED_BATCH:]
        if not len(held):
            held = None
    if held is not None:
        yield held


class _ProductWatch(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises where a module multiplies matrices in a forward of its own, which no neuron would ever reach."""
    OPERATIONS = {'mm', 'bmm', 'addmm', 'baddbmm', 'addbmm', 'convolution', 'linear', 'matmul', 'einsum',
                  '_scaled_dot_product_flash_attention_for_cpu', '_scaled_dot_product_attention_math',
                  'scaled_dot_product_attention'}

    def __init__(self, module: nn.Module, enabled: bool):
        super().__init__()
        self.module, self.enabled = module, enabled
        self.stack: List[Tuple[str, nn.Module]] = []
        self.handles: List[Any] = []

    def __enter__(self):
        if not self.enabled:
            return self
        for name, child in self.module.named_modules():
            self.handles.append(child.register_forward_pre_hook(
                lambda module, args, name=name: self.stack.append((name, module))))
            self.handles.append(child.register_forward_hook(lambda *args: self.stack.pop() and None, always_call=True))
        return super().__enter__()

    def __exit__(self, *args):
        if not self.enabled:
            return None
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.OPERATIONS and self.stack:
            name, module = self.stack[-1]
            known = (*SPIKING_LAYERS.values(), *FLOATING_LAYERS, AttentionProduct)
            if type(module) not in known and not left_alone(module):
                kind = type(module)
                raise UnsupportedLayerError(
                    f'{name or "(root)"} ({kind.__module__}.{kind.__qualname__}) multiplies currents in its own '
                    f'forward ({func.overloadpacket.__name__}), which has no spiking counterpart. Register one with '
                    f'sformer.layers.register_spiking.')
        return func(*args, **(kwargs or {}))
