"""Conversion: a source network becomes an SFormer whose neurons are fitted to it; and what moves its weights later."""
from .calibration import calibrate_, observe
from .changes import (
    another_source,
    changed,
    kept_record,
    network_inside,
    record_of,
    recorded_as,
    source_of,
    warn_of_changes,
)
from .convert import Images, all_tokens, calibration_batches, convert
from .record import CalibrationRecord, Conversion, library_versions
from .sources import Source, create_source, set_data_config_

__all__ = [
    'CalibrationRecord', 'Conversion', 'Images', 'Source', 'all_tokens', 'another_source', 'calibrate_',
    'calibration_batches', 'changed', 'convert', 'create_source', 'kept_record', 'library_versions',
    'network_inside', 'observe', 'record_of', 'recorded_as', 'set_data_config_', 'source_of', 'warn_of_changes',
]
