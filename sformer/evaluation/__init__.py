"""Evaluation: accuracy, calibration, agreement with the source network, activity; on one process or many."""
from .activity import Activity, activity
from .evaluate import evaluate, evaluate_all
from .journal import Journal, check_same
from .results import check_replaceable, check_results_file, write_results
from .settings import EvaluationConfig

__all__ = [
    'evaluate', 'evaluate_all', 'EvaluationConfig', 'Activity', 'activity', 'Journal', 'check_results_file',
    'check_replaceable', 'check_same', 'write_results',
]
