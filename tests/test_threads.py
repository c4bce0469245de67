"""What all threads of a process share is changed by one of them at a time, and put back: threads export, load and fit
at once, and find what they would find alone."""
import ast
import contextlib
import logging
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_tools import build, pixels
from test_house import MODULES
from timm.layers import pos_embed_sincos

from sformer import SFNConfig, convert
from sformer.detection import DetectorConfig, create_detector
from sformer.errors import quiet
from sformer.execution.onnx import rotary_products
from sformer.saving.pretrained import float32_by_default


def shared():
    """What threads share, as it is."""
    return (
        [*warnings.filters], logging.getLogger('shared').level, torch.get_default_dtype(), pos_embed_sincos.rot,
        sys.stdout, torch.get_rng_state().tolist())


@contextlib.contextmanager
def bfloat16_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize('change, around', [
    (lambda: quiet('shared'), contextlib.nullcontext), (rotary_products, contextlib.nullcontext),
    (float32_by_default, bfloat16_by_default)], ids=['warnings', 'rotary embedding', 'dtype'])
def test_the_one_that_ends_last_puts_back_what_was_there(change, around):
    """Of two that overlap, were they let: the first one to begin is the first one to end."""
    entered, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def changing(index):
        with change():
            entered[index].set()
            assert leave[index].wait(20)

    with around(), ThreadPoolExecutor(2) as pool:
        before = shared()
        first = pool.submit(changing, 0)
        assert entered[0].wait(20) and shared() != before
        second = pool.submit(changing, 1)
        assert not entered[1].wait(0.2)
        leave[0].set()
        first.result()
        assert entered[1].wait(20)
        leave[1].set()
        second.result()
        assert shared() == before


def test_other_threads_turn_as_ever_while_a_graph_is_made():
    x = torch.randn(2, 5, 8)
    x[0, 0, 0] = torch.inf  # which a product makes NaN of
    expected = pos_embed_sincos.rot(x)
    with rotary_products(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: pos_embed_sincos.rot(x)).result(), expected)
        assert pos_embed_sincos.rot(x).isnan().any()


@pytest.mark.slow
def test_graphs_that_are_made_at_once_are_those_that_are_made_alone():
    pytest.importorskip('onnxscript')
    from sformer.execution import to_integer_
    from sformer.execution.graph import to_graph_
    from sformer.execution.onnx import graph_hash, to_onnx

    def network(family):
        model = convert(build(family, depth=1), [pixels()], SFNConfig(8))
        to_integer_(model)
        to_graph_(model)
        return model

    networks = [network('eva02') for _ in range(2)]
    expected = [graph_hash(to_onnx(networks[0]))] * 2
    before = shared()
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda network: graph_hash(to_onnx(network)), networks)] == expected
    assert shared() == before


def test_models_that_are_converted_at_once_are_those_that_are_converted_alone():
    sources = [build(family, depth=1) for family in ('vit', 'eva02', 'beit')]

    def state(source):
        model = convert(source, [pixels()], SFNConfig(8, silence=0.01))
        return {name: value for name, value in model.state_dict().items()}

    expected = [*map(state, sources)]
    before = shared()
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(state, sources)]
    assert shared() == before
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def test_detectors_that_are_built_at_once_are_of_their_seeds(monkeypatch):
    """The new weights of heads are drawn from torch's state, which threads share."""
    from sformer.detection import detectors
    monkeypatch.setattr(detectors, 'create_source', None)  # no weights are loaded
    monkeypatch.setattr(detectors, 'create_backbone', lambda *args: build('vit', depth=1))
    config = DetectorConfig('vit_tiny_patch16_224', {1: 'thing'}, image_size=(64, 64), channels=16, hidden=16)

    def heads(seed):
        detector = create_detector(config, seed=seed)
        return torch.cat([p.flatten() for name, p in detector.named_parameters() if '.vit.' not in name])

    expected = [heads(seed) for seed in range(4)]
    before = shared()
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(heads, range(4))]
    assert shared() == before and all(map(torch.equal, found, expected))


