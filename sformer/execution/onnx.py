"""Export of an SFormer as ONNX: int8 levels times int8 weights, for engines that know how.

Linear layers, the patch embedding and QK^T multiply int8, and so does AV where softmax levels are a byte. LayerNorm,
softmax and activation functions stay in float32.
"""
import contextlib
import hashlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from timm.layers import pos_embed_sincos
from torch.overrides import TorchFunctionMode

from ..conversion import Images
from ..errors import SFormerError, alone, needed_packages, quiet
from ..files import write_file
from ..layers import unwrapped
from .functions import called_parts, inlined
from .graph import linear_neurons, to_graph_
from .integer import MAX_WEIGHT_ERROR, IntegerReport
from .operators import onnx_operator
from .prepared import METADATA, check_output, integer_copy
from .spike_outputs import SPIKE_OUTPUTS, SpikeOutputs

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ['check_graph_size', 'export_onnx', 'graph_hash', 'graph_of_module', 'grid_of', 'to_onnx', 'writable',
           'write_graph']

OPSET = 20
MAX_GRAPH = 2 ** 31 - 2 ** 24  # bytes of values in a file of ONNX, less than protobuf's 2 GiB by what nodes take


def export_onnx(
        model: nn.Module,
        path: str | Path,
        calibration: Images | None = None,
        *,
        split: str | None = None,
        num_images: int = 128,
        seed: int = 0,
        image_column: str | None = None,
        max_error: float = MAX_WEIGHT_ERROR,
        portable: bool = True,
        spikes: bool = False,
        uint8_input: bool = False,
        overwrite: bool = False,
        command: str | None = None,
) -> list[IntegerReport]:
    """Write a calibrated SFormer as ONNX with int8 levels and int8 weights.

    The graph takes `images` (batch, C, H, W), normalised, float32, of the model's size, and gives `logits` (batch,
    classes), or features; with `spikes`, also where it spikes, as of `SpikeOutputs`. What was exported is recorded in
    the file, with a hash of its graph.

    Args:
        model: Calibrated SFormer, compiled or not; it is not changed.
        path: File to write, aside and then renamed.
        calibration: Images to round weights for, as of `sformer.convert`; to the nearest if None.
        split: Split of the data set that these are from.
        num_images: Number of images drawn from a named origin of images.
        seed: Seed of the choice of images.
        image_column: Column of the images of a data set, where it is not found.
        max_error: As of `to_integer_`.
        portable: Sum products exactly on every processor: where levels are many, weights have fewer bits, and what
            meets other levels is multiplied in float32. Otherwise the graph wants VNNI, and `load_onnx` refuses it on a
            processor that has none.
        spikes: Give where it spikes, too: `spikes` and `activity` (batch, blocks, tokens).
        uint8_input: Let the graph take pixels as decoders give them, and normalise them itself: `images` (batch, H, W,
            C), uint8, RGB of colour models.
        overwrite: Replace a file that is there.
        command: Command line to record.

    Returns:
        What became of each layer.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If the file is there, packages are missing, a fire function or a layer has no form in ONNX, or
            weights are more than a file of ONNX can hold.
    """
    path = writable(path, overwrite)  # before the work
    model = unwrapped(model)
    check_graph_size(model, of_bytes=True)
    network, reports, about = integer_copy(
        model, calibration, split=split, num_images=num_images, seed=seed, image_column=image_column,
        max_error=max_error, portable=portable, command=command)
    to_graph_(network, portable=portable)
    maps: dict[str, object] = {}
    if spikes:
        grid = grid_of(model)
        network = SpikeOutputs(
            network, linear_neurons(network), torch.zeros(1, *resolve_input_data_config(network)['input_size']),
            math.prod(grid or ())).eval()
        maps = dict(blocks=[*network.blocks], neurons_per_token=[*network.blocks.values()], grid_size=grid)
    exported = to_onnx(network, ('logits', *(SPIKE_OUTPUTS if spikes else ())), uint8_input)
    write_graph(exported, dict(about, **maps, uint8_input=uint8_input, graph_sha256=graph_hash(exported)), path)
    return reports


class _OfPixels(nn.Module):
    """A network that normalises pixels (B, H, W, C), uint8, itself."""
    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, network: nn.Module):
        super().__init__()
        cfg = resolve_input_data_config(network)
        mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        self.network = network
        self.register_buffer('scale', 1 / (255 * std))
        self.register_buffer('offset', -mean / std)

    def forward(self, images: torch.Tensor) -> object:
        return self.network(images.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.offset)


def writable(path: str | Path, overwrite: bool) -> Path:
    """Where a graph will be written: what a link points to.

    Raises:
        SFormerError: If it cannot be, or packages are missing.
    """
    path = check_output(path, '.onnx', overwrite)
    _check_packages()
    return path


