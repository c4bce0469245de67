"""Calibration: observe the currents of the source network, fit neurons to them."""
from .observation import calibrate_, observe

__all__ = ['calibrate_', 'observe']
