"""Graphs of convolutions: every engine computes what integers in torch compute, spike by spike."""
import copy

import pytest
import torch
import torch.nn as nn

import sformer
from sformer import SFNConfig, spiking_, to_integer_
from sformer.execution import engines
from sformer.execution.graph import to_graph_
from sformer.execution.onnx import to_onnx

for package in ('onnx', 'onnxscript', 'onnxruntime', 'openvino'):
    pytest.importorskip(package)
ENGINES = ('openvino', 'onnxruntime')
pytestmark = pytest.mark.usefixtures('operators_read_once')


def errors(network, images):
    """By each engine, of each image, relative ones, of the graph of a network in integers against the network."""
    graph = copy.deepcopy(network)
    to_graph_(graph)
    exported = to_onnx(graph).SerializeToString()
    with torch.no_grad():
        expected = network(images)
    for engine in ENGINES:
        found = torch.from_numpy(engines.compile_graph(exported, engine)(images.numpy()))
        yield (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


@pytest.mark.slow
def test_convolutions_agree_with_torch():
    # strided, grouped, transposed, with batch norm and ReLU between them
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2), nn.Conv2d(4, 2, 1)).eval()
    for norm in (network[1], network[4], network[7]):
        norm.running_var.uniform_(0.5, 2.)
    network.pretrained_cfg = dict(input_size=(3, 16, 16))
    images = torch.randn(16, 3, 16, 16)
    sformer.calibrate_(spiking_(network), [images])
    assert all(report.integer for report in to_integer_(network))
    for each in errors(network, images):
        assert (each < 1e-5).float().mean() >= 0.5 and each.max() < 0.05, each


class Residual(nn.Module):
    """Sum of two convolutions, one of which reads the other: without bias, and with one that is zero."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = dict(input_size=(4, 4, 4))
        self.first = nn.Conv2d(4, 4, 1, bias=False)
        self.second = nn.Conv2d(4, 4, 1)
        nn.init.zeros_(self.second.bias)
        self.act = nn.GELU()

    def forward(self, x):
        x = self.first(x)
        return x + self.second(self.act(x))


def test_convolutions_of_maps_in_any_engine():
    """Each channel fires by its own threshold, and sums are added when they are multiplied by their steps."""
    torch.manual_seed(0)
    network = Residual().eval()
    maps = torch.randn(8, 4, 4, 4) * torch.tensor([1., 9., 3., 5.]).view(-1, 1, 1)
    sformer.calibrate_(spiking_(network, SFNConfig(levels=127)), [maps])
    to_integer_(network)
    for each in errors(network, maps):
        assert each.median() < 1e-5 and each.max() < 0.02, each
