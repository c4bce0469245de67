""" SFormer: single-timestep spiking vision transformers as timm models

Built from timm's own models: an SFormer is a timm model whose layers were replaced by their spiking counterparts, so
every constructor argument of timm works and parameter names are those of the source.

Paper: `One-Timestep is Enough: Achieving High-performance ANN-to-SNN Conversion via Scale-and-Fire Neurons`
    - https://arxiv.org/abs/2510.23383
"""
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn as nn
from timm.layers import PatchEmbed
from timm.models import beit, deit, eva, vision_transformer

from ..errors import SFormerError, UnsupportedLayerError
from ..layers import (
    FLOATING_LAYERS,
    SPIKING_LAYERS,
    SpikingLayer,
    SpikingPatchEmbed,
    named_neurons,
    register_spiking,
    spiking_,
)
from ..neurons import FitConfig, GradedCoding, SFNConfig, as_config
from ..neurons.config import Fields
from .zoo import CUSTOM, ENTRYPOINTS, SMALL, SOURCES

__all__ = [
    'SFormer', 'SFormerBeit', 'SFormerDistilled', 'SFormerEva', 'SFormerMixin', 'SPIKING_MODELS', 'HEADS',
    'spiking_model_', 'set_norm_eps_', 'set_pixel_range_', 'state_input_size_', 'checkpoint_filter_fn',
]

HEADS = ('head', 'head_dist')  # what timm's reset_classifier() puts in anew

State = dict[str, torch.Tensor]
Pixel = Sequence[float] | float | None  # a number per channel, or of all


class Record(Protocol):
    """What a model knows of its `sformer.conversion.Conversion`."""

    @property
    def fit(self) -> FitConfig: ...

    @property
    def global_pool(self) -> str | None: ...


