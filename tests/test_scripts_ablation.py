"""scripts/ablation.py, on the network of digits, and the tables that are made of what it writes."""
import importlib
import json
from pathlib import Path

import pytest

from sformer import SFormerError

with pytest.MonkeyPatch.context() as patch:  # they import one another
    patch.syspath_prepend(Path(__file__).parents[1] / 'scripts')
    ablation, few_tables, figure_files = map(importlib.import_module, ('ablation', 'few_tables', 'figure_files'))

NETWORK, FEEDBACK = 'sformer_nano.digits', 'feedback, 8 groups'


def run(output, ideas, seed=0, levels=4):
    ablation.main([NETWORK], 'digits', 'test', [levels], ideas, num_images=16, num_test=16, seed=seed, output=output)
    return json.loads(output.read_text())


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    """A file that was begun with one idea and gone on with."""
    output = tmp_path_factory.mktemp('ablation') / 'ablation.json'
    first = run(output, [FEEDBACK])
    assert [row['idea'] for row in first['results']] == [FEEDBACK]
    run(output, ['correction of gains', FEEDBACK, 'nothing'])
    return output


def test_what_is_there_is_not_measured_again(output, monkeypatch):
    rows = json.loads(output.read_text())['results']
    assert [row['idea'] for row in rows] == ['nothing', 'correction of gains', FEEDBACK]
    monkeypatch.setattr(ablation, 'measure', None)
    assert run(output, ['nothing', FEEDBACK])['results'] == rows


def test_other_images_are_another_file(output):
    with pytest.raises(SystemExit, match='other images'):
        run(output, ['nothing'], seed=1)


def test_an_idea_that_is_none_is_named(output):
    with pytest.raises(SystemExit, match='no idea'):
        run(output, ['more of it'])


def test_what_a_network_refuses_is_no_row(tmp_path, monkeypatch, capsys):
    def refuse(source, batches, config, fit=None):
        if fit is not None:
            raise SFormerError('not this one')

    monkeypatch.setattr(ablation.sformer, 'convert', refuse)
    ablation.main([NETWORK], 'digits', 'test', [4], ['balance'], num_images=16, num_test=16, output=tmp_path / 'a.json')
    assert 'N = 4, balance: not this one' in capsys.readouterr().out and not (tmp_path / 'a.json').exists()


def test_feedback_costs_what_it_causes(output):
    plain, _, fed_back = json.loads(output.read_text())['results']
    assert fed_back['operations']['graded'] > 1.02 * plain['operations']['graded']
    assert fed_back['config'] == dict(lateral=8) and not plain['config']
    assert 0 < fed_back['time']['min'] <= fed_back['time']['median'] <= fed_back['time']['max']


def test_what_says_the_same_as_the_default_is_no_row():
    assert not ablation.says_nothing(4, {}) and not ablation.says_nothing(4, dict(fire='uniform'))
    assert ablation.says_nothing(32, dict(fire='uniform'))


def test_tables_are_of_its_rows(output, monkeypatch):
    monkeypatch.setattr(figure_files, 'FIGURES', output.parent)
    monkeypatch.setitem(few_tables.NETWORKS, NETWORK, 'nano')
    plain, gains, fed_back = json.loads(output.read_text())['results']
    out, more = few_tables.left_out(), few_tables.added()
    assert out.startswith('| left out | nano, N = 4 |') and FEEDBACK not in out
    assert f'| correction of gains | {gains["error"]:.4f} |' in out
    assert f'| nano | 4 | nothing | {plain["error"]:.4f} | {plain["activity"]:.3f} | 1.00 |' in more
    assert f'| nano | 4 | {FEEDBACK} | {fed_back["error"]:.4f} |' in more and 'correction' not in more
