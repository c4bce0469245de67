"""The same network without neurons in int8, as the libraries that users would take quantise it: what integers of an
SFormer are compared with."""
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn as nn

from ..errors import needed_packages, quiet
from .onnx import to_onnx

if TYPE_CHECKING:
    from openvino import Model

__all__ = ['nncf_graph', 'plain_int8']


def plain_int8(network: nn.Module, images: torch.Tensor) -> bytes:
    """A network without neurons as ONNX Runtime's quantiser makes it: symmetric int8, weights per channel, activations
    per tensor, whose ranges are those on some images (B, C, H, W).

    Returns:
        A serialised ONNX model.

    Raises:
        SFormerError: If packages are missing.
    """
    with needed_packages('onnx'):
        from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{'images': image[None].numpy()} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = f'{folder}/plain.onnx', f'{folder}/int8.onnx'
        Path(plain).write_bytes(to_onnx(network).SerializeToString())
        with quiet('root'):  # which recommends to prepare the graph, as torch's exporter has done
            quantization.quantize_static(
                plain, quantised, Reader(), op_types_to_quantize=['MatMul', 'Gemm', 'Conv'], per_channel=True,
                activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
                extra_options=dict(ActivationSymmetric=True, WeightSymmetric=True))
        return Path(quantised).read_bytes()


def nncf_graph(network: nn.Module, batches: Iterable[torch.Tensor]) -> 'Model':
    """W8A8 by NNCF's post-training quantisation, as its documentation says for transformers.

    Args:
        network: timm model on the CPU, without neurons.
        batches: Images to calibrate with, normalised, all of which are used.

    Returns:
        An OpenVINO model.

    Raises:
        SFormerError: If packages are missing.
    """
    with needed_packages('baselines'):
        import nncf
        import openvino
    images = [batch.numpy() for batch in batches]
    with quiet('nncf'):
        return nncf.quantize(
            openvino.Core().read_model(to_onnx(network).SerializeToString()), nncf.Dataset(images),
            subset_size=len(images), model_type=nncf.ModelType.TRANSFORMER)
