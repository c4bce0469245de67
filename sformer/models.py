""" SFormer: single-timestep spiking vision transformers as timm models

Built from timm's own models: an SFormer is a timm model whose layers were replaced by their spiking counterparts, so
every constructor argument of timm works and parameter names are those of the source.

Paper: `One-Timestep is Enough: Achieving High-performance ANN-to-SNN Conversion via Scale-and-Fire Neurons`
    - https://arxiv.org/abs/2510.23383
"""
import copy
from pathlib import Path
from typing import Any, Dict, Optional, Type, Union

import timm
import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn

from .errors import SFormerError, UnsupportedLayerError
from .layers import SPIKING_LAYERS, named_neurons, spiking_
from .layers.linear import SpikingPatchEmbed
from .layers.registry import FLOATING_LAYERS
from .neurons import DirectCoding, Neuron, SFNConfig
from .verification import check_pretrained

__all__ = ['SFormer', 'SFormerMixin', 'spiking_model_', 'source_of', 'is_calibrated', 'architecture_of']


class SFormerMixin(nn.Module):
    """What a spiking model adds to the timm model that it was: layers that timm puts in later spike too."""

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, *args, **kwargs) -> None:
        old = getattr(self, 'head', None)
        super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
        spiking_(self, self.sfn_config)
        new = getattr(self, 'head', None)
        if hasattr(old, 'neuron') and hasattr(new, 'neuron') and old.in_features == new.in_features:
            new.neuron = old.neuron  # thresholds belong to the features that it reads, and these stay

    @torch.jit.ignore
    def set_input_size(self, *args, **kwargs) -> None:
        coding = self.patch_embed.proj.neuron
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        spiking_(self, self.sfn_config)
        self.patch_embed.proj.neuron = coding


class SFormer(SFormerMixin, VisionTransformer):
    """Spiking vision transformer; constructor and methods are those of `timm.models.VisionTransformer`."""

    def __init__(self, *args, sfn: Union[SFNConfig, Dict[str, Any], None] = None, **kwargs):
        super().__init__(*args, **kwargs)
        spiking_model_(self, sfn)


# timm model class -> spiking model class
SPIKING_MODELS: Dict[Type[nn.Module], Type[nn.Module]] = {VisionTransformer: SFormer}
FLOATING_LAYERS.update(SPIKING_MODELS.keys() | SPIKING_MODELS.values())


def spiking_model_(model: nn.Module, sfn: Union[SFNConfig, Dict[str, Any], None] = None) -> nn.Module:
    """Turn a timm model into an uncalibrated SFormer, in place.

    Args:
        model: Model of a class in `SPIKING_MODELS`.
        sfn: Neurons, as a config or as its fields.

    Returns:
        The same object, now of the spiking class.

    Raises:
        UnsupportedLayerError: If the model or one of its layers has no spiking counterpart; it is unchanged then.
    """
    config = sfn if isinstance(sfn, SFNConfig) else SFNConfig(**(sfn or {}))
    kind = type(model)
    if kind not in SPIKING_MODELS and kind not in SPIKING_MODELS.values():
        names = ', '.join(sorted(k.__name__ for k in SPIKING_MODELS))
        raise UnsupportedLayerError(
            f'no spiking counterpart for a model of class {kind.__module__}.{kind.__qualname__}, only for {names}.')
    spiking_(model, config)
    model.__class__ = SPIKING_MODELS.get(kind, kind)
    model.sfn_config = config
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    set_pixel_range_(model, cfg.get('mean'), cfg.get('std'))
    return model


def set_pixel_range_(model: nn.Module, mean: Any, std: Any) -> None:
    """Fit the direct coding of pixels to a normalisation, so that 8-bit images are coded without loss."""
    for module in model.modules():
        if isinstance(module, SpikingPatchEmbed) and not module.proj.weight.is_meta:
            coding = module.proj.neuron
            in_chans = module.proj.in_channels
            # adapted inputs (in_chans=1 of an RGB cfg) have no statistics of their own: the mean one serves
            mean_, std_ = (torch.tensor(v if v is not None else 0.5, dtype=torch.float32).reshape(-1)
                           for v in (mean, std))
            if mean_.numel() != in_chans or std_.numel() != in_chans:
                mean_, std_ = mean_.mean().expand(in_chans), std_.mean().expand(in_chans)
            coding.set_range(-mean_ / std_, (1 - mean_) / std_)


def source_of(model: nn.Module) -> nn.Module:
    """The source network of an SFormer, as a copy: the inverse of conversion.

    Args:
        model: Spiking model.

    Returns:
        A model of the timm class that it was converted from, with the same weights and no neurons.
    """
    model = copy.deepcopy(model)
    back = {spiking: source for source, spiking in (SPIKING_LAYERS | SPIKING_MODELS).items()}
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Neuron):
                delattr(module, name)
        module.__class__ = back.get(type(module), type(module))
    for attribute in ('sfn_config', 'conversion'):
        model.__dict__.pop(attribute, None)
    return model


