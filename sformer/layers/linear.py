"""Layers with weights: their input is spikes, their output a current."""
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from timm.layers.linear import Linear
from torch.overrides import TorchFunctionMode

from ..neurons import LateralScaleAndFire, Neuron, SFNConfig, SharedScaleAndFire, new_neuron
from ..neurons.config import SCALE_AND_FIRE
from ..neurons.lateral import num_feedback
from . import products
from .multiplying import CONVOLUTION, LINEAR, Product
from .table import SpikingLayer, register_spiking

__all__ = ['SpikingLinear', 'SpikingConvMixin', 'SpikingConv2d', 'SpikingConvTranspose2d']


@register_spiking(nn.Linear)
class SpikingLinear(SpikingLayer, nn.Linear):
    """Linear layer on spikes, with a step per input channel.

    A channel is a neuron, so its own step costs nothing: it folds into the column of weights that follows.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        bias: Add a bias.
        config: Neurons of the input.

    Shape:
        Input (..., in_features), output (..., out_features). With `fired`, the input is what the neuron fired already.
    """
    spiking_parts = ('neuron',)

    def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            config: SFNConfig = SFNConfig(),
            device=None,
            dtype=None,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.add_neurons(config)

    def add_neurons(self, config: SFNConfig, fire_function: str | None = None) -> None:
        fires = fire_function or config.signed_fire
        make: Callable[..., Neuron] = new_neuron
        if config.lateral and 0 < self._feedback_cost(config) <= config.lateral_cost:
            make = LateralScaleAndFire
        elif config.neuron == SCALE_AND_FIRE and SharedScaleAndFire.suits(config, fires):
            make = SharedScaleAndFire
        self.neuron = make((self.in_features,), config, folds=True, token=True, fire_function=fire_function,
                           device=self.weight.device)

    def _feedback_cost(self, config: SFNConfig) -> float:
        """Weights of the feedback between groups of input channels, as a share of those of the layer."""
        return num_feedback(self.in_features, config.lateral) / max(1, self.weight.numel())

    def forward(self, x: torch.Tensor, fired: bool = False) -> torch.Tensor:
        return products.linear(None if fired else self.neuron, x, self.weight, self.bias)

    def multiplies(self) -> list[Product]:
        return [Product(LINEAR, (self.neuron,), F.linear, _linear_total, self.weight, self.bias)]


@register_spiking(Linear)
class SpikingTimmLinear(SpikingLinear, Linear):  # type: ignore[misc]
    """timm's linear layer, which differs where it is scripted, on spikes."""


def _linear_total(spikes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (spikes.reshape(-1, spikes.shape[-1]).sum(0) * weight.sum(0)).sum()


class SpikingConvMixin(SpikingLayer):
    """A convolution on spikes, with a step per input channel, which folds into the weights, grouped or not.

    Zeros around an image are no spikes: these neurons have no centre.

    Shape:
        Input (B, C, H, W), output and further arguments as of the layer. With `fired`, the input is what the neuron
        fired already.

    Raises:
        AssertionError: If the input has another number of channels; the neuron would spread one over all.
    """
    spiking_parts = ('neuron',)
    neuron: Neuron | None
    in_channels: int
    groups: int
    padding: str | tuple[int, ...]
    padding_mode: str
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.neuron = None  # as in the layers of this class that peft adds to one that fires

    def add_neurons(self, config: SFNConfig) -> None:
        self.neuron = new_neuron((self.in_channels, 1, 1), config, device=self.weight.device)

    def forward(self, x: torch.Tensor, *args: object, fired: bool = False, **kwargs: object) -> torch.Tensor:
        torch._assert(x.shape[-3] == self.in_channels, 'currents have another number of channels than the weights')
        return super().forward(x if self.neuron is None or fired else self.neuron(x), *args, **kwargs)

    def convolution(self) -> functools.partial[torch.Tensor]:
        """This convolution, called with its input and weights, without a bias."""
        raise NotImplementedError

    def multiplies(self) -> list[Product]:
        if self.neuron is None:
            return []
        convolution, transposed = self.convolution(), isinstance(self, nn.ConvTranspose2d)
        total = functools.partial(_convolution_total, convolution, self.groups, transposed)
        pads = '' if not transposed and not self.pads() else self.padding_mode
        return [Product(CONVOLUTION, (self.neuron,), convolution, total, self.multiplied_weight(), self.bias,
                        self.groups, transposed, pads)]

    def pads(self) -> bool:
        """Whether something is put around images."""
        return self.padding not in ((0, 0), 'valid')

    def multiplied_weight(self) -> torch.Tensor:
        """Weights that multiply spikes."""
        return self.weight


def _convolution_total(
        convolution: Callable[..., torch.Tensor],
        groups: int,
        transposed: bool,
        spikes: torch.Tensor,
        weight: torch.Tensor,
) -> torch.Tensor:
    """Sum over a convolution, of which images and the output channels of a group are summed up first."""
    images = spikes.reshape(-1, *spikes.shape[-3:]).sum(0, keepdim=True)
    of_group = weight.sum(1, keepdim=True) if transposed else weight.unflatten(0, (groups, -1)).sum(1)
    return convolution(images.double(), of_group.double()).sum()


@register_spiking(nn.Conv2d)
class SpikingConv2d(SpikingConvMixin, nn.Conv2d):  # type: ignore[misc]
    """Convolution on spikes; made by `spiking_` of an `nn.Conv2d`."""

    def convolution(self) -> functools.partial[torch.Tensor]:
        if self.padding_mode == 'zeros':
            return functools.partial(
                F.conv2d, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        return functools.partial(
            _padded_conv2d, around=self._reversed_padding_repeated_twice, mode=self.padding_mode, stride=self.stride,
            dilation=self.dilation, groups=self.groups)


def _padded_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        around: list[int],
        mode: str,
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
) -> torch.Tensor:
    return F.conv2d(F.pad(x, around, mode=mode), weight, bias, stride, dilation=dilation, groups=groups)


class _SamePaddingMixin(SpikingConvMixin):
    """A convolution that pads as TensorFlow does, by the size of the image."""
    same_pad = True
    kernel_size: list[int]
    stride: list[int]
    dilation: list[int]

    def convolution(self) -> functools.partial[torch.Tensor]:
        if not self.same_pad:
            return SpikingConv2d.convolution(self)  # type: ignore[arg-type]
        return functools.partial(_same_conv2d, kernel_size=self.kernel_size, stride=self.stride,
                                 dilation=self.dilation, groups=self.groups)

    def pads(self) -> bool:
        return self.same_pad or super().pads()


def _same_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        kernel_size: list[int],
        stride: list[int],
        dilation: list[int],
        groups: int,
) -> torch.Tensor:
    x = pad_same(x, kernel_size, stride, dilation)
    return F.conv2d(x, weight, bias, stride, dilation=dilation, groups=groups)


