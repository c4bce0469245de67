"""Searching for neurons: what is measured, which points count, and that a journal continues."""
import pytest
import torch
from conftest import make_source

from sformer import FitConfig, SFNConfig, SFormerError, convert
from sformer.conversion.search import (
    SILENCES,
    Bench,
    Point,
    is_search_journal,
    pareto_front,
    recommended,
    search,
    sweep,
)


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


def test_a_source_that_says_nothing(images):
    """Its relative errors were NaN, at an agreement of 100 %."""
    zero = make_source()
    torch.nn.init.zeros_(zero.head.weight)
    torch.nn.init.zeros_(zero.head.bias)
    with pytest.raises(SFormerError, match='outputs are all zero, or not finite. Is its head trained'):
        Bench(zero, images[:16], images[16:])
    with pytest.raises(SFormerError, match='no image to compare'):
        Bench(zero, images[:16], images[:0])
    with pytest.raises(SFormerError, match='silence.* outputs of the source are zero. Is its head trained'):
        convert(zero, [images], SFNConfig(silence=0.01))


@pytest.fixture
def quick(source, images, monkeypatch):
    """`quick(fit)`: a bench that finds at once what a config says, and counts what it was asked."""
    pytest.importorskip('optuna')

    def quick(fit=FitConfig()):
        bench = Bench(source, images[:16], images[16:32], fit)
        bench.asked = []

        def measure(config, origin):
            bench.asked.append(config)
            bench.seconds += 1.5
            bench.forward_passes += 32
            return Point(config, origin, config.scale + config.silence, None, 1 / config.levels, config.scale, .1)
        bench.measure = measure
        return bench
    return quick


def test_a_search_continues_from_its_journal(quick, tmp_path):
    whole, first, second = quick(), quick(), quick()
    expected = search(whole, SFNConfig(), 12)
    points = search(first, SFNConfig(), 7, tmp_path / 'journal')
    assert len(points) == len(first.asked) == 7
    seen = []
    again = search(second, SFNConfig(), 12, tmp_path / 'journal', report=seen.append)
    assert len(again) == len(expected) == 12 and len(second.asked) == len(seen) == 5 and {*points} <= {*again}
    assert [p.origin for p in again].count('closed form') == 5 == [p.origin for p in expected].count('closed form')
    assert len({*again}) == 12  # nothing is proposed twice by the same seed
    # what it cost is what all of it did
    assert (second.seconds, second.forward_passes) == (whole.seconds, whole.forward_passes) == (12 * 1.5, 13 * 32 - 16)
    third = quick()
    assert search(third, SFNConfig(), 12, tmp_path / 'journal') == again and not third.asked
    assert (third.seconds, third.forward_passes) == (whole.seconds, whole.forward_passes)


@pytest.mark.parametrize('error, after', [  # the first error is noted by nobody
    (SystemExit, 2), (KeyboardInterrupt, 7), (MemoryError, 9)])
def test_a_trial_that_was_ended_is_run_again(quick, tmp_path, error, after):
    """One of the closed form, a proposal, and one of lambda alone: what nobody finished was never run again."""
    bench, begun = quick(), []
    measure = bench.measure

    def until(config, origin):
        begun.append((config, origin))
        if len(begun) > after:
            raise error
        return measure(config, origin)
    bench.measure = until
    with pytest.raises(error):
        search(bench, SFNConfig(), 10, tmp_path / 'journal')
    second = quick()
    points = search(second, SFNConfig(), 10, tmp_path / 'journal')
    found = [(point.config, point.origin) for point in points]
    assert len(begun) == after + 1 and len(found) == len({*found}) == 10 and {*begun} <= {*found}
    assert len(second.asked) == 10 - after
    assert [c.silence for c, origin in found if origin == 'closed form'] in (
        [*SILENCES], [*SILENCES[:2], *SILENCES[3:], SILENCES[2]])
    assert second.seconds == 10 * 1.5


def test_a_journal_is_of_one_search(quick, tmp_path):
    journal = tmp_path / 'journal'
    search(quick(), SFNConfig(), 5, journal)
    for bench, config in ((quick(), SFNConfig(levels=9)), (quick(FitConfig('max')), SFNConfig()),
                          (quick(FitConfig(floor=0.5)), SFNConfig())):
        with pytest.raises(SFormerError, match='another search'):
            search(bench, config, 7, journal)
        assert not bench.asked


def test_a_journal_in_use_and_a_damaged_one(quick, tmp_path):
    journal = tmp_path / 'journal'

    def meanwhile(point):
        with pytest.raises(SFormerError, match='another search is at work on .*journal'):
            search(quick(), SFNConfig(), 5, journal)
    points = search(quick(), SFNConfig(), 5, journal, report=meanwhile)
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "wor')  # killed as it wrote
    assert search(quick(), SFNConfig(), 5, journal) == points and is_search_journal(journal)
    journal.write_bytes(whole[:300] + b'\n' + whole[300:])
    with pytest.raises(SFormerError, match='journal is damaged .*: choose another file, or remove it'):
        search(quick(), SFNConfig(), 5, journal)
    journal.write_bytes(b'')
    assert is_search_journal(journal) and len(search(quick(), SFNConfig(), 5, journal)) == 5


@pytest.mark.slow
def test_a_search_of_networks(bench, tmp_path):
    pytest.importorskip('optuna')
    first = search(bench, SFNConfig(), 5, tmp_path / 'journal')
    assert [p.origin for p in first] == ['closed form'] * 4 + ['lambda']
    assert first[0].error < first[3].error and first[0].activity > first[3].activity
