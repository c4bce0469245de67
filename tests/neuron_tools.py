"""What tests of neurons and their fits share: random firings and neurons, references that loop, samples of currents."""
import math

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st

from sformer.neurons import (
    FIRE_FUNCTIONS,
    MAX_LEVEL,
    MAX_WIDE_LEVEL,
    CurrentStatistics,
    ScaleAndFire,
    SFNConfig,
    fire,
    level_values,
    max_levels,
)

prop = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2 ** 31 - 1)
potentials = st.sampled_from([0., 0.25, 0.5])  # sums with these are exact, so comparisons are sharp
dead_zones = st.sampled_from([0., 0.25, 0.5, 1., 1.75, 3.3, 130.])


def rng(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def level_sets(draw, functions=FIRE_FUNCTIONS, top=MAX_LEVEL):
    """(fire function, level values)"""
    name = draw(st.sampled_from(functions))
    if name == 'density':
        return name, torch.tensor(sorted(draw(st.sets(st.integers(1, top), min_size=1, max_size=127)))).float()
    return name, level_values(name, draw(st.integers(1, max_levels(name))), top)


def naive_boundaries(values, initial_potential, dead_zone=0.):
    y = [0.] + values.tolist()
    boundaries = [high - initial_potential * (high - low) for low, high in zip(y, y[1:], strict=False)]
    return [max(b, torch.tensor(dead_zone).item()) for b in boundaries]


def naive_fire(u, values, boundaries):
    """Levels by comparing every potential with every boundary, on the branch of its sign."""
    y = [0.] + values.tolist()
    return torch.tensor([math.copysign(y[sum(abs(v) >= b for b in boundaries)], v) for v in u.tolist()])


def around(boundaries, seed=0):
    """Random potentials, and every boundary with its neighbours in float32, on both branches."""
    b = torch.tensor(boundaries, dtype=torch.float32)
    random = torch.cat([torch.rand(40, generator=rng(seed)) * 140 - 5, torch.randn(40, generator=rng(seed))])
    extreme = torch.tensor([0., -0., 1e-30, 1e-45, 1e9, 3e38])
    u = torch.cat([random, extreme, b, torch.nextafter(b, b - 1), torch.nextafter(b, b + 1)])
    return torch.cat([u, -u])


SHAPES = {'tensor': (1,), 'head': (3, 1, 1), 'channel': (5,), 'head and channel': (3, 1, 5)}
CENTER = (3, 1, 5)


@st.composite
def neurons(draw, signed=None, center=None, functions=FIRE_FUNCTIONS):
    """A calibrated neuron, and currents (2, 3, 4, 5) that reach beyond its firing range and lie on its boundaries."""
    signed = draw(st.booleans()) if signed is None else signed
    center = draw(st.booleans()) if center is None else center
    top = MAX_LEVEL if signed else MAX_WIDE_LEVEL
    name, values = draw(level_sets(functions, top))
    config = SFNConfig(len(values), name, name, initial_potential=draw(potentials),
                       dead_zone=draw(st.sampled_from([0., 0.5, 1.])))
    neuron = ScaleAndFire(SHAPES[draw(st.sampled_from(sorted(SHAPES)))], config, signed, CENTER if center else None)
    generator = rng(draw(seeds))
    room = top // int(values[-1]) if signed else 1
    multiplier = torch.randint(1, room + 1, neuron.multiplier.shape, generator=generator)
    reach = (torch.rand(neuron.step.shape, generator=generator) + 0.5) * 2. ** draw(st.integers(-20, 20))
    neuron.set_state(reach / values[-1] / multiplier.amax(0), multiplier, values,
                     torch.randn(CENTER, generator=generator) if center else None)
    x = torch.randn(2, 3, 4, 5, generator=generator) * reach
    boundaries = torch.tensor(naive_boundaries(values, config.initial_potential, config.dead_zone)).float()
    chosen = boundaries[torch.randint(len(boundaries), x.shape, generator=generator)]
    sign = torch.randint(0, 2, x.shape, generator=generator)
    on_boundary = torch.where(sign == 0, chosen * neuron.threshold[0], -chosen * neuron.threshold[-1])
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, on_boundary, x)
    return neuron, x if neuron.center is None else x + neuron.center


def naive_neuron(neuron, x):
    """Levels of a neuron and where it passes gradients, from its definition: two branches, one difference."""
    config, h = neuron.config, x if neuron.center is None else x - neuron.center
    args = neuron.fire_function, neuron.levels, config.initial_potential, config.dead_zone, neuron.top
    end = neuron.threshold * (neuron.levels[-1] + 0.5)  # beyond it the top level is more than half a threshold away
    levels = neuron.multiplier[0] * fire(h / neuron.threshold[0], *args).clamp_min(0)
    inside = h <= end[0]
    if not neuron.signed:
        return levels, inside & (h >= 0)
    negative = neuron.multiplier[1] * fire(-h / neuron.threshold[1], *args).clamp_min(0)
    return levels - negative, inside & (h >= -end[1])


# currents as they occur at the sites of a ViT

def samples(name, n=50_000):
    """Positive currents, (n,)."""
    x = torch.randn(n, generator=rng(0), dtype=torch.float64)
    y = torch.rand(n, generator=rng(1), dtype=torch.float64)
    chi2 = torch.randn(4, n, generator=rng(2), dtype=torch.float64).square().sum(0)
    return {
        'normal': x.abs(),
        'laplace': -y.log(),
        'gelu': F.gelu(2 * x).clamp_min(0),
        'gelu negative': (-F.gelu(2 * x)).clamp_min(0),
        'heavy tail': x.abs() / (chi2 / 4).sqrt(),  # Student's t with four degrees of freedom
        'two scales': torch.where(y < 0.01, 100 * x.abs(), x.abs()),
        'uniform': 3 * y,
    }[name].float()


DISTRIBUTIONS = ('normal', 'laplace', 'gelu', 'gelu negative', 'heavy tail', 'two scales', 'uniform')


def site(x, shape=(1,), signed=True):
    """Statistics of a site that saw the currents x."""
    statistics = CurrentStatistics(shape, signed)
    statistics.update(x)
    return statistics
