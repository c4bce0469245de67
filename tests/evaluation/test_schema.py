"""One entry is all that a new figure needs; and what the schema refuses."""
import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from sformer import SFormerError, save_model
from sformer.cli import main
from sformer.evaluation import figures
from sformer.evaluation.figures import CLASSIFICATION, DETECTION, PRECISION, precision, precision_figures
from sformer.evaluation.schema import (
    COUNT,
    FLAG,
    PERCENT,
    POSITIVE,
    SHARE,
    TEXT,
    TEXTS,
    Figure,
    check_values,
    is_result,
    mapping,
    schema_of,
)
from sformer.files import write_json
from sformer.publishing.cards import render_card
from sformer.publishing.model_record import load_recorded, read_record, recorded_results

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'scripts'))
import make_tables  # noqa: E402


@pytest.fixture
def brier():
    """A figure of one's own: the squared distance of probabilities from the labels."""
    def count(batch):
        distance = batch.log_p.exp()
        distance[range(len(distance)), batch.labels[:, 0]] -= 1
        return distance.square().sum(1)
    CLASSIFICATION.register(Figure(
        'brier', 'squared distance of probabilities from the label', POSITIVE, digits=3,
        of_source=True, label='Brier score', head='Brier', said='Brier {:.3f}', count=count))
    yield
    del CLASSIFICATION.figures['brier']


def page(name):
    return (ROOT / 'docs' / name).read_text(encoding='utf-8')


def test_a_figure_is_one_entry(brier, model, digits, tmp_path, capsys):
    """It is counted, printed, checked, carded, in CSV, in the table of `compare` and wanted by the documents."""
    folder, file = save_model(model, tmp_path / 'm'), tmp_path / 'm' / 'r.json'

    def run(*args):
        with pytest.raises(SystemExit) as done:
            main([*map(str, args)])
        assert done.value.code == 0
        return capsys.readouterr().out
    data = '--dataset', 'digits', '--num-images', 540, '--results-file'
    said = run('evaluate', folder, *data, file)
    result = json.loads(file.read_text())
    images, labels = digits
    p = model(images).softmax(1).detach().numpy()
    score = np.square(p - np.eye(10)[labels.numpy()]).sum(1).mean()
    assert result['brier'] == pytest.approx(score, abs=1e-4) and 0 < result['source_brier'] != result['brier']
    assert f'Brier {result["brier"]:.3f}' in said and f'Brier {result["source_brier"]:.3f}' in said
    run('evaluate', folder, *data, tmp_path / 'r.csv')
    row, = csv.DictReader(open(tmp_path / 'r.csv', newline=''))
    assert (float(row['brier']), float(row['source_brier'])) == (result['brier'], result['source_brier'])
    table = run('compare', folder, folder, *data[:-1])
    assert 'Brier' in table and table.count(f'{result["brier"]:.3f}') >= 2
    assert 'brier' in run('compare', folder, folder, *data[:-1], '--format', 'csv').splitlines()[0].split(',')
    record, _ = read_record(folder, load_recorded(folder))
    assert f'| Brier score | {result["source_brier"]:.3f} | {result["brier"]:.3f} |' in str(render_card(record))
    assert CLASSIFICATION.documented() not in page('evaluate.md'), 'nobody would miss it in the documents'
    assert '| `brier`, `source_brier` |' in make_tables.with_tables(page('evaluate.md'))
    write_json(file, dict(result, source_brier=-1))
    with pytest.raises(SFormerError, match='source_brier is -1, not a finite number'):
        recorded_results(folder, result['weights_sha256'])


