"""Spikes, executed: what meets weights and other spikes is 0 or 1, and the result is that of graded spikes."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_tools import FAMILIES, build, pixels, relative_error, rng
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sformer import SFNConfig, SFormerError, UncalibratedError, convert, source_of, spiking_, to_integer_, to_spikes_
from sformer.execution import spike_planes, spike_trains
from sformer.layers import SpikingLinear

aten = torch.ops.aten


class Operands(TorchDispatchMode):
    """Operands of float64 products, which are those of spikes."""
    PRODUCTS = {aten.mm: (0,), aten.addmm: (1,), aten.bmm: (0, 1), aten.convolution: (0,)}

    def __init__(self):
        super().__init__()
        self.values, self.count = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for i in self.PRODUCTS.get(func._overloadpacket, ()):
            if args[0].dtype == torch.float64:
                self.values |= set(args[i].unique().tolist())
                self.count += 1
        return func(*args, **(kwargs or {}))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-16256, 16256), min_size=1, max_size=30))
def test_planes_are_zeros_and_ones_and_add_up(levels):
    k = torch.tensor(levels, dtype=torch.int16)
    trains = list(spike_trains(k))
    assert all(set(spikes.tolist()) <= {0., 1.} and spikes.any() for _, spikes in trains)
    assert len({weight for weight, _ in trains}) == len(trains) <= 2 * 14
    assert sum((weight * spikes for weight, spikes in trains), torch.zeros(len(k))).tolist() == levels
    planes = spike_planes(k)
    assert set(planes.flatten().tolist()) <= {-1, 0, 1}
    assert (planes * 2. ** torch.arange(len(planes))[:, None]).sum(0).tolist() == levels
    assert sum(spikes.sum() for _, spikes in trains) == sum(abs(level).bit_count() for level in levels)


def coded(model, coding):
    return to_spikes_(copy.deepcopy(model), coding)


@pytest.mark.parametrize('family', [
    name if name in ('vit', 'eva02', 'gated attention') else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES])
@torch.no_grad()
def test_bit_planes_equal_graded_spikes(family):
    model, images = convert(build(family), [pixels(8)]), pixels(3, seed=5)
    with Operands() as operands:
        binary = coded(model, 'binary')(images)
    assert operands.values == {0., 1.} and operands.count > 10
    with Operands() as operands:
        graded = coded(model, 'graded')(images)
    assert len(operands.values) > 2
    assert torch.equal(binary, graded)
    assert relative_error(binary, model(images)) < 0.05  # sums in float32, and a potential at a boundary now and then


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_constants_around_which_neurons_are_silent_are_executed(dtype):
    model, images = convert(build('vit'), [pixels(8)], SFNConfig(silence=0.01)), pixels(3, seed=5)
    assert model.blocks[0].attn.products[0].v_neuron.center.abs().max() > 0.1
    model, images = model.to(dtype), images.to(dtype)
    binary = coded(model, 'binary')(images)
    assert torch.equal(binary, coded(model, 'graded')(images))
    assert relative_error(binary, model(images)) < 0.05


@torch.no_grad()
def test_a_layer_is_its_simulation(model, images):
    layer = copy.deepcopy(model.blocks[1].mlp.fc1)
    x = torch.randn(4, 17, 64, generator=rng(0))
    spiking = nn.Sequential(layer)
    exact = in_float64(layer, x)
    for coding in ('binary', 'graded'):
        out = coded(spiking, coding)(x)
        assert (out - exact).abs().max() <= 1e-6 * exact.abs().max()


def in_float64(layer, x):
    spikes = layer.neuron.encode(x)
    decoded = spikes.levels.double() * spikes.step * (1 if spikes.token_scale is None else spikes.token_scale)
    return decoded @ layer.weight.double().T + layer.bias


@torch.no_grad()
def test_int8_weights_bit_for_bit(model, images):
    integer = copy.deepcopy(model)
    to_integer_(integer)
    for name in ('patch_embed', 'blocks.0.mlp', 'head'):
        part = integer.get_submodule(name)
        x = images if name == 'patch_embed' else torch.randn(3, 17, 64, generator=rng(1))
        whole = nn.Sequential(part)
        for coding in ('binary', 'graded'):
            assert torch.equal(coded(whole, coding)(x), part(x)), (name, coding)
    assert torch.equal(coded(integer, 'binary')(images), coded(integer, 'graded')(images))


@torch.no_grad()
def test_trained_network(model, images):
    images = images[:8]
    out = model(images)
    spikes = to_spikes_(copy.deepcopy(model))
    assert relative_error(spikes(images), out) < 0.05 and (spikes(images).argmax(1) == out.argmax(1)).sum() >= 7
    binary = spikes(images)
    assert torch.equal(to_spikes_(spikes, 'graded')(images), binary)  # called again, the coding changes
    with pytest.raises(SFormerError, match='copy'):
        source_of(spikes)


def test_a_row_that_sees_no_key(model):
    product = model.blocks[0].attn.products[0]
    q, k, v = torch.randn(3, 1, 4, 5, 16, generator=rng(2)).unbind()
    mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)  # the first sees none
    with torch.no_grad():
        expected = product(q, k, v, mask)
        for coding in ('binary', 'graded'):
            out = coded(nn.Sequential(product), coding)[0](q, k, v, mask)
            assert not out[:, :, 0].any() and relative_error(out, expected) < 1e-3


def test_a_row_that_sees_no_key_gets_nothing_of_the_centre_either():
    model = convert(build('vit'), [pixels(8)], SFNConfig(silence=0.01))
    product = model.blocks[0].attn.products[0]
    assert product.v_neuron.center.abs().max() > 0.1
    q, k, v = torch.randn(3, 1, 2, 5, 16, generator=rng(2)).unbind()
    mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    with torch.no_grad():
        expected = product(q, k, v, mask)
        out = coded(nn.Sequential(product), 'binary')[0](q, k, v, mask)
    assert not out[:, :, 0].any() and relative_error(out, expected) < 1e-3


def test_bad_input(model):
    with pytest.raises(SFormerError, match="coding must be one of binary, graded, got 'ternary'"):
        to_spikes_(copy.deepcopy(model), 'ternary')
    with pytest.raises(SFormerError, match="coding must be one of binary, graded, got 'ternary'"):
        next(spike_trains(torch.ones(1, dtype=torch.int8), 'ternary'))
    with pytest.raises(UncalibratedError, match=r'fit it with sformer\.convert\(\) or calibrate_\(\) first'):
        to_spikes_(spiking_(build()))
    other = copy.deepcopy(model)
    other.blocks[1].mlp.fc1.__class__ = OwnLinear
    # instead of leaving it as it is
    with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1 \(OwnLinear\) does not say what it multiplies'):
        to_spikes_(other)
    assert type(other.blocks[0].mlp.fc1) is SpikingLinear


class OwnLinear(SpikingLinear):
    """One that multiplies in a forward of its own."""

    def forward(self, x, fired=False):
        return 2 * super().forward(x, fired)
