"""Export of a detector as ONNX: int8 levels times int8 weights, as of classifiers, and torchvision's proposals,
RoIAlign and NMS. By torch's older exporter, which traces; the newer one cannot read torchvision's detectors."""
import contextlib
import copy
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN

from ..conversion.record import library_versions
from ..errors import SFormerError, first_line, quiet
from ..execution.graph import to_graph_
from ..execution.integer import MAX_WEIGHT_ERROR, IntegerReport, to_integer_
from ..execution.onnx import check_graph_size, graph_hash, writable, write_graph
from ..files import state_hash
from ..layers import named_neurons, unwrapped

if TYPE_CHECKING:
    import onnx

__all__ = ['export_detector']

LEGACY_OPSET = 20  # the last one that the older exporter knows


def export_detector(
        detector: nn.Module,
        path: str | Path,
        image_size: tuple[int, int] | None = None,
        *,
        max_error: float = MAX_WEIGHT_ERROR,
        portable: bool = True,
        overwrite: bool = False,
        command: str | None = None,
) -> list[IntegerReport]:
    """Write a calibrated SFormer that detects as ONNX, for ONNX Runtime.

    The graph takes `image` (3, H, W) of one size, float32 in [0, 1], and gives `boxes` (N, 4) in pixels of it, `labels`
    (N,), `scores` (N,) and, of a detector that segments, `masks` (N, 1, H, W) in [0, 1].

    Args:
        detector: As of `convert_detector`; it is not changed.
        path: File to write, aside and then renamed.
        image_size: Height and width of the images; those of the detector's config if None.
        max_error: As of `to_integer_`.
        portable: As of `export_onnx`.
        overwrite: Replace a file that is there.
        command: Command line to record.

    Returns:
        What became of each layer.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If it has no neurons, the file is there, packages are missing, a fire function has no form in
            ONNX, weights are more than a file of ONNX can hold, or torch's exporter does not manage the backbone:
            rotary embeddings (EVA, EVA-02).
    """
    path = writable(path, overwrite)
    if not any(True for _ in named_neurons(detector)):
        raise SFormerError('the detector has no neurons: convert it first.')
    detector = unwrapped(detector)
    check_graph_size(detector, of_bytes=True)
    network: FasterRCNN = copy.deepcopy(detector).eval().to('cpu', torch.float32)
    size = tuple(image_size or network.config.image_size)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    # position embeddings of what the image is resized to: the exporter has no word for resampling them
    network.backbone.vit.set_input_size(img_size=tuple(network.transform([image])[0].tensors.shape[-2:]))
    reports = to_integer_(network, max_error, portable=portable)
    to_graph_(network, early=False, portable=portable)
    check_graph_size(network)
    exported = _to_onnx(network, image)
    about = dict(
        detector=dataclasses.asdict(network.config), image_size=size, weights_sha256=state_hash(detector.state_dict()),
        versions=library_versions(), max_error=max_error, portable=portable, command=command,
        graph_sha256=graph_hash(exported),
        floating=[report.name for report in reports if not report.integer])
    write_graph(exported, about, path)
    return reports


def _to_onnx(network: FasterRCNN, image: torch.Tensor) -> 'onnx.ModelProto':
    """An `onnx.ModelProto` of a detector that `to_graph_` has been through."""
    import onnx
    file: Any = io.BytesIO()  # which torch takes, and does not name among its types
    names = ['boxes', 'labels', 'scores', *(['masks'] if network.config.masks else [])]
    with quiet('torch.onnx'), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        try:
            torch.onnx.export(
                network, ([image],), file, dynamo=False, opset_version=LEGACY_OPSET, input_names=['image'],
                output_names=names, dynamic_axes={name: [0] for name in names})
        except torch.onnx.errors.OnnxExporterError as e:
            raise SFormerError(f"torch's exporter cannot write {network.config.backbone}: {first_line(e)}") from None
    model = onnx.load_from_string(file.getvalue())
    _forget_shapes_of_loops_(model.graph)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise SFormerError(f"torch's exporter wrote a graph of {network.config.backbone} that is not valid "
                           f'({first_line(e)}): it garbles rotary embeddings, for one.') from None
    return model


def _forget_shapes_of_loops_(graph: 'onnx.GraphProto') -> None:
    """Leave out the shapes of what loops carry on, in place: the exporter writes those of the first round, and masks
    are pasted one more in each, at which ONNX Runtime wonders every time."""
    for node in graph.node:
        for attribute in node.attribute if node.op_type == 'Loop' else ():
            body = attribute.g  # which begins with the number of the round and whether to go on
            for value in (*body.input[2:], *body.output[1:], *body.value_info):
                value.type.tensor_type.ClearField('shape')
