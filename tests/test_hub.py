"""Publishing to and loading from the Hub, by the real client against a stand-in on the loopback interface."""
import errno
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import NANO
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants, file_download
from safetensors.torch import load_file, save_file

import sformer
from sformer import SFNConfig, SFormerError, UncalibratedError, cli, convert, load_model, save_model
from sformer.cards import render_plots
from sformer.hub import open_model
from sformer.publish import prepare, publish, upload
from sformer.utils import file_hash, write_json

TOKEN, READER = 'hf_writerWriter01', 'hf_readerReader01'
REPO = 'my-org/sformer_nano.digits'
FILES = {'model.safetensors', 'config.json', 'README.md', 'results/eval.json', 'plots/firing_rates.png'}


@pytest.fixture(scope='session', autouse=True)
def plots_are_drawn_once():
    """They take a second; the same numbers give the same plots."""
    drawn = {}

    def remember(record):
        key = json.dumps([record.conversion.get('recipe'), record.evaluations, record.curve], sort_keys=True)
        if key not in drawn:
            drawn[key] = render_plots(record)
        return drawn[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sformer.publish, 'render_plots', remember)
        yield


@pytest.fixture
def hub(monkeypatch, tmp_path, caplog):
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
def run(capsys):
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
def publication(evaluated):
    """What is published of `evaluated`."""
    return prepare(evaluated, REPO)


@pytest.fixture
def published(hub, publication):
    """A Hub with the model on it, put there without the client."""
    hub.commit = hub.put(REPO, {path: content.read_bytes() if isinstance(content, Path) else content
                                for path, content in publication.files.items()})
    return hub


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


# publishing -----------------------------------------------------------------------------------------------------------

def test_round_trip(hub, folder, model, images):
    before = snapshot(folder)
    done = publish(folder, REPO)
    assert done.changed and done.url == f'{hub.url}/{REPO}/commit/{done.commit}'
    assert_same(timm_load(), model, images)
    loaded = load_model(f'hf-hub:{REPO}')
    assert_same(loaded, model, images)
    config = json.loads((folder / 'config.json').read_text())
    assert loaded.conversion == config['sformer'] and loaded.conversion['source'] == 'vit_tiny_patch16_224'
    assert len(hub.repos[REPO].commits) == 2, 'the initial one and ours'
    assert snapshot(folder) == before


def test_what_the_hub_shows(hub, folder):
    publish(folder, REPO)
    assert set(HfApi(endpoint=hub.url).list_repo_files(REPO)) == FILES | {'.gitattributes'}
    for name in ('model.safetensors', 'config.json'):
        assert hub.files(REPO)[name] == (folder / name).read_bytes()
    assert json.loads(hub.files(REPO)['results/eval.json']) == json.loads((folder / 'eval.json').read_text())
    assert hub.files(REPO)['plots/firing_rates.png'][:4] == b'\x89PNG'
    info = HfApi(endpoint=hub.url).model_info(REPO)
    assert info.library_name == 'timm' and info.pipeline_tag == 'image-classification' and 'sformer' in info.tags
    ModelCard(hub.files(REPO)['README.md'].decode()).validate()


def test_twice_is_once(hub, folder, run):
    assert publish(folder, REPO).changed
    uploads, commits = hub.count('PUT', '/lfs/'), hub.count('POST', '/commit/')
    again = publish(folder, REPO)
    assert not again.changed and again.commit == hub.repos[REPO].refs['main']
    result = run('publish', folder, REPO)
    assert result.code == 0 and 'nothing has changed' in result.out
    assert (hub.count('PUT', '/lfs/'), hub.count('POST', '/commit/')) == (uploads, commits)
    assert len(hub.repos[REPO].commits) == 2


def test_new_weights_replace_what_was_measured_of_the_old_ones(hub, folder, other_folder, images):
    (folder / 'eval.json').rename(folder / 'old-name.json')
    first = publish(folder, REPO).commit
    hub.put(REPO, dict(hub.files(REPO), **{'notes.md': b'mine'}))
    second = publish(other_folder, REPO).commit
    assert set(hub.files(REPO)) == FILES | {'.gitattributes', 'notes.md'}, 'results of the old weights stay'
    assert_same(timm_load(), load_model(other_folder), images)
    assert_same(timm_load(f'{REPO}@{first}'), load_model(folder), images)
    assert first != second


def test_multipart_upload(hub, folder, model, images):
    hub.multipart_above = 300_000
    publish(folder, REPO)
    assert hub.count('PUT', r'/lfs/\w+/3$') == 1
    assert_same(timm_load(), model, images)


def test_only_what_belongs_to_the_model_is_published(hub, folder):
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(1))
    (folder / 'diary.txt').write_text('mine')
    (folder / 'notes.json').write_text('{"a": 1}')
    publish(folder, REPO)
    assert set(hub.files(REPO)) == FILES | {'.gitattributes'}


