"""What the pages show holds: their Python runs, the options of their commands exist, their links lead somewhere."""
import re
import shlex
from pathlib import Path

import pytest
import typer

from sformer.cli.app import app
from sformer.layers import FLOATING_LAYERS, SPIKING_LAYERS

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md',
                           *sorted((ROOT / 'docs').glob('*.md'))) if path.exists()]
BLOCK = re.compile(r'(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$', re.M | re.S)


def blocks(page, language):
    """Blocks of a page: the line where one starts, its text, and why it is not run, if it is not."""
    text = page.read_text(encoding='utf-8')
    return [(text[:m.start('text')].count('\n'), m['text'], m['reason'])
            for m in BLOCK.finditer(text) if m['language'] == language]


def commands(page):
    """Calls of `sformer` in the shell blocks of a page: line, arguments."""
    for start, text, _ in blocks(page, 'bash'):
        for line in text.replace('\\\n', ' ').splitlines():
            found = re.search(r'(?:^|&& |-m )sformer (.+)', line.split(' #')[0].strip())
            if found:
                yield start, shlex.split(re.sub(r'[][]', '', found[1]))


@pytest.fixture
def tables():
    """Layers that a page registers are forgotten."""
    spiking, floating = dict(SPIKING_LAYERS), set(FLOATING_LAYERS)
    yield
    SPIKING_LAYERS.clear()
    SPIKING_LAYERS.update(spiking)
    FLOATING_LAYERS.clear()
    FLOATING_LAYERS.update(floating)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_python_runs(page, tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {'__name__': page.stem}  # a page is read from its top, so later blocks know what earlier ones made
    for line, text, reason in blocks(page, 'python'):
        code = compile('\n' * (line + 1) + text, str(page), 'exec')
        if reason is None:
            exec(code, names)


def test_blocks_are_found():
    assert all(any(reason is None for _, _, reason in blocks(page, 'python'))
               for page in PAGES if page.parent == ROOT / 'docs' or page.name == 'README.md')
    assert sum(1 for page in PAGES for _ in commands(page)) > 10


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    known = typer.main.get_command(app).commands
    for line, (name, *args) in commands(page):
        command = known[name]
        if hasattr(command, 'commands'):  # of `detect`, say
            command = command.commands[args.pop(0)]
        options = {option for parameter in command.params
                   for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {arg.split('=')[0] for arg in args if arg.startswith('-') and not re.match(r'-?[\d.]', arg[1:])}
        assert used <= options, f'{page.name}:{line} {sorted(used - options)}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r'^```.*?^```$', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        path, _, anchor = target.partition('#')
        if not re.match(r'\w+:', target):
            there = page.parent / path if path else page
            assert there.exists(), f'{page.name}: {target}'
            if anchor:
                heads = re.findall(r'^#+ (.+)$', there.read_text(encoding='utf-8'), re.M)
                assert anchor in {re.sub(r'[^\w -]', '', head.lower()).replace(' ', '-') for head in heads}, target
