"""Where a network is silent: centres, dead zones by one price, and what a default conversion has nothing of."""
import copy

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from layer_tools import build, named_neurons, pixels, relative_error, rng
from neuron_tools import prop

import sformer
from sformer import SFNConfig, SFormerError, activity, calibrate_, convert, spiking_, to_spikes_
from sformer.conversion.silence import RowSensitivity, Sensitivity, set_quiet_
from sformer.errors import ConfigError
from sformer.evaluation.activity import Activity
from sformer.layers import AttentionProduct
from sformer.layers.products import softmax_numerators
from sformer.neurons import ScaleAndFire
from sformer.neurons.statistics import silent_center


@prop
@given(st.integers(0, 99), st.floats(0.02, 5))
def test_no_centre_saves_much_more(seed, q):
    x = torch.randn(3, 200, generator=rng(seed)).double()
    x[1] = torch.where(x[1] > 0.5, x[1] * 3, -0.1)  # a flat tail, as of GELU
    x[2] += 7
    quiet = torch.full((3,), q, dtype=torch.float64)

    def saved(c):
        return (quiet[:, None, None] ** 2 - (x[:, None] - c[..., None]) ** 2).clamp_min(0).sum(-1)

    grid = x.amin(1)[:, None] + (x.amax(1) - x.amin(1))[:, None] * torch.linspace(0, 1, 500, dtype=torch.float64)
    best = saved(grid).amax(1)
    assert (saved(silent_center(x, quiet).double()[:, None])[:, 0] >= 0.9 * best).all()


def test_the_dead_zone_of_a_linear_layer_is_the_price_over_its_columns():
    layer, x, price = nn.Linear(5, 3), torch.randn(4000, 5, generator=rng()), 0.07
    with torch.no_grad():
        power = layer(x).square().sum() / len(x)
    neuron = ScaleAndFire((5,), SFNConfig(silence=price))
    site = Sensitivity(neuron)
    set_quiet_([site], [x[:2000], x[2000:]], lambda batch: layer(site(batch)))
    # w q^2 = price per neuron, of five, with w the squared norm of a column over the power of the output
    expected = (price / 5 * power / layer.weight.detach().square().sum(0)).sqrt()
    torch.testing.assert_close(neuron.quiet, expected, rtol=0.05, atol=0)


def test_what_is_silent_in_a_row_errs_together():
    n, v = torch.rand(8, 2, 5, 30, generator=rng()) ** 6, torch.randn(30, 1, generator=rng(1))
    n = n / n.amax(-1, keepdim=True)
    neuron = ScaleAndFire((2, 1, 1), SFNConfig(silence=0.4), signed=False)
    site = RowSensitivity(neuron)
    n[0, ..., 1:] = site.thresholds[torch.randint(40, 65, n[0, ..., 1:].shape, generator=rng(2))]  # which fire
    n[0, ..., 0] = 1.

    def attend(x):
        return (x @ v) / x.sum(-1, keepdim=True)

    set_quiet_([site], [n], lambda x: attend(site(x)))
    t = site.thresholds[:-1]
    quieter = attend(torch.where(n[..., None, :, :] < t.view(-1, 1, 1), 0., n[..., None, :, :]))  # (B, H, K, L, 1)
    errors = (quieter - attend(n)[:, :, None]).square().sum((0, 3, 4))
    torch.testing.assert_close(site.errors[:, :-1].float(), errors, rtol=1e-3, atol=1e-5)
    silent = (n[..., None, :, :] < t.view(-1, 1, 1)).sum((0, 3, 4))
    assert torch.equal(site.silent[:, :-1].long(), silent)
    best = (errors / attend(n).square().sum() - 0.4 / n.numel() * silent).argmin(1)
    assert torch.equal(neuron.quiet.flatten(), t[best]) and (best > 0).all()


def test_keys_that_rest_err_together_in_all_rows():
    n, v = torch.rand(8, 2, 5, 30, generator=rng()) ** 6, torch.randn(30, 1, generator=rng(1))
    n = n / n.amax(-1, keepdim=True)
    site = RowSensitivity(ScaleAndFire((2, 1, 1), SFNConfig(silence=0.4, keys_rest=True), signed=False))

    def attend(x):  # of what all rows of an image give, the sum is read
        return ((x @ v) / n.sum(-1, keepdim=True)).sum(2)

    def rested(x):
        return attend(x) + ((n.sum(-1, keepdim=True) - x.sum(-1, keepdim=True)) / n.sum(-1, keepdim=True)
                            * v.mean(0)).sum(2)

    def outputs(x):
        seen = site(x)
        return (seen @ v / seen.sum(-1, keepdim=True)).sum(2)

    set_quiet_([site], [n], outputs)
    for i, t in enumerate(site.thresholds[:-1]):
        quieter = torch.where(n < t, 0., n)
        errors = (rested(quieter) - attend(n)).square().sum((0, 2))
        torch.testing.assert_close(site.errors[:, i].float(), errors, rtol=1e-3, atol=1e-5)
    assert site.neuron.quiet.max() > 0


