"""`sformer list`."""
import csv
import io
import json
import re
from types import SimpleNamespace

import pytest
import timm
import torchvision

from sformer.cli.list_models import KNOWN
from sformer.saving.entrypoints import entries
from sformer.tasks import tasks


def test_list(run_here, monkeypatch):
    """Whole names at 80 columns, so that they can be searched for and copied."""
    monkeypatch.setenv('COLUMNS', '80')
    result = run_here('list')
    assert result.code == 0 and max(map(len, result.out.splitlines())) <= 80
    for name in timm.list_models('sformer*', include_tags=True, exclude_filters='sformer_custom*'):
        assert re.search(rf'^{re.escape(name)}(?: |$)', result.out, re.MULTILINE), name
    lines = result.out.splitlines()
    i = next(i for i, line in enumerate(lines) if line.startswith('sformer_base.augreg2_in21k_ft_in1k '))
    assert lines[i].split()[1:] == ['86.6', '3x224x224', 'apache-2.0']
    assert lines[i + 1].split() == ['vit_base_patch16_224.augreg2_in21k_ft_in1k']
    for name in torchvision.models.list_models(include='sformer_*'):
        assert name in map(str.rstrip, lines), name
    assert re.search(r'sformer_nano\.digits .*\n.*\n +top-1 \[%\]: 99\.\d\d \(source', result.out)


def test_list_as_csv(run_here):
    result = run_here('list', '--format', 'csv')
    assert result.code == 0
    rows = {row['name']: row for row in csv.DictReader(io.StringIO(result.out))}
    assert rows.keys() == {*timm.list_models('sformer*', include_tags=True, exclude_filters='sformer_custom*')}
    row = rows['sformer_base.augreg2_in21k_ft_in1k']
    assert row['source'] == 'vit_base_patch16_224.augreg2_in21k_ft_in1k' and row['weights'] == 'converted on first use'
    assert (row['num_classes'], row['license']) == ('1000', 'apache-2.0')


@pytest.mark.parametrize('counts', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['entries', 'parameters'])
def test_what_is_listed_is_registered(counts, monkeypatch):
    """Or `python scripts/make_list.py` is to be run again. Building all to count their parameters takes seconds."""
    known = json.loads(KNOWN.read_text(encoding='utf-8'))
    if not counts:
        monkeypatch.setattr(timm, 'create_model', lambda name: SimpleNamespace(parameters=lambda: ()))
        known['models'] = [dict(entry, param_count=0) for entry in known['models']]
    others = [dict(heading=task.heading, names=task.names()) for task in tasks() if task.names()]
    assert known == dict(models=[*entries()], others=others)
