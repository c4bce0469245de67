"""The page that runs SFormers in the browser: what is written, and what Chromium makes of it."""
import base64
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from browser import CHROMIUM, Browser, served
from PIL import Image

import sformer
from sformer.data.origins import Digits
from sformer.evaluation.predictions import Reader
from sformer.execution import export_onnx, to_integer_
from sformer.execution.prepared import METADATA
from sformer.execution.spike_outputs import SPIKE_OUTPUTS
from sformer.layers import named_products
from sformer.layers.multiplying import LINEAR
from sformer.layers.watch import watch_spikes
from sformer.publishing import web_runtime
from sformer.publishing.page import MODELS, write_page
from sformer.publishing.web_runtime import RUNTIME_FILES, find_runtime

pytest.importorskip('onnxscript')
onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')


@pytest.fixture(scope='session')
def runtime(made_once):
    """Folder of npm's package, from where SFORMER_TEST_ORT_WEB says it is, or as npm fetches it."""
    folder = os.environ.get('SFORMER_TEST_ORT_WEB')
    if folder:
        return Path(folder)
    if shutil.which('npm') is None:
        pytest.skip('npm, which brings onnxruntime-web, is not installed')

    def fetch(cache):
        find_runtime(cache_dir=cache)
    try:
        cache = made_once('ort-web', fetch)
    except sformer.SFormerError as e:
        pytest.skip(f'onnxruntime-web cannot be had: {e}')
    return find_runtime(cache_dir=cache).folder


@pytest.fixture
def stand_in(tmp_path):
    """A folder with files of the names of the runtime, for pages that nobody opens."""
    folder = tmp_path / 'stand-in'
    folder.mkdir()
    for name in RUNTIME_FILES:
        (folder / name).write_text('nothing')
    return folder


def in_integers(model, images):
    """Logits of the model with the int8 weights that its graph has, and spikes per neuron of each image and block."""
    network = copy.deepcopy(model)
    to_integer_(network)
    linear = {product.operands[0] for _, _, products in named_products(network) for product in products
              if product.kind == LINEAR}
    levels = {}

    def add(name, spikes):
        block = re.match(r'(blocks\.\d+)\.', name)
        if block and network.get_submodule(name) in linear:
            levels.setdefault(block[1], []).append(spikes.levels.abs().double())
    with torch.no_grad(), watch_spikes(network, add):
        logits = network(images)
    return logits.numpy(), torch.stack([torch.cat(fired, 2).mean(2) for fired in levels.values()], 1).numpy()


# graphs that say where they spike -------------------------------------------------------------------------------------


def test_a_graph_says_where_it_spikes(model, spiking_graph, digits):
    images = digits[0][:3]
    session = ort.InferenceSession(spiking_graph)
    assert [output.name for output in session.get_outputs()] == ['logits', *SPIKE_OUTPUTS]
    logits, spikes, activity = session.run(None, {'images': images.numpy()})
    expected, fired = in_integers(model, images)
    assert np.abs(logits - expected).max() < 1e-3
    assert np.abs(spikes - fired).mean() < 1e-3 * fired.mean()  # but for currents within rounding of a boundary
    assert (activity > 0).all() and (activity <= 1).all() and (spikes >= activity - 1e-6).all()
    loaded = sformer.load_onnx(spiking_graph)(images)
    assert np.abs(loaded.numpy() - logits).max() < 1e-3


@pytest.mark.slow
def test_shared_thresholds_count_what_they_stand_for(source, digits, tmp_path):
    """Their levels have a zero point per channel, which is no spike."""
    fast = sformer.convert(source, 'digits', split='train', num_images=64, recipe='fast')
    export_onnx(fast, tmp_path / 'fast.onnx', spikes=True)
    images = digits[0][:2]
    spikes = ort.InferenceSession(tmp_path / 'fast.onnx').run(['spikes'], {'images': images.numpy()})[0]
    _, fired = in_integers(fast, images)
    assert np.abs(spikes - fired).mean() < 1e-3 * fired.mean()


# what is written ------------------------------------------------------------------------------------------------------


def test_no_path_of_this_machine(spiking_graph, stand_in, tmp_path):
    pytest.importorskip('jinja2')
    written = write_page([str(spiking_graph)], tmp_path / 'page', runtime=stand_in, space=True, license='mit')
    said, = json.loads((tmp_path / 'page' / MODELS).read_text())['models']
    assert said['title'] == 'spiking' and said['file'] == 'model-0.onnx' and written.size > 0
    assert (said['input_size'], said['mean'], said['std'], said['scale_size']) == ([1, 8, 8], [0.5], [0.5], [8, 8])
    assert (said['interpolation'], said['crop_mode'], said['grid_size']) == ('bilinear', 'center', [4, 4])
    assert said['blocks'] == ['blocks.0', 'blocks.1'] and len(said['names']) == 10
    for path in (tmp_path / 'page').iterdir():
        content = path.read_bytes()
        for part in (str(tmp_path), str(spiking_graph.parent), '/home/', str(Path.home()),
                     os.sep.join(('', 'tmp', ''))):
            assert part.encode() not in content, (path.name, part)
    text = ''.join(path.read_text() for path in (tmp_path / 'page').glob('*.[hj]*') if path.suffix != '.json')
    assert not re.search(r'https?://|\bimport\(', text), 'the page asks for files of others'
    card = (tmp_path / 'page' / 'README.md').read_text()
    assert card.startswith('---\ntitle: spiking\n') and '\nsdk: static\n' in card and '\nlicense: mit\n' in card