def test_private(hub, folder, run, monkeypatch):
    result = run('publish', folder, REPO, '--private')
    assert result.code == 0 and hub.repos[REPO].private
    timm_load()
    for token in (None, READER):
        monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        with pytest.raises(SFormerError, match=f'{REPO}: there is no such repository .* private .*HF_TOKEN'):
            load_model(f'hf-hub:{REPO}')
        with pytest.raises(Exception, match='Repository Not Found'):
            timm_load()
        result = run('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits')
        assert result.code == 1 and 'there is no such repository on the Hub, or it is private' in result.err


def test_private_does_not_publish_to_a_public_repository(hub, folder, run):
    hub.put(REPO, {'mine.txt': b'mine'})
    result = run('publish', folder, REPO, '--private')
    assert result.code == 1 and 'there and public' in result.err
    assert set(hub.files(REPO)) == {'mine.txt'}


def test_pull_request(hub, folder, run, model, images):
    hub.put(REPO, {'mine.txt': b'mine'})
    result = run('publish', folder, REPO, '--create-pr')
    assert result.code == 0 and f'{hub.url}/{REPO}/discussions/1' in result.out and 'published' in result.out
    assert set(hub.files(REPO)) == {'mine.txt'}
    assert_same(timm_load(f'{REPO}@refs/pr/1'), model, images)
    nothing_loads()
    result = run('publish', folder, REPO, '--create-pr')
    assert result.code == 0 and 'discussions/1' in result.out and 'nothing has changed' in result.out
    assert len(hub.repos[REPO].pulls) == 1, 'the same proposal twice'


def test_pull_request_to_others(hub, folder, monkeypatch):
    """Who may not write may still propose."""
    hub.put(REPO, {'mine.txt': b'mine'})
    monkeypatch.setenv('HF_TOKEN', READER)
    with pytest.raises(SFormerError, match='the access token does not permit this'):
        publish(folder, REPO)
    assert publish(folder, REPO, create_pr=True).url.endswith('/discussions/1')


def test_dry_run_needs_no_network_and_no_token(hub, folder, run, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    before = snapshot(folder)
    result = run('publish', folder, REPO, '--dry-run')
    assert result.code == 0 and hub.log == [] and snapshot(folder) == before
    lines = {line.split()[2]: line.split()[:2] for line in result.out.splitlines()[1:len(FILES) + 1]}
    assert lines.keys() == FILES
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert run('publish', folder, REPO).code == 0
    for path, (size, sha256) in lines.items():
        content = hub.files(REPO)[path]
        assert (int(size.replace(',', '')), sha256) == (len(content), hashlib.sha256(content).hexdigest()), path
    assert hub.files(REPO)['README.md'].decode().strip() in result.out


# what is refused ------------------------------------------------------------------------------------------------------

def test_not_evaluated(hub, folder, other_folder, run):
    (folder / 'eval.json').unlink()
    result = run('publish', folder, REPO)
    assert result.code == 1 and 'was not evaluated' in result.err and '--results-file' in result.err
    shutil.copy(other_folder / 'eval.json', folder / 'theirs.json')
    result = run('publish', folder, REPO)
    assert result.code == 1 and 'theirs.json: results of other weights' in result.err
    assert hub.log == []
    result = run('publish', folder, REPO, '--force')
    assert result.code == 0 and 'theirs.json is not used: it has results of other weights' in result.err
    card = hub.files(REPO)['README.md'].decode()
    assert 'was not evaluated' in card and 'top-1' not in card and 'model-index' not in card
    assert set(hub.files(REPO)) == {'.gitattributes', 'model.safetensors', 'config.json', 'README.md'}


def test_results_of_other_weights_are_left_out(hub, folder, other_folder, run):
    shutil.copy(other_folder / 'eval.json', folder / 'theirs.json')
    result = run('publish', folder, REPO)
    assert result.code == 0 and 'theirs.json is not used' in result.err
    assert set(hub.files(REPO)) == FILES | {'.gitattributes'}


def test_uncalibrated(hub, tmp_path, run):
    model = timm.create_model('sformer_nano', img_size=8, in_chans=1, num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path / 'x'), safe_serialization=True)
    with pytest.raises(UncalibratedError, match=r'uncalibrated .* --force'):
        prepare(tmp_path / 'x', REPO)
    result = run('publish', tmp_path / 'x', REPO)
    assert result.code == 1 and hub.log == []
    assert run('publish', tmp_path / 'x', REPO, '--force').code == 0
    assert 'never calibrated' in hub.files(REPO)['README.md'].decode()


def test_without_a_recorded_hash(hub, folder):
    config = json.loads((folder / 'config.json').read_text())
    del config['sformer']['weights_sha256']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(SFormerError, match='does not record the hash'):
        publish(folder, REPO)
    assert hub.log == []


def test_damaged_folder(hub, folder, run):
    os.truncate(folder / 'model.safetensors', 10_000)
    result = run('publish', folder, REPO)
    assert result.code == 1 and 'model.safetensors is truncated or corrupted' in result.err and hub.log == []


