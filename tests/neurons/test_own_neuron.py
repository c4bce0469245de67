"""A neuron type of one's own."""
import pytest
import torch

from sformer.neurons import Neuron, Spikes


class Sign(Neuron):
    def encode(self, x):
        return Spikes(x.detach().sign().to(torch.int8), torch.tensor(0.5))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_forward_follows_from_encode(dtype):
    x = torch.tensor([-3., 0., 2.], dtype=dtype, requires_grad=True)
    out = Sign()(x)
    out.sum().backward()
    assert out.dtype == dtype and out.tolist() == [-0.5, 0, 0.5] and x.grad.tolist() == [1, 1, 1]
    with torch.no_grad():
        assert torch.equal(Sign()(x), out)
