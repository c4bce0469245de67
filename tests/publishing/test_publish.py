"""Publishing to the Hub, by the real client against a stand-in on the loopback interface."""
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import timm
from cli_process import SCRIPT
from hub_fixtures import FILES, READER, REPO, TOKEN, assert_same, nothing_loads, snapshot, timm_load
from huggingface_hub import HfApi, ModelCard, constants

from sformer import SFormerError, UncalibratedError, load_model
from sformer.files import write_json
from sformer.publishing.publish import prepare, publish, upload

# publishing -----------------------------------------------------------------------------------------------------------

def test_round_trip(hub, folder, model, images):
    before = snapshot(folder)
    done = publish(folder, REPO)
    assert done.changed and done.url == f'{hub.url}/{REPO}/commit/{done.commit}'
    assert_same(timm_load(), model, images)
    loaded = load_model(f'hf-hub:{REPO}')
    assert_same(loaded, model, images)
    config = json.loads((folder / 'config.json').read_text())
    assert loaded.conversion.to_dict() == config['sformer'] and loaded.conversion.source == 'vit_tiny_patch16_224'
    assert len(hub.repos[REPO].commits) == 2, 'the initial one and ours'
    assert snapshot(folder) == before


def test_what_the_hub_shows(hub, folder):
    publish(folder, REPO)
    assert set(HfApi(endpoint=hub.url).list_repo_files(REPO)) == FILES | {'.gitattributes'}
    for name in ('model.safetensors', 'config.json'):
        assert hub.files(REPO)[name] == (folder / name).read_bytes()
    assert json.loads(hub.files(REPO)['results/eval.json']) == json.loads((folder / 'eval.json').read_text())
    assert hub.files(REPO)['plots/activity.png'][:4] == b'\x89PNG'
    info = HfApi(endpoint=hub.url).model_info(REPO)
    assert info.library_name == 'timm' and info.pipeline_tag == 'image-classification' and 'sformer' in info.tags
    ModelCard(hub.files(REPO)['README.md'].decode()).validate()


def test_twice_is_once(hub, folder, run_here):
    assert publish(folder, REPO).changed
    uploads, commits = hub.count('PUT', '/lfs/'), hub.count('POST', '/commit/')
    again = publish(folder, REPO)
    assert not again.changed and again.commit == hub.repos[REPO].refs['main']
    result = run_here('publish', folder, REPO)
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
    hub.multipart_above = 150_000
    publish(folder, REPO)
    assert hub.count('PUT', r'/lfs/\w+/3$') == 1
    assert_same(timm_load(), model, images)


def test_only_what_belongs_to_the_model_is_published(hub, folder):
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(1))
    (folder / 'diary.txt').write_text('mine')
    (folder / 'notes.json').write_text('{"a": 1}')
    publish(folder, REPO)
    assert set(hub.files(REPO)) == FILES | {'.gitattributes'}


def test_private(hub, folder, run_here, monkeypatch):
    result = run_here('publish', folder, REPO, '--private')
    assert result.code == 0 and hub.repos[REPO].private
    timm_load()
    for token in (None, READER):
        monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        with pytest.raises(SFormerError, match=f'{REPO}: there is no such repository .* private .*HF_TOKEN'):
            load_model(f'hf-hub:{REPO}')
        with pytest.raises(Exception, match='Repository Not Found'):
            timm_load()
        result = run_here('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits')
        assert result.code == 1 and 'there is no such repository on the Hub, or it is private' in result.err


def test_private_does_not_publish_to_a_public_repository(hub, folder, run_here):
    hub.put(REPO, {'mine.txt': b'mine'})
    result = run_here('publish', folder, REPO, '--private')
    assert result.code == 1 and 'there and public' in result.err
    assert set(hub.files(REPO)) == {'mine.txt'}


def test_pull_request(hub, folder, run_here, model, images):
    hub.put(REPO, {'mine.txt': b'mine'})
    result = run_here('publish', folder, REPO, '--create-pr')
    assert result.code == 0 and f'{hub.url}/{REPO}/discussions/1' in result.out and 'published' in result.out
    assert set(hub.files(REPO)) == {'mine.txt'}
    assert_same(timm_load(f'{REPO}@refs/pr/1'), model, images)
    nothing_loads()
    result = run_here('publish', folder, REPO, '--create-pr')
    assert result.code == 0 and 'discussions/1' in result.out and 'nothing has changed' in result.out
    assert len(hub.repos[REPO].pulls) == 1, 'the same proposal twice'


