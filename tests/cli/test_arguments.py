"""Arguments as users type them."""
import math

import pytest

from sformer import SFormerError
from sformer.cli.arguments import expand_home, parse_dataset_ids, parse_kwargs, parse_names, spread
from sformer.cli.options import CropPct, Mean, Std
from sformer.data.preprocessing import check_preprocessing


def test_spread():
    assert spread(['--std', '-.1', '2', '-o', 'x', 'y']) == ['--std', '-.1', '--std', '2', '-o', 'x', 'y']
    assert spread(['--mean', '1', '--mean', '2']) == ['--mean', '1', '--mean', '2']
    assert spread(['a', '--model-kwargs', 'b=1', 'c=-1', '--flag', 'd']) == [
        'a', '--model-kwargs', 'b=1', '--model-kwargs', 'c=-1', '--flag', 'd']


def test_parse_kwargs():
    assert parse_kwargs(['img_size=32', 'global_pool=avg', 'size=(1, 2)', 'x=None', 'y=a=b', 'lr=1e-3']) == dict(
        img_size=32, global_pool='avg', size=(1, 2), x=None, y='a=b', lr=1e-3)
    assert parse_kwargs(None) == {}
    for bad in ('img_size', '=3', '1x=2', 'a b=3'):
        with pytest.raises(SFormerError, match='key=value'):
            parse_kwargs([bad])


def test_values_that_are_none(capsys):
    for args, message in ((['--mean'], '--mean has no values'),
                          (['--model-kwargs', 'a=1', 'vit'], "key=value pairs, got 'vit'; the name of a model goes")):
        with pytest.raises(SystemExit) as done:
            spread(args)
        err = capsys.readouterr().err
        assert done.value.code == 2 and message in err and len(err.splitlines()) == 1


def test_expand_home(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    for arg, expected in (
            ('~/x', '/home/me/x'), ('~', '/home/me'), ('--output=~/x', '--output=/home/me/x'),
            ('local-dir:~/x', 'local-dir:/home/me/x'), ('x~', 'x~'), ('a/~/b', 'a/~/b'), ('k=~/x', 'k=~/x'), ('', ''),
            ('hf-hub:a/b', 'hf-hub:a/b')):
        assert expand_home(arg) == expected


@pytest.mark.parametrize('name, content', [
    ('names.txt', '\ufeffcat \r\nhot dog\r\n\r\n'), ('names.json', '["cat", "hot dog"]'),
    ('names.JSON', '{"1": "hot dog",\n "0": "cat"}'), ('names.json', '{"hot dog": 1, "cat": 0}')])
def test_parse_names(tmp_path, name, content):
    """Lines of JSON are no names."""
    file = tmp_path / name
    file.write_bytes(content.encode())
    assert parse_names([str(file)]) == ['cat', 'hot dog']
    assert parse_names(['cat', 'hot dog']) == ['cat', 'hot dog'] and parse_names(None) is None


@pytest.mark.parametrize('content, message', [
    ('{"0": ["n01440764", "tench"]}', 'holds no names of classes'), ('3', 'holds no names'), ('[]', 'holds no names'),
    ('[1, 2', 'cannot be read as JSON')])
def test_json_of_something_else(tmp_path, content, message):
    (tmp_path / 'names.json').write_text(content)
    with pytest.raises(SFormerError, match=message):
        parse_names([str(tmp_path / 'names.json')])


def test_parse_dataset_ids():
    assert parse_dataset_ids(['data/a=org/b', 'x=y=org/z']) == {'data/a': 'org/b', 'x=y': 'org/z'}
    assert parse_dataset_ids(None) == {}
    for bad in ('x', '=org/x', 'x='):
        with pytest.raises(SFormerError, match='NAME=org/dataset'):
            parse_dataset_ids([bad])


@pytest.mark.parametrize('name, option', [('mean', Mean), ('std', Std), ('crop_pct', CropPct)])
def test_ranges_of_preprocessing_are_those_of_the_library(name, option):
    info, = option.__metadata__

    def value(number):
        return number if name == 'crop_pct' else [number]
    for bound, beyond in ((info.min, -math.inf), (info.max, math.inf)):
        check_preprocessing({name: value(bound)})
        with pytest.raises(SFormerError, match=f'{name} must lie in'):
            check_preprocessing({name: value(math.nextafter(bound, beyond))})
