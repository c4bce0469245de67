"""MLPs: their linear layers spike, and so do both operands where two activations are multiplied."""
import torch
import torch.nn as nn
from timm.layers import GluMlp, Mlp, SwiGLU

from ..neurons import DEFAULT_RANGE, ScaleAndFire, SFNConfig

__all__ = ['SpikingMlp', 'SpikingGluMlp', 'SpikingSwiGLU']


def _fit_negative_branch(neuron: ScaleAndFire, act: nn.Module) -> None:
    """Let the negative branch cover just the negative range of an activation function, as GELU's of -0.17.

    This is the default of an uncalibrated neuron, whose branch would be wasted otherwise.
    """
    if neuron.threshold.is_meta:
        return
    with torch.no_grad():
        current = torch.linspace(-DEFAULT_RANGE, DEFAULT_RANGE, 801, dtype=torch.float32, device='cpu')
        low = -act(current).min().clamp(max=-1e-3)
    neuron.threshold[1] = low / neuron.levels[-1]


def _add_operand_neurons(mlp: nn.Module, config: SFNConfig) -> None:
    """Add neurons for gate and value of a gated MLP, a threshold per channel."""
    features, device = mlp.fc2.in_features, mlp.fc2.weight.device
    mlp.gate_neuron = ScaleAndFire((features,), config, device=device)
    mlp.value_neuron = ScaleAndFire((features,), config, device=device)
    _fit_negative_branch(mlp.gate_neuron, mlp.act)


class SpikingMlp(Mlp):
    """MLP whose hidden activation is lopsided, as GELU's range of -0.17 ... +10 is; `fc1` and `fc2` spike."""

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        if isinstance(self.norm, nn.Identity):
            _fit_negative_branch(self.fc2.neuron, self.act)


class SpikingGluMlp(GluMlp):
    """Gated MLP with packed weights; gate (after its activation function) and value spike before their product."""

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        _add_operand_neurons(self, config)

    def forward(self, x):
        x = self.fc1(x)
        x1, x2 = x.chunk(2, dim=self.chunk_dim)
        if self.gate_last:
            x = self.value_neuron(x1) * self.gate_neuron(self.act(x2))
        else:
            x = self.gate_neuron(self.act(x1)) * self.value_neuron(x2)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x


class SpikingSwiGLU(SwiGLU):
    """Gated MLP with separate weights; gate (after its activation function) and value spike before their product."""

    @torch.jit.ignore
    def add_neurons(self, config: SFNConfig) -> None:
        _add_operand_neurons(self, config)

    def forward(self, x):
        x_gate = self.fc1_g(x)
        x = self.fc1_x(x)
        x = self.gate_neuron(self.act(x_gate)) * self.value_neuron(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x
