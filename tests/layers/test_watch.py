"""Watches on forwards: they see what fires, and outlive a forward that fails."""
import pytest
import torch
from layer_tools import build, levels_of, pixels, spiking

from sformer import named_neurons
from sformer.layers.watch import ForwardWatch, watch_spikes


def test_a_forward_that_failed_is_watched_when_it_is_repeated():
    """As evaluation does with smaller batches where memory was not enough."""
    model, images, seen = spiking(build(depth=1), pixels()), pixels(2, seed=3), {}
    neuron = model.blocks[0].mlp.fc1.neuron
    expected = levels_of(model, images)

    def fails(*args):
        raise MemoryError
    with torch.no_grad(), watch_spikes(model, lambda name, spikes: seen.update({name: spikes.levels.long()})):
        handle = neuron.register_forward_pre_hook(fails)
        with pytest.raises(MemoryError):
            model(images)
        handle.remove()
        seen.clear()
        neuron.encode(torch.ones(1, 1, 32))  # asked as integers ask, before any forward has ended
        assert [*seen] == ['blocks.0.mlp.fc1.neuron']
        model(images)
    counted = {name: expected[name] for name, neuron in named_neurons(model) if neuron.counted}
    assert seen.keys() == counted.keys() and all(torch.equal(seen[name], counted[name]) for name in seen)
    seen.clear()
    neuron.encode(torch.ones(1, 1, 32))
    assert not seen and 'encode' not in vars(neuron)


class Convolutions(ForwardWatch):
    """Names of the modules in whose forwards there is a convolution."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'convolution' in func.name():
            self.found.append(self.stack[-1][0])
        return func(*args, **(kwargs or {}))


def test_whose_forward_it_is_after_one_that_failed():
    model = build(depth=1)
    watch = Convolutions(model)
    watch.found = []
    with torch.no_grad(), watch:
        with pytest.raises(RuntimeError, match='3 channels'):
            model(torch.zeros(1, 5, 32, 32))
        assert watch.stack == []
        model(pixels(1))
        assert watch.stack == [] and watch.found[-1] == 'patch_embed.proj'
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