@pytest.mark.parametrize('name', [
    'name', 'a/b/c', 'my-org/na me', 'my-org/../x', 'my-org/a--b', 'my-org/x.git', '/x', 'x/', 'my-org/ü', '-/-',
    'my-org/' + 'x' * 97])
def test_names_that_are_not_allowed(hub, folder, run, name):
    for options in ([], ['--dry-run']):
        result = run('publish', *options, '--', folder, name)
        assert result.code == 1 and 'not a name that the Hub allows' in result.err, result.err
    assert hub.log == []
    with pytest.raises(SFormerError):
        load_model(f'hf-hub:{name}')


def test_name_that_only_the_hub_refuses(hub, folder, run):
    hub.fail('POST', '/api/repos/create', 400, 'Invalid repo name: reserved')
    result = run('publish', folder, REPO)
    assert result.code == 1 and 'refuses (400' in result.err and 'reserved' in result.err
    result = run('publish', folder, 'their-org/x')
    assert result.code == 1 and 'does not permit' in result.err and 'under this namespace' in result.err
    assert hub.repos == {}


@pytest.mark.parametrize('token, message', [
    (None, 'needs an access token'), ('hf_nobodyNobody01', 'does not accept the access token')])
def test_tokens_that_do_not_do(hub, folder, run, monkeypatch, token, message):
    monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
    result = run('publish', folder, REPO)
    assert result.code == 1 and message in result.err and 'nobody' not in result.err
    assert hub.repos == {}


def test_token_in_the_error_of_the_hub(hub, folder, run):
    """Whoever answers with what he was sent."""
    hub.fail('POST', '/api/repos/create', 403, f'token {TOKEN} and hf_someOtherSecret1 are not good enough')
    result = run('publish', folder, REPO)
    assert result.code == 1 and 'token *** and *** are not good enough' in result.err


def test_token_in_the_records(hub, folder, run):
    result = json.loads((folder / 'eval.json').read_text())
    (folder / 'eval.json').rename(folder / 'leak.json')
    write_json(folder / 'leak.json', dict(result, command=f'HF_TOKEN={TOKEN} sformer evaluate out'))
    result = run('publish', folder, REPO)
    assert result.code == 1 and 'would publish an access token' in result.err and hub.log == []


# faults of the Hub and of the connection while publishing -----------------------------------------------------------

@pytest.mark.parametrize('method, path', [
    ('POST', '/api/repos/create'), ('GET', '/api/models/'), ('POST', '/preupload/'), ('POST', 'lfs/objects/batch'),
    ('PUT', '/lfs/'), ('POST', '/verify'), ('POST', '/commit/')])
@pytest.mark.parametrize('fault', ['status', 'connection'])
def test_interrupted_publication(hub, publication, model, images, method, path, fault):
    """Nothing loads, and what was left undone is done by a second attempt."""
    if fault == 'status':
        hub.fail(method, path, 503, 'Service Unavailable', times=100)
    else:
        hub.refuse(method, path, times=100)
    expected = '503 Service Unavailable.* Try again later' if fault == 'status' else 'the connection to .* failed'
    with pytest.raises(SFormerError, match=f'{REPO}: .*{expected}') as caught:
        upload(publication)
    assert '\n' not in str(caught.value)
    hub.faults.clear()
    nothing_loads()
    upload(publication)
    assert_same(timm_load(), model, images)
    assert len(hub.repos[REPO].commits) == 2


def test_interrupted_publication_on_the_command_line(hub, folder, run):
    before = snapshot(folder)
    hub.fail('PUT', '/lfs/', 503, 'Service Unavailable', times=100)
    result = run('publish', folder, REPO)
    assert result.code == 1 and result.out == '' and 'Try again later' in result.err
    assert snapshot(folder) == before


@pytest.mark.parametrize('path', ['/lfs/', 'lfs/objects/batch', '/preupload/'])
def test_short_outage_is_sat_out(hub, publication, path):
    hub.fail('PUT', path, 500, times=2)
    hub.fail('POST', path, 500, times=2)
    assert upload(publication).changed


def test_interrupted_update_leaves_the_old_model(published, other_folder, run, model, images):
    published.fail('POST', '/commit/', 500, times=100)
    assert run('publish', other_folder, REPO).code == 1
    assert_same(timm_load(), model, images)


def test_commit_whose_answer_was_lost(hub, publication):
    """The second attempt finds everything there."""
    hub.answers_lost = 0
    real = hub.server.RequestHandlerClass.reply

    def reply(handler, code, *args, **kwargs):
        if '/commit/' in handler.path and hub.answers_lost == 0:
            hub.answers_lost = 1
            return handler.connection.shutdown(2)
        return real(handler, code, *args, **kwargs)
    hub.server.RequestHandlerClass.reply = reply
    with pytest.raises(SFormerError, match='connection'):
        upload(publication)
    assert not upload(publication).changed
    assert len(hub.repos[REPO].commits) == 2


