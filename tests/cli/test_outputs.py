"""No command replaces what is not its own, whatever option names it; noticed before any work, in one line."""
import json
import os
import sys

import pytest
from cli_process import NAME

from sformer.files import holds, may_write, write_file

DIGITS = '--dataset', 'digits', '--num-images', '4'
# command line, and the file that it would write, `{out}` being what is named
FILES = {
    'evaluate, JSON': ('evaluate {saved} --dataset digits --results-file {out}', 'r.json'),
    'evaluate, CSV': ('evaluate {saved} --dataset digits --results-file {out}', 'r.csv'),
    'compare': ('compare {saved} {saved} --dataset digits --results-file {out}', 'r.json'),
    'sweep': ('sweep {saved} --dataset digits --results-file {out}', 'r.json'),
    'search': ('search {saved} --dataset digits --results-file {out}', 'r.json'),
    'search, journal': ('search {saved} --dataset digits --storage {out}', 'trials'),
    'baselines': ('baselines {saved} --dataset digits --results-file {out}', 'r.json'),
    'benchmark': ('benchmark {saved} --results-file {out}', 'r.json'),
    'export': ('export {saved} {out}', 'm.onnx'),
    'predict, CSV': ('predict {saved} nothing.png -o {out}', 'p.csv'),
    'predict, JSON': ('predict {saved} nothing.png -o {out}', 'p.json'),
    'predict, PNG': ('predict {saved} nothing.png -o {out}', 'p.png'),
    'detect show': ('detect show nowhere nothing.png -o {out}', 'p.png'),
    'detect show, JPEG': ('detect show nowhere nothing.png -o {out}', 'p.jpg'),
}
FOLDERS = {
    'convert': (f'convert {NAME} -o {{out}}', 'config.json'),
    'distill': ('distill {saved} --dataset digits -o {out}', 'model.safetensors'),
    'detect train': ('detect train --backbone test_vit2 --data nowhere -o {out}', 'config.json'),
    'profile': ('profile {saved} -o {out}', 'sites.csv'),
    'profile, picture': ('profile {saved} -o {out}', 'energy.png'),
    'card': ('card {saved} -o {out} --name m', 'm.md'),
    'demo': ('demo -o {out}', 'accuracy.png'),
}
CASES = [pytest.param(line, name, False, id=case) for case, (line, name) in FILES.items()]
CASES += [pytest.param(line, name, True, id=case) for case, (line, name) in FOLDERS.items()]


@pytest.fixture
def refuse(run, saved):
    def refuse(line, out, *messages):
        result = run(*line.format(saved=saved, out=out).split())
        assert result.code == 1 and result.err.count('\n') == 1, result.err
        assert any(message in result.err for message in messages), result.err
    return refuse


@pytest.mark.parametrize('line, name, is_folder', CASES)
def test_files_of_others_stay(refuse, tmp_path, line, name, is_folder):
    out = tmp_path / 'place'
    file = out / name
    out.mkdir()
    file.write_text('{"mine": [1, 2, 3]}')
    refuse(line, out if is_folder else file, 'is there', 'holds a model already', 'is no CSV file of results')
    assert file.read_text() == '{"mine": [1, 2, 3]}' and [*out.iterdir()] == [file]


@pytest.mark.parametrize('line, name, is_folder', CASES)
def test_places_where_nothing_can_be(refuse, tmp_path, monkeypatch, line, name, is_folder):
    suffix = '' if is_folder else f'/{name}'
    (tmp_path / 'file').write_text('')
    refuse(line, f'{tmp_path}/file{suffix}', 'is a file, not a folder')
    (tmp_path / 'link').symlink_to('gone/away')
    refuse(line, f'{tmp_path}/link{suffix}', 'is a link to gone/away, which does not exist')
    (tmp_path / 'folder' / name).mkdir(parents=True)
    refuse(line, f'{tmp_path}/folder{suffix}', f'{name} is a folder')
    monkeypatch.setattr('os.access', lambda path, mode: mode != os.W_OK)
    refuse(line, f'{tmp_path}/new{suffix}', 'is read-only for you')
    assert not (tmp_path / 'new').exists() and (tmp_path / 'file').read_text() == ''


@pytest.mark.skipif(sys.platform == 'win32', reason='no pipes')
@pytest.mark.parametrize('line, name, is_folder', CASES)
def test_pipes_stay(refuse, tmp_path, line, name, is_folder):
    os.mkfifo(tmp_path / name)
    refuse(line, tmp_path if is_folder else tmp_path / name, 'is no regular file')


def test_a_sweep_replaces_its_own(run_inside, saved, tmp_path):
    """And a link to it stays; an evaluation does not take its place, nor it that of one."""
    sweep = 'sweep', saved, *DIGITS, '--num-calibration', '4', '--levels', '4', '--results-file'
    (tmp_path / 'there').mkdir()
    (tmp_path / 'link.json').symlink_to('there/sweep.json')
    for _ in range(2):
        assert run_inside(*sweep, 'link.json')[0] == 0
    assert (tmp_path / 'link.json').is_symlink()
    assert len(json.loads((tmp_path / 'link.json').read_text())['points']) == 1
    evaluate = 'evaluate', saved, *DIGITS, '--results-file'
    code, _, err = run_inside(*evaluate, 'link.json')
    assert code == 1 and 'holds no results, which would take its place' in err
    assert run_inside(*evaluate, 'r.json')[0] == 0
    code, _, err = run_inside(*sweep, 'r.json')
    assert code == 1 and 'r.json is there and holds no points of a sweep or search' in err


def test_what_may_be_replaced(tmp_path):
    file = tmp_path / 'f'
    for text, own in (('', True), ('{"a": 1, "b": 2}', True), ('{"a": 1}', False), ('[1]', False), ('{', False)):
        file.write_text(text)
        assert holds('a', 'b')(file) == own
    assert may_write(file, 'thing', overwrite=True) == file
    (tmp_path / 'link').symlink_to(file)
    assert may_write(tmp_path / 'link', 'thing', overwrite=True) == file
    write_file(tmp_path / 'link', b'new')
    assert file.read_bytes() == b'new' and (tmp_path / 'link').is_symlink()
