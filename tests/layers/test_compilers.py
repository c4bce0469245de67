"""What compiles, exports and traces a network finds every product: outputs are equal, and no gate is left analog."""
import copy
import inspect

import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, spiking
from timm import layers as tl
from timm.models._features_fx import create_feature_extractor

from sformer import SFNConfig, UnsupportedLayerError

NETWORKS = ['vit', 'eva02', 'beit', 'differential']
GATED = ['gated attention', 'gated rope attention']
ALL = [*NETWORKS, *GATED, 'deit distilled', 'parallel scaling', 'glu mlp', 'swiglu', 'map pooling']


@pytest.fixture(scope='module')
def models():
    """Spiking models by family, of one block as the others are alike, built once: not to be changed."""
    built = {}

    def model(family):
        if family not in built:
            with torch.random.fork_rng([]):
                built[family] = spiking(build(family, depth=1), pixels(), SFNConfig(levels=8))
        return built[family]

    return model


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def images():
    return pixels(2, seed=5)


def by_default(families, of):
    """Some families of a list; the others slowly."""
    return [family if family in families else pytest.param(family, marks=pytest.mark.slow) for family in of]


# by default each kind of attention by one compiler, a ViT by all of them in tests/models
@pytest.mark.parametrize('family', by_default(['differential', GATED[0]], ALL))
def test_graph_is_unbroken(family, models):
    model = models(family)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend='eager', fullgraph=True)(images()), model(images()))


@pytest.mark.slow
@pytest.mark.parametrize('family', [*NETWORKS, *GATED])
def test_compiled_network(family, models):
    model = models(family)
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True)(images())
    # fused kernels round otherwise: here and there a current falls on the other side of a boundary
    torch.testing.assert_close(out, model(images()), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_compiled_network_trains(models):
    model = copy.deepcopy(models('vit')).train()
    compiled = torch.compile(copy.deepcopy(model), backend='aot_eager', fullgraph=True)
    for network in (model, compiled):
        network(images()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize('strict', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('family', by_default(['eva02', *GATED], [*NETWORKS, *GATED]))
def test_exported_network(family, strict, models):
    model = models(family)
    with torch.no_grad():
        program = torch.export.export(model, (images(),), strict=strict)
        assert torch.equal(program.module()(images()), model(images()))


@pytest.mark.slow
def test_export_with_any_batch_size(models):
    model = models('vit')
    batch = torch.export.Dim('batch', min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
        assert torch.equal(program.module()(pixels(5)), model(pixels(5)))


@pytest.mark.parametrize('family', [f for f in ALL if f not in GATED])
def test_symbolically_traced_network(family, models):
    model = models(family)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(images()), model(images()))


@pytest.mark.parametrize('family', GATED)
def test_symbolic_tracing_of_a_gate_is_refused(family, models):
    # a proxy multiplies without telling: the gate would be left analog
    with pytest.raises(UnsupportedLayerError, match='symbolic tracing of a gated layer hides it: use torch.export'):
        torch.fx.symbolic_trace(models(family))


@pytest.mark.parametrize('kind', [tl.Attention, tl.AttentionRope])
def test_symbolic_tracing_of_a_layer(kind):
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    for gated in (False, True):
        layer = spiking(nn.Sequential(kind(16, 2, gated=gated).eval()), x)
        if gated:
            with pytest.raises(UnsupportedLayerError):
                torch.fx.symbolic_trace(layer)
        else:
            assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))


@pytest.mark.parametrize('kind', [tl.Attention, tl.AttentionRope])
def test_symbolic_tracing_of_an_attention_layer_as_the_root(kind):
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    layer = spiking(nn.Sequential(kind(16, 2).eval()), x)[0]
    fixed = {name: None for name in inspect.signature(kind.forward).parameters if name not in ('self', 'x')}
    traced = torch.fx.symbolic_trace(layer, concrete_args=dict(fixed, is_causal=False))
    with torch.no_grad():
        assert torch.equal(traced(x), layer(x))
    assert inspect.signature(type(layer).forward) == inspect.signature(kind.forward)


@pytest.mark.parametrize('family', NETWORKS)
def test_feature_extractor_of_timm(family, models):
    model, blocks = models(family), []
    handle = model.blocks[0].register_forward_hook(lambda module, args, out: blocks.append(out))
    with torch.no_grad():
        expected = model(images())
        handle.remove()
        extractor = create_feature_extractor(model, {'blocks.0': 'block', 'head': 'head'})
        features = extractor(images())
        assert torch.equal(features['head'], expected) and torch.equal(features['block'], blocks[0])


@pytest.mark.slow
@pytest.mark.parametrize('family', [*NETWORKS, *GATED])
def test_onnx_export(family, models, tmp_path):
    pytest.importorskip('onnxscript')
    onnx = pytest.importorskip('onnx')
    from onnx.reference import ReferenceEvaluator
    # in double precision, or the other order of sums would push currents over the boundaries of levels
    model, x = copy.deepcopy(models(family)).double(), images().double()
    path = tmp_path / 'model.onnx'
    with torch.no_grad():
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        expected = model(x)
    program = onnx.load(path)
    onnx.checker.check_model(program)
    name = program.graph.input[0].name
    out, = ReferenceEvaluator(program).run(None, {name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected)


@pytest.mark.parametrize('trace', [
    lambda model: model, torch.fx.symbolic_trace,
    lambda model: torch.compile(model, backend='eager', fullgraph=True),
    lambda model: torch.export.export(model, (images(),)).module()], ids=['eager', 'fx', 'compile', 'export'])
def test_grey_images_are_refused_as_by_the_source(trace, models):
    with torch.no_grad(), pytest.raises((RuntimeError, AssertionError)):
        trace(models('vit'))(images()[:, :1])
