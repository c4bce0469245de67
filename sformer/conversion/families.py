"""Families of vision transformers that transformers and open_clip save: whose parameters are called what, and which
timm model computes the same.

What is here is data: names as `renaming.Pairs`, to timm's or, where timm's own filter reads those of a release, to
these; fields of a config that transformers leaves out of a `config.json`; arguments of timm.
"""
import dataclasses
from collections.abc import Collection

from ..errors import SFormerError
from ..files import Json
from .renaming import Family, FamilyConfig, Pairs

__all__ = ['FAMILIES', 'family_of', 'open_clip']

ACTIVATIONS = {
    'gelu': 'gelu', 'quick_gelu': 'quick_gelu', 'relu': 'relu', 'silu': 'silu', 'swish': 'silu',
    **dict.fromkeys(('gelu_new', 'gelu_fast', 'gelu_pytorch_tanh'), 'gelu_tanh')}
HEAD_OF_ALL = 'classifier.weight'  # what tells networks with logits from others
SECOND_HEAD = 'distillation_classifier.weight'


# names of parameters --------------------------------------------------------------------------------------------------

def _joined(theirs: str, ours: str = 'blocks.*.attn.qkv.*', parts: str = 'query key value') -> Pairs:
    return tuple((theirs.format(part), f'{ours}[{i}]') for i, part in enumerate(parts.split()))


PATCHES: Pairs = (
    ('embeddings.cls_token', 'cls_token'),
    ('embeddings.position_embeddings', 'pos_embed'),
    ('embeddings.patch_embeddings.projection.*', 'patch_embed.proj.*'))
ATTENTION: Pairs = (
    *_joined('encoder.layer.*.attention.attention.{}.*'),
    ('encoder.layer.*.attention.output.dense.*', 'blocks.*.attn.proj.*'))
MLP: Pairs = (
    ('encoder.layer.*.layernorm_before.*', 'blocks.*.norm1.*'),
    ('encoder.layer.*.layernorm_after.*', 'blocks.*.norm2.*'),
    ('encoder.layer.*.intermediate.dense.*', 'blocks.*.mlp.fc1.*'),
    ('encoder.layer.*.output.dense.*', 'blocks.*.mlp.fc2.*'))
HEAD: Pairs = (
    ('layernorm.*', 'norm.*'),
    ('classifier.*', 'head.*'))
VIT = (*PATCHES, *ATTENTION, *MLP, *HEAD)
DEIT: Pairs = (
    ('embeddings.distillation_token', 'dist_token'),
    ('cls_classifier.*', 'head.*'),
    ('distillation_classifier.*', 'head_dist.*'))
BEIT: Pairs = (
    ('encoder.layer.*.attention.attention.query.bias', 'blocks.*.attn.q_bias'),
    ('encoder.layer.*.attention.attention.value.bias', 'blocks.*.attn.v_bias'),
    *_joined('encoder.layer.*.attention.attention.{}.weight', 'blocks.*.attn.qkv.weight'),
    ('encoder.layer.*.attention.attention.relative_position_bias.relative_position_bias_table',
     'blocks.*.attn.relative_position_bias_table'),
    ('encoder.relative_position_bias.relative_position_bias_table', 'rel_pos_bias.relative_position_bias_table'),
    ('encoder.layer.*.attention.output.dense.*', 'blocks.*.attn.proj.*'),
    ('encoder.layer.*.lambda_*', 'blocks.*.gamma_*'),
    ('pooler.layernorm.*', 'fc_norm.*'))
DINOV2: Pairs = (  # to the names of the release, which timm's filter reads
    ('embeddings.mask_token', 'mask_token'),
    ('embeddings.register_tokens', 'register_tokens'),
    *PATCHES,
    *ATTENTION,
    ('encoder.layer.*.norm*.*', 'blocks.*.norm*.*'),
    ('encoder.layer.*.layer_scale*.lambda1', 'blocks.*.ls*.gamma'),
    ('encoder.layer.*.mlp.weights_in.*', 'blocks.*.mlp.w12.*'),
    ('encoder.layer.*.mlp.weights_out.*', 'blocks.*.mlp.w3.*'),
    ('encoder.layer.*.mlp.*.*', 'blocks.*.mlp.*.*'),
    ('layernorm.*', 'norm.*'))
