"""A neuron type of one's own: converted, swept, counted, saved and loaded by its name; exported, or refused by it."""
import copy
import json

import pytest
import torch
import torch.nn as nn
from layer_tools import build, pixels, relative_error

from sformer import (
    FitConfig,
    SFNConfig,
    SFormerError,
    calibrate_,
    convert,
    load_model,
    named_neurons,
    save_model,
    source_of,
    spiking_,
)
from sformer.conversion.distillation import unary_spikes
from sformer.conversion.search import Bench, sweep
from sformer.errors import ConfigError
from sformer.evaluation.activity import Activity
from sformer.execution import export_onnx, to_integer_, to_spikes_
from sformer.neurons import NEURON_TYPES, GradedCoding, Neuron, ScaleAndFire, Spikes, register_neuron
from sformer.profiling import neurobench_view, profile_operations


class Sign(Neuron):
    def encode(self, x):
        return Spikes(x.detach().sign().to(torch.int8), torch.tensor(0.5))


class Linear(Neuron):
    """Fires whole numbers up to N of one step per site, which the largest current reaches."""

    def __init__(self, shape, config, signed=True, device=None, **site):
        super().__init__(device=device)
        self.levels, self.signed = config.levels, signed
        self.register_buffer('step', torch.ones((), device=device))

    def encode(self, x):
        k = (x.detach().float() / self.step).round_().clamp_(-self.levels if self.signed else 0, self.levels)
        return Spikes(k.to(torch.int8), self.step)

    def statistics(self):
        return Largest()

    def fit(self, statistics, config=FitConfig()):
        self.step.fill_(statistics.value / self.levels)
        self.mark_calibrated()


class Largest:
    value = 0.

    def update(self, x):
        self.value = max(self.value, x.abs().max().item())


