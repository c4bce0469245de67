"""Quantised networks by the libraries that users would take: NNCF on OpenVINO, and torchao."""
import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn

from ..errors import needed_packages
from ..execution import quantisers
from ..execution.engines import compile_graph
from ..execution.onnx import to_onnx

__all__ = ['Inference', 'nncf_int8', 'openvino_float', 'torchao_int8']

Inference = Callable[[torch.Tensor], torch.Tensor]


def openvino_float(source: nn.Module) -> Inference:
    """The source in float32 on OpenVINO, on the CPU: what `nncf_int8` is compared with.

    Raises:
        SFormerError: If packages are missing.
    """
    run = compile_graph(to_onnx(source).SerializeToString(), 'openvino')
    return lambda images: torch.from_numpy(run(images.numpy()))


def nncf_int8(source: nn.Module, batches: Iterable[torch.Tensor]) -> Inference:
    """W8A8 by NNCF (`execution.quantisers`), on OpenVINO.

    Args:
        source: timm model on the CPU.
        batches: Images to calibrate with, normalised, all of which are used.

    Returns:
        Images to outputs.

    Raises:
        SFormerError: If packages are missing.
    """
    run = compile_graph(quantisers.nncf_graph(source, batches), 'openvino')
    return lambda images: torch.from_numpy(run(images.numpy()))


def torchao_int8(source: nn.Module) -> nn.Module:
    """W8A8 by torchao: int8 weights per channel, int8 activations per token, of all linear layers. Products of two
    activations and convolutions stay in float32. Nothing is calibrated: the range of a token is its own.

    Raises:
        SFormerError: If torchao is missing.
    """
    with needed_packages('baselines'):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    network = copy.deepcopy(source)
    quantize_(network, Int8DynamicActivationInt8WeightConfig())
    return network
