"""Types of neurons by name: those of this package, and those of one's own."""
from collections.abc import Sequence
from typing import Unpack

from ..errors import check
from .base import Neuron
from .config import NEURON_TYPES, SCALE_AND_FIRE, SEPARATE_BRANCHES, SFNConfig
from .scale_and_fire import ScaleAndFire, SiteOptions

__all__ = ['new_neuron', 'register_neuron']


def register_neuron(name: str, kind: type[Neuron]) -> type[Neuron]:
    """Let `SFNConfig(neuron=name)` put neurons of a type of one's own wherever signed currents and softmax numerators
    fire, so that such models are converted, swept, counted, saved and loaded as others are. Pixels stay graded spikes.

    What loads a saved model registers the type under the same name before.

    Args:
        name: Name of the type, an identifier.
        kind: Called as `kind(shape, config, **site)`, where `site` has some of the further arguments of `ScaleAndFire`,
            which say what is free at that place and what fires there; those that mean nothing to the type are for
            `**site` to take. Softmax numerators are `signed=False`.

    Returns:
        The type.

    Raises:
        ConfigError: If it is no `Neuron`, or another type has this name.
    """
    check(isinstance(name, str) and name.isidentifier(), f'the name of a neuron is an identifier, not {name!r}.')
    check(isinstance(kind, type) and issubclass(kind, Neuron), f'{kind!r} is no subclass of sformer.neurons.Neuron.')
    known = NEURON_TYPES.get(name, kind)
    same = (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__)  # a cell that is run again
    check(same, f'{name!r} is the name of {known.__module__}.{known.__qualname__} already.')
    NEURON_TYPES[name] = kind
    return kind


def new_neuron(shape: Sequence[int], config: SFNConfig, **site: Unpack[SiteOptions]) -> Neuron:
    """A neuron of the type that a config names, uncalibrated; further arguments as of `ScaleAndFire`."""
    neuron: Neuron = NEURON_TYPES[config.neuron](shape, config, **site)
    neuron.config = config
    return neuron


register_neuron(SCALE_AND_FIRE, ScaleAndFire)  # or `SharedScaleAndFire`, where that suits
register_neuron(SEPARATE_BRANCHES, ScaleAndFire)
