"""One table in every format."""
import csv
import shutil
import subprocess

import pytest

from sformer.cli.tables import MIN_NAMES, Format, print_table, show_table, table_lines

HEADS = ('network', 'drop [points]', 'spikes')
ROWS = [('W8A8, NNCF', '-0.5 ± 0.3', '1_000'), ('a|b & 50 % of {x} ^ ~ \\', '1.25', '')]


def test_markdown():
    assert table_lines(Format.md, 'three -- columns', HEADS, ROWS) == [
        '<!-- three - - columns -->', '| network | drop [points] | spikes |', '| --- | ---: | ---: |',
        '| W8A8, NNCF | -0.5 ± 0.3 | 1_000 |', '| a\\|b & 50 % of {x} ^ ~ \\ | 1.25 |  |']


def test_latex():
    lines = table_lines(Format.latex, 'title', HEADS, ROWS)
    assert lines[:3] == ['% title', r'\begin{tabular}{lrr}', r'\toprule']
    assert lines[5] == r'W8A8, NNCF & $-$0.5 $\pm$ 0.3 & 1\_000 \\'
    assert lines[6] == (r'a|b \& 50 \% of \{x\} \textasciicircum{} \textasciitilde{} \textbackslash{} & 1.25 &  \\')
    assert lines[-2:] == [r'\bottomrule', r'\end{tabular}']


@pytest.mark.skipif(shutil.which('pdflatex') is None, reason='no LaTeX is here')
def test_latex_compiles(tmp_path):
    lines = [r'\documentclass{article}\usepackage[utf8]{inputenc}\usepackage{booktabs}\begin{document}',
             *table_lines(Format.latex, 'title', HEADS, ROWS), r'\end{document}']
    (tmp_path / 'table.tex').write_text('\n'.join(lines), encoding='utf-8')
    subprocess.run(['pdflatex', '-halt-on-error', 'table.tex'], cwd=tmp_path, check=True, capture_output=True)


def test_csv_has_the_columns_of_records_if_there_are_some(capsys):
    show_table(Format.csv, 'title', HEADS, ROWS)
    assert list(csv.reader(capsys.readouterr().out.splitlines())) == [[*HEADS], *map(list, ROWS)]
    show_table(Format.csv, 'title', HEADS, ROWS, ('a', 'b'), [dict(b=1, c=2)])
    assert capsys.readouterr().out == 'a,b\n,1\n'


@pytest.mark.parametrize('width', [60, 80, 300])
def test_columns_without_room_stand_below(capsys, monkeypatch, width):
    monkeypatch.setenv('COLUMNS', str(width))
    heads = ['a rather long name of a network', *(f'column-{i}' for i in range(12))]
    rows = [[f'the name of row {i}, which is long', *(f'{i}.{j}' for j in range(12))] for i in range(2)]
    print_table('title', heads, rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    found = [word for line in out.splitlines() for word in line.split()]
    assert all(found.count(f'{i}.{j}') == 1 for i in range(2) for j in range(12))
    tables = out.count('column-0') and sum('───' in line for line in out.splitlines())
    assert tables == {60: 3, 80: 2, 300: 1}[width] and MIN_NAMES + 10 * 4 <= 60