def is_calibrated(model: nn.Module) -> bool:
    """Whether every neuron of a spiking model has fitted thresholds."""
    neurons = [neuron for _, neuron in named_neurons(model)]
    return bool(neurons) and all(bool(neuron.calibrated) for neuron in neurons)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Check and adapt the state dict of a pretrained SFormer.

    timm loads non-strictly where num_classes differs; default thresholds must not slip in for missing ones there.

    Raises:
        SFormerError: If neuron state is missing; names it.
    """
    missing = [
        f'{name}.{key}' for name, neuron in named_neurons(model) for key, _ in neuron.named_buffers(recurse=False)
        if f'{name}.{key}' not in state_dict]
    if missing:
        raise SFormerError(
            f'the checkpoint has no {", ".join(missing[:3])}{" ..." if len(missing) > 3 else ""} '
            f'({len(missing)} neuron buffers missing): it is not a converted SFormer. '
            f'Convert a source network with sformer.convert().')
    wanted = {name for name, _ in named_neurons(model)}
    state = {k: v for k, v in state_dict.items() if '.neuron.' not in k or k.rpartition('.')[0] in wanted}
    for name, neuron in named_neurons(model):
        if isinstance(neuron, DirectCoding):
            for key in (f'{name}.threshold', f'{name}.center'):
                if state[key].shape != neuron.threshold.shape:  # other in_chans; timm adapts the weights likewise
                    state[key] = state[key].mean(0, keepdim=True).expand(neuron.threshold.shape).clone()
    return vit_checkpoint_filter_fn(state, model)


def _build(source: str, sfn: Union[SFNConfig, Dict[str, Any], None] = None, **kwargs) -> nn.Module:
    return spiking_model_(timm.models.model_entrypoint(source)(pretrained=False, **kwargs), sfn)


def _create_sformer(variant: str, source: str, pretrained: bool = False, **kwargs) -> nn.Module:
    kwargs['pretrained_cfg'] = check_pretrained(kwargs.get('pretrained_cfg'), pretrained, kwargs.get('cache_dir'))
    return build_model_with_cfg(
        _build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        source=source,
        **kwargs,
    )


WEIGHTS = Path(__file__).parent / 'weights'

# entrypoint -> timm model whose architecture it has
SOURCES = {
    'sformer_tiny': 'vit_tiny_patch16_224',
    'sformer_small': 'vit_small_patch16_224',
    'sformer_base': 'vit_base_patch16_224',
    'sformer_large': 'vit_large_patch16_224',
}


def architecture_of(source: str) -> str:
    """Name of the `sformer_*` entrypoint that has the architecture of a timm model, `sformer_custom` if none has."""
    return next((name for name, s in SOURCES.items() if s == source), CUSTOM)


# the entrypoint for every other source names it in its model_args
CUSTOM = 'sformer_custom'
ENTRYPOINTS = {*SOURCES, 'sformer_nano', CUSTOM}


def _cfg(source: Optional[str] = None, **kwargs) -> Dict[str, Any]:
    """Default config: preprocessing of the source, weights of nobody until somebody publishes some."""
    cfg = dict(
        input_size=(3, 224, 224), crop_pct=.9, interpolation='bicubic', fixed_input_size=True,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='patch_embed.proj', classifier='head',
        num_classes=1000, license='apache-2.0', paper_name='One-Timestep is Enough',
        paper_ids='arXiv:2510.23383',
    )
    if source is not None:
        keep = ('input_size', 'crop_pct', 'interpolation', 'mean', 'std', 'num_classes', 'crop_mode')
        cfg.update({k: v for k, v in get_pretrained_cfg(source).to_dict().items() if k in keep and v is not None})
    cfg.update(kwargs)
    return cfg


default_cfgs = generate_default_cfgs({
    **{name: _cfg(source) for name, source in SOURCES.items()},
    'sformer_nano.digits': _cfg(
        file=str(WEIGHTS / 'sformer_nano.digits.safetensors'),
        input_size=(1, 8, 8), num_classes=10, mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation='bilinear',
        license='apache-2.0'),
    'sformer_custom': _cfg(),
})


@register_model
def sformer_nano(pretrained: bool = False, **kwargs) -> nn.Module:
    """ Spiking ViT of 0.2 M parameters for 8x8 images; its source is trained by scripts/train_source.py
    """
    model_args = dict(patch_size=2, embed_dim=64, depth=4, num_heads=4)
    return _create_sformer('sformer_nano', 'vit_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def sformer_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """ Spiking ViT-Tiny (Ti/16)
    """
    return _create_sformer('sformer_tiny', SOURCES['sformer_tiny'], pretrained, **kwargs)


@register_model
def sformer_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """ Spiking ViT-Small (S/16)
    """
    return _create_sformer('sformer_small', SOURCES['sformer_small'], pretrained, **kwargs)


@register_model
def sformer_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """ Spiking ViT-Base (B/16)
    """
    return _create_sformer('sformer_base', SOURCES['sformer_base'], pretrained, **kwargs)


@register_model
def sformer_large(pretrained: bool = False, **kwargs) -> nn.Module:
    """ Spiking ViT-Large (L/16)
    """
    return _create_sformer('sformer_large', SOURCES['sformer_large'], pretrained, **kwargs)


@register_model
def sformer_custom(pretrained: bool = False, source: str = 'vit_tiny_patch16_224', **kwargs) -> nn.Module:
    """ Spiking counterpart of any timm model whose layers all have one, named by `source`
    """
    return _create_sformer(CUSTOM, source, pretrained, **kwargs)