def test_pull_request_to_others(hub, folder, monkeypatch):
    """Who may not write may still propose."""
    hub.put(REPO, {'mine.txt': b'mine'})
    monkeypatch.setenv('HF_TOKEN', READER)
    with pytest.raises(SFormerError, match='the access token does not permit this'):
        publish(folder, REPO)
    assert publish(folder, REPO, create_pr=True).url.endswith('/discussions/1')


def test_dry_run_needs_no_network_and_no_token(hub, folder, run_here, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    before = snapshot(folder)
    result = run_here('publish', folder, REPO, '--dry-run')
    assert result.code == 0 and hub.log == [] and snapshot(folder) == before
    lines = {line.split()[2]: line.split()[:2] for line in result.out.splitlines()[1:len(FILES) + 1]}
    assert lines.keys() == FILES
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert run_here('publish', folder, REPO).code == 0
    for path, (size, sha256) in lines.items():
        content = hub.files(REPO)[path]
        assert (int(size.replace(',', '')), sha256) == (len(content), hashlib.sha256(content).hexdigest()), path
    assert hub.files(REPO)['README.md'].decode().strip() in result.out


# what is refused ------------------------------------------------------------------------------------------------------

def test_not_evaluated(hub, folder, other_folder, run_here):
    (folder / 'eval.json').unlink()
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and 'was not evaluated' in result.err and '--results-file' in result.err
    shutil.copy(other_folder / 'eval.json', folder / 'theirs.json')
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and 'theirs.json: results of other weights' in result.err
    assert hub.log == []
    result = run_here('publish', folder, REPO, '--force')
    assert result.code == 0 and 'theirs.json is not used: it has results of other weights' in result.err
    card = hub.files(REPO)['README.md'].decode()
    assert 'was not evaluated' in card and 'top-1' not in card and 'model-index' not in card
    assert set(hub.files(REPO)) == {'.gitattributes', 'model.safetensors', 'config.json', 'README.md'}


def test_results_of_other_weights_are_left_out(hub, folder, other_folder, run_here):
    shutil.copy(other_folder / 'eval.json', folder / 'theirs.json')
    result = run_here('publish', folder, REPO)
    assert result.code == 0 and 'theirs.json is not used' in result.err
    assert set(hub.files(REPO)) == FILES | {'.gitattributes'}


def test_uncalibrated(hub, tmp_path, run_here):
    model = timm.create_model('sformer_nano', img_size=8, in_chans=1, num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path / 'x'), safe_serialization=True)
    with pytest.raises(UncalibratedError, match=r'uncalibrated .* it is not published without --force\.$'):
        prepare(tmp_path / 'x', REPO)
    result = run_here('publish', tmp_path / 'x', REPO)
    assert result.code == 1 and hub.log == []
    assert run_here('publish', tmp_path / 'x', REPO, '--force').code == 0
    assert 'never calibrated' in hub.files(REPO)['README.md'].decode()


def test_without_a_recorded_hash(hub, folder):
    config = json.loads((folder / 'config.json').read_text())
    del config['sformer']['weights_sha256']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(SFormerError, match='does not record the hash'):
        publish(folder, REPO)
    assert hub.log == []


def test_damaged_folder(hub, folder, run_here):
    os.truncate(folder / 'model.safetensors', 10_000)
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and 'model.safetensors is truncated or corrupted' in result.err and hub.log == []


@pytest.mark.parametrize('name', [
    'name', 'a/b/c', 'my-org/na me', 'my-org/../x', 'my-org/a--b', 'my-org/x.git', '/x', 'x/', 'my-org/ü', '-/-',
    'my-org/' + 'x' * 97])
def test_names_that_are_not_allowed(hub, folder, run_here, name):
    for options in ([], ['--dry-run']):
        result = run_here('publish', *options, '--', folder, name)
        assert result.code == 1 and 'not a name that the Hub allows' in result.err, result.err
    assert hub.log == []
    with pytest.raises(SFormerError):
        load_model(f'hf-hub:{name}')


def test_name_that_only_the_hub_refuses(hub, folder, run_here):
    hub.fail('POST', '/api/repos/create', 400, 'Invalid repo name: reserved')
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and 'refuses (400' in result.err and 'reserved' in result.err
    result = run_here('publish', folder, 'their-org/x')
    assert result.code == 1 and 'does not permit' in result.err and 'under this namespace' in result.err
    assert hub.repos == {}


@pytest.mark.parametrize('token, message', [
    (None, 'needs an access token'), ('hf_nobodyNobody01', 'does not accept the access token')])
def test_tokens_that_do_not_do(hub, folder, run_here, monkeypatch, token, message):
    monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and message in result.err and 'nobody' not in result.err
    assert hub.repos == {}