def test_its_own_page_is_replaced_and_files_of_others_stay(spiking_graph, stand_in, tmp_path):
    name = str(spiking_graph)
    for names in ([name, name], [name]):  # a graph that is gone from the page is gone from the folder
        write_page(names, tmp_path / 'page', runtime=stand_in, title='mine')
        assert len([*(tmp_path / 'page').glob('*.onnx')]) == len(names)
    assert json.loads((tmp_path / 'page' / MODELS).read_text())['title'] == 'mine'
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'index.html').write_text('precious')
    with pytest.raises(sformer.SFormerError, match='holds no page'):
        write_page([str(spiking_graph)], tmp_path / 'other', runtime=stand_in)
    assert (tmp_path / 'other' / 'index.html').read_text() == 'precious'
    write_page([str(spiking_graph)], tmp_path / 'other', runtime=stand_in, overwrite=True)


@pytest.mark.slow
def test_what_is_not_exact_in_browsers_is_refused(source, model, stand_in, tmp_path):
    accurate = sformer.convert(source, 'digits', split='train', num_images=64, recipe='accurate')
    export_onnx(accurate, tmp_path / 'a.onnx')
    with pytest.raises(sformer.SFormerError, match='a.onnx fires up to 127 levels.*default and fast'):
        write_page([str(tmp_path / 'a.onnx')], tmp_path / 'page', runtime=stand_in)
    export_onnx(model, tmp_path / 'w.onnx', portable=False, max_error=1.)
    with pytest.raises(sformer.SFormerError, match='--no-portable'):
        write_page([str(tmp_path / 'w.onnx')], tmp_path / 'page', runtime=stand_in)
    assert not (tmp_path / 'page').exists()


