"""The verb that makes a module spike: what it keeps, what it refuses, and the ways back."""
import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn as nn
from layer_tools import (
    FAMILIES,
    SMALL,
    build,
    neuron_names,
    pixels,
    randomise_,
    relative_error,
    rng,
    same_state,
    spiking,
    state_of,
    tokens,
)
from timm import layers as tl

import sformer
from sformer import (
    SFNConfig,
    UnsupportedLayerError,
    calibrate_,
    is_calibrated,
    named_neurons,
    source_of,
    source_view,
    spiking_,
)
from sformer.layers import SPIKING_LAYERS, AttentionProduct, SpikingConv2d, SpikingLayer, SpikingLinear, uncalibrated
from sformer.neurons import Neuron

families = pytest.mark.parametrize('family', FAMILIES)
VARIANTS = {
    'reg tokens': dict(reg_tokens=4, no_embed_class=True),
    'gap': dict(global_pool='avg'),
    'layer scale': dict(init_values=0.1),
    'pre norm': dict(pre_norm=True),
    'no bias': dict(qkv_bias=False, proj_bias=False),
    'silu rms norm': dict(act_layer=nn.SiLU, norm_layer=tl.RmsNorm),
    'no head': dict(num_classes=0),
    'gray': dict(in_chans=1),
    'dropout': dict(drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1, patch_drop_rate=0.1),
}
ALL = {**{name: (name, {}) for name in FAMILIES}, **{name: ('vit', kwargs) for name, kwargs in VARIANTS.items()}}
structures = pytest.mark.parametrize('structure', ALL)


def source_and_pixels(structure, seed=0):
    family, kwargs = ALL[structure]
    return build(family, seed, **kwargs), pixels(4, chans=kwargs.get('in_chans', 3))


# what stays

@structures
def test_parameters_stay_bit_for_bit(structure):
    source, _ = source_and_pixels(structure)
    model = spiking_(copy.deepcopy(source))
    before, after = dict(source.named_parameters()), dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    neurons = neuron_names(model)
    added = set(model.state_dict()) - set(source.state_dict())
    assert added and all(name.rpartition('.')[0] in neurons for name in added)
    assert set(source.state_dict()) <= set(model.state_dict())


@structures
def test_weights_move_either_way(structure):
    source, x = source_and_pixels(structure)
    other, _ = source_and_pixels(structure, seed=9)
    model = spiking_(copy.deepcopy(other))
    assert not model.load_state_dict(source.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        assert torch.equal(source_view(model)(x), source(x))
        assert not other.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert torch.equal(other(x), source(x))


@structures
def test_every_layer_with_weights_is_spiking(structure):
    model = spiking_(source_and_pixels(structure)[0])
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert layers and all(type(m) in (SpikingLinear, SpikingConv2d) for m in layers)
    assert all(isinstance(m.neuron, Neuron) for m in layers)
    assert not any(type(m) in SPIKING_LAYERS for m in model.modules())
    assert sum(isinstance(m, AttentionProduct) for m in model.modules()) >= SMALL['depth']


@families
def test_many_levels_come_close_to_the_source(family):
    source, x = build(family), pixels()
    with torch.no_grad():
        reference = source(x)
        errors = [relative_error(spiking(source, x, SFNConfig(levels))(x), reference)
                  for levels in ((8, 127) if family in ('vit', 'eva02') else (127,))]
    assert errors[-1] < 0.03 and (len(errors) == 1 or errors[1] < errors[0] / 3), errors


# what is refused

class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize('module, named', [
    (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.GELU(), nn.LSTM(4, 4))),
     r'1\.1 \(torch\.nn\.modules\.rnn\.LSTM\)'),
    (nn.Sequential(nn.Linear(4, 4), Subclass(4, 4)), r'1 \(.*test_spiking\.Subclass\)'),
    (nn.Conv1d(4, 4, 1), r'\(root\) \(torch\.nn\.modules\.conv\.Conv1d\)'),
    (nn.MultiheadAttention(4, 1), r'\(root\) .*MultiheadAttention.*out_proj'),
])
def test_unsupported_layer_is_named_and_nothing_changes(module, named):
    kinds, state = [type(m) for m in module.modules()], state_of(module)
    with pytest.raises(UnsupportedLayerError, match=named):
        spiking_(module)
    assert [type(m) for m in module.modules()] == kinds and same_state(module, state)


def test_unsupported_model_is_named_and_nothing_changes():
    model = build(act_layer=nn.PReLU)
    kinds, state = [type(m) for m in model.modules()], state_of(model)
    with pytest.raises(UnsupportedLayerError, match=r'blocks\.0\.mlp\.act \(torch\.nn.*\.PReLU\)'):
        sformer.models.spiking_model_(model)
    assert [type(m) for m in model.modules()] == kinds and same_state(model, state)
    assert not hasattr(model, 'sfn_config')


