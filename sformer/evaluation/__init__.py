"""Evaluation: accuracy, calibration, agreement with the source network, activity; on one process or many."""
from .activity import Activity, activity
from .config import EvaluationConfig
from .engine import evaluate, evaluate_all
from .journal import Journal
from .results import check_replaceable, check_results_file, write_results

__all__ = [
    'evaluate', 'evaluate_all', 'EvaluationConfig', 'Activity', 'activity', 'Journal', 'check_results_file',
    'check_replaceable', 'write_results',
]
