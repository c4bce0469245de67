"""CITATION.cff, the BibTeX of the README and pyproject say the same of this software and of the paper."""
import re
import tomllib
from pathlib import Path

import yaml

import sformer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
CITATION = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))


def bibtex():
    """Fields of the entries of the README, by their kind, without braces."""
    block, = re.findall(r'^```bibtex\n(.*?)^```$', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M | re.S)
    entries = re.findall(r'^@(\w+)\{(\w+),\n(.*?)^\}$', block, re.M | re.S)
    assert block.count('@') == len(entries) and block.count('{') == block.count('}')
    fields = {kind: dict(re.findall(r'^  (\w+) = \{(.*)\},?$', text, re.M)) for kind, _, text in entries}
    return {kind: {key: re.sub('[{}]', '', value) for key, value in found.items()} for kind, found in fields.items()}


def test_software():
    entry = bibtex()['software']
    assert entry['version'] == CITATION['version'] == PROJECT['version'] == sformer.__version__
    said = PROJECT['description']
    assert entry['title'] == CITATION['title'] == f'SFormer: {said[0].lower()}{said[1:]}'
    assert [entry['author']] == [a['name'] for a in CITATION['authors']] == [a['name'] for a in PROJECT['authors']]
    assert CITATION['license'] == PROJECT['license'] and CITATION['keywords'] == PROJECT['keywords']


def test_paper():
    paper, = CITATION['references']
    entry = bibtex()['article']
    assert (entry['title'], entry['journal']) == (paper['title'], paper['identifiers'][0]['value'])
    assert [entry['author']] == [author['name'] for author in paper['authors']] and entry['year'] == str(paper['year'])
    assert paper['url'] == PROJECT['urls']['Paper']


def test_the_file_has_what_its_format_needs():
    assert {'cff-version', 'message', 'title', 'authors'} <= CITATION.keys() and CITATION['type'] == 'software'
    assert all({'type', 'title', 'authors'} <= reference.keys() for reference in CITATION['references'])
