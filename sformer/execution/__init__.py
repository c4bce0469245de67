"""Executions of an SFormer other than the simulation: in integers, in torch and in engines that read ONNX."""
from .executions import EXECUTIONS
from .exported import EngineNetwork, load_onnx
from .integer import IntegerReport, to_integer_
from .onnx import export_onnx
from .spikes import SPIKE_CODINGS, spike_planes, spike_trains, to_spikes_
from .tensors import export_safetensors
from .timing import benchmark

__all__ = [
    'EXECUTIONS', 'SPIKE_CODINGS', 'EngineNetwork', 'IntegerReport', 'benchmark', 'export_onnx', 'export_safetensors',
    'load_onnx', 'spike_planes', 'spike_trains', 'to_integer_', 'to_spikes_',
]
