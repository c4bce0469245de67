"""Help: where options and commands stand, and what it ends with."""
import re
import shlex

import pytest
import typer

from sformer.cli.app import COMMANDS, app
from sformer.cli.arguments import spread
from sformer.cli.panels import PANELS

ROOT = typer.main.get_command(app)
LEAVES = {(name, *inner): leaf for name, command in ROOT.commands.items() for inner, leaf in (
    [((sub,), leaf) for sub, leaf in command.commands.items()] if hasattr(command, 'commands') else [((), command)])}


def test_every_option_is_in_one_panel_and_there():
    named = [option for options in PANELS.values() for option in options]
    assert len(named) == len({*named})
    assert {*named} <= {parameter.name for leaf in LEAVES.values() for parameter in leaf.params}


def test_what_everybody_needs_comes_first(run):
    result = run('convert', '--help')
    panels = dict(re.findall(r'╭─ ([\w ]+) ─+╮\n(.*?)╰', result.out, re.DOTALL))
    assert [*panels][:4] == ['Arguments', 'Options', 'Neurons', 'Thresholds']
    first = re.findall(r'--([\w-]+)', panels['Options'])
    assert {'output', 'levels', 'calibration'} <= {*first} and len(first) <= 10
    assert '--attention-fire' in panels['Neurons'] and '--crop-pct' in panels['Preprocessing']


def test_commands_stand_in_the_order_of_the_work(run):
    out = run('--help').out
    assert re.findall(r'╭─ ([\w ]+) ─', out) == ['Options', *COMMANDS, 'Detectors']
    names = re.findall(r'^│ ([a-z]+) ', out, re.MULTILINE)
    assert names == [*ROOT.commands] and {'list', 'detect', 'search'} <= {*names}


@pytest.mark.parametrize('path', LEAVES, ids=' '.join)
def test_help_ends_with_an_example_that_can_be_run(run, path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    out = run(*path, '--help').out
    assert '…' not in out, 'a word is cut'
    example = ' '.join(out.rpartition(' Example: ')[2].split())
    name, *args = spread(shlex.split(example)[1:])
    if len(path) > 1:
        assert args.pop(0) == path[1]
    assert example.startswith('sformer ') and name == path[0]
    with LEAVES[path].make_context(path[-1], args) as context:  # fails at an option that is not there
        assert {parameter.name for parameter in LEAVES[path].params if parameter.required} <= {
            key for key, value in context.params.items() if value is not None}


def test_shell_completion(monkeypatch, run):
    for words, expected in (('sformer conv', ['convert']), ('sformer convert --attention', ['--attention-fire'])):
        monkeypatch.setenv('_SFORMER_COMPLETE', 'complete_bash')
        monkeypatch.setenv('COMP_WORDS', words)
        monkeypatch.setenv('COMP_CWORD', str(words.count(' ')))
        result = run()
        assert (result.code, result.out.split()) == (0, expected)