class Halved(ScaleAndFire):
    """Fires as scale-and-fire neurons do, but for every other level."""

    def encode(self, x):
        spikes = super().encode(x)
        return spikes._replace(levels=spikes.levels // 2 * 2)

    def forward(self, x):
        return Neuron.forward(self, x)


@pytest.fixture(autouse=True)
def registered():
    before = dict(NEURON_TYPES)
    register_neuron('linear', Linear)
    register_neuron('halved', Halved)
    yield
    NEURON_TYPES.clear()
    NEURON_TYPES.update(before)


def own(name='linear', levels=32, family='vit'):
    return convert(build(family), [pixels(16)], SFNConfig(levels, neuron=name))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_forward_follows_from_encode(dtype):
    x = torch.tensor([-3., 0., 2.], dtype=dtype, requires_grad=True)
    out = Sign()(x)
    out.sum().backward()
    assert out.dtype == dtype and out.tolist() == [-0.5, 0, 0.5] and x.grad.tolist() == [1, 1, 1]
    with torch.no_grad():
        assert torch.equal(Sign()(x), out)


@pytest.mark.parametrize('family', ['vit', 'eva02', 'gated attention'])
def test_it_stands_wherever_something_fires(family):
    source, model = build(family), own(family=family)
    kinds = {name: type(neuron) for name, neuron in named_neurons(model)}
    expected = {name: type(neuron) for name, neuron in named_neurons(convert(source, [pixels(4)]))}
    assert kinds == {name: Linear if kind is ScaleAndFire else kind for name, kind in expected.items()}
    assert set(kinds.values()) == {Linear, GradedCoding} and model.sfn_config == SFNConfig(32, neuron='linear')
    with torch.no_grad():
        assert relative_error(model(pixels(8, 5)), source(pixels(8, 5))) < 0.1
    assert not any(isinstance(m, Neuron) for m in source_of(model).modules())


@pytest.mark.parametrize('name', ['linear', 'halved'])
def test_it_is_saved(name, tmp_path):
    model, x = own(name), pixels(4, 5)
    loaded = load_model(save_model(model, tmp_path / 'a'))
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    assert config['model_args']['sfn']['neuron'] == name and loaded.sfn_config == model.sfn_config
    assert {type(n) for _, n in named_neurons(loaded)} == {NEURON_TYPES[name], GradedCoding}
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    del NEURON_TYPES[name]
    with pytest.raises(SFormerError, match=rf"neuron must be one of [\w, ]+, got '{name}': sformer.neurons."
                                           r'register_neuron registers') as caught:
        load_model(tmp_path / 'a')
    assert '\n' not in str(caught.value)


def test_what_no_config_rebuilds_is_not_saved(tmp_path):
    """A neuron that was put in by hand, even if its buffers have the same names and shapes."""
    for name, kind in (('linear', 'Linear'), ('halved', 'Halved')):
        model, other = convert(build(), [pixels(8)]), own(name)
        model.blocks[1].mlp.fc1.neuron = other.blocks[1].mlp.fc1.neuron
        with pytest.raises(SFormerError, match=rf'blocks\.1\.mlp\.fc1\.neuron is a {kind}, which no config can'):
            save_model(model, tmp_path / 'x')
    model = convert(build(), [pixels(8)])
    rest = convert(build(), [pixels(8)], SFNConfig(initial_potential=0.))
    model.head.neuron = rest.head.neuron
    with pytest.raises(SFormerError, match=r'head\.neuron fires by another config than the first neuron'):
        save_model(model, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


def test_it_is_counted():
    """By activity, by a profile and by the price of distillation, which agree with what is fired."""
    model, x = own(), pixels(4, 5)
    sites = [name for name, neuron in named_neurons(model) if not isinstance(neuron, GradedCoding)]
    fired, total, unary = 0, 0, 0

    def count(neuron, args):
        nonlocal fired, total, unary
        levels = neuron.encode(args[0]).levels.int()
        fired += (levels != 0).sum().item()
        total += levels.numel()
        unary += levels.abs().sum().item()

    handles = [dict(named_neurons(model))[name].register_forward_pre_hook(count) for name in sites]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    counts = Activity()
    with counts.observe(model), torch.no_grad(), unary_spikes(model) as spikes:
        model(x)
    assert counts.per_site().keys() == set(sites) and counts.mean() == fired / total
    assert counts.spikes_per_neuron()['unary'] == unary / total
    assert spikes.mean().item() == pytest.approx(unary / total, rel=1e-5)
    _, profiled, _ = profile_operations(model, [x])
    seen = {site.name: site for site in profiled}
    assert set(sites) < seen.keys() and all(seen[name].activity == counts.per_site()[name] for name in sites)


def test_it_is_swept():
    model, x = own(), pixels(48, 5)
    few, many = sweep(Bench(model, x[:16], x[16:]), model.sfn_config, (4, 64))
    assert (few.config, many.config) == (SFNConfig(4, neuron='linear'), SFNConfig(64, neuron='linear'))
    assert few.error > 2 * many.error and few.unary < many.unary and 0 < few.activity < many.activity < 1


def test_it_computes_in_integers():
    for layer, shape in ((nn.Linear(64, 32), (99, 64)), (nn.Conv2d(8, 6, 3, padding=1), (9, 8, 5, 5))):
        module, x = nn.Sequential(layer), torch.randn(shape, generator=torch.Generator().manual_seed(0))
        calibrate_(spiking_(module, SFNConfig(neuron='linear')), [x])
        integers = copy.deepcopy(module)
        assert [report.integer for report in to_integer_(integers)] == [True]
        with torch.no_grad():
            assert 0 < relative_error(integers(x), module(x)) < 0.02
    model, images = own(), pixels(4, 5)
    with torch.no_grad():
        spikes = to_spikes_(copy.deepcopy(model))
        assert relative_error(spikes(images), model(images)) < 1e-3


@pytest.mark.parametrize('name', ['linear', 'halved'])
def test_it_is_refused_by_name_where_it_has_no_form(name, tmp_path):
    model = own(name)
    for package in ('onnx', 'onnxscript'):
        pytest.importorskip(package)
    kind = type(model.head.neuron).__name__
    with pytest.raises(SFormerError, match=f'a {kind} has no form in ONNX: a ScaleAndFire has'):
        export_onnx(model, tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


def test_spikes_without_a_step_per_channel_are_refused_by_name():
    layer = spiking_(nn.Sequential(nn.Linear(4, 3)))
    layer[0].neuron = Sign()
    layer[0].neuron.mark_calibrated()
    with pytest.raises(SFormerError, match=r'0\.neuron is a Sign, whose spikes have no step per channel'):
        to_integer_(layer)


def test_gates_of_a_type_of_ones_own_keep_it():
    """`to_spikes_` executes gates of scale-and-fire neurons; others it names, and changes nothing."""
    model = own('halved', family='eva02')
    with pytest.raises(SFormerError, match=r'blocks\.0\.mlp\.gate_neuron is a Halved, whose products are not'):
        to_spikes_(model)
    assert {type(neuron) for _, neuron in named_neurons(model)} == {Halved, GradedCoding}


def test_counters_of_neurobench():
    pytest.importorskip('neurobench')
    model, x = own(), pixels(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(neurobench_view(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_price_that_it_does_not_know():
    with pytest.raises(ConfigError, match='silence is a price of scale-and-fire neurons, which a Linear does not know'):
        convert(build(), [pixels(4)], SFNConfig(neuron='linear', silence=0.01))
    module = spiking_(nn.Sequential(nn.Linear(4, 3)), SFNConfig(neuron='linear', silence=0.01))
    with pytest.raises(ConfigError, match='a Linear does not know'):
        calibrate_(module, [torch.randn(8, 4)])


def test_names_that_are_none():
    for name, kind, message in (
            ('a b', Linear, "an identifier, not 'a b'"), (3, Linear, 'an identifier, not 3'),
            ('mine', nn.Linear, 'is no subclass of'), ('mine', Sign(), 'is no subclass of'),
            ('scale_and_fire', Linear, "'scale_and_fire' is the name of sformer.neurons.scale_and_fire.ScaleAndFire"),
            ('linear', Sign, "'linear' is the name of")):
        with pytest.raises(ConfigError, match=message):
            register_neuron(name, kind)
    again = type('Linear', (Linear,), {'__qualname__': 'Linear'})  # as in a notebook, where a cell is run again
    assert register_neuron('linear', again) is again and NEURON_TYPES['linear'] is again
