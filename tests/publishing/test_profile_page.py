"""The report of a profile: one page that asks nothing of the network, and the same as files."""
import base64
import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from sformer import SFormerError
from sformer.profiling import energy, profile_model, spike_maps, verdicts
from sformer.publishing.profile_page import kind_of, read_curve, write_profile

VOID = {'meta', 'link', 'img', 'br'}


class Page(HTMLParser):
    """Tags have to nest; keeps what is linked, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags, self.text = [], [], [], ''
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ('src', 'href', 'srcset', 'action')]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope='module')
def report(model, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('profile') / 'report'
    counted = profile_model(model, [images[:4]])
    figures = energy(*counted[:3])
    result = dict(
        model='<b>mine</b>', images=dict(name='digits'), energy=figures, verdicts=verdicts(figures), executed=None,
        executed_line='', command='sformer profile',
        **{name: [dataclasses.asdict(row) for row in getattr(counted, name)] for name in counted._fields[:3]})
    curve = [dict(levels=n, top1=90. + n, energy=n / 10, source_top1=99.) for n in (4, 8)]
    write_profile(folder, result, counted, images[0] / 2 + 0.5, spike_maps(model, images[0]), curve)
    return folder, result, counted


def test_the_page_needs_nothing_else(report):
    text = (report[0] / 'index.html').read_text()
    page = Page(text)
    assert page.links and all(link.startswith('data:') for link in page.links)
    assert 'script' not in page.tags and 'iframe' not in page.tags
    assert not re.search(r'https?://|@import|url\(', text)
    assert 'width=device-width' in text and '<b>mine' not in text and '<b>mine</b>' in page.text
    pictures = [link for link in page.links if link.startswith('data:image/png')]
    titles = ['activity_per_site', 'levels', 'energy', 'points', 'spikes_per_neuron']
    for link, title in zip(pictures, titles, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(link.partition(',')[2]))) as image:
            assert title in json.loads(image.info['sformer']) and image.width > 300


def test_the_page_says_what_was_counted(report):
    _, result, counted = report
    page = Page((report[0] / 'index.html').read_text())
    words = ' '.join(page.text.split())
    for line in result['verdicts']:
        assert ' '.join(line.split()) in words
    for row in result['energy']['constants']:
        assert row['name'] in page.text and row['source'] in page.text
    assert all(o.name in page.text for o in counted.operations) and all(f.name in page.text for f in counted.floating)
    assert f'{result["energy"]["account"]["graded"]["total"]:.4g}' in page.text


def test_files_beside_it_hold_the_same(report, model):
    folder, result, counted = report
    written = json.loads((folder / 'profile.json').read_text())
    assert written['energy'] == result['energy'] and 'torch' in written['versions']
    assert sum(written['sites'][1]['histogram'].values()) == counted.sites[1].neurons * 4
    for name in ('operations', 'sites', 'floating'):
        rows = list(csv.DictReader((folder / f'{name}.csv').open()))
        assert [row['name'] for row in rows] == [row.name for row in getattr(counted, name)]
    with Image.open(folder / 'maps.png') as image:
        maps = json.loads(image.info['sformer'])['spikes_per_neuron']
    assert torch.tensor(maps['blocks.0']).shape == (4, 4)
    with Image.open(folder / 'activity.png') as image:
        activity = json.loads(image.info['sformer'])
    assert activity['levels'] == model.sfn_config.levels
    assert activity['activity_per_site'] == {site.name: site.activity for site in counted.sites}


def test_curves(tmp_path):
    path = tmp_path / 'curve.json'
    path.write_text(json.dumps({'curve': [{'levels': 8, 'top1': 90, 'dataset': 'x'}]}))
    assert read_curve(path) == [dict(levels=8., top1=90.)]
    for content in ('[', '[1]', '{}', '[{"levels": 8}]', '[{"levels": 8, "top1": "high"}]', '[' * 10 ** 5,
                    '[{"levels": 8, "top1": 1%s}]' % ('0' * 400)):
        path.write_text(content)
        with pytest.raises(SFormerError, match='curve.json'):
            read_curve(path)


@pytest.mark.parametrize('key, value', [
    ('top1', 'NaN'), ('top1', '101'), ('top1', '-1'), ('levels', 'NaN'), ('levels', '0'), ('levels', 'Infinity'),
    ('energy', 'NaN'), ('energy', 'Infinity'), ('energy', '-0.1'), ('source_top1', 'NaN'), ('top1', '"nan"')])
def test_points_that_cannot_be(tmp_path, key, value):
    """A curve with NaN was drawn without a word."""
    good = '{"levels": 8, "top1": 90, "energy": 1, "source_top1": 95}'
    (tmp_path / 'curve.json').write_text(f'[{good}, {good[:-1]}, "{key}": {value}}}]')
    with pytest.raises(SFormerError, match=f'curve.json: {key} of point number 1 is '):
        read_curve(tmp_path / 'curve.json')


def test_the_page_names_nobodys_folders(report, tmp_path, monkeypatch):
    """It is made to be shared; its title was a path of whoever made it."""
    folder, result, counted = report
    secret = tmp_path / 'me' / 'secret'
    (secret / 'net').mkdir(parents=True)
    (secret / 'photos').mkdir()
    monkeypatch.chdir(secret / 'net')
    for model in (f'local-dir:{secret}/net', 'vit.net'):
        command = f'sformer profile {model} --dataset {secret}/photos --curve={secret}/c.json -o {tmp_path}/page'
        write_profile(tmp_path / 'page', dict(result, model=str(model), command=command, images=dict(
            name=str(secret / 'photos'))), counted)
        page = Page((tmp_path / 'page' / 'index.html').read_text())
        title = str(model) if str(model)[:2] in ('hf', 'vi') else 'net'
        assert f'Profile of {title}\n' in page.text and '4 images of photos;' in ' '.join(page.text.split())
        assert '--dataset photos --curve=c.json -o page' in page.text and 'secret' not in page.text
    assert json.loads((tmp_path / 'page' / 'profile.json').read_text())['command'] == command


@pytest.mark.parametrize('name, kind', [
    ('blocks.3.mlp.fc2.neuron', 'mlp.fc2'), ('blocks.11.mlp.fc2.neuron', 'mlp.fc2'), ('head.neuron', 'head'),
    ('blocks.0.attn.products.0.q_neuron', 'attn.q_neuron'), ('patch_embed.proj.neuron', 'patch_embed.proj')])
def test_sites_of_all_blocks_are_of_one_kind(name, kind):
    assert kind_of(name) == kind