@torch.no_grad()
def test_keys_that_rest_count_as_the_mean_of_all_values():
    layer = AttentionProduct(2, 8, config=SFNConfig(127, silence=1e-6, keys_rest=True))
    q, k, v = torch.randn(3, 2, 2, 12, 8, generator=rng()).unbind()
    calibrate_(layer, [[q, k, v]], forward_fn=lambda layer, qkv: layer(*qkv))
    layer.attn_neuron.set_quiet(torch.full((2, 1, 1), 0.3))
    numerators = softmax_numerators(q @ k.mT / 8 ** 0.5)
    loud = torch.where(numerators < 0.3, 0., numerators)
    assert 0.3 < (loud == 0).float().mean() < 0.9
    whole, rest = numerators.sum(-1, keepdim=True), (numerators - loud).sum(-1, keepdim=True)
    expected = (loud @ v + rest * v.mean(-2, keepdim=True)) / whole
    assert relative_error(layer(q, k, v), expected) < 0.03 < 0.1 < relative_error(loud @ v / loud.sum(
        -1, keepdim=True), expected)
    causal = layer(q, k, v, is_causal=True)  # where some keys are hidden, silent ones count as none
    assert torch.allclose(causal[..., 0, :], layer.v_neuron(v)[..., 0, :], atol=1e-5)
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    torch.testing.assert_close(causal, layer(q, k, v, visible))
    added = torch.zeros(2, 1, 12, 12)  # padding, as timm masks it: what it holds is no part of the mean
    added[..., 8:] = torch.finfo(torch.float32).min
    padded = [torch.cat([x[..., :8, :], 100 * x[..., 8:, :]], dim=-2) for x in (k, v)]
    torch.testing.assert_close(layer(q, *padded, added), layer(q, k[..., :8, :], v[..., :8, :]))
    for coding in ('binary', 'graded'):
        spikes = to_spikes_(nn.Sequential(copy.deepcopy(layer)), coding)[0]
        assert relative_error(spikes(q, k, v), layer(q, k, v)) < 1e-3
        assert relative_error(spikes(q, *padded, added), layer(q, *padded, added)) < 1e-3


@torch.no_grad()
def test_of_keys_that_rest_fewer_fire_at_less_error(source, digits):
    images = digits[0][:128]
    found = []
    for rest in (False, True):
        model = convert(source, 'digits', SFNConfig(63, silence=0.02, keys_rest=rest), split='train')
        counts = Activity()
        with counts.observe(model):
            found.append((relative_error(model(images), source(images)), counts.mean()))
    assert found[1][0] < 1.05 * found[0][0] and found[1][1] < found[0][1]
    with pytest.raises(ConfigError, match='keys_rest says what silent keys count as'):
        SFNConfig(keys_rest=True)


def test_what_no_current_reaches_is_named():
    spiking = spiking_(build(), SFNConfig(silence=0.01))
    with pytest.raises(SFormerError, match='no current reached head.neuron'):
        calibrate_(spiking, [pixels(8)], forward_fn=lambda network, x: network.forward_features(x))


def test_the_strongest_key_of_a_row_fires_at_any_price():
    source, x = build(), pixels(32)
    model = convert(source, [x], SFNConfig(levels=8, silence=1e6))
    per_site = activity(model, x)
    softmax = {name: share for name, share in per_site.items() if name.endswith('attn_neuron')}
    assert softmax and all(share > 0 for share in softmax.values()) and torch.isfinite(model(x)).all()
    assert all(share < 0.01 for name, share in per_site.items() if name not in softmax)


@pytest.mark.parametrize('family', ['gated attention', *(
    pytest.param(family, marks=pytest.mark.slow) for family in ('vit', 'eva02', 'map pooling', 'differential'))])
def test_a_price_buys_silence(family):
    source, x = build(family), pixels(48)
    shares, errors = [], []
    for price in (0., 0.01, 0.1):
        model = convert(source, [x[:32]], SFNConfig(levels=16, silence=price))
        with torch.no_grad():
            errors.append(relative_error(model(x), source(x)))
        per_site = activity(model, x)
        shares.append(sum(per_site.values()) / len(per_site))
    assert shares[0] > shares[1] + 0.03 and shares[1] > shares[2] + 0.03
    assert errors[2] < errors[0] + 0.25


