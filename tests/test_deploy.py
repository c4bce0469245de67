"""What docs/deploy.md shows in C++ and JavaScript, and the service, run beside the network itself."""
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from sformer import export_onnx, load_onnx

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs/deploy.md').read_text(encoding='utf-8')
for package in ('onnx', 'onnxscript', 'onnxruntime', 'openvino'):
    pytest.importorskip(package)
HEADERS = Path(importlib.util.find_spec('openvino').origin).parent / 'include'


def block(language):
    found, = re.findall(rf'^```{language}\n(.*?)^```$', PAGE, re.M | re.S)
    return found


@pytest.fixture(scope='module')
def graph(tmp_path_factory):
    """A graph of digits that takes bytes, and images of which it tells the classes."""
    path = tmp_path_factory.mktemp('deploy') / 'model.onnx'
    export_onnx(timm.create_model('sformer_nano.digits', pretrained=True), path, uint8_input=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    network = load_onnx(path, 'onnxruntime')
    mean, std = network.pretrained_cfg['mean'][0], network.pretrained_cfg['std'][0]
    normalised = (torch.from_numpy(pixels).movedim(-1, 1) / 255 - mean) / std
    return path, pixels, network(normalised).argmax(1).tolist()


@pytest.mark.slow
def test_cpp(graph, tmp_path):
    if shutil.which('g++') is None or not (HEADERS / 'openvino').is_dir():
        pytest.skip('no compiler, or no headers')
    path, pixels, classes = graph
    (tmp_path / 'classify.cpp').write_text(block('cpp'))
    commands = next(text for text in re.findall(r'^```bash\n(.*?)^```$', PAGE, re.M | re.S) if 'g++' in text)
    bash = commands.replace('python ', f'{sys.executable} ')
    found = []
    for i, image in enumerate(pixels):
        (tmp_path / 'pixels.bin').write_bytes(image.tobytes())
        lines = bash if i == 0 else bash.splitlines()[-1]
        run = subprocess.run(['bash', '-ec', lines.replace('model.onnx', str(path))], cwd=tmp_path, capture_output=True,
                             text=True, timeout=240)
        assert run.returncode == 0, run.stderr
        found.append(int(run.stdout))
    assert sum(a != b for a, b in zip(found, classes, strict=True)) <= 1  # engines differ where a spike moves


@pytest.mark.slow
def test_javascript(graph, tmp_path):
    node = shutil.which('node')
    needed = "require.resolve('onnxruntime-web')"
    if node is None or subprocess.run([node, '-e', needed], capture_output=True).returncode:
        pytest.skip('no node, or no onnxruntime-web where it looks (NODE_PATH)')
    path, pixels, classes = graph
    (tmp_path / 'classify.js').write_text(block('js'))
    found = []
    for image in pixels[:3]:
        (tmp_path / 'pixels.bin').write_bytes(image.tobytes())
        run = subprocess.run([node, 'classify.js', path, 'pixels.bin', *map(str, image.shape)], cwd=tmp_path,
                             capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr
        found.append(int(run.stdout))
    assert found == classes[:3]


@pytest.fixture
def client(graph, monkeypatch):
    pytest.importorskip('fastapi')
    testclient = pytest.importorskip('fastapi.testclient')
    monkeypatch.setenv('MODEL', str(graph[0]))
    spec = importlib.util.spec_from_file_location('serve', ROOT / 'scripts/serve.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return testclient.TestClient(module.app)


@pytest.mark.slow
def test_service(graph, client):
    _, pixels, classes = graph
    for image, label in zip(pixels, classes, strict=True):
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, 'PNG')
        answer = client.post('/?top=3', content=file.getvalue())
        shares = answer.json()
        assert answer.status_code == 200 and len(shares) == 3 and next(iter(shares)) == str(label)
        assert 0 < min(shares.values()) and sum(shares.values()) <= 1 + 1e-6
    big = io.BytesIO()
    Image.new('RGB', (300, 200)).save(big, 'JPEG')
    assert client.post('/', content=big.getvalue()).status_code == 200
    assert client.post('/', content=b'no image').status_code == 415


def test_container_copies_what_is_there():
    """No build is run here: paths, extras and options of the file are those of the repository."""
    text = (ROOT / 'scripts/Dockerfile').read_text(encoding='utf-8')
    assert 'COPY scripts/serve.py /' in text and (ROOT / 'scripts/serve.py').exists()
    extras = re.findall(r"'\.\[(\w+)\]'", text)
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    assert extras == ['onnx'] and re.search(r'^onnx = ', project, re.M)
    imported = set(re.findall(r'^(?:import|from) (\w+)', (ROOT / 'scripts/serve.py').read_text(encoding='utf-8'), re.M))
    needed = {'PIL': 'pillow', 'numpy': 'onnxruntime'}  # which brings numpy
    installed = text.split('FROM')[-1]
    assert all(needed.get(name, name) in installed for name in imported - {*sys.stdlib_module_names})
