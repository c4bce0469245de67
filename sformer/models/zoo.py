"""The zoo as a table: entrypoints, the timm models whose architecture they have, and pinned tags of their weights."""
__all__ = ['ZOO', 'SMALL', 'CUSTOM', 'SOURCES', 'ENTRYPOINTS', 'architecture_of', 'source_name']

# entrypoint -> (timm model whose architecture it has, tags of its published weights, the first is the default).
# Tags are pinned here: timm's own defaults change, and with them what a result means.
ZOO: dict[str, tuple[str, str]] = {
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
SMALL: dict[str, tuple[str, dict[str, int]]] = {
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

ENTRYPOINTS = {*SOURCES, CUSTOM}


def architecture_of(source: str) -> str:
    """Name of the `sformer_*` entrypoint that has the architecture of a timm model, `sformer_custom` if none has."""
    return next((name for name, (s, _) in ZOO.items() if s == source), CUSTOM)


def source_name(name: str) -> str:
    """timm name, with tag, of the network that an entry of the zoo is converted from.

    Args:
        name: `sformer_*` name with or without tag.

    Raises:
        KeyError: If there is no such entry.
    """
    architecture, _, tag = name.partition('.')
    if architecture in ZOO:
        source, tags = ZOO[architecture]
        return f'{source}.{tag or tags.split()[0]}'
    return SOURCES[architecture]
