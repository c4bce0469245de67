"""Searching for neurons: what is measured, which points count, and that a journal continues."""
import pytest
import torch

from sformer import SFNConfig, SFormerError, convert
from sformer.conversion.search import Bench, Point, pareto_front, recommended, search, sweep


def point(error, activity, unary=1.):
    return Point(SFNConfig(), 'search', error, 0.9, activity, unary, 0.5)


def test_front_and_recommendation():
    points = [point(.3, .2), point(.1, .5), point(.2, .5), point(.05, .9), point(.31, .3)]
    assert pareto_front(points) == [points[0], points[1], points[3]]
    assert recommended(points, 0.1) is points[1] and recommended(points, 0.01) is points[3]
    assert recommended([point(.1, .5, 3.), point(.1, .6, 2.)], 1., 'unary').activity == .6


@pytest.fixture(scope='module')
def bench(source, images):
    return Bench(source, images[:16], images[16:32])


def test_points_say_what_others_measure(bench, source):
    (measured,) = sweep(bench, SFNConfig(), [8])
    model = convert(source, [bench.calibration], SFNConfig(levels=8))
    with torch.no_grad():
        out, expected = model(bench.images), source(bench.images)
    assert measured.error == pytest.approx(((out - expected).norm() / expected.norm()).item(), rel=1e-4)
    assert measured.agreement == pytest.approx((out.argmax(1) == expected.argmax(1)).float().mean().item())
    assert bench.forward_passes == 2 * len(bench.images) + len(bench.calibration) and bench.seconds > 0
    from sformer.evaluation.activity import Activity
    counts = Activity()
    with counts.observe(model), torch.no_grad():
        model(bench.images)
    assert counts.spikes_per_neuron() == pytest.approx(
        dict(unary=measured.unary, binary=measured.binary, graded=measured.activity))


def test_more_levels_than_a_fire_function_has(bench):
    with pytest.raises(SFormerError, match='at most 7'):
        sweep(bench, SFNConfig(levels=4, fire='power2'), [4, 8])


@pytest.mark.slow
def test_a_search_continues_from_its_journal(bench, tmp_path):
    pytest.importorskip('optuna')
    journal, seen = tmp_path / 'journal', []
    first = search(bench, SFNConfig(), 5, journal, report=seen.append)
    assert len(first) == len(seen) == 5 and [p.origin for p in first].count('lambda') == 1
    again = search(bench, SFNConfig(), 7, journal, report=seen.append)
    assert len(again) == len(seen) == 7 and set(first) <= set(again)
    assert [p.origin for p in again].count('closed form') == 5 and again[5].origin == 'search'
    with pytest.raises(SFormerError, match='another search'):
        search(bench, SFNConfig(levels=9), 7, journal)
