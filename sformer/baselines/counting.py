"""Spikes and operations of a network of several timesteps, in the terms of `sformer.profiling`."""
import dataclasses
from collections.abc import Iterable

import torch

from ..layers import named_neurons
from ..neurons import CODINGS, count_spikes
from ..profiling import Operation, Profile, Site
from .stepped import MultiStep, SteppedNeuron

__all__ = ['profile_steps']


def profile_steps(
        network: MultiStep,
        batches: Iterable[torch.Tensor],
        one_step: Profile,
) -> Profile:
    """Run a network of several timesteps on images and count all spikes of all timesteps.

    A spike that meets weights causes an operation per weight. In a product of two activations each operand waits as the
    sum of its spikes so far, and a spike of the other causes an operation per element of it that it meets: an upper
    bound in the first timesteps, when sums have zeros. Weights are read, and functions on currents are computed, once
    per timestep; pixels are coded once.

    Args:
        network: Network of several timesteps, not layer-synchronous.
        batches: Normalised images (B, C, H, W).
        one_step: `profile_model` of the network of one timestep that it was made of.

    Returns:
        The same of all timesteps together; potentials of neurons count once per timestep.
    """
    spikes: dict[str, dict[str, int]] = {}
    handles = []
    for name, neuron in named_neurons(network.network):
        if isinstance(neuron, SteppedNeuron):
            sums = spikes[name] = dict.fromkeys(CODINGS, 0)

            def add(neuron, args, out, sums=sums):
                for levels in neuron.latest:
                    for coding, count in count_spikes(levels).items():
                        sums[coding] += count
            handles.append(neuron.register_forward_hook(add))
    images = 0
    try:
        for batch in batches:
            network(batch)
            images += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    per_image: dict[str, dict[str, float]] = {}
    for name, sums in spikes.items():
        per_image[name] = {coding: count / images for coding, count in sums.items()}
    neurons = {site.name: site.neurons for site in one_step.sites}
    steps = network.steps

    def over_time(operation: Operation) -> Operation:
        if not operation.operands or not per_image.keys() >= {*operation.operands}:
            return operation
        caused = {}
        for coding in CODINGS:
            caused[coding] = sum(
                per_image[name][coding] * operation.macs / neurons[name] for name in operation.operands)
        return dataclasses.replace(operation, weights=operation.weights * steps, synaptic_operations=caused)

    return Profile(
        [*map(over_time, one_step.operations)],
        [_over_time(site, per_image[site.name], steps) if site.name in per_image else site for site in one_step.sites],
        [dataclasses.replace(function, elements=function.elements * steps) for function in one_step.floating], images)


def _over_time(site: Site, spikes: dict[str, float], steps: int) -> Site:
    """A neuron that is looked at once per timestep."""
    potentials = site.neurons * steps
    return dataclasses.replace(
        site, neurons=potentials, activity=spikes['graded'] / potentials, saturation=float('nan'), levels=1, planes=1,
        bits=2, top=1, spikes={coding: spikes[coding] / potentials for coding in CODINGS})