# What is changed of the process, by module -> why. Whoever adds to it says why there is no other way, and is `alone`
# where it is put back.
CHANGED = {
    ('sformer.cli.app', 'logging.getLogger(name).setLevel'): 'a command has the process to itself',
    ('sformer.cli.baselines', 'contextlib.redirect_stdout'): 'likewise; toolkits print',
    ('sformer.cli.benchmark', 'contextlib.redirect_stdout'): 'likewise; NNCF prints',
    ('sformer.cli.benchmark', 'torch.set_num_threads'): 'likewise',
    ('sformer.cli.demo', 'torch.set_num_threads'): 'likewise',
    ('sformer.cli.failure', 'sys.excepthook'): 'likewise',
    ('sformer.conversion.repositories', 'disable_progress_bars'): 'bars of another thread come back early, no more',
    ('sformer.conversion.repositories', 'enable_progress_bars'): 'likewise',
    ('sformer.conversion.repositories', 'warnings.filterwarnings'): 'of one message, for good',
    ('sformer.conversion.weights', 'torch.serialization.safe_globals'): 'what may be unpickled; alone',
    ('sformer.data.resolution', 'datasets.disable_progress_bars'): 'bars of another thread come back early, no more',
    ('sformer.data.resolution', 'datasets.enable_progress_bars'): 'likewise',
    ('sformer.data.resolution', 'logger.setLevel'): 'the level that it had, which the import of datasets has changed',
    ('sformer.detection.detector_evaluation', 'contextlib.redirect_stdout'): 'pycocotools prints; alone',
    ('sformer.detection.detector_export', 'contextlib.redirect_stdout'): "torch's older exporter prints; alone",
    ('sformer.detection.detectors', 'torch.manual_seed'): "torchvision's layers take no generator; alone",
    ('sformer.detection.detectors', 'torch.random.fork_rng'): 'likewise',
    ('sformer.detection.training', 'torch.manual_seed'): "torchvision's losses take no generator",
    ('sformer.errors', 'logger.setLevel'): 'alone',
    ('sformer.errors', 'warnings.catch_warnings'): 'alone',
    ('sformer.conversion.training_state', 'signal.signal'): 'of the main thread, while it trains, and put back',
    ('sformer.evaluation.launch', 'signal.signal'): 'of the main thread, in a run of several processes',
    ('sformer.execution.onnx', 'pos_embed_sincos.rot'): 'layers of timm are given no function; alone',
    ('sformer.layers.adapters', 'register_module_module_registration_hook'): 'a layer is not told what it is put into',
    ('sformer.saving.hub', 'warnings.filterwarnings'): 'of one message, for good',
    ('sformer.saving.pretrained', 'torch.random.fork_rng'): "the user's state stays as it was; alone",
    ('sformer.saving.pretrained', 'torch.set_default_dtype'): 'promotion goes by it; alone',
}
CHANGING = re.compile(
    r'(?:^|\.)(?:set_default_\w+|set_num_threads|\w*catch_warnings|filterwarnings|simplefilter|redirect_std\w+|setLevel|'
    r'safe_globals|fork_rng|umask|chdir|putenv|\w+able_progress_bars|register_module_\w+)$|^torch\.manual_seed$|^signal\.signal$')

# tables that functions fill: on import, but for what users register -> where
FILLED = {
    'sformer.evaluation.figures': {'PRECISION', 'PRECISION_PARTS'},
    'sformer.evaluation.schema': {'SCHEMAS'},
    'sformer.models.sformer': {'MADE'},
    'sformer.layers.table': {'SPIKING_LAYERS', 'FLOATING_LAYERS'},
    'sformer.neurons.registry': {'NEURON_TYPES'},
    'sformer.tasks.door': {'_TASKS'},
}


def changes(module, path):
    """What a module changes of the process: calls, and attributes of modules that it assigns to."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    modules = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
               for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and CHANGING.search(ast.unparse(node.func)):
            yield module, ast.unparse(node.func)
        elif isinstance(node, ast.Global):
            yield module, f'global {", ".join(node.names)}'
        for target in getattr(node, 'targets', ()):
            place = target.value if isinstance(target, (ast.Attribute, ast.Subscript)) else None
            if isinstance(target, ast.Attribute) and isinstance(place, ast.Name) and place.id in modules \
                    and place.id.islower() or place is not None and ast.unparse(place) == 'os.environ':
                yield module, ast.unparse(target)


def filled(path):
    """Names at the top of a module that its functions write to."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    top = {name.id for node in tree.body for name in ast.walk(node) if isinstance(name, ast.Name)
           and isinstance(name.ctx, ast.Store) and not isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    top |= {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        local = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        local |= {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
        for node in ast.walk(function):
            place = None
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
                place = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (
                    'append', 'add', 'update', 'setdefault', 'pop', 'clear', 'extend', 'remove', 'discard'):
                place = node.func.value
            if isinstance(place, ast.Name) and place.id in top - local:
                yield place.id


def test_what_is_changed_of_the_process_has_a_reason():
    assert {change for module, path in MODULES.items() for change in changes(module, path)} == CHANGED.keys()


def test_tables_of_a_module_are_registers():
    found = {module: {*filled(path)} for module, path in MODULES.items()}
    assert {module: names for module, names in found.items() if names} == FILLED