DINOV3: Pairs = (
    ('embeddings.cls_token', 'cls_token'),
    ('embeddings.register_tokens', 'reg_token'),
    ('embeddings.patch_embeddings.*', 'patch_embed.proj.*'),
    ('layer.*.attention.q_proj.bias', 'blocks.*.attn.q_bias'),
    ('layer.*.attention.v_proj.bias', 'blocks.*.attn.v_bias'),
    *_joined('layer.*.attention.{}.weight', 'blocks.*.attn.qkv.weight', 'q_proj k_proj v_proj'),
    ('layer.*.attention.o_proj.*', 'blocks.*.attn.proj.*'),
    ('layer.*.layer_scale*.lambda1', 'blocks.*.gamma_*'),
    ('layer.*.norm*.*', 'blocks.*.norm*.*'),
    ('layer.*.mlp.down_proj.*', 'blocks.*.mlp.fc2.*'),
    ('norm.*', 'norm.*'))
DINOV3_MLP: Pairs = (
    ('layer.*.mlp.up_proj.*', 'blocks.*.mlp.fc1.*'),)
DINOV3_GATED_MLP: Pairs = (
    ('layer.*.mlp.gate_proj.*', 'blocks.*.mlp.fc1_g.*'),
    ('layer.*.mlp.up_proj.*', 'blocks.*.mlp.fc1_x.*'))
CLIP: Pairs = (
    ('embeddings.class_embedding', 'cls_token'),
    ('embeddings.position_embedding.weight', 'pos_embed'),
    ('embeddings.patch_embedding.*', 'patch_embed.proj.*'),
    ('pre_layrnorm.*', 'norm_pre.*'),
    *_joined('encoder.layers.*.self_attn.{}.*', parts='q_proj k_proj v_proj'),
    ('encoder.layers.*.self_attn.out_proj.*', 'blocks.*.attn.proj.*'),
    ('encoder.layers.*.layer_norm*.*', 'blocks.*.norm*.*'),
    ('encoder.layers.*.mlp.*.*', 'blocks.*.mlp.*.*'),
    ('post_layernorm.*', 'norm.*'),
    ('visual_projection.*', 'head.*'),
    ('classifier.*', 'head.*'))
SIGLIP: Pairs = (
    ('head.probe', 'attn_pool.latent'),
    ('head.attention.in_proj_*', ('attn_pool.q.*', 'attn_pool.kv.*')),
    ('head.attention.out_proj.*', 'attn_pool.proj.*'),
    ('head.layernorm.*', 'attn_pool.norm.*'),
    ('head.mlp.*.*', 'attn_pool.mlp.*.*'),
    *CLIP)
PRETRAINING = ('embeddings.mask_token', 'pooler.dense.*', 'decoder.**')  # read by nobody who classifies
TEXT_TOWER = ('text_model.**', 'text_projection.**', 'logit_scale', 'logit_bias', 'embeddings.position_ids')


# the timm model that computes the same --------------------------------------------------------------------------------

