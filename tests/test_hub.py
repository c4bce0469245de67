"""Publishing to and loading from the Hub, by the real client against a stand-in on the loopback interface."""
import json
import shutil
import time

import huggingface_hub
import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, constants

import sformer
from sformer import SFormerError, load_model, save_model
from sformer.publish import prepare, publish
from sformer.utils import file_hash, state_hash, write_json

TOKEN = 'hf_writerWriter01'
REPO = 'my-org/sformer_nano.digits'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with nothing on it, which the client of this process talks to with a token that may write."""
    with HubServer() as hub:
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.url + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        real = time.sleep
        monkeypatch.setattr(time, 'sleep', lambda seconds: real(min(seconds, 0.01)))  # between the client's attempts
        yield hub


@pytest.fixture(scope='session')
def evaluated(tmp_path_factory, model):
    """A folder with `model` and its results on digits; not to be changed."""
    folder = save_model(model, tmp_path_factory.mktemp('evaluated') / 'out')
    result = sformer.evaluate(load_model(folder), 'digits', 'test')
    write_json(folder / 'eval.json', dict(result, command='sformer evaluate out --dataset digits'))
    return folder


@pytest.fixture
def folder(evaluated, tmp_path):
    return shutil.copytree(evaluated, tmp_path / 'out')


def assert_same(a, b, images):
    with torch.no_grad():
        assert torch.equal(a(images), b(images))


def test_round_trip(hub, folder, model, images):
    done = publish(folder, REPO)
    assert done.changed and done.url.endswith(done.commit)
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    assert_same(loaded, model, images)
    assert set(hub.files(REPO)) == {
        '.gitattributes', 'model.safetensors', 'config.json', 'README.md', 'results/eval.json', 'plots/firing_rates.png'}
    assert len(hub.repos[REPO].commits) == 2, 'the initial one and ours'
