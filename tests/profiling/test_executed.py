"""What a profile shows of spikes as they are executed."""
import torch

from sformer import named_neurons
from sformer.profiling import compare_codings, pixels_of, spike_maps


def test_codings_agree(model, images):
    found = compare_codings(model, images[:2])
    assert found['images'] == 2 and found['equal'] is True and found['difference'] == 0
    assert 0 <= found['simulation'] < 0.05
    assert model(images[:2]).shape == (2, 10)  # which can still be run as it was


def test_maps_are_of_patches(model, images):
    maps = spike_maps(model, images[0])
    assert list(maps) == [f'blocks.{i}' for i in range(2)] and all(m.shape == (4, 4) for m in maps.values())
    neurons, levels = dict(named_neurons(model)), []
    handles = [neurons[f'blocks.1.{site}.neuron'].register_forward_pre_hook(
        lambda neuron, args: levels.append(neuron.encode(args[0]).levels[0, 1 + 4 * 2 + 3].abs().tolist()))
        for site in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')]
    with torch.no_grad():
        model(images[:1])
    for handle in handles:
        handle.remove()
    spikes = [k for site in levels for k in site]
    assert maps['blocks.1'][2, 3].item() == sum(spikes) / len(spikes)
    assert pixels_of(model, images[0]).equal(images[0] * 0.5 + 0.5)
    assert spike_maps(model.blocks, torch.zeros(1, 8, 8)) == {}