@pytest.mark.parametrize('count, more', [(4, ''), (5, ' and 1 more'), (6, ' and 2 more')])
def test_many_unsupported_layers_are_counted(count, more):
    with pytest.raises(UnsupportedLayerError, match=rf', 3 \([\w.]+\){more}\. Register'):
        spiking_(nn.Sequential(*(nn.LSTM(4, 4) for _ in range(count))))


def test_a_replaced_forward_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    forward = model[1].forward
    model[1].forward = lambda x: forward(x)
    with pytest.raises(UnsupportedLayerError, match='the forward of 1 was replaced'):
        spiking_(model)
    assert type(model[0]) is nn.Linear


def test_a_forward_that_was_put_back_spikes():
    layer = nn.Linear(4, 4)
    layer.forward = layer.forward  # what hooks that were removed leave behind
    spiking_(layer, SFNConfig(token_scale=False))
    layer.neuron.step.fill_(1e6)
    assert torch.equal(layer(torch.randn(2, 4)), layer.bias.expand(2, 4)), 'nothing reaches its threshold'


# again

def test_spiking_twice_changes_nothing():
    model = spiking(build(), pixels(), SFNConfig(levels=8))
    neurons, state = dict(named_neurons(model)), state_of(model)
    assert spiking_(model, SFNConfig(levels=99)) is model
    again = dict(named_neurons(model))
    assert list(again) == list(neurons) and all(again[name] is neurons[name] for name in neurons)
    assert same_state(model, state)


def test_second_call_converts_a_layer_that_was_put_in_later():
    model = spiking(build(), pixels(), SFNConfig(levels=8))
    model.head = nn.Linear(32, 3)
    spiking_(model, SFNConfig(levels=8))
    assert type(model.head) is SpikingLinear and not model.head.neuron.calibrated
    assert all(neuron.calibrated for name, neuron in named_neurons(model) if name != 'head.neuron')
    assert not is_calibrated(model) and 'the first is head.neuron' in uncalibrated(model)


# the ways back

@structures
def test_source_of_is_the_inverse(structure):
    source, x = source_and_pixels(structure)
    model = sformer.models.spiking_model_(copy.deepcopy(source))
    kind, state = type(model), state_of(model)
    back = source_of(model)
    assert [(n, type(m)) for n, m in back.named_modules()] == [(n, type(m)) for n, m in source.named_modules()]
    assert same_state(back, state_of(source))
    with torch.no_grad():
        assert torch.equal(back(x), source(x))
        back.patch_embed.proj.weight.zero_()  # a copy
    assert type(model) is kind and issubclass(kind, SpikingLayer) and same_state(model, state)


@structures
def test_source_view_shares_parameters_and_computes_the_source(structure):
    source, x = source_and_pixels(structure)
    model = spiking_(copy.deepcopy(source), SFNConfig(levels=4))
    with torch.no_grad():
        out = model(x)
        view = source_view(model)
        pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
        assert {name: p.data_ptr() for name, p in view.named_parameters()} == pointers
        assert not list(named_neurons(view)) and same_state(view, state_of(source))
        assert torch.equal(view(x), source(x))
        assert torch.equal(model(x), out) and not torch.equal(out, source(x))
        next(model.parameters()).add_(1.)  # the view is one: a change of the model reaches it
        assert torch.equal(next(view.parameters()), next(model.parameters()))


def test_a_view_is_in_the_mode_of_its_model():
    model = spiking(build(), pixels())
    assert not source_view(model).training and source_view(model.train()).training