def _ratio(hidden: int, width: int) -> float:
    """A ratio of which timm makes exactly `hidden` channels of `width`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _of_width(names: str, width: int) -> str:
    """Of the timm models of a family, `WIDTH=NAME ...`, the one of a width, or else the first: arguments say the rest.
    """
    known = {int(size): name for size, _, name in (entry.partition('=') for entry in names.split())}
    return known.get(width) or next(iter(known.values()))


def _shape(config: FamilyConfig) -> Json:
    """Arguments of timm that every family has."""
    return dict(
        img_size=config['image_size'], patch_size=config['patch_size'], in_chans=config['num_channels'],
        embed_dim=config['hidden_size'], depth=config['num_hidden_layers'], num_heads=config['num_attention_heads'],
        norm_eps=float(config['layer_norm_eps']))


def _activation(config: FamilyConfig, only: Collection[str] = ACTIVATIONS) -> str:
    name = config['hidden_act']
    if name not in only:
        raise SFormerError(f'hidden_act {name!r} is not one of {", ".join(only)}, which timm\'s model has.')
    return ACTIVATIONS[name]


def _usual(config: FamilyConfig) -> Json:
    return dict(
        _shape(config), mlp_ratio=_ratio(config['intermediate_size'], config['hidden_size']),
        act_layer=_activation(config))


def _vit(config: FamilyConfig, names: Collection[str]) -> tuple[str, Json]:
    architecture = _of_width('192=vit_tiny_patch16_224 384=vit_small_patch16_224 768=vit_base_patch16_224 '
                          '1024=vit_large_patch16_224 1280=vit_huge_patch14_224', config['hidden_size'])
    return architecture, dict(_usual(config), qkv_bias=config['qkv_bias'], global_pool='token')


def _deit(config: FamilyConfig, names: Collection[str]) -> tuple[str, Json]:
    arguments = dict(_usual(config), qkv_bias=config['qkv_bias'], global_pool='token')
    if SECOND_HEAD in names:
        return _of_width('192=deit_tiny_distilled_patch16_224 384=deit_small_distilled_patch16_224 '
                      '768=deit_base_distilled_patch16_224', config['hidden_size']), arguments
    # a second token that no classifier reads
    return _of_width('192=deit_tiny_patch16_224 384=deit_small_patch16_224 768=deit_base_patch16_224',
                  config['hidden_size']), dict(arguments, reg_tokens=1)


def _beit(config: FamilyConfig, names: Collection[str]) -> tuple[str, Json]:
    arguments = _usual(config)
    del arguments['act_layer']
    _activation(config, ('gelu',))
    return _of_width('768=beit_base_patch16_224 1024=beit_large_patch16_224', config['hidden_size']), dict(
        arguments, global_pool='avg' if config['use_mean_pooling'] else 'token',
        use_abs_pos_emb=config['use_absolute_position_embeddings'], init_values=config['layer_scale_init_value'],
        use_rel_pos_bias=config['use_relative_position_bias'],
        use_shared_rel_pos_bias=config['use_shared_relative_position_bias'])


def _dinov2(config: FamilyConfig, names: Collection[str]) -> tuple[str, Json]:
    if HEAD_OF_ALL in names:
        raise SFormerError(
            'its classifier reads the class token beside the mean of all patches, which no model of timm does: '
            '--model-kwargs num_classes=0 (num_classes=0) takes the backbone alone.')
    width, registers = config['hidden_size'], config.get('num_register_tokens', 0)
    arguments = dict(
        _shape(config), qkv_bias=config['qkv_bias'], init_values=config['layerscale_value'], global_pool='token',
        reg_tokens=registers, no_embed_class=bool(registers))
    reg = '_reg4' if registers else ''
    if config['use_swiglu_ffn']:
        hidden = (int(int(width * config['mlp_ratio']) * 2 / 3) + 7) // 8 * 8
        return f'vit_giant_patch14{reg}_dinov2', dict(arguments, mlp_ratio=_ratio(2 * hidden, width))
    return _of_width(f'384=vit_small_patch14{reg}_dinov2 768=vit_base_patch14{reg}_dinov2 '
                  f'1024=vit_large_patch14{reg}_dinov2', width), dict(
        arguments, mlp_ratio=_ratio(int(width * config['mlp_ratio']), width), act_layer=_activation(config))


def _dinov3(config: FamilyConfig, names: Collection[str]) -> tuple[str, Json]:
    arguments = _usual(config)
    del arguments['act_layer']
    gated = config['use_gated_mlp']
    _activation(config, ('silu', 'swish') if gated else ('gelu',))
    for field, value in (('key_bias', False), ('proj_bias', True), ('mlp_bias', True),
                         ('value_bias', config['query_bias'])):
        if config[field] != value:
            raise SFormerError(f'timm has no DINOv3 with {field} = {config[field]}.')
    architecture = _of_width('384=vit_small_patch16_dinov3_qkvb 768=vit_base_patch16_dinov3_qkvb '
                          '1024=vit_large_patch16_dinov3_qkvb', config['hidden_size'])
    if gated:
        architecture = _of_width('384=vit_small_plus_patch16_dinov3_qkvb 1280=vit_huge_plus_patch16_dinov3_qkvb '
                              '4096=vit_7b_patch16_dinov3', config['hidden_size'])
    return architecture, dict(
        arguments, qkv_bias=config['query_bias'], init_values=config['layerscale_value'], global_pool='token',
        num_reg_tokens=config['num_register_tokens'], rope_temperature=config['rope_theta'], swiglu_mlp=gated,
        swiglu_align_to=1 if gated else 0)


def _clip(config: FamilyConfig, names: Collection[str]) -> tuple[str, Json]:
    arguments = dict(_usual(config), global_pool='token')
    if HEAD_OF_ALL in names:  # of patches as the last block leaves them
        arguments.update(global_pool='avg', final_norm=False)
    return _of_width('768=vit_base_patch16_clip_224 1024=vit_large_patch14_clip_224 1280=vit_huge_patch14_clip_224 '
                  '1408=vit_giant_patch14_clip_224 1664=vit_gigantic_patch14_clip_224',
                  config['hidden_size']), arguments


def _siglip(config: FamilyConfig, names: Collection[str]) -> tuple[str, Json]:
    arguments = dict(_usual(config), global_pool='map')
    if HEAD_OF_ALL in names or not config['vision_use_head']:
        arguments.update(global_pool='avg', fc_norm=False)
    return _of_width('768=vit_base_patch16_siglip_224 1024=vit_large_patch16_siglip_256 '
                  '1152=vit_so400m_patch14_siglip_224', config['hidden_size']), arguments


def open_clip(config: Json) -> tuple[str, Json]:
    """The timm model of the image tower that an `open_clip_config.json` is of, and its arguments."""
    model = config.get('model_cfg', config)
    tower = model['vision_cfg']
    if tower.get('timm_model_name'):
        if tower.get('timm_proj') not in (None, '', 'none', 'linear'):
            raise SFormerError(f'timm has no image tower with a projection {tower["timm_proj"]!r}.')
        arguments: Json = dict(img_size=tower['image_size']) if tower.get('image_size') else {}
        if tower.get('timm_pool') in ('avg', 'token', 'map'):
            arguments['global_pool'] = tower['timm_pool']
        return tower['timm_model_name'], arguments
    known = {'image_size', 'layers', 'width', 'patch_size', 'head_width', 'mlp_ratio', 'patch_dropout'}
    unknown = sorted(key for key, value in tower.items() if key not in known and value)
    if unknown or not isinstance(tower.get('layers'), int):
        raise SFormerError(f'timm has no image tower of open_clip with {", ".join(unknown) or "these layers"}.')
    width = tower['width']
    act = 'quick_gelu' if model.get('quick_gelu') else 'gelu'
    return _clip({**CLIP_DEFAULTS, **dict(
        image_size=tower['image_size'], patch_size=tower['patch_size'], hidden_size=width, hidden_act=act,
        num_hidden_layers=tower['layers'], num_attention_heads=width // tower.get('head_width', 64),
        intermediate_size=int(width * tower.get('mlp_ratio', 4.0)))}, ())


DEFAULTS: Json = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act='gelu',
    layer_norm_eps=1e-12, image_size=224, patch_size=16, num_channels=3, qkv_bias=True)
BEIT_DEFAULTS: Json = dict(
    DEFAULTS, use_mean_pooling=True, use_absolute_position_embeddings=False, use_relative_position_bias=False,
    use_shared_relative_position_bias=False, layer_scale_init_value=0.1)
DINOV2_DEFAULTS: Json = dict(
    DEFAULTS, layer_norm_eps=1e-6, patch_size=14, mlp_ratio=4, layerscale_value=1.0, use_swiglu_ffn=False)
DINOV3_DEFAULTS: Json = dict(
    DEFAULTS, hidden_size=384, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-5,
    layerscale_value=1.0, query_bias=True, key_bias=False, value_bias=True, proj_bias=True, mlp_bias=True,
    use_gated_mlp=False, num_register_tokens=0, rope_theta=100.0)
CLIP_DEFAULTS: Json = dict(DEFAULTS, hidden_act='quick_gelu', layer_norm_eps=1e-5, patch_size=32)
SIGLIP_DEFAULTS: Json = dict(DEFAULTS, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6, vision_use_head=True)

_CLIP = Family('CLIP', CLIP, _clip, TEXT_TOWER, ('vision_model.',), CLIP_DEFAULTS, 'vision_config',
               {'visual_projection.weight': 'head.bias'})
_SIGLIP = Family('SigLIP', SIGLIP, _siglip, TEXT_TOWER, ('vision_model.',), SIGLIP_DEFAULTS, 'vision_config')

# model_type of a config -> its family
FAMILIES: dict[str, Family] = {
    'vit': Family('ViT', VIT, _vit, PRETRAINING, ('vit.',), DEFAULTS),
    'deit': Family('DeiT', (('embeddings.distillation_token', 'reg_token'), *VIT), _deit, PRETRAINING, ('deit.',),
                   DEFAULTS),
    'deit of a teacher': Family('DeiT', (*DEIT, *VIT), _deit, PRETRAINING, ('deit.',), DEFAULTS),
    'beit': Family('BEiT', (*BEIT, *PATCHES, *MLP, *HEAD), _beit,
                   (*PRETRAINING, '**.relative_position_index'), ('beit.',), BEIT_DEFAULTS, follows_size=False),
    'dinov2': Family('DINOv2', DINOV2, _dinov2, (), ('dinov2.',), DINOV2_DEFAULTS),
    'dinov2_with_registers': Family(
        'DINOv2 with registers', DINOV2, _dinov2, (), ('dinov2_with_registers.',),
        dict(DINOV2_DEFAULTS, patch_size=16, num_register_tokens=4), antialias=True),
    'dinov3_vit': Family('DINOv3', (*DINOV3, *DINOV3_MLP), _dinov3, PRETRAINING, ('model.',), DINOV3_DEFAULTS),
    'dinov3_vit gated': Family(
        'DINOv3', (*DINOV3, *DINOV3_GATED_MLP), _dinov3, PRETRAINING, ('model.',), DINOV3_DEFAULTS),
    'clip': _CLIP,
    'clip_vision_model': _CLIP,
    'clip with a classifier': dataclasses.replace(_CLIP, unused=(*TEXT_TOWER, 'post_layernorm.*')),
    'siglip': _SIGLIP,
    'siglip_vision_model': _SIGLIP,
    'siglip with a classifier': dataclasses.replace(_SIGLIP, unused=(*TEXT_TOWER, 'head.**')),
}
# where the names in a file tell one of two: a name -> what its family is
VARIANTS = {
    ('deit', SECOND_HEAD): 'deit of a teacher',
    ('dinov3_vit', 'layer.0.mlp.gate_proj.weight'): 'dinov3_vit gated',
    ('clip', HEAD_OF_ALL): 'clip with a classifier',
    ('siglip', HEAD_OF_ALL): 'siglip with a classifier',
}


def family_of(config: Json, names: Collection[str], where: str) -> Family:
    """The family that a config of transformers and the names in a file are of.

    Raises:
        SFormerError: If it is of none that is known here.
    """
    kind = str(config.get('model_type'))
    if kind not in FAMILIES:
        titles = ', '.join(dict.fromkeys(family.title for family in FAMILIES.values()))
        raise SFormerError(f'{where} is of a {kind!r} of transformers, of which no names are known here. Known are: '
                           f'{titles}.')
    family = FAMILIES[kind]
    own = {family.own_name(name) for name in names}
    return next((FAMILIES[other] for (of, name), other in VARIANTS.items() if of == kind and name in own), family)
