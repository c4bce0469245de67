""" SFormer: single-timestep spiking vision transformers as timm models

Built from timm's own models: an SFormer is a timm model whose layers were replaced by their spiking counterparts, so
every constructor argument of timm works and parameter names are those of the source.

Paper: `One-Timestep is Enough: Achieving High-performance ANN-to-SNN Conversion via Scale-and-Fire Neurons`
    - https://arxiv.org/abs/2510.23383
"""
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, SupportsIndex

import timm
import torch
import torch.nn as nn
from timm.models import beit, deit, eva, get_model_traits, vision_transformer

from ..errors import SFormerError, UnsupportedLayerError
from ..layers import (
    FLOATING_LAYERS,
    SPIKING_LAYERS,
    SpikingConvMixin,
    SpikingLayer,
    named_neurons,
    register_spiking,
    spiking_,
    valid_tokens,
)
from ..neurons import FitConfig, GradedCoding, SFNConfig, as_config
from ..neurons.config import Fields
from .zoo import CUSTOM, ENTRYPOINTS, SMALL, SOURCES

__all__ = [
    'SFormer', 'SFormerBeit', 'SFormerDistilled', 'SFormerEva', 'SFormerMixin', 'HEADS', 'PLAIN_MODELS', 'head_names',
    'is_encoder', 'spiking_model_', 'set_norm_eps_', 'set_pixel_range_', 'source_filter', 'spiking_root',
    'state_input_size_', 'checkpoint_filter_fn',
]