def test_the_runtime_is_what_it_was(tmp_path, stand_in, monkeypatch):
    with pytest.raises(sformer.SFormerError, match='has no ort.wasm'):
        find_runtime(tmp_path)
    assert find_runtime(stand_in).version is None
    (tmp_path / 'package.json').write_text(json.dumps(dict(version=web_runtime.VERSION)))
    with pytest.raises(sformer.SFormerError, match='is not that of onnxruntime-web'):
        find_runtime(stand_in)
    (tmp_path / 'package.json').write_text(json.dumps(dict(version='9.9.9')))
    assert find_runtime(stand_in).version == '9.9.9'
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.raises(sformer.SFormerError, match='npm is not installed.*--runtime'):
        find_runtime(cache_dir=tmp_path / 'cache')
    monkeypatch.setattr(shutil, 'which', lambda name: name)

    def pack(command, cwd, **how):
        (Path(cwd) / 'p.tgz').write_bytes(b'something else')
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(subprocess, 'run', pack)
    with pytest.raises(sformer.SFormerError, match='SHA-512 differs'):
        find_runtime(cache_dir=tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('content, code, message', [
    (b'no archive', 0, 'onnxruntime-web cannot be kept in .*: npm install'),
    (None, 0, 'npm cannot fetch onnxruntime-web .* .no reason given.. Elsewhere: npm install'),
    (b'no archive', 1, 'npm cannot fetch onnxruntime-web .* .npm error 404.. Elsewhere: npm install')])
def test_what_npm_cannot_fetch(tmp_path, monkeypatch, content, code, message):
    def pack(command, cwd, **how):
        if content:
            (Path(cwd) / 'p.tgz').write_bytes(content)
        return subprocess.CompletedProcess(command, code, '', '\nnpm error 404\nmore' if code else '')
    monkeypatch.setattr(shutil, 'which', lambda name: name)
    monkeypatch.setattr(subprocess, 'run', pack)
    digest = base64.b64encode(hashlib.sha512(content or b'').digest()).decode()
    monkeypatch.setattr(web_runtime, 'INTEGRITY', f'sha512-{digest}')
    with pytest.raises(sformer.SFormerError, match=message):
        find_runtime(cache_dir=tmp_path / 'cache')


def test_a_model_without_classes_has_no_page(spiking_graph, stand_in, tmp_path):
    graph = onnx.load(spiking_graph)
    said, = (entry for entry in graph.metadata_props if entry.key == METADATA)
    about = json.loads(said.value)
    about['num_classes'] = 0
    said.value = json.dumps(about)
    onnx.save(graph, tmp_path / 'features.onnx')
    with pytest.raises(sformer.SFormerError, match=r'features.onnx has no classes to show \(num_classes=0\)'):
        write_page([str(tmp_path / 'features.onnx')], tmp_path / 'page', runtime=stand_in)
    assert not (tmp_path / 'page').exists()


# in a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip('Chromium is not installed')
    opened = Browser(tmp_path / 'profile')
    yield opened
    opened.close()


def blob(path):
    """JavaScript that makes a file."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'new Blob([Uint8Array.from(atob("{data}"), (c) => c.charCodeAt(0))])'


def shown(browser, path):
    """What the page finds in an image file: logits, spikes, activity, tokens, seconds."""
    return browser.run(
        f'sformer.show({blob(path)}).then((f) => ({{logits: [...f.logits], spikes: [...f.spikes], tokens: f.tokens, '
        f'activity: [...f.activity], seconds: f.seconds.network, threads: f.threads}}))')


def native(graph, tensor, optimised=True):
    """What ONNX Runtime gives on this processor."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, 'ORT_ENABLE_ALL' if optimised else 'ORT_DISABLE_ALL')
    return ort.InferenceSession(graph, options).run(None, {'images': tensor[None].numpy()})


def apart(a, b):
    """How far logits are from one another, how far spikes of the first block."""
    return np.abs(a[0][0] - b[0][0]).max(), np.abs(a[1][0, 0] - b[1][0, 0]).max()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # where other work shares the processor
def test_the_page_in_chromium(model, spiking_graph, runtime, browser, tmp_path):
    small = timm.create_model('sformer_micro.cifar10', pretrained=True).eval()
    export_onnx(small, tmp_path / 'micro.onnx', spikes=True)
    write_page([str(spiking_graph), str(tmp_path / 'micro.onnx')], tmp_path / 'page', runtime=runtime)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((140, 100), Image.BICUBIC)
    smooth.save(tmp_path / 'smooth.png')
    Digits('test').read(3)[0].save(tmp_path / 'six.png')
    with served(tmp_path / 'page') as url:
        browser.open(url)
        browser.wait_for('window.sformer && document.getElementById("status").textContent.startsWith("Drop")')
        for index, network, graph in ((0, model, spiking_graph), (1, small, tmp_path / 'micro.onnx')):
            browser.run(f'sformer.choose({index})')
            for file in ('six.png', 'smooth.png'):
                found = shown(browser, tmp_path / file)
                tensor = Reader(network)(tmp_path / file)
                ways = [native(graph, tensor, optimised) for optimised in (True, False)]
                seen = [np.array(found['logits'])[None], np.array(found['spikes']).reshape(ways[0][1].shape)]
                # a current within float rounding of a boundary moves a spike, and with it all that follows: so native
                # executions differ, too, and the page by no more than these do
                spread = apart(*ways)
                nearest = np.min([apart(seen, way) for way in ways], axis=0)
                assert nearest[0] <= max(1e-3, 2 * spread[0]) and nearest[1] <= 1e-3
                assert np.abs(seen[1] - ways[0][1]).mean() < 1e-2 * seen[1].mean()
                assert found['threads'] == 1 and found['tokens'] == seen[1].shape[2]
        browser.run('sformer.choose(0)')
        browser.choose_file('#file', tmp_path / 'six.png')
        browser.wait_for('document.querySelector("#classes b")?.textContent === "6" && '
                         'document.getElementById("status").textContent.includes("ms for the network")')
        assert 'million neurons fire' in browser.run('document.getElementById("counts").textContent')
        blocks = len(model.blocks)
        assert browser.run('document.querySelectorAll("#blocks figure:not([hidden]) canvas").length') == blocks
        browser.resize(390, 844, mobile=True)
        assert browser.run('document.documentElement.scrollWidth') <= 390, 'a phone has to scroll sideways'
        browser.screenshot(tmp_path / 'phone.png')
        assert not browser.said
        assert not [request for request in browser.requested if not request.startswith((url, 'data:', 'blob:'))]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # where other work shares the processor
def test_the_camera_and_a_file_that_is_no_image(spiking_graph, runtime, browser, tmp_path):
    write_page([str(spiking_graph)], tmp_path / 'page', runtime=runtime)
    (tmp_path / 'torn.png').write_bytes(b'torn')
    with served(tmp_path / 'page') as url:
        browser.open(url)
        browser.wait_for('window.sformer && document.getElementById("status").textContent.startsWith("Drop")')
        browser.choose_file('#file', tmp_path / 'torn.png')
        browser.wait_for('document.getElementById("status").textContent.includes("no image")')
        browser.run('document.getElementById("camera").click()')
        browser.wait_for('document.getElementById("status").textContent.includes("images per second")')
        assert browser.run('document.getElementById("camera").textContent') == 'Stop'
        browser.run('document.getElementById("camera").click()')
        assert browser.run('document.getElementById("camera").textContent') == 'Camera'
        assert not browser.said