def test_levels_lie_beyond_the_dead_zone():
    model, x = convert(build(), [pixels(32)], SFNConfig(levels=8, silence=0.03)), pixels()
    checked = 0

    def check(neuron, args):
        nonlocal checked
        h = args[0] if neuron.center is None else args[0] - neuron.center
        k = neuron.encode(args[0]).levels
        assert (k[h.abs() < neuron.quiet] == 0).all()
        assert torch.equal(neuron.forward(args[0]), neuron.encode(args[0]).decode())
        checked += int((h.abs() < neuron.quiet).sum())

    for _, neuron in named_neurons(model):
        if isinstance(neuron, ScaleAndFire):
            neuron.register_forward_pre_hook(check)
    with torch.no_grad():
        model(x)
    assert checked > 1000


def test_without_a_price_there_is_nothing_of_it():
    source, x = build(), pixels(32)
    plain = convert(source, [x], SFNConfig(levels=8))
    assert not [name for name in plain.state_dict() if name.endswith('.quiet')]
    assert [name for name in plain.state_dict() if name.endswith('.center')] == [
        'patch_embed.proj.neuron.center', *(f'blocks.{i}.attn.products.0.k_neuron.center' for i in (0, 1))]


def test_gradients_of_the_source_leave_no_trace():
    source, x = build(), pixels(16)
    model = spiking_(copy.deepcopy(source), SFNConfig(silence=0.01))
    model.norm.weight.requires_grad_(False)
    calibrate_(model, [x])
    for (name, p), q in zip(model.named_parameters(), source.parameters(), strict=True):
        assert p.grad is None and torch.equal(p, q) and p.requires_grad == (name != 'norm.weight')


def test_silent_neurons_can_be_trained_awake():
    neuron = ScaleAndFire((4,), SFNConfig(silence=0.01), folds=True)
    neuron.quiet.fill_(1.)
    x = torch.full((1, 4), 0.5, requires_grad=True)
    out = neuron(x)
    out.sum().backward()
    assert (out == 0).all() and (x.grad == 1).all()


def test_a_row_is_not_silent_where_nothing_is_saved():
    """Numerators of which none is below the lowest thresholds, and what is lost above costs more than spikes do."""
    n = torch.rand(4, 2, 5, 30, generator=rng()) * 0.9 + 0.1
    n[..., 0] = 1.
    neuron = ScaleAndFire((2, 1, 1), SFNConfig(silence=1e-9), signed=False)
    site = RowSensitivity(neuron)
    set_quiet_([site], [n], lambda x: site(x) / site(x).sum(-1, keepdim=True))
    assert not neuron.quiet.any()


def test_fits_are_to_what_is_loud():
    config, loud = SFNConfig(levels=4, silence=0.1), 1 + torch.rand(400, 3, generator=rng())
    loud = loud * torch.tensor([4., -1.]).repeat(200)[:, None]  # lopsided
    steps, multipliers = [], []
    for silent in (0, 4000):
        neuron = ScaleAndFire((3,), config)
        neuron.set_quiet(torch.full((3,), 0.5))
        statistics = neuron.statistics()
        statistics.update(torch.cat([loud, 0.4 * torch.rand(silent, 3, generator=rng(1))]))
        neuron.fit(statistics)
        steps.append(neuron.step)
        multipliers.append(neuron.multiplier)
    assert torch.equal(*steps) and torch.equal(*multipliers)
    assert (multipliers[0] == 1).all(), 'a multiplier takes as many times the spikes'
    without = ScaleAndFire((3,), SFNConfig(levels=4))
    statistics = without.statistics()
    statistics.update(loud)
    without.fit(statistics)
    assert (without.multiplier.amax(0) > 1).all(), 'or there would be nothing to see'


def test_what_is_loud_now_and_then_lies_on_the_levels():
    neuron = ScaleAndFire((3,), SFNConfig(levels=4, silence=0.1))
    quiet = torch.tensor([8., 0.01, 8.])
    neuron.set_quiet(quiet)
    statistics = neuron.statistics()
    statistics.update(torch.randn(400, 3, generator=rng()))
    neuron.fit(statistics)
    reach = neuron.step * neuron.levels[-1]
    torch.testing.assert_close(reach[[0, 2]], quiet[[0, 2]] * neuron.config.scale)
    assert reach[1] > 1


@pytest.mark.parametrize('config', [SFNConfig(8, silence=0.01), SFNConfig(4, lateral=2)])
def test_an_output_of_several_tensors_is_refused(config):
    """Its error is of one output."""
    model = spiking_(build(), config)
    message = 'lateral spikes .*need an output that is one tensor, got a tuple: let'
    with pytest.raises(sformer.SFormerError, match=message):
        calibrate_(model, [pixels()], forward_fn=lambda network, images: (network(images), 1))
