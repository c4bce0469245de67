""" SFormer: single-timestep spiking vision transformers as timm models

Built from timm's own models: an SFormer is a timm model whose layers were replaced by their spiking counterparts, so
every constructor argument of timm works and parameter names are those of the source.

With `pretrained=True` an entry of the zoo gets, in this order: converted weights of the Hub namespace that
SFORMER_HUB_NAMESPACE names; else the published weights of its source, with thresholds that `pretrained.py` fits on
first use. Entries that are embedded have their weights in the package.

Paper: `One-Timestep is Enough: Achieving High-performance ANN-to-SNN Conversion via Scale-and-Fire Neurons`
    - https://arxiv.org/abs/2510.23383
"""
import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Type, Union

import timm
import torch
import torch.nn as nn
from timm.models import (
    beit,
    build_model_with_cfg,
    deit,
    eva,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    vision_transformer,
)

from .errors import SFormerError, UnsupportedLayerError
from .layers import SPIKING_LAYERS, named_neurons, spiking_
from .layers.attention import SpikingAttentionPoolLatent, SpikingAttentionPoolPrr
from .layers.linear import SpikingPatchEmbed
from .layers.registry import FLOATING_LAYERS
from .neurons import DirectCoding, Neuron, SFNConfig
from .verification import check_pretrained

__all__ = [
    'SFormer', 'SFormerBeit', 'SFormerDistilled', 'SFormerEva', 'SFormerMixin',
    'spiking_model_', 'source_of', 'view_of', 'source_view', 'revert_', 'is_calibrated', 'architecture_of',
]


HEADS = ('head', 'head_dist')  # what timm's reset_classifier() puts in anew


class SFormerMixin(nn.Module):
    """What a spiking model adds to the timm model that it was: layers that timm puts in later spike too.

    Args:
        sfn: Neurons, as a config or as its fields.
        *args: Passed to the timm model.
        **kwargs: Passed to the timm model.
    """

    def __init__(self, *args, sfn: Union[SFNConfig, Dict[str, Any], None] = None, **kwargs):
        super().__init__(*args, **kwargs)
        spiking_model_(self, sfn)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Weights of a source network come without neurons, and what was fitted before does not fit them. A head or
        # adapters alone change nothing that a neuron was fitted to.
        known = FLOATING_LAYERS | set(SPIKING_LAYERS.values())
        names = [f'{prefix}{name}.{key}' if name else f'{prefix}{key}' for name, child in self.named_modules()
                 if type(child) in known and name.split('.')[0] not in HEADS
                 for key, _ in child.named_parameters(recurse=False)]
        if not state_dict.keys().isdisjoint(names):
            for name, neuron in named_neurons(self):
                if f'{prefix}{name}.threshold' not in state_dict:
                    neuron.calibrated.fill_(False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, *args, **kwargs) -> None:
        old = {name: getattr(self, name, None) for name in HEADS}
        pool = self.global_pool
        super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
        spiking_(self, self.sfn_config)
        for name, head in old.items():
            new = getattr(self, name, None)
            if hasattr(head, 'neuron') and hasattr(new, 'neuron') and self.global_pool == pool:
                new.neuron = head.neuron  # thresholds belong to the features that it reads, and these stay

    @torch.jit.ignore
    def set_input_size(self, *args, **kwargs) -> None:
        coding = self.patch_embed.proj.neuron
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        spiking_(self, self.sfn_config)
        self.patch_embed.proj.neuron = coding


class SFormer(SFormerMixin, vision_transformer.VisionTransformer):
    """Spiking vision transformer; constructor and methods are those of `timm.models.VisionTransformer`."""


class SFormerDistilled(SFormerMixin, deit.VisionTransformerDistilled):
    """Spiking DeiT with a distillation token; constructor and methods are those of timm's distilled ViT."""


class SFormerEva(SFormerMixin, eva.Eva):
    """Spiking EVA, EVA-02, DINOv3 ...; constructor and methods are those of `timm.models.Eva`."""


class SFormerBeit(SFormerMixin, beit.Beit):
    """Spiking BEiT; constructor and methods are those of `timm.models.Beit`."""


# timm model class -> spiking model class
SPIKING_MODELS: Dict[Type[nn.Module], Type[nn.Module]] = {
    vision_transformer.VisionTransformer: SFormer,
    deit.VisionTransformerDistilled: SFormerDistilled,
    eva.Eva: SFormerEva,
    beit.Beit: SFormerBeit,
}
FLOATING_LAYERS.update(SPIKING_MODELS.keys() | SPIKING_MODELS.values())

