"""Registration with timm: the `sformer_*` models, their default configs, and what is known of each."""
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models._builder import resolve_pretrained_cfg

from ..conversion.record import set_record_
from ..data.batches import progress
from ..files import Json
from ..layers import named_neurons
from ..models import head_names, set_norm_eps_, set_pixel_range_, spiking_model_, state_input_size_
from ..models.sformer import checkpoint_filter_fn
from ..models.zoo import CUSTOM, SMALL, SOURCES, ZOO, source_name
from ..neurons import SFNConfig
from .pretrained import check_firing, find_pretrained

__all__ = ['default_cfgs', 'entries']

WEIGHTS = Path(__file__).parent / 'weights'


def _build(
        source: str,
        tag: str | None,
        sfn: SFNConfig | Json | None = None,
        norm_eps: float | None = None,
        **kwargs,
) -> nn.Module:
    # some sources have an architecture that depends on the tag: the width that a language model reads
    tag = tag if timm.is_model_pretrained(f'{source}.{tag}') else None
    model = timm.models.model_entrypoint(source)(pretrained=False, pretrained_cfg=tag, **kwargs)
    if norm_eps is not None:
        set_norm_eps_(model, norm_eps)
    return spiking_model_(model, sfn)


def _create_sformer(variant: str, source: str, pretrained: bool = False, **kwargs) -> nn.Module:
    fitted = (kwargs.get('pretrained_model_args') or {}).get('sfn')
    if pretrained and fitted is not None:
        check_firing(variant, kwargs.get('sfn'), fitted)
    cfg, overlay = kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None)
    if variant == CUSTOM and not pretrained and not cfg and timm.is_model(source):
        overlay = {**_cfg(source), 'hf_hub_id': None, **(overlay or {})}
    found = find_pretrained(
        variant, source, default_cfgs[variant].cfgs, pretrained=pretrained, cfg=cfg, overlay=overlay,
        cache_dir=kwargs.get('cache_dir'), sfn=kwargs.get('sfn'))
    args = {'source': source, **found.model_args, **kwargs}
    args['tag'] = resolve_pretrained_cfg(variant, found.cfg, found.overlay).tag
    model = build_model_with_cfg(
        _build,
        variant,
        pretrained,
        pretrained_cfg=found.cfg,
        pretrained_cfg_overlay=found.overlay or None,
        pretrained_filter_fn=functools.partial(checkpoint_filter_fn, source=args['source'], neurons=found.neurons),
        feature_cfg=dict(out_indices=args.pop('out_indices', 3), feature_cls='getter'),
        **args,
    )
    set_record_(model, found.conversion)
    state_input_size_(model, kwargs.get('img_size'))
    _reset_head_of_other_features(model)
    if not pretrained or found.fresh or {'mean', 'std'} & found.overlay.keys():
        # a converted checkpoint brings the code of its pixels along; for others the config is known only now
        cfg = vars(model)['pretrained_cfg']
        set_pixel_range_(model, cfg.get('mean'), cfg.get('std'))
    return model


def _reset_head_of_other_features(model: nn.Module) -> None:
    """Mark the neurons of a head as uncalibrated where they were fitted to other features than it reads now."""
    pool, record = getattr(model, 'global_pool', None), vars(model)['conversion']
    if record is not None and pool is not None and record.global_pool not in (None, pool):
        heads = {f'{name}.neuron' for name in head_names(model)}
        for name, neuron in named_neurons(model):
            if name in heads:
                neuron.calibrated.fill_(False)


def _cfg(source: str | None = None, **kwargs) -> Json:
    """Default config: preprocessing, licence and, with a tag, the published weights of the source."""
    cfg = dict(
        input_size=(3, 224, 224), crop_pct=.9, interpolation='bicubic', fixed_input_size=True,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv='patch_embed.proj', classifier='head',
        num_classes=1000, license='apache-2.0', paper_name='One-Timestep is Enough',
        paper_ids='arXiv:2510.23383',
    )
    if source is not None:
        keep = (
            'input_size', 'crop_pct', 'interpolation', 'mean', 'std', 'num_classes', 'crop_mode', 'fixed_input_size',
            'license', 'hf_hub_id', 'label_names', 'label_descriptions', 'min_input_size')
        published = get_pretrained_cfg(source)
        assert published is not None  # as of every source in the zoo
        cfg.update({k: v for k, v in published.to_dict().items() if k in keep and v is not None})
        cfg.update(first_conv=published.first_conv, classifier=published.classifier)  # an encoder has none
        if '.' not in source:
            cfg.pop('hf_hub_id', None)
    cfg.update(kwargs)
    return cfg


default_cfgs = generate_default_cfgs({
    **{f'{name}.{tag}': _cfg(f'{source}.{tag}') for name, (source, tags) in ZOO.items() for tag in tags.split()},
    **{name: _cfg(source) for name, (source, tags) in ZOO.items() if not tags},
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


def _register_sformer(name: str, source: str, model_args: Json) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create_sformer(name, source, pretrained, **dict(model_args, **kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f' Spiking counterpart of `{source}`\n    '
    globals()[name] = register_model(entrypoint)


for _name, (_source, _) in ZOO.items():
    _register_sformer(_name, _source, {})
for _name, (_source, _model_args) in SMALL.items():
    _register_sformer(_name, _source, _model_args)


@register_model
def sformer_custom(pretrained: bool = False, source: str = 'vit_tiny_patch16_224', **kwargs) -> nn.Module:
    """ Spiking counterpart of any timm model whose layers all have one, named by `source`
    """
    return _create_sformer(CUSTOM, source, pretrained, **kwargs)


def entries() -> Iterator[Json]:
    """What is known of every registered entry: name, source, param_count (millions), input_size, num_classes, license,
    weights, results."""
    params: dict[str, float] = {}
    names = [name for name in timm.list_models('sformer*', include_tags=True) if name.split('.')[0] in SOURCES]
    for name in progress(names, 'Counting parameters', len(names)):
        architecture = name.split('.')[0]
        known = timm.get_pretrained_cfg(name)
        assert known is not None  # it is one of `default_cfgs`
        if architecture not in params:
            with torch.device('meta'):
                model = timm.create_model(architecture)
            params[architecture] = sum(p.numel() for p in model.parameters()) / 1e6
        weights = 'in the package' if known.file else 'converted on first use' if known.hf_hub_id else 'none'
        yield dict(
            name=name, source=source_name(name), param_count=round(params[architecture], 1),
            input_size=list(known.input_size),
            num_classes=known.num_classes, license=known.license or '', weights=weights,
            results=_measured(known.file))


def _measured(weights: str | None) -> str:
    """Recorded result of an entry whose weights are in the package: N, SFormer and source."""
    record = Path(weights).with_suffix('.json') if weights else None
    if record is None or not record.is_file():
        return ''
    data = json.loads(record.read_text(encoding='utf-8'))
    result = data.get('evaluation')
    if not result:
        return ''
    return f'{result["top1"]:.2f} (source {result["source_top1"]:.2f}), N = {data["sfn"]["levels"]}'