def test_nobody_listens(hub, folder, run, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}')
    result = run('publish', folder, REPO)
    assert result.code == 1 and 'the connection to 127.0.0.1 failed' in result.err
    result = run('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits')
    assert result.code == 1 and 'the connection to 127.0.0.1 failed' in result.err


def test_ctrl_c_while_publishing(hub, folder, run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(HfApi, 'create_commit', interrupt)
    result = run('publish', folder, REPO)
    assert result.code == 130
    nothing_loads()


# loading --------------------------------------------------------------------------------------------------------------

def test_revisions(hub, folder, other_folder, images):
    first, second = publish(folder, REPO).commit, publish(other_folder, REPO).commit
    old, new = load_model(folder), load_model(other_folder)
    for name, expected in ((REPO, new), (f'{REPO}@main', new), (f'{REPO}@{first}', old), (f'{REPO}@{second}', new)):
        assert_same(timm_load(name), expected, images)
        assert_same(load_model(f'hf-hub:{name}'), expected, images)
        assert_same(open_model(f'hf-hub:{name}'), expected, images)
    assert_same(load_model(f'hf-hub:{REPO}', revision=first), old, images)
    assert timm_load(f'{REPO}@{first}').pretrained_cfg['hf_hub_id'] == f'{REPO}@{first}'
    assert timm_load().pretrained_cfg['hf_hub_id'] == f'{REPO}@{second}', 'what was verified is pinned'
    with pytest.raises(SFormerError, match='one revision and .* another'):
        load_model(f'hf-hub:{REPO}@{first}', revision=second)
    with pytest.raises(SFormerError, match='only a model on the Hub has revisions'):
        load_model(folder, revision=first)


def test_revision_that_does_not_exist(published, run):
    for name in (f'hf-hub:{REPO}@v9', f'hf-hub:{REPO}@' + 'a' * 40):
        with pytest.raises(SFormerError, match='there is no such revision'):
            load_model(name)
    assert run('evaluate', f'hf-hub:{REPO}@v9', '--dataset', 'digits').code == 1
    for name in (f'hf-hub:{REPO}@', f'hf-hub:{REPO}@a@b', 'hf-hub:', 'hf-hub:@main'):
        with pytest.raises(SFormerError, match='does not name a repository'):
            load_model(name)


def test_repository_that_does_not_exist(hub, run):
    for load in (load_model, open_model):
        with pytest.raises(SFormerError, match='my-org/nothing: there is no such repository on the Hub'):
            load('hf-hub:my-org/nothing')
    assert run('evaluate', 'hf-hub:my-org/nothing', '--dataset', 'digits').code == 1


def test_config_and_weights_are_of_one_commit(published, other_folder, model, images):
    """Somebody publishes other weights right between the two downloads."""
    def publish_more(handler):
        handler.route()
        published.put(REPO, {p.name: p.read_bytes() for p in other_folder.iterdir()})
        return True
    published.faults.append(SimpleNamespace(method='GET', path='/config.json', do=publish_more, times=1, after=0))
    assert_same(timm_load(), model, images)


def test_without_a_network_what_was_loaded_before(published, model, images, monkeypatch):
    timm_load()
    published.faults.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert_same(timm_load(), model, images)
    assert_same(load_model(f'hf-hub:{REPO}'), model, images)
    with pytest.raises(SFormerError, match='not in the local cache, .* offline mode'):
        load_model('hf-hub:my-org/another')


def test_cache_dir(published, tmp_path, model, images):
    for load in (timm_load, lambda **k: load_model(f'hf-hub:{REPO}', **k)):
        assert_same(load(cache_dir=tmp_path / 'elsewhere'), model, images)
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_loading_with_other_arguments(published):
    assert timm_load(num_classes=3)(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert load_model(f'hf-hub:{REPO}', num_classes=3)(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert timm.create_model(f'hf-hub:{REPO}')(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_evaluate_from_the_hub(published, run, tmp_path, evaluated):
    result = run('evaluate', f'hf-hub:{REPO}@{published.commit}', '--dataset', 'digits',
                 '--results-file', tmp_path / 'r.json')
    assert result.code == 0, result.err
    there, here = json.loads((tmp_path / 'r.json').read_text()), json.loads((evaluated / 'eval.json').read_text())
    for key in ('top1', 'weights_sha256', 'dataset_fingerprint', 'agreement'):
        assert there[key] == here[key]


# faults of the Hub and of the connection while loading --------------------------------------------------------------

def test_connection_cut_for_a_moment(published, model, images):
    published.cut('/cdn/', keep=100_000)
    assert_same(timm_load(), model, images)


@pytest.mark.parametrize('load', [timm_load, lambda: load_model(f'hf-hub:{REPO}')], ids=['timm', 'load_model'])
def test_connection_cut_for_good(published, model, images, load):
    published.cut('/cdn/', keep=100, times=1000)
    with pytest.raises(SFormerError, match=f'{REPO}.*: the connection to 127.0.0.1 failed'):
        load()
    published.faults.clear()
    assert_same(load(), model, images)


def test_connection_cut_on_the_command_line(published, run):
    published.cut('/cdn/', keep=100, times=1000)
    result = run('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits')
    assert result.code == 1 and 'connection' in result.err


@pytest.mark.parametrize('load', [timm_load, lambda: load_model(f'hf-hub:{REPO}')], ids=['timm', 'load_model'])
def test_corrupted_file(published, model, images, load):
    published.corrupt('/cdn/', times=1)
    assert_same(load(), model, images)  # noticed, and downloaded again
    shutil.rmtree(constants.HF_HUB_CACHE)
    published.corrupt('/cdn/', times=100)
    with pytest.raises(SFormerError, match=r'downloaded twice: .*model\.safetensors is not the file .*SHA-256 differs'):
        load()
    published.faults.clear()
    assert_same(load(), model, images)


def test_corrupted_cache(published, model, images):
    timm_load()
    path = next(Path(constants.HF_HUB_CACHE).rglob('model.safetensors')).resolve()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert_same(timm_load(), model, images)


def test_weights_that_the_config_does_not_record(published, evaluated_other, run):
    """A repository with two halves that do not belong together."""
    files = published.files(REPO)
    published.put(REPO, dict(files, **{'model.safetensors': (evaluated_other / 'model.safetensors').read_bytes()}))
    for load in (timm_load, lambda: load_model(f'hf-hub:{REPO}')):
        with pytest.raises(SFormerError, match=r'model\.safetensors is not the file that config\.json belongs to'):
            load()
    assert run('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits').code == 1


def test_weights_in_a_folder_that_the_config_does_not_record(folder, other_folder):
    """The same check where timm loads from a folder."""
    shutil.copy(other_folder / 'model.safetensors', folder)
    with pytest.raises(SFormerError, match=r'out/model\.safetensors is not the file that config\.json belongs to'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_spoilt_thresholds(published, tmp_path):
    """By a publisher who has the hash right."""
    for value in (0., float('nan'), -1.):
        state = load_file(next(iter([published_file(published, tmp_path)])))
        state['blocks.1.mlp.fc1.neuron.threshold'].fill_(value)
        save_file(state, tmp_path / 'spoilt.safetensors')
        published.put(REPO, dict(published.files(REPO), **{
            'model.safetensors': (tmp_path / 'spoilt.safetensors').read_bytes()}))
        change_config(published, sformer=dict(weights_sha256=file_hash(tmp_path / 'spoilt.safetensors')))
        with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.neuron\.threshold is'):
            load_model(f'hf-hub:{REPO}')
        with pytest.raises(RuntimeError, match=r'blocks\.1\.mlp\.fc1\.neuron\.threshold is'):
            timm_load()


def published_file(hub, tmp_path, name='model.safetensors'):
    (tmp_path / name).write_bytes(hub.files(REPO)[name])
    return tmp_path / name


@pytest.mark.parametrize('load', [timm_load, lambda: load_model(f'hf-hub:{REPO}')], ids=['timm', 'load_model'])
def test_disk_full(published, model, images, load, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'blob')
    with monkeypatch.context() as patch:
        patch.setattr(file_download, 'http_get', full)
        with pytest.raises((SFormerError, OSError), match='No space left|disk is full'):
            load()
    assert_same(load(), model, images)


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds no model."""
    mount = tmp_path / 'disk'
    mount.mkdir()
    tool = shutil.which('mount')
    command = [tool, '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(mount)]
    if not tool or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('a small file system can not be mounted here (root only)')
    yield mount
    subprocess.run(['umount', str(mount)], check=True)


def test_full_disk_for_the_cache(published, small_disk, run, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(small_disk / 'cache'))
    with pytest.raises(SFormerError, match=f'{REPO}.*: the disk is full'):
        timm_load()
    result = run('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits')
    assert result.code == 1 and 'the disk is full' in result.err


# nothing downloaded is executed, unpickled or obeyed ------------------------------------------------------------------

class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


LOADERS = pytest.mark.parametrize(
    'load', [timm_load, lambda: load_model(f'hf-hub:{REPO}')], ids=['timm', 'load_model'])


@LOADERS
@pytest.mark.parametrize('name', ['pytorch_model.bin', 'pytorch_model.pth', 'model.pth', 'open_clip_pytorch_model.bin'])
def test_pickle_instead_of_weights(published, tmp_path, load, name):
    files = published.files(REPO)
    del files['model.safetensors']
    published.put(REPO, dict(files, **{name: pickle.dumps(Bomb(tmp_path / 'boom'))}))
    with pytest.raises(SFormerError, match=r'there is no model\.safetensors. Pickled weights are not loaded'):
        load()
    assert not (tmp_path / 'boom').exists()
    assert published.count('GET', name) == 0, 'it was even downloaded'


def test_pickle_instead_of_weights_in_a_folder(folder, tmp_path, images, model):
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Bomb(tmp_path / 'boom')))
    assert_same(load_model(folder), model, images)
    (folder / 'model.safetensors').unlink()
    for load in (load_model, lambda f: timm.create_model(f'local-dir:{f}', pretrained=True)):
        with pytest.raises(SFormerError, match=r'there is no model\.safetensors'):
            load(folder)
    assert not (tmp_path / 'boom').exists()


@LOADERS
def test_pickle_by_the_name_of_weights(published, tmp_path, load):
    data = pickle.dumps(Bomb(tmp_path / 'boom'))
    published.put(REPO, dict(published.files(REPO), **{'model.safetensors': data}))
    change_config(published, sformer=dict(weights_sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(Exception, match='[Hh]eader|truncated or corrupted|can not be loaded'):
        load()
    assert not (tmp_path / 'boom').exists()


@pytest.mark.parametrize('changes, message', [
    (dict(pretrained_cfg=dict(file='/etc/passwd')), 'pretrained_cfg sets file'),
    (dict(pretrained_cfg=dict(url='http://127.0.0.1:9/x.pth')), 'pretrained_cfg sets url'),
    (dict(pretrained_cfg=dict(state_dict={'a': 1})), 'pretrained_cfg sets state_dict'),
    (dict(pretrained_cfg=dict(hf_hub_filename='pytorch_model.bin')), 'pretrained_cfg sets hf_hub_filename'),
    (dict(pretrained_cfg=dict(hf_hub_filename='../../../secret.safetensors')), 'pretrained_cfg sets hf_hub_filename'),
    (dict(pretrained_cfg=dict(hf_hub_filename='x.npz', custom_load='hf')), 'hf_hub_filename, custom_load'),
    (dict(pretrained_cfg=dict(custom_load=True)), 'pretrained_cfg sets custom_load'),
    (dict(pretrained_cfg=dict(hf_hub_id='their-org/x')), 'pretrained_cfg sets hf_hub_id'),
    (dict(pretrained_cfg=dict(source='local-dir', file='/')), 'pretrained_cfg sets file, source'),
    (dict(pretrained_cfg=dict(num_classes=7)), 'contradicts itself about num_classes'),
    (dict(model_args=dict(num_classes=7)), 'contradicts itself about num_classes'),
    (dict(model_args=dict(checkpoint_path='/etc/passwd')), 'model_args sets checkpoint_path'),
    (dict(model_args=dict(pretrained=False)), 'model_args sets pretrained'),
    (dict(model_args=dict(pretrained_cfg=dict(file='/x'))), 'model_args sets pretrained_cfg'),
    (dict(model_args=dict(pretrained_cfg_overlay=dict(file='/x'))), 'model_args sets pretrained_cfg_overlay'),
    (dict(model_args=dict(pretrained_strict=False)), 'model_args sets pretrained_strict'),
    (dict(model_args=dict(pretrained_filter_fn='os.system')), 'model_args sets pretrained_filter_fn'),
    (dict(model_args=dict(cache_dir='/tmp')), 'model_args sets cache_dir'),
    (dict(model_args=dict(depth=10 ** 9)), 'depth to 1000000000'),
    (dict(pretrained_cfg=dict(interpolation='foo')), "unknown interpolation 'foo'"),
    (dict(pretrained_cfg=dict(std=[0])), 'std must lie in'),
    (dict(pretrained_cfg=dict(crop_pct='x')), "crop_pct must lie in .* got 'x'"),
    (dict(sformer=dict(recipe=5)), 'sformer.recipe is 5'),
    (dict(model_args=dict(pruned=True)), 'model_args sets pruned'),
    (dict(model_args=dict(features_only=True)), 'model_args sets features_only'),
    (dict(architecture='sformer_custom', model_args=dict(source='hf-hub:their-org/x')), "source 'hf-hub:"),
    (dict(architecture='sformer_custom', model_args=dict(source='local-dir:/')), "source 'local-dir:/'"),
    (dict(architecture='sformer_custom', model_args=dict(source='antigravity.x')), "source 'antigravity.x'"),
    (dict(architecture='sformer_custom', model_args=dict(source=['vit_tiny_patch16_224'])), 'source '),
    (dict(architecture='sformer_from_the_future'), 'is not an SFormer of this version|Unknown model'),
    (dict(architecture='../sformer'), 'is not an SFormer of this version|Unknown model'),
], ids=str)
def test_configs_that_direct_the_loader(published, changes, message):
    change_config(published, **changes)
    with pytest.raises(SFormerError, match=f'config.json.*{message}'):
        load_model(f'hf-hub:{REPO}')
    with pytest.raises((SFormerError, TypeError, RuntimeError)) as caught:
        timm_load()
    # what timm refuses by itself, before it asks us, is an error of its own
    assert re.search(message, str(caught.value)) or 'multiple values' in str(caught.value), caught.value
    assert not any('their-org' in r.path or 'passwd' in r.path for r in published.log)
    assert published.count('GET', '/cdn/') == 0, 'the weights were loaded first'


@pytest.mark.parametrize('changes', [
    dict(model_args=dict(norm_layer='antigravity.x')), dict(model_args=dict(act_layer='antigravity.x')),
    dict(model_args=dict(block_fn='antigravity.x')), dict(model_args=dict(embed_layer='antigravity.x')),
    dict(model_args=dict(mlp_layer='subprocess.Popen')), dict(model_args=dict(no_such_argument=1)),
    dict(model_args=dict(sfn=dict(levels='__import__("os")'))), dict(model_args=dict(depth=[1])),
    dict(pretrained_cfg=dict(no_such_key=1)),
    dict(pretrained_cfg=dict(input_size=3)),
    dict(pretrained_cfg=dict(mean=['a'])), dict(pretrained_cfg=dict(std='x'))], ids=str)
def test_configs_that_fit_nothing(published, run, changes):
    """One line that names the model; whatever timm makes of a string, it imports nothing."""
    change_config(published, **changes)
    with pytest.raises(SFormerError, match=f'{REPO} can not be loaded|config.json') as caught:
        load_model(f'hf-hub:{REPO}')
    assert '\n' not in str(caught.value)
    assert run('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits').code == 1
    assert 'antigravity' not in sys.modules


def test_other_networks_are_not_loaded(hub, tmp_path, run):
    """A repository of timm's own is a source to convert, not an SFormer."""
    model = timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, embed_dim=48, depth=1, num_classes=2)
    timm.models.save_for_hf(model, str(tmp_path / 'x'), safe_serialization=False)
    hub.put('my-org/vit', {p.name: p.read_bytes() for p in (tmp_path / 'x').iterdir()})
    with pytest.raises(SFormerError, match="architecture 'vit_tiny_patch16_224' is not an SFormer"):
        load_model('hf-hub:my-org/vit')
    assert run('evaluate', 'hf-hub:my-org/vit', '--dataset', 'digits').code == 1
    assert hub.count('GET', 'pytorch_model') == 0


# from a published source to a published SFormer -----------------------------------------------------------------------

@pytest.fixture
def published_source(hub, tmp_path):
    """A tiny ViT on the Hub, as timm publishes one."""
    source = timm.create_model(
        'vit_tiny_patch16_224', img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2)
    source.pretrained_cfg['license'] = 'cc-by-nc-4.0'
    timm.models.save_for_hf(source, str(tmp_path / 'source'), safe_serialization=True)
    hub.put('my-org/tiny_vit', {p.name: p.read_bytes() for p in (tmp_path / 'source').iterdir()})
    return 'hf-hub:my-org/tiny_vit'


def test_card_names_the_published_source_and_its_license(published_source, tmp_path, run):
    result = run('convert', published_source, '-o', tmp_path / 'out', '--num-images', 4)
    assert result.code == 0, result.err
    result = run('publish', tmp_path / 'out', 'my-org/tiny', '--force', '--dry-run')
    data = ModelCard(result.out[result.out.index('---\n'):]).data
    assert (data.base_model, data.base_model_relation) == ('my-org/tiny_vit', 'quantized')
    assert data.license == 'cc-by-nc-4.0'


@pytest.fixture(scope='module')
def zoo():
    spec = importlib.util.spec_from_file_location(
        'publish_zoo', Path(__file__).parents[1] / 'scripts' / 'publish_zoo.py')
    sys.modules['publish_zoo'] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_entry(zoo, source, tmp_path):
    save_file(source.state_dict(), tmp_path / 'digits.safetensors')
    return zoo.Entry(
        'sformer_nano.zoo', 'vit_tiny_patch16_224', SFNConfig(levels=8), calibration='digits', split='train',
        num_images=64, dataset='digits', checkpoint=tmp_path / 'digits.safetensors', model_kwargs=NANO,
        data_config=dict(mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation='bilinear'), license='apache-2.0')


def test_table_of_the_zoo(zoo):
    entries = zoo.zoo()
    assert len({e.name for e in entries}) == len(entries) >= 35
    for entry in entries:
        architecture, _, tag = entry.name.partition('.')
        source, tags = sformer.models.ZOO[architecture]
        assert entry.source == f'{source}.{tag}' and tag in tags.split()
        assert timm.get_pretrained_cfg(entry.source).num_classes > 0, 'nothing to evaluate'
    left_out = {name for name in timm.list_models('sformer*', pretrained=True)
                if not timm.get_pretrained_cfg(name).file} - {e.name for e in entries}
    assert all(timm.get_pretrained_cfg(name).num_classes == 0 for name in left_out)


def test_zoo_entry_by_entry(hub, zoo, tiny_entry, tmp_path, monkeypatch, images, capsys):
    """Interrupted at each step, it goes on with the next."""
    work, calls = tmp_path / 'zoo', []
    for module, name in ((sformer, 'convert'), (sformer, 'evaluate')):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    hub.fail('POST', '/commit/', 503, 'Service Unavailable', times=1)
    def run(entry=tiny_entry, curve=(4,)):
        return zoo.run([entry], 'my-org', work, curve=curve, num_images=50)

    failed = run()
    assert failed.keys() == {'sformer_nano.zoo'} and '503' in failed['sformer_nano.zoo']
    assert calls == ['convert', 'evaluate'] * 2
    nothing_loads()

    assert run() == {}
    assert calls == ['convert', 'evaluate'] * 2, 'it was done again'
    commits = len(hub.repos['my-org/sformer_nano.zoo'].commits)
    assert run() == {}
    assert len(hub.repos['my-org/sformer_nano.zoo'].commits) == commits == 2
    assert 'nothing has changed' in capsys.readouterr().out

    files = hub.files('my-org/sformer_nano.zoo')
    assert files.keys() == FILES | {'.gitattributes', 'plots/accuracy.png'}
    card = ModelCard(files['README.md'].decode())
    assert card.data.license == 'apache-2.0' and card.data.base_model is None
    assert '| 4 | ' in card.text and '| 8 | ' in card.text
    assert_same(timm_load('my-org/sformer_nano.zoo'), load_model(work / tiny_entry.name), images)

    (work / tiny_entry.name / 'eval.json').unlink()
    assert run(curve=()) == {}
    assert calls == ['convert', 'evaluate'] * 2 + ['evaluate'], 'only what was missing'
    assert run(replace(tiny_entry, config=SFNConfig(levels=16)), ()) == {}
    assert calls[5:] == ['convert', 'evaluate'], 'a row that was changed'


def test_zoo_goes_on_after_an_entry_that_fails(hub, zoo, tiny_entry, tmp_path, capsys):
    broken = replace(tiny_entry, name='sformer_nano.broken', checkpoint=tmp_path / 'nothing.safetensors')
    failed = zoo.run([broken, tiny_entry], 'my-org', tmp_path / 'zoo', num_images=50)
    assert failed.keys() == {'sformer_nano.broken'} and 'no checkpoint at' in capsys.readouterr().err
    assert set(hub.repos) == {'my-org/sformer_nano.zoo'}


def test_zoo_says_what_is_missing_before_any_work(hub, zoo, tiny_entry, tmp_path, monkeypatch):
    with pytest.raises(SFormerError, match='not a name that the Hub allows'):
        zoo.run([tiny_entry], 'my org', tmp_path / 'zoo')
    failed = zoo.run([replace(tiny_entry, dataset=None)], 'my-org', tmp_path / 'zoo')
    assert '--imagenet' in failed[tiny_entry.name]
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(SFormerError, match='needs an access token'):
        zoo.run([tiny_entry], 'my-org', tmp_path / 'zoo')
    assert not (tmp_path / 'zoo').exists()
    assert zoo.run([tiny_entry], 'my-org', tmp_path / 'zoo', dry_run=True, num_images=50) == {}
    assert hub.log == []


# processes of their own -----------------------------------------------------------------------------------------------

@pytest.fixture
def environment(hub, tmp_path):
    return dict(os.environ, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET='1', HF_HOME=str(tmp_path / 'home'),
                HF_TOKEN=TOKEN, PYTHONPATH=str(Path(sformer.__file__).parents[1]))


def test_publish_in_a_process_of_its_own(hub, folder, environment, images, model, tmp_path):
    """With the endpoint, the token and the cache of the environment."""
    done = subprocess.run(
        [sys.executable, '-m', 'sformer', 'publish', str(folder), REPO, '--private'], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, '') and f'{REPO}: published, {hub.url}/{REPO}/commit/' in done.stdout
    assert TOKEN not in done.stdout and hub.repos[REPO].private
    assert_same(timm_load(), model, images)


def test_snippet_of_a_published_card(published):
    code = re.search(r'```python\n(.*?)```', published.files(REPO)['README.md'].decode(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names['logits'].shape == (1, 10) and code.startswith('import sformer\n')
    assert published.count('GET', '/config.json') >= 1


@pytest.mark.slow
def test_zoo_in_two_processes(hub, environment, source, tmp_path, images):
    """The main process converts and publishes, all evaluate."""
    save_file(source.state_dict(), tmp_path / 'digits.safetensors')
    (tmp_path / 'two.py').write_text(f'''
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1] / 'scripts')!r})
from publish_zoo import Entry, run
entry = Entry(
    'sformer_nano.zoo', 'vit_tiny_patch16_224', calibration='digits', split='train', num_images=64, dataset='digits',
    checkpoint=Path('digits.safetensors'), model_kwargs={NANO!r}, data_config=dict(mean=(.5,), std=(.5,), crop_pct=1.))
bad = Entry('sformer_nano.bad', 'vit_tiny_patch16_224', dataset='digits', checkpoint=Path('nothing.safetensors'))
assert set(run([bad, entry], 'my-org', Path('zoo'))) == {{'sformer_nano.bad'}}
''')
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '29631', 'two.py'],
        env=dict(environment, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'), cwd=tmp_path, capture_output=True,
        text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert hub.count('POST', '/commit/') == 1
    assert_same(timm_load('my-org/sformer_nano.zoo'), load_model(tmp_path / 'zoo' / 'sformer_nano.zoo'), images)