def test_an_average_of_precision_is_one_entry():
    """Of boxes and masks, of a detector and its source, over all and by category."""
    precision('mAP90', '(at IoU of 0.90)', lambda values: values[8], source_head='mAP90')
    try:
        values = np.linspace(1, 0.1, 10)[:, None] * np.ones((10, 4))
        found = precision_figures(values)
        assert found == dict(mAP=55., mAP50=100., mAP75=50., mAP90=20.)
        assert precision_figures(-np.ones((10, 4)))['mAP90'] is None
        result = DETECTION.make({}, dataset='d', weights_sha256='ab', boxes=found, source_boxes=found)
        heads, rows = DETECTION.table([result])
        assert rows[0][heads.index('box mAP90')] == rows[0][heads.index('source box mAP90')] == '20.00'
        assert DETECTION.row(result)['source_boxes_mAP90'] == 20. and 'masks_mAP90' in DETECTION.columns()
        assert ['boxes, mAP90 [%]', '20.00', '20.00'] in DETECTION.card_rows(result)
        assert ('boxes mAP90 [%]', 20.) in DETECTION.listed(result) and '`mAP90` (at' in DETECTION.documented()
        DETECTION.check(result)
        for wrong in (dict(found, mAP90=120), dict(found, per_class=dict(disc=dict(mAP90=-1)))):
            with pytest.raises(ValueError, match='boxes is .*, not percentages of average precision'):
                DETECTION.check(dict(result, boxes=wrong))
    finally:
        del PRECISION['mAP90'], figures.PRECISION_PARTS['mAP90']


def test_values_that_no_figure_describes_are_refused():
    with pytest.raises(ValueError, match='results of detectors have no figure brightness'):
        DETECTION.make({}, brightness=1)
    with pytest.raises(ValueError, match="results of classifiers have a figure 'top1' already"):
        CLASSIFICATION.register(Figure('top1', '', PERCENT))


def test_whose_result_it_is():
    assert schema_of(dict(top1=1.)) is CLASSIFICATION and schema_of(dict(boxes={})) is DETECTION
    assert is_result(dict(top1=1.)) and not any(map(is_result, (dict(model='m'), [], None, 'top1')))


def test_every_figure_of_an_evaluation_is_checked(result):
    CLASSIFICATION.check(result)
    known = {key for key, _, _ in CLASSIFICATION.places()}
    assert result.keys() <= known
    for key in known:
        if result.get(key) is not None:
            with pytest.raises(ValueError, match=f'^{key} is '):
                CLASSIFICATION.check({**result, key: {1: object()}})


WRONG = dict(a=True, b='x', c=None, d=[1])


@pytest.mark.parametrize('check, right, wrong', [
    (PERCENT, [0, 100, 99.5], [-0.1, 100.1, math.nan, math.inf, *WRONG.values()]),
    (SHARE, [0, 1, 0.5], [-0.1, 1.1, *WRONG.values()]),
    (COUNT, [0, 2 ** 53], [-1, 1.5, 2. ** 3, 2 ** 53 + 1, True, '1']),
    (POSITIVE, [0, 1e300], [-1, math.inf, math.nan]), (TEXT, ['', 'x'], [1, None, ['x']]),
    (FLAG, [True, False], [0, 1, '']),
    (TEXTS, [[], ['x', 'y']], ['x', ['x', 1], [1, 'x'], ('x',)]),
    (mapping(SHARE), [{}, dict(a=0.5, b=1)], [dict(a=0.5, b=2), dict(a=2, b=0.5), [0.5], 0.5])])
def test_what_a_value_has_to_be(check, right, wrong):
    for value in right:
        check_values(dict(x=value), dict(x=check))
    for value in wrong:
        if value is not None:  # which is a value that is missing
            with pytest.raises(ValueError, match=f'^x is .*, not {check.words}$'):
                check_values(dict(x=value), dict(x=check))
    check_values(dict(y=object()), dict(x=check))
    check_values(dict(x=None), dict(x=check))
    for values in ({}, dict(x=None)):
        with pytest.raises(ValueError, match='^x is None, not '):
            check_values(values, dict(x=check), ['x'])
    with pytest.raises(ValueError, match=r"^\[1, 2\] is no object of JSON"):
        check_values([1, 2], {})
    with pytest.raises(ValueError, match=r"^x is 'a{56}\.\.\., not "):
        check_values(dict(x='a' * 100), dict(x=PERCENT))
