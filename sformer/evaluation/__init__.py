"""Evaluation: accuracy, calibration, agreement with the source network, firing rates; on one process or many."""
from .engine import evaluate, evaluate_all
from .firing import FiringRates, firing_rates
from .journal import Journal
from .results import check_results_file, write_results

__all__ = [
    'evaluate', 'evaluate_all', 'FiringRates', 'firing_rates', 'Journal', 'check_results_file', 'write_results',
]