def check_graph_size(network: nn.Module, of_bytes: bool = False) -> None:
    """Raise SFormerError if a graph would hold more than its file can, which protobuf notices when it is all done.

    Args:
        network: As `to_graph_` leaves it; or what it is going to be made of.
        of_bytes: Take all weights of layers for bytes: the least that it can become.
    """
    values = network.parameters() if of_bytes else network.state_dict().values()
    size = sum(value.numel() * (1 if of_bytes and value.ndim > 1 else value.element_size()) for value in values)
    if size > MAX_GRAPH:
        remedy = 'No option makes it fit: run it in torch.' if of_bytes else (
            'Layers in floating point take four times as much as those in integers; --max-error (max_error) says '
            'which.')
        raise SFormerError(f'the graph would hold {size / 2 ** 30:.2f} GiB of weights, and a file of ONNX holds no '
                           f'more than {MAX_GRAPH / 2 ** 30:.2f} GiB. {remedy}')


def write_graph(exported: 'ModelProto', about: dict[str, object], path: Path) -> None:
    """Write an `onnx.ModelProto` and what is recorded of it, aside and then renamed."""
    exported.metadata_props.add(key=METADATA, value=json.dumps(about, sort_keys=True))
    write_file(path, exported.SerializeToString())


def grid_of(model: nn.Module) -> list[int] | None:
    """Rows and columns of the patches of a model, which are its last tokens; None where tokens are no grid."""
    grid = getattr(getattr(model, 'patch_embed', None), 'grid_size', None) or ()
    return [*grid] if len(grid) == 2 else None


def to_onnx(
        network: nn.Module,
        outputs: Sequence[str] = ('logits',),
        uint8_input: bool = False,
) -> 'ModelProto':
    """A timm model on the CPU as an `onnx.ModelProto`, with any number of images per batch.

    Args:
        network: The model.
        outputs: Names of what it gives.
        uint8_input: As of `export_onnx`.

    Raises:
        SFormerError: If packages are missing, or weights are more than a file of ONNX can hold.
    """
    _check_packages()
    check_graph_size(network)
    channels, height, width = resolve_input_data_config(network)['input_size']
    images = torch.zeros(2, channels, height, width)
    if uint8_input:
        images = torch.zeros(2, height, width, channels, dtype=torch.uint8)
        network = _OfPixels(network)
    with rotary_products():  # by one thread at a time
        with called_parts(network) as kinds:
            model = graph_of_module(network, (images,), ({0: torch.export.Dim('batch')},), outputs)
        return inlined(model, kinds, graph_of_module)


def graph_of_module(
        module: nn.Module,
        inputs: tuple[object, ...],
        sizes: tuple[object, ...],
        outputs: Sequence[str] = (),
) -> 'ModelProto':
    """A module as torch's exporter writes it.

    Args:
        module: The module.
        inputs: What it is called with; the first are `images`.
        sizes: Of each, names of dimensions of any size.
        outputs: Names of what it gives.
    """
    with quiet('torch.onnx', 'onnxscript', 'onnx_ir'), torch.no_grad(), _ClampsByTensors():
        program = torch.onnx.export(
            module, inputs, dynamo=True, opset_version=OPSET, input_names=['images'], output_names=[*outputs],
            dynamic_shapes=sizes, verbose=False)
    assert program is not None
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info):  # where in this package each node comes from
        part.ClearField('metadata_props')
    return model


class _ClampsByTensors(TorchFunctionMode):
    """Writes clamps by tensors as one operator: onnxscript (0.7) makes it of two, and where several layers clamp one
    current, gives all their bounds one name and loses them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.clamp and len(args) == 3 and all(isinstance(bound, torch.Tensor) for bound in args[1:]):
            return onnx_operator('Clip', args[0], args[0].dtype, *args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def rotary_products() -> Iterator[None]:
    """Let the rotary embedding turn pairs of channels by a product with a signed permutation, which is exact: engines
    take a sixth of the time for it that they take for every second element of a tensor.

    timm's layers call the function of a module of timm, and nothing that they are given, so that is what is replaced:
    for all threads, though in others it does what it did, and by one thread at a time.
    """
    def turned(x: torch.Tensor) -> torch.Tensor:
        if threading.get_ident() != here:
            return rot(x)
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return x @ rot(eye)

    here = threading.get_ident()
    with alone:
        rot = pos_embed_sincos.rot
        pos_embed_sincos.rot = turned
        try:
            yield
        finally:
            pos_embed_sincos.rot = rot


def _check_packages() -> None:
    """Raise SFormerError if what torch exports by is missing."""
    with needed_packages('onnx'):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401


def graph_hash(model: 'ModelProto') -> str:
    """SHA-256 of the graph of an `onnx.ModelProto`, weights included, without what is recorded beside it."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()
