"""Conversion: a source network becomes an SFormer whose neurons are fitted to it; and what moves its weights later."""
from .calibration import calibrate_, observe
from .convert import (
    Images,
    all_tokens,
    another_source,
    calibration_batches,
    check_source_inside,
    convert,
    source_inside,
    warn_if_moved,
)
from .record import CalibrationRecord, Conversion, library_versions
from .sources import Source, create_source, set_data_config_

__all__ = [
    'CalibrationRecord', 'Conversion', 'Images', 'Source', 'all_tokens', 'another_source', 'calibrate_',
    'calibration_batches', 'check_source_inside', 'convert', 'create_source', 'library_versions', 'observe',
    'set_data_config_', 'source_inside', 'warn_if_moved',
]
