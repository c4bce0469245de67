"""NeuroBench's own metrics on the view: totals are those of our profile, to the unit."""
import copy
import importlib.util
import sys

import pytest
import torch
from layer_tools import FAMILIES, build, pixels

from sformer import SFormerError, UncalibratedError, convert, neurobench_view, spiking_
from sformer.layers import SpikingLinear
from sformer.profiling import profile_model


class OwnLinear(SpikingLinear):
    """One that multiplies in a forward of its own."""

    def forward(self, x, fired=False):
        return 2 * super().forward(x, fired)


def measured(view, images):
    """Metrics of NeuroBench over batches."""
    pytest.importorskip('neurobench', reason="neurobench is missing: pip install '.[neurobench]'")
    from neurobench.benchmarks import Benchmark
    from neurobench.metrics.static import Footprint
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, torch.zeros(len(images))), batch_size=2)
    benchmark = Benchmark(view, loader, [], [], [[Footprint], [SynapticOperations, ActivationSparsity]])
    with torch.no_grad():
        return benchmark.run(quiet=True)


@pytest.mark.parametrize('family, coding', [
    (family, coding) if (family, coding) in (('vit', 'graded'), ('eva02', 'binary')) else
    pytest.param(family, coding, marks=pytest.mark.slow) for family in FAMILIES for coding in ('graded', 'binary')])
def test_totals_are_ours(family, coding):
    pytest.importorskip('neurobench', reason="neurobench is missing: pip install '.[neurobench]'")
    model, images = convert(build(family), [pixels(8)]), pixels(4, seed=6)
    found = measured(neurobench_view(model, coding), images)
    profile = profile_model(model, [images])
    ours = sum(round(4 * o.synaptic_operations[coding]) for o in profile.operations)
    effective = found['SynapticOperations']
    spiking, other = ('Effective_ACs', 'Effective_MACs') if coding == 'binary' else ('Effective_MACs', 'Effective_ACs')
    assert 4 * effective[spiking] == ours and effective[other] == 0
    tensors = [*model.parameters(), *model.buffers()]
    assert found['Footprint'] == sum(t.numel() * t.element_size() for t in tensors)
    if coding == 'graded':
        assert effective['Dense'] == sum(o.macs for o in profile.operations)
        neurons = sum(s.neurons for s in profile.sites)
        activity = sum(s.neurons * s.activity for s in profile.sites) / neurons
        assert found['ActivationSparsity'] == pytest.approx(1 - activity, abs=1e-9)


def test_the_view_computes_the_same(model, images):
    pytest.importorskip('neurobench', reason="neurobench is missing: pip install '.[neurobench]'")
    with torch.no_grad():
        for coding in ('graded', 'binary'):
            assert torch.equal(neurobench_view(model, coding)(images), model(images))
    assert neurobench_view(model).net.head.product.weight is model.head.weight


def test_as_it_stands_it_would_be_counted_wrongly(model, images):
    pytest.importorskip('neurobench', reason="neurobench is missing: pip install '.[neurobench]'")
    from neurobench.models import TorchModel
    naive = measured(TorchModel(copy.deepcopy(model)), images[:4])['SynapticOperations']['Effective_MACs']
    assert naive != measured(neurobench_view(model), images[:4])['SynapticOperations']['Effective_MACs']


def test_bad_input(model, monkeypatch):
    with pytest.raises(SFormerError, match="coding must be one of binary, graded, got 'unary'"):
        neurobench_view(model, 'unary')
    with pytest.raises(UncalibratedError, match='its spikes would mean nothing'):
        neurobench_view(spiking_(build()))
    if 'neurobench' in sys.modules or importlib.util.find_spec('neurobench'):
        other = copy.deepcopy(model)
        other.blocks[1].mlp.fc1.__class__ = OwnLinear
        with pytest.raises(SFormerError, match=r'blocks.1.mlp.fc1 \(OwnLinear\)'):
            neurobench_view(other)
    monkeypatch.setitem(sys.modules, 'neurobench.models', None)
    with pytest.raises(SFormerError, match=r"^neurobench is missing: pip install '\.\[neurobench\]'"):
        neurobench_view(model)