def test_the_model_spikes_on_in_another_thread_while_its_view_is_used():
    model, x = spiking(build('gated attention'), pixels(), SFNConfig(levels=4)), pixels(2)
    with torch.no_grad():
        expected = {'model': model(x), 'view': source_view(model)(x)}
    wrong, barrier = [], threading.Barrier(2)

    def run(name):
        with torch.no_grad():
            barrier.wait()
            for _ in range(20):
                network = source_view(model) if name == 'view' else model
                if not torch.equal(network(x), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize('family, way', [
    *(('vit', way) for way in ('copy', 'deepcopy', 'pickle', 'torch.save')),
    ('eva02', 'pickle'), ('gated attention', 'torch.save'), ('differential', 'deepcopy'), ('glu mlp', 'pickle')])
def test_copies_of_a_spiking_model(family, way):
    model, x = spiking(build(family), pixels(), SFNConfig(levels=8)), pixels(2)
    if way == 'torch.save':
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = {'copy': copy.copy, 'deepcopy': copy.deepcopy,
                 'pickle': lambda m: pickle.loads(pickle.dumps(m))}[way](model)
    with torch.no_grad():
        out = model(x)
        assert type(other) is type(model) and same_state(other, state_of(model)) and torch.equal(other(x), out)
        assert torch.equal(source_of(other)(x), source_view(model)(x))
        if way != 'copy':
            next(other.parameters()).zero_()
            assert torch.equal(model(x), out)


# any module

class Net(nn.Module):
    """A module of a user: a container that only calls its children."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act, self.norm = nn.GELU(), nn.LayerNorm(8)
        self.heads = nn.ModuleDict({'one': nn.Linear(8, 5), 'two': nn.Sequential(nn.Linear(8, 8), nn.GELU())})

    def forward(self, image, scale=1.):
        x = self.norm(self.act(self.stem(image * scale)).flatten(2).transpose(1, 2))
        return {name: head(x) for name, head in self.heads.items()}


def network(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return randomise_(Net())


def images(n=6):
    return torch.randn(n, 3, 8, 8, generator=rng(1))


def test_any_module_converts_calibrates_and_saves():
    source, x = network(), images()
    model = spiking_(copy.deepcopy(source), SFNConfig(levels=127))
    assert neuron_names(model) == ['stem.neuron', 'heads.one.neuron', 'heads.two.0.neuron']
    assert calibrate_(model, [x]) == 6 and is_calibrated(model)
    with torch.no_grad():
        out, reference = model(x), source(x)
        assert all(relative_error(out[name], reference[name]) < 0.02 for name in out)
        other = spiking_(network(seed=5), SFNConfig(levels=127))
        other.load_state_dict(model.state_dict())
        assert is_calibrated(other) and all(torch.equal(v, out[name]) for name, v in other(x).items())
        assert all(torch.equal(v, reference[name]) for name, v in source_of(other)(x).items())


def test_a_forward_of_the_users_own_calibrates_what_is_no_tensor():
    source = network()
    batches = [dict(image=images(), scale=0.5), dict(image=images(2), scale=2.)]
    model = spiking_(copy.deepcopy(source), SFNConfig(levels=127))
    assert calibrate_(model, batches, forward_fn=lambda net, batch: net(**batch)) == 2
    with torch.no_grad():
        out, reference = model(**batches[1]), source(**batches[1])
        assert all(relative_error(out[name], reference[name]) < 0.02 for name in out)
    same = spiking_(copy.deepcopy(source), SFNConfig(levels=127))
    for batch in batches:
        batch['image'] = batch['image'] * batch.pop('scale')
    calibrate_(same, batches, forward_fn=lambda net, batch: net(batch['image']))
    assert same_state(same, state_of(model))


class Gram(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.norm(x)
        return x @ x.transpose(-2, -1)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


@pytest.mark.parametrize('kind', [Gram, Attends])
def test_a_module_that_multiplies_in_its_own_forward_is_refused_by_calibration(kind):
    model = spiking_(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.GELU(), kind())))
    state = state_of(model)
    with pytest.raises(UnsupportedLayerError, match=rf'1\.1 \(.*\.{kind.__name__}\) multiplies currents in its own'):
        calibrate_(model, [tokens(dim=8)])
    assert same_state(model, state) and not is_calibrated(model)


@pytest.mark.parametrize('left', [
    nn.Linear(8, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 8)), nn.Conv1d(6, 6, 1), Attends(), tl.Attention(8, 2),
    nn.MultiheadAttention(8, 2)], ids=lambda m: type(m).__name__)
def test_a_filter_leaves_layers_alone(left):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left = nn.Linear(8, 8), left

        def forward(self, x):
            x = self.first(x)
            return self.left(x, x, x)[0] if isinstance(self.left, nn.MultiheadAttention) else self.left(x)

    source = Two().eval()
    asked = []
    model = spiking_(copy.deepcopy(source), filter_fn=lambda module, name: asked.append(name) or name != 'left')
    assert asked == ['', 'first', 'left'], 'what is below it is not asked for'
    assert neuron_names(model) == ['first.neuron']
    assert [type(m) for m in model.left.modules()] == [type(m) for m in source.left.modules()]
    calibrate_(model, [tokens(dim=8)])
    with torch.no_grad():
        assert is_calibrated(model) and relative_error(model(tokens(dim=8)), source(tokens(dim=8))) < 0.1


def test_a_filtered_root_is_left_alone():
    assert type(spiking_(nn.Linear(4, 4), filter_fn=lambda module, name: False)) is nn.Linear


def test_new_neurons_are_in_the_mode_and_on_the_device_of_their_layer():
    model = spiking_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval())
    assert not any(m.training for m in model.modules())
    for family in ('vit', 'eva02', 'glu mlp'):
        assert not any(m.training for m in spiking_(build(family)).modules())
        assert all(m.training for m in spiking_(build(family).train()).modules())
    with torch.device('meta'):
        model = nn.Sequential(nn.Linear(4, 4), tl.AttentionPoolPrr(4, 2))
    assert all(t.is_meta for t in spiking_(model).state_dict().values())