HEAD_KEY = 'classifier'  # of a config of timm
HEADS = ('head', 'head_dist')  # what the reset_classifier() of most timm models puts in anew

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
    vetted = False
    conversion: Record | None = None

    def __init__(self, *args, sfn: SFNConfig | Fields | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        spiking_model_(self, sfn)

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Let layers that timm puts in anew spike, where the source does so: an encoder has no classifier."""
        super().__init_subclass__(**kwargs)
        for name, method in (('reset_classifier', _reset_classifier), ('set_input_size', _set_input_size)):
            if hasattr(cls, name) and name not in vars(cls):
                setattr(cls, name, method)
        for name in ('forward', 'forward_features', 'forward_intermediates'):
            own = getattr(cls, name, None)
            if own is not None and 'patch_valid' in inspect.signature(own).parameters:
                setattr(cls, name, _without_padding(own))

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        """Pickled by the class of its source where it is of a class that was made of it."""
        reduced = super().__reduce_ex__(protocol)
        source = MADE.get(type(self))
        return reduced if source is None else (_empty, (source,), *reduced[2:])

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
        """How the neurons fire, as they say themselves; as by default where blocks were pruned and none is left."""
        return next((neuron.config for _, neuron in named_neurons(self) if hasattr(neuron, 'config')), SFNConfig())

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
        heads = tuple(f'{head}.' for head in head_names(self))
        names: list[str] = []
        for name, child in self.named_modules():
            if type(child) in known and not f'{name}.'.startswith(heads):
                path = f'{prefix}{name}.' if name else prefix
                names += [path + key for key, _ in child.named_parameters(recurse=False)]
        if not state_dict.keys().isdisjoint(names):
            for name, neuron in named_neurons(self):
                if f'{prefix}{name}.step' not in state_dict:
                    neuron.calibrated.fill_(False)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _without_padding(forward: Callable[..., object]) -> Callable[..., object]:
    """A forward that is told which patches are padding, while which these do not fire."""
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def wrapped(self: 'SFormerMixin', *args: object, **kwargs: object) -> object:
        given = signature.bind(self, *args, **kwargs).arguments
        patches = next(value for name, value in given.items() if name != 'self')
        valid = patches.get('patch_valid') if isinstance(patches, dict) else given.get('patch_valid')
        if not isinstance(valid, torch.Tensor):
            return forward(self, *args, **kwargs)
        with valid_tokens(valid, getattr(self, 'num_prefix_tokens', 0)):
            return forward(self, *args, **kwargs)
    return wrapped


def _reset_classifier(self: SFormerMixin, num_classes: int, *args: object, **kwargs: object) -> None:
    old = {name: _neuron_of(self, name) for name in head_names(self)}
    pool = getattr(self, 'global_pool', None)
    super(SFormerMixin, self).reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
    spiking_(self, self.sfn_config)
    for name, neuron in old.items():
        if neuron is not None and _neuron_of(self, name) is not None and getattr(self, 'global_pool', None) == pool:
            self.get_submodule(name).neuron = neuron  # thresholds belong to the features that it reads: these stay


def _set_input_size(self: SFormerMixin, *args: object, **kwargs: object) -> None:
    codings = {name: neuron for name, neuron in named_neurons(self) if isinstance(neuron, GradedCoding)}
    super(SFormerMixin, self).set_input_size(*args, **kwargs)  # type: ignore[misc]
    spiking_(self, self.sfn_config)
    for name, coding in codings.items():
        self.set_submodule(name, coding)


def _neuron_of(model: nn.Module, name: str) -> nn.Module | None:
    """The neuron of a layer, if there is such a layer and it has one."""
    return dict(model.named_modules()).get(f'{name}.neuron')


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Paths where heads of a timm model are, or would be."""
    named = (getattr(model, 'pretrained_cfg', None) or {}).get(HEAD_KEY) or ()
    return *HEADS, *((named,) if isinstance(named, str) else named)


def is_encoder(model: nn.Module) -> bool:
    """Whether a timm model can have no head: its output is tokens, for others to read."""
    return not hasattr(model, f'get_{HEAD_KEY}')


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


# timm models that are one row of blocks between a patch embedding and a head
PLAIN_MODELS = (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled, eva.Eva, beit.Beit)

MADE: dict[type[nn.Module], type[nn.Module]] = {}  # spiking class that was made of a source's -> that class


def spiking_root(kind: type[nn.Module]) -> type[nn.Module]:
    """The spiking class of timm models of a class; made of it where there is none yet.

    Every class will do: whether a model converts is decided by its layers, and by products of its own that calibration
    meets.
    """
    if kind not in SPIKING_LAYERS:
        doc = f'Spiking `{kind.__module__}.{kind.__name__}`; constructor and methods are those of that class.'
        made = type(f'SFormer{kind.__name__}', (SFormerMixin, kind), {'__doc__': doc, '__module__': __name__})
        MADE[made] = kind
        register_spiking(kind)(made)
    return SPIKING_LAYERS[kind]


def _empty(kind: type[nn.Module]) -> nn.Module:
    """An object of the spiking class of a source, before its state is put in."""
    made = spiking_root(kind)
    return made.__new__(made)


def spiking_model_(model: nn.Module, sfn: SFNConfig | Fields | None = None) -> nn.Module:
    """Turn a timm model into an uncalibrated SFormer, in place.

    Args:
        model: A timm model.
        sfn: Neurons, as a config or as its fields.

    Returns:
        The same object, now of the spiking class.

    Raises:
        UnsupportedLayerError: If it is no timm model, or one of its layers has no spiking counterpart; it is unchanged
            then.
    """
    kind = type(model)
    if not isinstance(model, SFormerMixin):
        if not hasattr(model, 'num_classes'):
            raise UnsupportedLayerError(
                f'{kind.__module__}.{kind.__qualname__} is no timm model: it has no num_classes. '
                f'sformer.spiking_() and sformer.calibrate_() take any module whose layers have counterparts.')
        spiking_root(kind)
    config = as_config(SFNConfig, sfn)
    spiking_(model, config)
    for layer in _first_convolutions(model):
        layer.neuron = GradedCoding(layer.in_channels, device=layer.weight.device)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    set_pixel_range_(model, cfg.get('mean'), cfg.get('std'))
    return model


def _first_convolutions(model: nn.Module) -> Iterator[SpikingConvMixin]:
    """Convolutions that read pixels, as timm says, and have no code of them yet: those of patch embeddings have."""
    first = get_model_traits(model).get('first_conv') or ()
    modules = dict(model.named_modules())
    for name in (first,) if isinstance(first, str) else first:
        layer = modules.get(name)
        if isinstance(layer, SpikingConvMixin) and not isinstance(layer.neuron, GradedCoding):
            yield layer


def set_pixel_range_(model: nn.Module, mean: Pixel, std: Pixel) -> None:
    """Fit the graded coding of pixels to a normalisation, so that 8-bit images are coded without loss."""
    for _, coding in named_neurons(model):
        if isinstance(coding, GradedCoding) and not coding.step.is_meta:
            # adapted inputs (in_chans=1 of an RGB cfg) have no statistics of their own: the mean one serves
            mean_, std_ = (torch.tensor(v if v is not None else 0.5, dtype=torch.float32).reshape(-1)
                           for v in (mean, std))
            if mean_.numel() != coding.in_chans or std_.numel() != coding.in_chans:
                mean_, std_ = mean_.mean().expand(coding.in_chans), std_.mean().expand(coding.in_chans)
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


def source_filter(source: str, kind: type[nn.Module]) -> Callable[..., State]:
    """What timm does to a checkpoint before it is loaded into a model: reads foreign formats, resizes embeddings.

    Args:
        source: Name of the timm model.
        kind: Its class: where a module of timm has several such functions, their annotations say of which they are.
    """
    modules = inspect.getmodule(timm.model_entrypoint(source)), inspect.getmodule(kind)
    found = [f for module in modules for name, f in vars(module).items() if name.startswith('checkpoint_filter_fn')]
    suited = [f for f in found if list(inspect.signature(f).parameters.values())[1].annotation is kind]
    read = next(iter(suited or found), lambda state, model: state)

    def adapted(state: State, model: nn.Module) -> State:
        expected = model.state_dict()
        heads = tuple(f'{head}.' for head in head_names(model))
        fits = all(key in expected and expected[key].shape == value.shape or key.startswith(heads)
                   for key, value in state.items())
        return state if fits else read(state, model)  # not every such function knows its own names
    return adapted


def checkpoint_filter_fn(
        state_dict: State,
        model: nn.Module,
        source: str,
        neurons: State | None = None,
) -> State:
    """Check and adapt the state dict of a pretrained SFormer.

    timm loads non-strictly where num_classes differs; default thresholds must not slip in for missing ones there.

    Args:
        state_dict: State of an SFormer, or of the source network of a zoo entry.
        model: SFormer to be loaded.
        source: Name of the timm model that it has the architecture of.
        neurons: State of the neurons to go with the weights of a source network.

    Raises:
        SFormerError: If neuron state is missing; names it.
    """
    modules = dict(named_neurons(model))
    # a classifier that the checkpoint does not have starts anew, and so do its neurons
    new = {f'{head}.neuron' for head in head_names(model) if f'{head}.weight' not in state_dict}
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
    weights = {key: value for key, value in state_dict.items() if not is_neuron_key(key)}
    # but those of layers that this model does not have, such as a head that num_classes=0 leaves out
    state = {k: v for k, v in state_dict.items() if is_neuron_key(k) and k.rpartition('.')[0] in modules}
    for name, neuron in modules.items():
        if isinstance(neuron, GradedCoding):
            for key in (f'{name}.step', f'{name}.center'):
                if not torch.isfinite(state[key]).all() or (key.endswith('step') and not (state[key] > 0).all()):
                    raise SFormerError(f'{key} of the checkpoint is not finite and positive.')  # a mean may hide it
                if state[key].shape != neuron.step.shape:  # other in_chans; timm adapts the weights likewise
                    state[key] = state[key].mean(0, keepdim=True).expand(neuron.step.shape).clone()
    kind = next(kind for kind, spiking in SPIKING_LAYERS.items() if type(model) is spiking)
    return {**source_filter(source, kind)(weights, model), **state}


def is_neuron_key(key: str) -> bool:
    owner = key.split('.')[-2:-1]
    return bool(owner) and owner[0].endswith('neuron')