# what timm does to a checkpoint before it is loaded; reads foreign formats, resizes position embeddings
FILTERS = {
    SFormer: vision_transformer.checkpoint_filter_fn,
    SFormerDistilled: vision_transformer.checkpoint_filter_fn,
    SFormerEva: eva.checkpoint_filter_fn,
    SFormerBeit: beit.checkpoint_filter_fn,
}


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
    model._model_args = dict(getattr(model, '_model_args', None) or {}, sfn=dataclasses.asdict(config))
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
    return revert_(copy.deepcopy(model))


def view_of(model: nn.Module) -> nn.Module:
    """A copy of the structure of a model that shares its parameters and buffers.

    Its mode, hooks and layers are its own: what is done to them does not reach the model, which may be in use.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def source_view(model: nn.Module) -> nn.Module:
    """The source network inside of an SFormer, as a view: the same parameters and no neurons."""
    return revert_(view_of(model))


def revert_(model: nn.Module) -> nn.Module:
    """Turn an SFormer, or one that was left half converted, back into its source network, in place."""
    back = {spiking: source for source, spiking in (SPIKING_LAYERS | SPIKING_MODELS).items()}
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Neuron):
                delattr(module, name)
        if isinstance(module, (SpikingAttentionPoolLatent, SpikingAttentionPoolPrr)):
            module._modules.pop('attn_drop', None)  # came with the neurons
        module.__class__ = back.get(type(module), type(module))
    for attribute in ('sfn_config', 'conversion'):
        model.__dict__.pop(attribute, None)
    if hasattr(model, '_model_args'):
        model._model_args = {key: value for key, value in model._model_args.items() if key != 'sfn'}
    return model


def is_calibrated(model: nn.Module) -> bool:
    """Whether every neuron of a spiking model has fitted thresholds."""
    neurons = [neuron for _, neuron in named_neurons(model)]
    return bool(neurons) and all(not neuron.calibrated.is_meta and bool(neuron.calibrated) for neuron in neurons)


def checkpoint_filter_fn(
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
        neuron_state: Optional[Callable[[], Tuple[Dict[str, torch.Tensor], Dict[str, Any]]]] = None,
) -> Dict[str, torch.Tensor]:
    """Check and adapt the state dict of a pretrained SFormer.

    timm loads non-strictly where num_classes differs; default thresholds must not slip in for missing ones there.

    Args:
        state_dict: State of an SFormer, or of the source network of a zoo entry.
        model: SFormer to be loaded.
        neuron_state: Returns the neurons to go with the weights of a source network, and the record of their fit.

    Raises:
        SFormerError: If neuron state is missing; names it.
    """
    neurons = dict(named_neurons(model))
    # a classifier that the checkpoint does not have starts anew, and so do its neurons
    new = {f'{head}.neuron' for head in HEADS if f'{head}.weight' not in state_dict}
    expected = [f'{name}.{key}' for name, neuron in neurons.items() if name not in new
                for key, _ in neuron.named_buffers(recurse=False)]
    missing = [key for key in expected if key not in state_dict]
    if neuron_state is not None and len(missing) == len(expected):
        state, model.conversion = neuron_state()
        state_dict = {**state_dict, **state}
    elif missing:
        raise SFormerError(
            f'the checkpoint has no {", ".join(missing[:3])}{" ..." if len(missing) > 3 else ""} '
            f'({len(missing)} neuron buffers missing): it is not a converted SFormer. '
            f'Convert a source network with sformer.convert().')
    # neurons of layers that this model does not have, such as a head that num_classes=0 leaves out
    state = {k: v for k, v in state_dict.items() if not _is_neuron_key(k) or k.rpartition('.')[0] in neurons}
    for name, neuron in neurons.items():
        if isinstance(neuron, DirectCoding):
            for key in (f'{name}.threshold', f'{name}.center'):
                if not torch.isfinite(state[key]).all() or (key.endswith('threshold') and not (state[key] > 0).all()):
                    raise SFormerError(f'{key} of the checkpoint is not finite and positive.')  # a mean may hide it
                if state[key].shape != neuron.threshold.shape:  # other in_chans; timm adapts the weights likewise
                    state[key] = state[key].mean(0, keepdim=True).expand(neuron.threshold.shape).clone()
    return FILTERS[type(model)](state, model)


def _is_neuron_key(key: str) -> bool:
    owner = key.split('.')[-2:-1]
    return bool(owner) and owner[0].endswith('neuron')


def _build(source: str, sfn: Union[SFNConfig, Dict[str, Any], None] = None, **kwargs) -> nn.Module:
    return spiking_model_(timm.models.model_entrypoint(source)(pretrained=False, **kwargs), sfn)


def _check_config(variant: str, sfn: Union[SFNConfig, Dict[str, Any], None], record: Optional[Dict[str, Any]]) -> None:
    """Raise SFormerError if converted weights are to be loaded into other neurons than they were fitted to."""
    recipe = (record or {}).get('recipe') or {}
    asked = sfn if isinstance(sfn, SFNConfig) else SFNConfig(**(sfn or {}))
    keys = ('levels', 'fire', 'attention_fire', 'firing', 'dead_zone', 'scale')
    different = [key for key in keys if sfn is not None and key in recipe and recipe[key] != getattr(asked, key)]
    if different:
        raise SFormerError(
            f'{variant} was converted with {", ".join(f"{key}={recipe[key]!r}" for key in different)}, so sfn= can ask '
            f'for nothing else. Its source can be converted with sformer.convert().')


def _create_sformer(variant: str, source: str, pretrained: bool = False, **kwargs) -> nn.Module:
    from .pretrained import resolve_weights
    kwargs['pretrained_cfg'], record = check_pretrained(
        kwargs.get('pretrained_cfg'), pretrained, kwargs.get('cache_dir'))
    filter_fn: Callable[..., Any] = checkpoint_filter_fn
    neuron_state = None
    if pretrained:
        kwargs, neuron_state, known = resolve_weights(variant, source, kwargs)
        source, record = kwargs.pop('source', source), record or known
        _check_config(variant, kwargs.get('sfn'), record)
        filter_fn = functools.partial(checkpoint_filter_fn, neuron_state=neuron_state)
    model = build_model_with_cfg(
        _build,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        source=source,
        **kwargs,
    )
    if pretrained and record:
        model.conversion = record
    pool = getattr(model, 'global_pool', None)
    if pool != getattr(model, 'conversion', {}).get('global_pool', pool):
        for name in HEADS:  # fitted to other features; a new classifier has default thresholds as well
            for _, neuron in named_neurons(getattr(model, name, None) or nn.Identity()):
                neuron.calibrated.fill_(False)
    if not pretrained or neuron_state or {'mean', 'std'} & (kwargs.get('pretrained_cfg_overlay') or {}).keys():
        # a converted checkpoint brings the code of its pixels along; for others the config is known only now
        set_pixel_range_(model, model.pretrained_cfg.get('mean'), model.pretrained_cfg.get('std'))
    return model


WEIGHTS = Path(__file__).parent / 'weights'

# entrypoint -> (timm model whose architecture it has, tags of its published weights, the first is the default).
# Tags are pinned here: timm's own defaults change, and with them what a result means.
ZOO = {
    'sformer_tiny': ('vit_tiny_patch16_224', 'augreg_in21k_ft_in1k'),
    'sformer_tiny_384': ('vit_tiny_patch16_384', 'augreg_in21k_ft_in1k'),
    'sformer_small': ('vit_small_patch16_224', 'augreg_in21k_ft_in1k augreg_in1k'),
    'sformer_small_384': ('vit_small_patch16_384', 'augreg_in21k_ft_in1k augreg_in1k'),
    'sformer_base': (
        'vit_base_patch16_224', 'augreg2_in21k_ft_in1k augreg_in21k_ft_in1k augreg_in1k orig_in21k_ft_in1k'),
    'sformer_base_384': ('vit_base_patch16_384', 'augreg_in21k_ft_in1k augreg_in1k orig_in21k_ft_in1k'),
    'sformer_large': ('vit_large_patch16_224', 'augreg_in21k_ft_in1k'),
    'sformer_large_384': ('vit_large_patch16_384', 'augreg_in21k_ft_in1k'),
    'sformer_deit3_small': ('deit3_small_patch16_224', 'fb_in22k_ft_in1k fb_in1k'),
    'sformer_deit3_base': ('deit3_base_patch16_224', 'fb_in22k_ft_in1k fb_in1k'),
    'sformer_deit3_large': ('deit3_large_patch16_224', 'fb_in22k_ft_in1k fb_in1k'),
    'sformer_beit_base': ('beit_base_patch16_224', 'in22k_ft_in22k_in1k'),
    'sformer_beit_large': ('beit_large_patch16_224', 'in22k_ft_in22k_in1k'),
    'sformer_eva02_tiny': ('eva02_tiny_patch14_224', 'mim_in22k'),
    'sformer_eva02_tiny_336': ('eva02_tiny_patch14_336', 'mim_in22k_ft_in1k'),
    'sformer_eva02_small': ('eva02_small_patch14_224', 'mim_in22k'),
    'sformer_eva02_small_336': ('eva02_small_patch14_336', 'mim_in22k_ft_in1k'),
    'sformer_eva02_base': ('eva02_base_patch14_224', 'mim_in22k'),
    'sformer_eva02_base_448': ('eva02_base_patch14_448', 'mim_in22k_ft_in22k_in1k mim_in22k_ft_in1k'),
    'sformer_eva02_large': ('eva02_large_patch14_224', 'mim_m38m mim_in22k'),
    'sformer_eva02_large_448': (
        'eva02_large_patch14_448',
        'mim_m38m_ft_in22k_in1k mim_in22k_ft_in22k_in1k mim_m38m_ft_in1k mim_in22k_ft_in1k'),
    'sformer_eva_large': ('eva_large_patch14_196', 'in22k_ft_in22k_in1k in22k_ft_in1k'),
    'sformer_eva_large_336': ('eva_large_patch14_336', 'in22k_ft_in22k_in1k in22k_ft_in1k'),
    'sformer_eva_giant': ('eva_giant_patch14_224', 'clip_ft_in1k'),
    'sformer_eva_giant_336': ('eva_giant_patch14_336', 'm30m_ft_in22k_in1k clip_ft_in1k'),
    'sformer_eva_giant_560': ('eva_giant_patch14_560', 'm30m_ft_in22k_in1k'),
}

# entrypoint -> (timm model, its arguments): small networks, for tests and for the weights in the package
SMALL = {
    'sformer_nano': ('vit_tiny_patch16_224', dict(patch_size=2, embed_dim=64, depth=4, num_heads=4)),
    'sformer_micro': ('vit_tiny_patch16_224', dict(patch_size=4, depth=6)),
    'sformer_eva02_micro': ('eva02_tiny_patch14_224', dict(patch_size=4, depth=6)),
    'sformer_test_vit': (
        'vit_tiny_patch16_224', dict(patch_size=16, embed_dim=64, depth=4, num_heads=2)),
    'sformer_test_deit': (
        'deit_tiny_distilled_patch16_224', dict(patch_size=16, embed_dim=64, depth=4, num_heads=2)),
    'sformer_test_beit': ('beit_base_patch16_224', dict(patch_size=16, embed_dim=64, depth=4, num_heads=2)),
    'sformer_test_eva': (
        'eva02_tiny_patch14_224', dict(patch_size=16, embed_dim=64, depth=4, num_heads=2)),
}

CUSTOM = 'sformer_custom'  # the entrypoint for every other source, which its model_args name

# entrypoint -> timm model whose architecture it has
SOURCES = {name: source for name, (source, _) in (ZOO | SMALL).items()}


def architecture_of(source: str) -> str:
    """Name of the `sformer_*` entrypoint that has the architecture of a timm model, `sformer_custom` if none has."""
    return next((name for name, (s, _) in ZOO.items() if s == source), CUSTOM)


def _cfg(source: Optional[str] = None, **kwargs) -> Dict[str, Any]:
    """Default config: preprocessing, licence and, with a tag, the published weights of the source."""
    cfg = dict(
        input_size=(3, 224, 224), crop_pct=.9, interpolation='bicubic', fixed_input_size=True,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='patch_embed.proj', classifier='head',
        num_classes=1000, license='apache-2.0', paper_name='One-Timestep is Enough',
        paper_ids='arXiv:2510.23383',
    )
    if source is not None:
        keep = (
            'input_size', 'crop_pct', 'interpolation', 'mean', 'std', 'num_classes', 'crop_mode', 'classifier',
            'license', 'hf_hub_id', 'label_names', 'label_descriptions', 'min_input_size')
        cfg.update({k: v for k, v in get_pretrained_cfg(source).to_dict().items() if k in keep and v is not None})
        if '.' not in source:
            cfg.pop('hf_hub_id', None)
    cfg.update(kwargs)
    return cfg


default_cfgs = generate_default_cfgs({
    **{f'{name}.{tag}': _cfg(f'{source}.{tag}') for name, (source, tags) in ZOO.items() for tag in tags.split()},
    'sformer_nano.digits': _cfg(
        file=str(WEIGHTS / 'sformer_nano.digits.safetensors'),
        input_size=(1, 8, 8), num_classes=10, mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation='bilinear'),
    **{f'{name}.cifar10': _cfg(
        file=str(WEIGHTS / f'{name}.cifar10.safetensors'),
        input_size=(3, 32, 32), num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
        crop_pct=1.0) for name in ('sformer_micro', 'sformer_eva02_micro')},
    **{name: _cfg(source, input_size=(3, 160, 160)) for name, (source, _) in SMALL.items() if '_test_' in name},
    CUSTOM: _cfg(),
})


def _register(name: str, source: str, model_args: Dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create_sformer(name, source, pretrained, **dict(model_args, **kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f' Spiking counterpart of `{source}`\n    '
    globals()[name] = register_model(entrypoint)


for _name, (_source, _) in ZOO.items():
    _register(_name, _source, {})
for _name, (_source, _model_args) in SMALL.items():
    _register(_name, _source, _model_args)


@register_model
def sformer_custom(pretrained: bool = False, source: str = 'vit_tiny_patch16_224', **kwargs) -> nn.Module:
    """ Spiking counterpart of any timm model whose layers all have one, named by `source`
    """
    return _create_sformer(CUSTOM, source, pretrained, **kwargs)


ENTRYPOINTS = {*SOURCES, CUSTOM}