def test_token_in_the_error_of_the_hub(hub, folder, run_here):
    """Whoever answers with what he was sent."""
    hub.fail('POST', '/api/repos/create', 403, f'token {TOKEN} and hf_someOtherSecret1 are not good enough')
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and 'token *** and *** are not good enough' in result.err


def test_token_in_the_records(hub, folder, run_here):
    result = json.loads((folder / 'eval.json').read_text())
    (folder / 'eval.json').rename(folder / 'leak.json')
    write_json(folder / 'leak.json', dict(result, command=f'HF_TOKEN={TOKEN} sformer evaluate out'))
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and 'access token of the Hub; remove it from the records in' in result.err and hub.log == []


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


def test_interrupted_publication_on_the_command_line(hub, folder, run_here):
    before = snapshot(folder)
    hub.fail('PUT', '/lfs/', 503, 'Service Unavailable', times=100)
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and result.out == '' and 'Try again later' in result.err
    assert snapshot(folder) == before


@pytest.mark.parametrize('path', ['/lfs/', 'lfs/objects/batch', '/preupload/'])
def test_short_outage_is_sat_out(hub, publication, path):
    hub.fail('PUT', path, 500, times=2)
    hub.fail('POST', path, 500, times=2)
    assert upload(publication).changed


def test_interrupted_update_leaves_the_old_model(published, other_folder, run_here, model, images):
    published.fail('POST', '/commit/', 500, times=100)
    assert run_here('publish', other_folder, REPO).code == 1
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


def test_nobody_listens(hub, folder, run_here, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/{revision}/{filename}')
    result = run_here('publish', folder, REPO)
    assert result.code == 1 and 'the connection to 127.0.0.1 failed' in result.err
    result = run_here('evaluate', f'hf-hub:{REPO}', '--dataset', 'digits')
    assert result.code == 1 and 'the connection to 127.0.0.1 failed' in result.err


def test_ctrl_c_while_publishing(hub, folder, run_here, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(HfApi, 'create_commit', interrupt)
    result = run_here('publish', folder, REPO)
    assert result.code == 130
    nothing_loads()


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


def test_card_names_the_published_source_and_its_license(published_source, tmp_path, run_here):
    result = run_here('convert', published_source, '-o', tmp_path / 'out', '--num-images', 4)
    assert result.code == 0, result.err
    result = run_here('publish', tmp_path / 'out', 'my-org/tiny', '--force', '--dry-run')
    data = ModelCard(result.out[result.out.index('---\n'):]).data
    assert (data.base_model, data.base_model_relation) == ('my-org/tiny_vit', 'quantized')
    assert data.license == 'cc-by-nc-4.0'


# processes of their own -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_publish_in_a_process_of_its_own(hub, folder, environment, images, model, tmp_path):
    """With the endpoint, the token and the cache of the environment; as installed, nobody else registers models."""
    command = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, '-m', 'sformer']
    done = subprocess.run([*command, 'publish', str(folder), REPO, '--private'], env=environment, cwd=tmp_path,
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


# what cannot be true --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes, message', [
    (dict(top1=999), 'top1 is 999, not a percentage'), (dict(source_top5=-5), 'source_top5 is -5, not a percentage'),
    (dict(curve=[dict(levels=4, top1='all')]), "top1 is 'all', not a percentage"),
], ids=str)
def test_results_that_cannot_be_true(hub, folder, run_here, changes, message):
    result = json.loads((folder / 'eval.json').read_text())
    write_json(folder / 'eval.json', {**result, **changes})
    for options in ([], ['--dry-run'], ['--force']):
        result = run_here('publish', folder, REPO, *options)
        assert result.code == 1 and message in result.err and 'eval.json' in result.err and result.out == ''
    assert hub.log == []


@pytest.mark.parametrize('names', [5, 'abcdefghij', ['a'] * 9, [*range(10)], {'a': 'b'}], ids=str)
def test_label_names_that_cannot_be_true(hub, folder, run_here, names):
    """A string of the right length is no list of names."""
    config = json.loads((folder / 'config.json').read_text())
    for changed in (dict(config, label_names=names),
                    dict(config, pretrained_cfg=dict(config['pretrained_cfg'], label_names=names))):
        write_json(folder / 'config.json', changed)
        result = run_here('publish', folder, REPO)
        assert result.code == 1 and 'config.json' in result.err and 'label_names' in result.err, result.err
    assert hub.log == []
    write_json(folder / 'config.json', dict(config, label_names=[*'0123456789']))
    assert run_here('publish', folder, REPO).code == 0
