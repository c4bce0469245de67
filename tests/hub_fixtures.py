"""Fixtures of tests that publish to and load from the Hub, by the real client against a stand-in on the loopback
interface."""
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import constants

import sformer
from sformer import SFNConfig, cli, convert, load_model, save_model
from sformer.files import write_json
from sformer.publishing.plots import render_plots
from sformer.publishing.publish import prepare

TOKEN, READER = 'hf_writerWriter01', 'hf_readerReader01'
REPO = 'my-org/sformer_nano.digits'
FILES = {'model.safetensors', 'config.json', 'README.md', 'results/eval.json', 'plots/activity.png'}


@pytest.fixture(scope='session')
def plots_are_drawn_once():
    """They take a second; the same numbers give the same plots."""
    drawn = {}

    def remember(record):
        key = json.dumps([record.sfn, record.evaluations, record.curve, record.pictures], sort_keys=True)
        if key not in drawn:
            drawn[key] = render_plots(record)
        return drawn[key]
    with pytest.MonkeyPatch.context() as patch:
        for module in (sformer.publishing.publish, sformer.publishing.cards):
            patch.setattr(module, 'render_plots', remember)
        yield


@pytest.fixture
def hub(monkeypatch, tmp_path, caplog, plots_are_drawn_once):
    """A Hub with nothing on it, which the client of this process talks to with a token that may write."""
    with HubServer() as hub:
        template = hub.url + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no-token'))
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        real = time.sleep
        monkeypatch.setattr(time, 'sleep', lambda seconds: real(min(seconds, 0.01)))  # between the client's attempts
        yield hub
        assert not [r.path for r in hub.log if r.status == 404 and 'stand-in' in r.path], 'the stand-in lacks something'
        assert not any(r.authorized for r in hub.log if r.host.startswith('localhost')), 'the token left the Hub'
        assert TOKEN not in caplog.text
        for path in tmp_path.rglob('*'):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes() or path.name == 'leak.json', path


@pytest.fixture
def run_here(capsys):
    """`sformer ARGS` in this process: exit code, stdout and stderr; a mistake is one line without a token."""
    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert TOKEN not in out + err and READER not in out + err
        if done.value.code:
            lines = [line for line in err.splitlines() if line.startswith('sformer: error: ')]
            assert len(lines) == 1 and 'Traceback' not in err, err
        return SimpleNamespace(code=done.value.code, out=out, err=err)
    return run


@pytest.fixture(scope='session')
def evaluated(tmp_path_factory, model):
    """A folder with `model` and its results on digits; not to be changed."""
    folder = save_model(model, tmp_path_factory.mktemp('evaluated') / 'out')
    result = sformer.evaluate(load_model(folder), 'digits', 'test')
    write_json(folder / 'eval.json', dict(result, command='sformer evaluate out --dataset digits'))
    return folder


@pytest.fixture(scope='session')
def evaluated_other(tmp_path_factory, source, images):
    """The same with other weights."""
    folder = save_model(convert(source, [images], SFNConfig(levels=8)), tmp_path_factory.mktemp('other') / 'out')
    write_json(folder / 'eval.json', sformer.evaluate(load_model(folder), 'digits', 'test'))
    return folder


@pytest.fixture
def folder(evaluated, tmp_path):
    return Path(shutil.copytree(evaluated, tmp_path / 'out'))


@pytest.fixture
def other_folder(evaluated_other, tmp_path):
    return Path(shutil.copytree(evaluated_other, tmp_path / 'other'))


@pytest.fixture(scope='session')
def publication(evaluated, plots_are_drawn_once):
    """What is published of `evaluated`."""
    return prepare(evaluated, REPO)


@pytest.fixture
def published(hub, publication):
    """A Hub with the model on it, put there without the client."""
    hub.commit = hub.put(REPO, {path: content.read_bytes() if isinstance(content, Path) else content
                                for path, content in publication.files.items()})
    return hub


@pytest.fixture
def environment(hub, tmp_path):
    return dict(os.environ, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET='1', HF_HOME=str(tmp_path / 'home'),
                HF_TOKEN=TOKEN, PYTHONPATH=str(Path(sformer.__file__).parents[1]))


def timm_load(name=REPO, **kwargs):
    return timm.create_model(f'hf-hub:{name}', pretrained=True, **kwargs).eval()


def assert_same(a, b, images):
    with torch.no_grad():
        assert torch.equal(a(images), b(images))


def snapshot(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob('*')}


def nothing_loads(revision='main'):
    for load in (load_model, lambda n: timm.create_model(n, pretrained=True)):
        with pytest.raises(Exception, match='config.json|no such|not found|Not Found|locate|connection|SFormer'):
            load(f'hf-hub:{REPO}@{revision}')


def change_config(hub, repo_id=REPO, **changes):
    """Change the config of a published model behind everybody's back."""
    files = hub.files(repo_id)
    config = json.loads(files['config.json'])
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    hub.put(repo_id, dict(files, **{'config.json': json.dumps(config).encode()}))
