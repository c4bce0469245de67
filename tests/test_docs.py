"""What the pages show holds: their Python runs, the options of their commands exist, their links lead somewhere."""
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sformer.cli import main
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


EXPORTING = ('page.md', 'deploy.md')  # graphs take their time


@pytest.mark.parametrize('page', [
    pytest.param(page, marks=pytest.mark.slow) if page.name in EXPORTING else page for page in PAGES],
    ids=lambda page: page.name)
def test_python_runs(page, tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {'__name__': page.stem}  # a page is read from its top, so later blocks know what earlier ones made
    for line, text, reason in blocks(page, 'python'):
        code = compile('\n' * (line + 1) + text, str(page), 'exec')
        if reason is None:
            exec(code, names)


def test_blocks_are_found():
    shown = {page.name: blocks(page, 'python') for page in PAGES}
    run = {name for name, found in shown.items() if any(reason is None for _, _, reason in found)}
    assert len(run) >= 8 and 'README.md' in run
    assert sum(len(found) for found in shown.values()) > 20
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


@pytest.mark.slow  # the benchmark alone takes half of a minute
def test_readme_commands_run_as_they_stand(tmp_path, monkeypatch):
    """Those of the block that says so, one after another, by somebody who has nothing."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    block = text[text.index('each line runs as it stands'):].split('```')[1]
    lines = [line.split(' #')[0] for line in block.splitlines() if line.startswith('sformer ')]
    assert len(lines) >= 6
    for line in lines:
        with pytest.raises(SystemExit) as done:
            main(shlex.split(line)[1:])
        assert done.value.code == 0, line
    assert {path.name for path in tmp_path.iterdir()} >= {'out', 'report'}


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


@pytest.fixture(scope='module')
def make_tables():
    spec = importlib.util.spec_from_file_location('make_tables', ROOT / 'scripts/make_tables.py')
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'scripts')
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_files(page, make_tables):
    """Otherwise run scripts/make_tables.py."""
    text = page.read_text(encoding='utf-8')
    assert make_tables.with_tables(text) == text


def test_every_table_stands_somewhere(make_tables):
    text = ''.join(page.read_text(encoding='utf-8') for page in PAGES)
    assert {found['name'] for found in make_tables.MARK.finditer(text)} == set(make_tables.TABLES)


def test_a_table_at_the_end_of_a_page_is_written_too(make_tables):
    mark = '<!-- recipes: written by scripts/make_tables.py -->\n'
    for end in ('\n', '\n\nMore.\n'):
        assert make_tables.with_tables(f'{mark}x{end}') == f'{mark}{make_tables.recipes()}{end}'


def test_a_figure_that_moved_is_noticed(make_tables, tmp_path, monkeypatch):
    for path in (ROOT / 'docs/figures').glob('*.json'):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = json.loads((tmp_path / 'fidelity_fast.json').read_text())
    moved['results'][0]['tokens'] += 0.01
    (tmp_path / 'fidelity_fast.json').write_text(json.dumps(moved))
    monkeypatch.setattr(sys.modules[make_tables.read.__module__], 'FIGURES', tmp_path)
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert make_tables.with_tables(text) != text


def test_files_of_figures_say_how_they_were_made():
    for path in (ROOT / 'docs/figures').glob('*.json'):
        text = path.read_text(encoding='utf-8')
        found = json.loads(text)
        for record in found if isinstance(found, list) else [found]:
            assert {'command', 'versions'} <= set(record), path.name
        assert re.findall(r'(?<=["=\s])/\w+/\S*', text) == [], f'{path.name} names a folder of a machine'


def test_first_screen():
    """What it is, a picture, how to install and use it, and figures, before a reader scrolls far."""
    lines = (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 150
    assert next(i for i, line in enumerate(lines, 1) if line.startswith('![')) <= 15
    assert next(i for i, line in enumerate(lines, 1) if line.startswith('| `')) <= 60


def test_site_builds(tmp_path):
    """No link of a page leads nowhere, and every name of the reference has a docstring."""
    pytest.importorskip('mkdocs', reason="pip install '.[docs]'")
    built = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', tmp_path],
                           cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*.html')}
    assert {'index.html', 'docs/concepts/index.html', 'docs/reference/index.html'} <= pages
    assert 'sformer.conversion.convert' in (tmp_path / 'docs/reference/index.html').read_text(encoding='utf-8')