class _StandardisedMixin(_SamePaddingMixin):
    """A convolution that standardises its weights before each product, as it says itself."""
    same_pad = False

    def multiplied_weight(self) -> torch.Tensor:
        with _Weights() as weights:
            super(SpikingConvMixin, self).forward(self.weight.new_zeros(1, self.in_channels, *self.kernel_size))
        return weights.used


class _Weights(TorchFunctionMode):
    """Keeps the weights that a convolution is called with."""
    used: torch.Tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv2d:
            self.used = args[1]
        return func(*args, **(kwargs or {}))


@register_spiking(Conv2dSame)
class SpikingConv2dSame(_SamePaddingMixin, Conv2dSame):  # type: ignore[misc]
    """Convolution with padding by the size of the image on spikes."""


@register_spiking(StdConv2d)
class SpikingStdConv2d(_StandardisedMixin, StdConv2d):  # type: ignore[misc]
    """Convolution with standardised weights on spikes."""


@register_spiking(StdConv2dSame)
class SpikingStdConv2dSame(_StandardisedMixin, StdConv2dSame):  # type: ignore[misc]
    """Convolution with standardised weights, and padding by the size of the image, on spikes."""


@register_spiking(ScaledStdConv2d)
class SpikingScaledStdConv2d(_StandardisedMixin, ScaledStdConv2d):  # type: ignore[misc]
    """Convolution with standardised and scaled weights on spikes."""


@register_spiking(ScaledStdConv2dSame)
class SpikingScaledStdConv2dSame(_StandardisedMixin, ScaledStdConv2dSame):  # type: ignore[misc]
    """Convolution with standardised and scaled weights, and padding by the size of the image, on spikes."""


@register_spiking(nn.ConvTranspose2d)
class SpikingConvTranspose2d(SpikingConvMixin, nn.ConvTranspose2d):  # type: ignore[misc]
    """Transposed convolution on spikes; made by `spiking_` of an `nn.ConvTranspose2d`."""

    def convolution(self) -> functools.partial[torch.Tensor]:
        assert isinstance(self.padding, tuple)
        return functools.partial(
            _transposed_conv2d, stride=self.stride, padding=self.padding, output_padding=self.output_padding,
            groups=self.groups, dilation=self.dilation)


def _transposed_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        output_padding: tuple[int, ...],
        groups: int,
        dilation: tuple[int, ...],
        more: Sequence[int] = (0, 0),
) -> torch.Tensor:
    """With so many `more` rows and columns, which the end of the result would lack."""
    end = [own + rows for own, rows in zip(output_padding, more, strict=True)]
    return F.conv_transpose2d(x, weight, bias, stride, padding, end, groups, dilation)
