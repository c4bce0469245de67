"""Sites that are alike are exported once."""
import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, rng

from sformer import SFNConfig, calibrate_, convert, spiking_, to_integer_
from sformer.execution.fired import LateralLevels
from sformer.execution.functions import called_parts, inlined
from sformer.execution.graph import to_graph_


def graph_of(network, images, **config):
    network = convert(network, [images], SFNConfig(4, lateral=2, **config))
    to_integer_(network)
    to_graph_(network)
    return network


def kinds_of(network):
    """Names of functions that sites call, by path."""
    parts = {name: part for name, part in network.named_modules() if isinstance(part, LateralLevels)}
    with called_parts(network) as kinds:
        names = {name: vars(part)['forward'].name for name, part in parts.items()}
        assert {*kinds} == {*names.values()}
    assert not any('forward' in vars(part) for part in parts.values())  # they compute again
    return names


@torch.no_grad()
def test_sites_of_the_same_structure_call_one_function():
    network = graph_of(build('vit', depth=2), pixels(8))
    names = kinds_of(network)
    assert len({*names.values()}) < len(names)
    assert names['blocks.0.mlp.fc2.neuron'] == names['blocks.1.mlp.fc2.neuron'] != names['blocks.0.mlp.fc1.neuron']
    network.get_submodule('blocks.1.mlp.fc2.neuron').token_reach += 1
    assert kinds_of(network)['blocks.1.mlp.fc2.neuron'] not in names.values()


@pytest.mark.slow
@pytest.mark.usefixtures('operators_read_once')
@pytest.mark.parametrize('shape', [(6, 24), (6, 2, 3, 24)], ids=str)
@torch.no_grad()
def test_a_call_is_what_its_part_gives(shape):
    engine = pytest.importorskip('onnxruntime')
    from sformer.execution.onnx import graph_of_module
    x = torch.randn(shape, generator=rng()) * torch.logspace(0, 1, 24)
    layer = spiking_(nn.Sequential(nn.Linear(24, 8)), SFNConfig(4, lateral=3))
    calibrate_(layer, [x])
    to_integer_(layer)
    expected = layer(x)
    to_graph_(layer, early=False)
    with called_parts(layer) as kinds:
        model = graph_of_module(layer, (x,), ({0: torch.export.Dim('batch')},), ['out'])
    assert [node.domain for node in model.graph.node].count('sformer') == len(kinds) == 1
    model = inlined(model, kinds, graph_of_module)
    assert not model.functions and not any(node.domain == 'sformer' for node in model.graph.node)
    run = engine.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    for images in (x, x[:1], torch.cat([x, x])):  # any number of them
        out, = run.run(None, {'images': images.numpy()})
        torch.testing.assert_close(torch.from_numpy(out)[:1], expected[:1], rtol=1e-5, atol=1e-5)
        assert out.shape == (*images.shape[:-1], 8)