class SFormerMixin(SpikingLayer):
    """What a spiking model adds to the timm model that it was: layers that timm puts in later spike too.

    Args:
        sfn: Neurons, as a config or as its fields.
        *args: Passed to the timm model.
        **kwargs: Passed to the timm model.

    Attributes:
        conversion: Record of the conversion (`sformer.conversion.Conversion`), None where there was none.
    """
    spiking_parts = ('conversion',)
    conversion: Record | None = None
    patch_embed: PatchEmbed

    def __init__(self, *args, sfn: SFNConfig | Fields | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        spiking_model_(self, sfn)

    def remove_neurons(self) -> None:
        super().remove_neurons()
        cfg, args = dict(getattr(self, 'pretrained_cfg', None) or {}), self.__dict__.get('_model_args')
        architecture = cfg.get('architecture')
        if architecture == CUSTOM and args:
            cfg['architecture'] = args.pop('source', CUSTOM)
        elif architecture in SOURCES:
            cfg['architecture'] = SOURCES[architecture]
            if architecture in SMALL and args is not None:
                self.__dict__['_model_args'] = {**SMALL[architecture][1], **args}
        if architecture in ENTRYPOINTS:
            self.pretrained_cfg = self.default_cfg = cfg

    @property
    def sfn_config(self) -> SFNConfig:
        """How the neurons fire, as they say themselves."""
        return next(neuron.config for _, neuron in named_neurons(self) if hasattr(neuron, 'config'))

    @property
    def _model_args(self) -> dict[str, object]:
        """What timm records of the arguments that build this model, with the neurons that it has."""
        return dict(self.__dict__.get('_model_args', {}), sfn=dataclasses.asdict(self.sfn_config))

    @_model_args.setter
    def _model_args(self, args: dict[str, object]) -> None:
        self.__dict__['_model_args'] = {key: value for key, value in args.items() if key != 'sfn'}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Weights of a source network come without neurons, and what was fitted before does not fit them. A head or
        # adapters alone change nothing that a neuron was fitted to.
        known = FLOATING_LAYERS | set(SPIKING_LAYERS.values())
        names: list[str] = []
        for name, child in self.named_modules():
            if type(child) in known and name.split('.')[0] not in HEADS:
                path = f'{prefix}{name}.' if name else prefix
                names += [path + key for key, _ in child.named_parameters(recurse=False)]
        if not state_dict.keys().isdisjoint(names):
            for name, neuron in named_neurons(self):
                if f'{prefix}{name}.step' not in state_dict:
                    neuron.calibrated.fill_(False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_classifier(self, num_classes: int, *args, **kwargs) -> None:
        old = {name: getattr(getattr(self, name, None), 'neuron', None) for name in HEADS}
        pool = self.global_pool
        super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
        spiking_(self, self.sfn_config)
        for name, neuron in old.items():
            new = getattr(self, name, None)
            if new is not None and hasattr(new, 'neuron') and neuron is not None and self.global_pool == pool:
                new.neuron = neuron  # thresholds belong to the features that it reads, and these stay

    def set_input_size(self, *args, **kwargs) -> None:
        coding = self.patch_embed.proj.neuron
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        spiking_(self, self.sfn_config)
        self.patch_embed.proj.neuron = coding


@register_spiking(vision_transformer.VisionTransformer)
class SFormer(SFormerMixin, vision_transformer.VisionTransformer):
    """Spiking vision transformer; constructor and methods are those of `timm.models.VisionTransformer`."""


@register_spiking(deit.VisionTransformerDistilled)
class SFormerDistilled(SFormerMixin, deit.VisionTransformerDistilled):
    """Spiking DeiT with a distillation token; constructor and methods are those of timm's distilled ViT."""


@register_spiking(eva.Eva)
class SFormerEva(SFormerMixin, eva.Eva):
    """Spiking EVA, EVA-02, DINOv3 ...; constructor and methods are those of `timm.models.Eva`."""


@register_spiking(beit.Beit)
class SFormerBeit(SFormerMixin, beit.Beit):
    """Spiking BEiT; constructor and methods are those of `timm.models.Beit`."""


# timm model class -> spiking model class, and what timm does to a checkpoint of it before it is loaded: reads foreign
# formats, resizes position embeddings
SPIKING_MODELS: dict[type[nn.Module], tuple[type[SFormerMixin], Callable[..., State]]] = {
    vision_transformer.VisionTransformer: (SFormer, vision_transformer.checkpoint_filter_fn),
    deit.VisionTransformerDistilled: (SFormerDistilled, vision_transformer.checkpoint_filter_fn),
    eva.Eva: (SFormerEva, eva.checkpoint_filter_fn),
    beit.Beit: (SFormerBeit, beit.checkpoint_filter_fn),
}


def spiking_model_(model: nn.Module, sfn: SFNConfig | Fields | None = None) -> nn.Module:
    """Turn a timm model into an uncalibrated SFormer, in place.

    Args:
        model: Model of a class in `SPIKING_MODELS`.
        sfn: Neurons, as a config or as its fields.

    Returns:
        The same object, now of the spiking class.

    Raises:
        UnsupportedLayerError: If the model or one of its layers has no spiking counterpart; it is unchanged then.
    """
    kind = type(model)
    if kind not in SPIKING_MODELS and not isinstance(model, SFormerMixin):
        names = ', '.join(sorted(k.__name__ for k in SPIKING_MODELS))
        raise UnsupportedLayerError(
            f'no spiking counterpart for a model of class {kind.__module__}.{kind.__qualname__}, only for {names}. '
            f'sformer.spiking_() and sformer.calibrate_() take any module whose layers have one.')
    spiking_(model, as_config(SFNConfig, sfn))
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    set_pixel_range_(model, cfg.get('mean'), cfg.get('std'))
    return model


def set_pixel_range_(model: nn.Module, mean: Pixel, std: Pixel) -> None:
    """Fit the graded coding of pixels to a normalisation, so that 8-bit images are coded without loss."""
    for module in model.modules():
        if isinstance(module, SpikingPatchEmbed) and not module.proj.weight.is_meta:
            in_chans = module.proj.in_channels
            # adapted inputs (in_chans=1 of an RGB cfg) have no statistics of their own: the mean one serves
            mean_, std_ = (torch.tensor(v if v is not None else 0.5, dtype=torch.float32).reshape(-1)
                           for v in (mean, std))
            if mean_.numel() != in_chans or std_.numel() != in_chans:
                mean_, std_ = mean_.mean().expand(in_chans), std_.mean().expand(in_chans)
            coding = module.proj.neuron
            assert isinstance(coding, GradedCoding)
            coding.set_range(-mean_ / std_, (1 - mean_) / std_)


def set_norm_eps_(model: nn.Module, eps: float) -> None:
    """Let the layer norms of a timm model add `eps` to variances, and its recorded arguments say so (`norm_eps`), which
    timm has no argument of plain data for."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    vars(model)['_model_args'] = dict(vars(model).get('_model_args', {}), norm_eps=eps)


def state_input_size_(model: nn.Module, size: int | tuple[int, int] | None) -> None:
    """Let the config of a model that takes images of any size (`dynamic_img_size`) say the one that it was built for
    (`img_size`), if that was asked for: images are resized to it, and it is exported for it."""
    cfg = dict(getattr(model, 'pretrained_cfg', None) or {})
    if size is None or 'input_size' not in cfg:
        return
    cfg['input_size'] = (cfg['input_size'][0], *((size, size) if isinstance(size, int) else size))
    cfg.pop('test_input_size', None)
    for name in ('pretrained_cfg', 'default_cfg'):
        setattr(model, name, cfg)


def checkpoint_filter_fn(state_dict: State, model: nn.Module, neurons: State | None = None) -> State:
    """Check and adapt the state dict of a pretrained SFormer.

    timm loads non-strictly where num_classes differs; default thresholds must not slip in for missing ones there.

    Args:
        state_dict: State of an SFormer, or of the source network of a zoo entry.
        model: SFormer to be loaded.
        neurons: State of the neurons to go with the weights of a source network.

    Raises:
        SFormerError: If neuron state is missing; names it.
    """
    modules = dict(named_neurons(model))
    # a classifier that the checkpoint does not have starts anew, and so do its neurons
    new = {f'{head}.neuron' for head in HEADS if f'{head}.weight' not in state_dict}
    expected: list[str] = []
    for name, neuron in modules.items():
        if name not in new:
            expected += [f'{name}.{key}' for key in neuron.saved_buffers()]
    missing = [key for key in expected if key not in state_dict]
    if neurons is not None and len(missing) == len(expected):
        state_dict = {**state_dict, **neurons}
    elif missing:
        raise SFormerError(
            f'the checkpoint has no {", ".join(missing[:3])}{" ..." if len(missing) > 3 else ""} '
            f'({len(missing)} neuron buffers missing): it is not a converted SFormer. '
            f'Convert a source network with sformer.convert().')
    # neurons of layers that this model does not have, such as a head that num_classes=0 leaves out
    state = {k: v for k, v in state_dict.items() if not is_neuron_key(k) or k.rpartition('.')[0] in modules}
    for name, neuron in modules.items():
        if isinstance(neuron, GradedCoding):
            for key in (f'{name}.step', f'{name}.center'):
                if not torch.isfinite(state[key]).all() or (key.endswith('step') and not (state[key] > 0).all()):
                    raise SFormerError(f'{key} of the checkpoint is not finite and positive.')  # a mean may hide it
                if state[key].shape != neuron.step.shape:  # other in_chans; timm adapts the weights likewise
                    state[key] = state[key].mean(0, keepdim=True).expand(neuron.step.shape).clone()
    source_filter = next(filter_fn for spiking, filter_fn in SPIKING_MODELS.values() if type(model) is spiking)
    return source_filter(state, model)


def is_neuron_key(key: str) -> bool:
    owner = key.split('.')[-2:-1]
    return bool(owner) and owner[0].endswith('neuron')
