"""Products and the spikes that enter them: against counting one by one."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_tools import FAMILIES, build, levels_of, mask_rcnn, photographs, pixels, rng, spiking
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sformer
from sformer import (
    SFNConfig,
    SFormerError,
    UncalibratedError,
    calibrate_,
    convert,
    named_neurons,
    spiking_,
    to_integer_,
    to_spikes_,
)
from sformer.evaluation import Activity
from sformer.layers import AttentionProduct
from sformer.neurons import CODINGS
from sformer.profiling import energy, profile_model, profile_operations


def counted(k, coding):
    return {'unary': k.abs(), 'graded': k.ne(0).long(),
            'binary': k.abs().cpu().apply_(lambda v: bin(v).count('1'))}[coding]


@pytest.mark.parametrize('family', [
    name if name in ('vit', 'eva02', 'gated attention') else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES])
def test_every_product_is_found(family):
    model = convert(build(family), [pixels(8)])
    operations, sites, images = profile_operations(model, [pixels(4), pixels(2)])
    assert images == 6 and all(operation.operands for operation in operations)
    source = sformer.source_of(model).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        source(pixels(1))
    macs = sum(operation.macs for operation in operations if operation.kind != 'gate')
    assert macs == pytest.approx(counter.get_total_flops() / 2)
    assert {site.name for site in sites} == {name for name, _ in named_neurons(model)}
    used = {name for operation in operations for name in operation.operands}
    assert used == {site.name for site in sites}
    for operation in operations:
        graded, binary, unary = (operation.synaptic_operations[coding] for coding in ('graded', 'binary', 'unary'))
        assert 0 < graded <= operation.macs * (1 + 1e-6) and graded <= binary <= unary


@pytest.mark.parametrize('coding', CODINGS)
def test_spikes_are_counted_one_by_one(coding):
    model = convert(build('eva02', depth=1), [pixels(8)], SFNConfig(5))
    images = pixels(3, seed=4)
    k = {name: counted(levels, coding).double() for name, levels in levels_of(model, images).items()}
    operations = {o.name: o.synaptic_operations[coding] for o in profile_operations(model, [images])[0]}
    qkv = next(name for name in operations if name.startswith('blocks.0.attn.q'))
    width = model.get_submodule(qkv).out_features
    assert operations[qkv] == pytest.approx(k[f'{qkv}.neuron'].sum().item() * width / 3)
    p = 'blocks.0.attn.products.0'
    q, key, v, attn = (k[f'{p}.{n}_neuron'] for n in ('q', 'k', 'v', 'attn'))
    assert operations[f'{p} QK^T'] == pytest.approx(torch.einsum('bhld,bhsd->', q, key).item() / 3)
    assert operations[f'{p} AV'] == pytest.approx(torch.einsum('bhls,bhsd->', attn, v).item() / 3)
    mlp = 'blocks.0.mlp'
    assert operations[f'{mlp} gate'] == pytest.approx(
        (k[f'{mlp}.gate_neuron'] * k[f'{mlp}.value_neuron']).sum().item() / 3)
    pixel = k['patch_embed.proj.neuron'].sum().item() * 32 / 3
    assert operations['patch_embed.proj'] == pytest.approx(pixel)


@pytest.mark.parametrize('conv', [
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode='circular'), nn.Conv2d(4, 4, 3, padding='same', dilation=2),
    nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)], ids=str)
def test_spikes_of_a_convolution_meet_the_weights_that_they_reach(conv):
    images = torch.randn(3, 4, 7, 8, generator=rng(0))
    model = spiking(conv, images, SFNConfig(5))
    (operation,), (site,), count = profile_operations(model, images.split(2))
    assert (count, operation.kind, site.neurons) == (3, 'convolution', 4 * 7 * 8)
    assert operation.weights == conv.weight.numel()
    everywhere = copy.deepcopy(conv).requires_grad_(False)  # one by one: what a spike adds is summed over all outputs
    everywhere.weight.fill_(1.)
    everywhere.bias.fill_(0.)
    k = model.neuron.encode(images).levels.long()
    for coding in CODINGS:
        expected = everywhere(counted(k, coding).float()).sum().item()
        assert operation.synaptic_operations[coding] == pytest.approx(expected / 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        conv(images)
    assert operation.macs == pytest.approx(counter.get_total_flops() / 2 / 3)


def test_a_detector_is_counted_per_image():
    # lists of images; layers that see objects instead of images, several times per batch, or both
    model, images = spiking(mask_rcnn(), photographs(), SFNConfig(5)), photographs(2)
    operations, sites, count = profile_operations(model, [images])
    assert count == 2 and all(o.kind in ('convolution', 'linear') for o in operations) and len(operations) == 13
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sformer.source_of(model)(images)
    by_name = {o.name: o for o in operations}
    neurons = {site.name: site.neurons for site in sites}
    assert neurons['roi_heads.box_head.fc6.neuron'] == 20 * 8 * 49  # 20 proposals, 6 detections per image
    assert neurons['roi_heads.mask_predictor.conv5_mask.neuron'] == 6 * 8 * 14 * 14
    assert by_name['roi_heads.box_head.fc6'].macs == 20 * 8 * 49 * 24
    assert by_name['roi_heads.mask_predictor.conv5_mask'].macs == 6 * 14 * 14 * 8 * 8 * 2 * 2
    assert sum(o.macs for o in operations) == pytest.approx(counter.get_total_flops() / 2 / 2)
    own = profile_operations(model, [dict(images=images)], lambda network, batch: network(batch['images']))
    assert own[2] == 1 and own[0][0].macs == pytest.approx(2 * operations[0].macs)


def test_what_is_executed_otherwise_is_refused():
    model, images = convert(build(), [pixels(8)]), pixels(2)
    for executed in (to_integer_, to_spikes_):
        other = copy.deepcopy(model)
        executed(other)
        with pytest.raises(SFormerError, match=r'patch_embed\.proj is executed in integers or spike by spike, where'):
            profile_operations(other, [images])


def test_what_the_caller_computes_is_not_the_networks():
    model, images = convert(build(), [pixels(8)]), pixels(2)
    alone = profile_model(model, [images])
    own = profile_model(model, [images], lambda network, x: (network(x * 1.) @ torch.ones(7, 1)).relu())
    assert own.operations == alone.operations and own.floating == alone.floating


def test_activity_leaves_out_pixels():
    """As that of an evaluation does: they always fire."""
    model, images = convert(build(), [pixels(8)]), pixels(5)
    profile = profile_model(model, [images])
    counts = Activity()
    with torch.no_grad(), counts.observe(model):
        model(images)
    assert energy(*profile[:3])['activity'] == pytest.approx(counts.mean(), abs=1e-6)
    assert [site.name for site in profile.sites if not site.counted] == ['patch_embed.proj.neuron']


def test_sites_are_those_of_an_evaluation():
    model, images = convert(build(), [pixels(8)]), pixels(5)
    sites = {site.name: site for site in profile_operations(model, images.split(2))[1]}
    activity = sformer.activity(model, images)
    assert {name: site.activity for name, site in sites.items() if site.levels} == pytest.approx(activity)
    for name, levels in levels_of(model, images).items():
        neuron = dict(named_neurons(model))[name]
        assert sites[name].neurons == levels[0].numel()
        if sites[name].levels:
            top = neuron.multiplier.long() * neuron.levels[-1].long()
            reached = levels == top[0]
            if neuron.signed:
                reached |= levels == -top[1]
            assert sites[name].saturation == pytest.approx(reached.double().mean().item()) and reached.any()


def test_batches_do_not_matter_and_nothing_stays_behind():
    model, images = convert(build('glu mlp'), [pixels(8)]), pixels(6)
    whole, again = (profile_operations(model, images.split(size))[:2] for size in (6, 1))
    assert whole[1] == again[1]
    for a, b in zip(whole[0], again[0], strict=True):
        assert (a.name, a.operands) == (b.name, b.operands)
        assert a.synaptic_operations == pytest.approx(b.synaptic_operations) and a.macs == pytest.approx(b.macs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_of_queries_do_not_matter(monkeypatch):
    model, images = convert(build('vit'), [pixels(8)]), [pixels(4)]
    expected = profile_operations(model, images)
    monkeypatch.setattr(AttentionProduct, 'max_scores', 100)
    assert profile_operations(model, images) == expected


def test_what_does_not_spike_is_listed():
    model = spiking_(copy.deepcopy(build()), filter_fn=lambda layer, name: name not in ('head', 'blocks.1.mlp'))
    calibrate_(model, [pixels(8)])
    floating = [o for o in profile_operations(model, [pixels(2)])[0] if o.kind == 'floating']
    assert [o.name for o in floating] == ['blocks.1.mlp.fc1', 'blocks.1.mlp.fc2', 'head']
    assert [o.macs for o in floating] == [17 * 32 * 128, 17 * 32 * 128, 32 * 7] and not floating[0].operands
    assert [o.weights for o in floating] == [32 * 128, 32 * 128, 32 * 7]


def test_what_has_no_profile():
    with pytest.raises(UncalibratedError, match='its spikes would mean nothing'):
        profile_operations(spiking_(build()), [pixels()])
    with pytest.raises(SFormerError, match='at least one image'):
        profile_operations(convert(build(), [pixels()]), [])
