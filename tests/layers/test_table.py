"""The table of layers: counterparts differ by class only, and both lists are open to users."""
import dataclasses

import pytest
import torch
import torch.nn as nn
from layer_tools import spiking, tokens

from sformer import UnsupportedLayerError, calibrate_, named_neurons, source_of, spiking_
from sformer.layers import (
    FLOATING_LAYERS,
    SPIKING_LAYERS,
    SpikingLayer,
    SpikingLinear,
    register_floating,
    register_spiking,
)
from sformer.models import SFormerMixin


def test_spiking_layers_differ_from_their_sources_by_class_only():
    for source, counterpart in SPIKING_LAYERS.items():
        assert issubclass(counterpart, (SpikingLayer, source)) and counterpart is not source
        assert issubclass(counterpart, source)
        # whole models multiply nothing themselves, so some are layers of others that are left as they are
        assert source not in FLOATING_LAYERS or issubclass(counterpart, SFormerMixin)
    assert len(set(SPIKING_LAYERS.values())) == len(SPIKING_LAYERS)


def test_a_layer_of_the_users_own():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(UnsupportedLayerError, match='Doubled'):
        spiking_(Doubled(4, 4))
    try:
        @register_spiking(Doubled)
        class SpikingDoubled(SpikingLinear, Doubled):
            def forward(self, x):
                return 2 * super().forward(x)

        with pytest.raises(UnsupportedLayerError, match=r'0 \(SpikingDoubled\) does not say what it multiplies'):
            spiking(nn.Sequential(Doubled(4, 4)), tokens(dim=4))

        def multiplies(self):
            return [dataclasses.replace(product, kind='doubled') for product in SpikingLinear.multiplies(self)]
        SpikingDoubled.multiplies = multiplies
        layer = spiking(nn.Sequential(Doubled(4, 4)), tokens(dim=4))
        assert type(layer[0]) is SpikingDoubled and [n for n, _ in named_neurons(layer)] == ['0.neuron']
        assert type(source_of(layer)[0]) is Doubled
    finally:
        del SPIKING_LAYERS[Doubled]


def test_a_floating_layer_of_the_users_own():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x + self.shift

    model = nn.Sequential(nn.Linear(4, 4), Shift())
    with pytest.raises(UnsupportedLayerError, match='1 .*Shift'):
        spiking_(model)
    try:
        register_floating(Shift)
        assert calibrate_(spiking_(model), [tokens(dim=4)]) == 3
    finally:
        FLOATING_LAYERS.discard(Shift)
