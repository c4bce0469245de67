"""A page as a Space, by the Hub's client against a stand-in on the loopback interface."""
import json

import pytest
from hub_fixtures import READER, TOKEN

from sformer.errors import SFormerError
from sformer.publishing.page import LICENSE, MODELS, PAGE_FILES
from sformer.publishing.space import publish_space
from sformer.publishing.web_runtime import RUNTIME_FILES

SPACE = 'my-org/digits-page'


@pytest.fixture
def page(tmp_path):
    """Files of the names and of the sizes that a page has; what is in them nobody asks here."""
    folder = tmp_path / 'page'
    folder.mkdir()
    for name in (*PAGE_FILES, LICENSE, *RUNTIME_FILES, 'model-0.onnx', 'model-1.onnx'):
        (folder / name).write_text(f'content of {name}')
    (folder / MODELS).write_text(json.dumps(dict(title='Digits', runtime='', models=[])))
    (folder / 'README.md').write_text('---\ntitle: Digits\nsdk: static\n---\n')
    return folder


def test_a_space_is_published(hub, page, run_here):
    dry = run_here('publish', page, SPACE, '--space', '--dry-run')
    assert dry.code == 0 and 'model-1.onnx' in dry.out and SPACE not in hub.repos
    done = run_here('publish', page, SPACE, '--space')
    assert done.code == 0 and 'published' in done.out, done.err
    assert hub.repos[SPACE].sdk == 'static'
    assert {name: data.decode() for name, data in hub.files(SPACE).items() if name != '.gitattributes'} == {
        path.name: path.read_text() for path in page.iterdir()}
    (page / 'model-1.onnx').unlink()
    assert publish_space(page, SPACE).changed and 'model-1.onnx' not in hub.files(SPACE)
    again = run_here('publish', page, SPACE, '--space')
    assert again.code == 0 and 'nothing has changed' in again.out
    (page / 'page.js').write_text('other content')
    proposed = run_here('publish', page, SPACE, '--space', '--create-pr')
    assert proposed.code == 0 and 'discussions/1' in proposed.out


def test_what_is_no_page_is_refused(hub, page, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', READER)
    with pytest.raises(SFormerError, match='rights|permit'):
        publish_space(page, SPACE)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    with pytest.raises(SFormerError, match='org/name'):
        publish_space(page, 'digits-page')
    (page / 'README.md').unlink()
    with pytest.raises(SFormerError, match='sformer page --space'):
        publish_space(page, SPACE)
    (page / 'README.md').write_text('---\nsdk: static\n---\n')
    (page / 'leak.json').write_text(TOKEN)
    with pytest.raises(SFormerError, match='leak.json would publish an access token of the Hub; remove it.$'):
        publish_space(page, SPACE)
    with pytest.raises(SFormerError, match='is no page'):
        publish_space(tmp_path, SPACE)
    assert not hub.repos
