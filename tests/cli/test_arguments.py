"""Arguments as users type them."""
import math

import pytest

from sformer import SFormerError
from sformer.cli.arguments import expand_home, parse_dataset_ids, parse_kwargs, spread
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
