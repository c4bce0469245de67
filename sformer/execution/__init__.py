"""Executions of an SFormer other than the simulation: in integers, in torch and in engines that read ONNX."""
from .benchmark import EXECUTIONS, benchmark
from .engines import EngineNetwork, load_onnx
from .integer import IntegerReport, to_integer_
from .onnx import export_onnx

__all__ = ['EXECUTIONS', 'EngineNetwork', 'IntegerReport', 'benchmark', 'export_onnx', 'load_onnx', 'to_integer_']
