"""What is counted, against counts by hand; sums that depend on neither order nor chunks."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sformer import evaluate
from sformer.evaluation.figures import CLASSIFICATION
from sformer.evaluation.metrics import Counted, Scored, calibration_error, relative_error


def test_likelihood_and_calibration_error_by_hand(model, digits):
    images, labels = digits
    result = evaluate(model, 'digits', 'test')
    with torch.inference_mode():
        p = model(images).double().softmax(1).numpy()
    y = labels.numpy()
    assert result['nll'] == pytest.approx(-np.log(p[np.arange(540), y]).mean(), abs=1e-5)
    confidence, right = p.max(1), p.argmax(1) == y
    error = 0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert result['ece'] == pytest.approx(100 * error, abs=1e-3) and result['ece'] > 1
    assert result['source_nll'] != result['nll'] and result['source_ece'] != result['ece']


def test_certain_and_uncertain_predictions_have_a_bin():
    score = CLASSIFICATION.score()
    score.add(Scored(torch.tensor([[100., 0.], [0., 0.], [0., 100.]]), torch.tensor([[0], [0], [0]])))
    bins = score.record()['ece']
    assert bins[-1][:2] == [2, 1] and bins[7][:2] == [1, 1] and sum(b[0] for b in bins) == 3
    assert calibration_error([bins], 3) == pytest.approx(100 * (1 + 0.5) / 3, abs=1e-3)


def test_errors_relative_to_nothing_are_none():
    assert relative_error([9., 4.]) == 1.5 and relative_error([0., 4.]) == 0
    assert relative_error(None) is None and relative_error([9., 0.]) is None


def test_sums_do_not_depend_on_order_or_chunks():
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 10) * 10, torch.randint(0, 10, (64, 1))
    noise = torch.randn(64, 10)

    def total(order, size):
        records = []
        for part in torch.as_tensor(order).split(size):
            score = CLASSIFICATION.score()
            score.add(Scored(logits[part], labels[part], logits[part] + 0.1 * noise[part]))
            records.append(dict(count=len(part), networks=[score.record()]))
        counted = Counted(SimpleNamespace(index=0), None, records)
        return {figure.key: figure.value(counted) for figure in score.figures}
    assert total(range(64), 64) == total(range(63, -1, -1), 7)
