"""The zoo as a table: entrypoints, the timm models whose architecture they have, and pinned tags of their weights."""
__all__ = ['ZOO', 'SMALL', 'CUSTOM', 'SOURCES', 'ENTRYPOINTS', 'architecture_of', 'source_name']

# entrypoint -> (timm model whose architecture it has, tags of its published weights, if any, the first is the default).
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
    # encoders of vision-language models, as classifiers, as they are (enc), and with their projector (merge, align)
    'sformer_qwen3_88m': ('qwen3_vit_88m', 'qwen3_5_0_8b'),
    'sformer_qwen3_88m_enc': ('qwen3_vit_88m_enc', 'qwen3_5_0_8b'),
    'sformer_qwen3_88m_merge': ('qwen3_vit_88m_merge', 'qwen3_5_0_8b'),
    'sformer_qwen3_306m': ('qwen3_vit_306m', 'qwen3_5_2b qwen3_5_4b qwen3_vl_4b qwen_drive_1_0_4b'),
    'sformer_qwen3_306m_enc': ('qwen3_vit_306m_enc', 'qwen3_5_2b qwen3_5_4b qwen3_vl_4b qwen_drive_1_0_4b'),
    'sformer_qwen3_306m_merge': ('qwen3_vit_306m_merge', 'qwen3_5_2b qwen3_5_4b qwen3_vl_4b qwen_drive_1_0_4b'),
    'sformer_qwen3_416m': (
        'qwen3_vit_416m',
        'qwen3_8_27b qwen3_5_9b qwen3_5_27b qwen3_8_flash_next qwen3_vl_8b qwen3_vl_30b_a3b qwen3_vl_32b '
        'qwen3_vl_235b_a22b'),
    'sformer_qwen3_416m_enc': (
        'qwen3_vit_416m_enc',
        'qwen3_8_27b qwen3_5_9b qwen3_5_27b qwen3_8_flash_next qwen3_vl_8b qwen3_vl_30b_a3b qwen3_vl_32b '
        'qwen3_vl_235b_a22b'),
    'sformer_qwen3_416m_merge': (
        'qwen3_vit_416m_merge',
        'qwen3_8_27b qwen3_5_9b qwen3_5_27b qwen3_8_flash_next qwen3_vl_8b qwen3_vl_30b_a3b qwen3_vl_32b '
        'qwen3_vl_235b_a22b'),
    'sformer_gemma4_167m': ('gemma4_vit_167m', 'gemma4_e4b_it'),
    'sformer_gemma4_167m_enc': ('gemma4_vit_167m_enc', 'gemma4_e4b_it'),
    'sformer_gemma4_570m': ('gemma4_vit_570m', 'gemma4_31b_it'),
    'sformer_gemma4_570m_enc': ('gemma4_vit_570m_enc', 'gemma4_31b_it'),
    'sformer_deepseek_412m': ('deepseek_vit_412m', 'deepseek_v4_1_flash deepseek_v4_flash_vision_exp'),
    'sformer_deepseek_412m_align': ('deepseek_vit_412m_align', 'deepseek_v4_1_flash deepseek_v4_flash_vision_exp'),
    'sformer_deepseek_412m_enc': ('deepseek_vit_412m_enc', 'deepseek_v4_1_flash deepseek_v4_flash_vision_exp'),
    # images of any size, as flat patches
    'sformer_naflex_base_gap': ('naflexvit_base_patch16_gap', 'e300_s576_in1k'),
    'sformer_naflex_base_map': ('naflexvit_base_patch16_map', ''),
    'sformer_naflex_base_par_gap': ('naflexvit_base_patch16_par_gap', 'e300_s576_in1k'),
    'sformer_naflex_base_parfac_gap': ('naflexvit_base_patch16_parfac_gap', 'e300_s576_in1k'),
    'sformer_naflex_base_radio_v3': ('naflexvit_base_patch16_radio_v3', 'c_radio'),
    'sformer_naflex_base_siglip': ('naflexvit_base_patch16_siglip', 'v2_webli'),
    'sformer_naflex_so150m2_reg1_gap': ('naflexvit_so150m2_patch16_reg1_gap', ''),
    'sformer_naflex_so150m2_reg1_map': ('naflexvit_so150m2_patch16_reg1_map', ''),
    'sformer_naflex_so400m_radio_v4': ('naflexvit_so400m_patch16_radio_v4', 'c_radio'),
    'sformer_naflex_so400m_siglip': ('naflexvit_so400m_patch16_siglip', 'v2_webli'),
    'sformer_naflex_large_radio_v3': ('naflexvit_large_patch16_radio_v3', 'c_radio'),
    'sformer_naflex_huge_radio_v3': ('naflexvit_huge_patch16_radio_v3', 'c_radio'),
    'sformer_naflex_huge_radio_v4': ('naflexvit_huge_patch16_radio_v4', 'c_radio'),
    'sformer_naflex_giant_radio_v3': ('naflexvit_giant_patch16_radio_v3', 'c_radio'),
    # windows, and relative positions
    'sformer_sam_base': ('samvit_base_patch16', 'sa1b'),
    'sformer_sam_base_224': ('samvit_base_patch16_224', ''),
    'sformer_sam_large': ('samvit_large_patch16', 'sa1b'),
    'sformer_sam_huge': ('samvit_huge_patch16', 'sa1b'),
    'sformer_relpos_small': ('vit_relpos_small_patch16_224', 'sw_in1k'),
    'sformer_relpos_small_rpn': ('vit_relpos_small_patch16_rpn_224', ''),
    'sformer_srelpos_small': ('vit_srelpos_small_patch16_224', 'sw_in1k'),
    'sformer_relpos_medium': ('vit_relpos_medium_patch16_224', 'sw_in1k'),
    'sformer_relpos_medium_cls': ('vit_relpos_medium_patch16_cls_224', 'sw_in1k'),
    'sformer_relpos_medium_rpn': ('vit_relpos_medium_patch16_rpn_224', 'sw_in1k'),
    'sformer_srelpos_medium': ('vit_srelpos_medium_patch16_224', 'sw_in1k'),
    'sformer_relpos_base': ('vit_relpos_base_patch16_224', 'sw_in1k'),
    'sformer_relpos_base_cls': ('vit_relpos_base_patch16_cls_224', ''),
    'sformer_relpos_base_clsgap': ('vit_relpos_base_patch16_clsgap_224', 'sw_in1k'),
    'sformer_relpos_base_plus_240': ('vit_relpos_base_patch16_plus_240', ''),
    'sformer_relpos_base_rpn': ('vit_relpos_base_patch16_rpn_224', ''),
    'sformer_relpos_base_patch32_plus_rpn_256': ('vit_relpos_base_patch32_plus_rpn_256', 'sw_in1k'),
    'sformer_test_vit_relpos': ('test_vit_relpos', ''),
    # on a stem of convolutions
    'sformer_vitamin_small': ('vitamin_small_224', 'datacomp1b_clip_ltt datacomp1b_clip'),
    'sformer_vitamin_base': ('vitamin_base_224', 'datacomp1b_clip_ltt datacomp1b_clip'),
    'sformer_vitamin_large2': ('vitamin_large2_224', 'datacomp1b_clip'),
    'sformer_vitamin_large2_256': ('vitamin_large2_256', 'datacomp1b_clip'),
    'sformer_vitamin_large2_336': ('vitamin_large2_336', 'datacomp1b_clip'),
    'sformer_vitamin_large2_384': ('vitamin_large2_384', 'datacomp1b_clip'),
    'sformer_vitamin_large': ('vitamin_large_224', 'datacomp1b_clip'),
    'sformer_vitamin_large_256': ('vitamin_large_256', 'datacomp1b_clip'),
    'sformer_vitamin_large_336': ('vitamin_large_336', 'datacomp1b_clip'),
    'sformer_vitamin_large_384': ('vitamin_large_384', 'datacomp1b_clip'),
    'sformer_vitamin_xlarge_256': ('vitamin_xlarge_256', 'datacomp1b_clip'),
    'sformer_vitamin_xlarge_336': ('vitamin_xlarge_336', 'datacomp1b_clip'),
    'sformer_vitamin_xlarge_384': ('vitamin_xlarge_384', 'datacomp1b_clip'),
    'sformer_tiny_r_s16_p8': ('vit_tiny_r_s16_p8_224', 'augreg_in21k_ft_in1k augreg_in21k'),
    'sformer_tiny_r_s16_p8_384': ('vit_tiny_r_s16_p8_384', 'augreg_in21k_ft_in1k'),
    'sformer_small_r26_s32': ('vit_small_r26_s32_224', 'augreg_in21k_ft_in1k augreg_in21k'),
    'sformer_small_r26_s32_384': ('vit_small_r26_s32_384', 'augreg_in21k_ft_in1k'),
    'sformer_small_resnet26d': ('vit_small_resnet26d_224', ''),
    'sformer_small_resnet50d_s16': ('vit_small_resnet50d_s16_224', ''),
    'sformer_base_mci': ('vit_base_mci_224', 'apple_mclip_lt apple_mclip apple_mclip2_dfndr2b'),
    'sformer_base_r26_s32': ('vit_base_r26_s32_224', ''),
    'sformer_base_r50_s16': ('vit_base_r50_s16_224', 'orig_in21k'),
    'sformer_base_r50_s16_384': ('vit_base_r50_s16_384', 'orig_in21k_ft_in1k'),
    'sformer_base_resnet26d': ('vit_base_resnet26d_224', ''),
    'sformer_base_resnet50d': ('vit_base_resnet50d_224', ''),
    'sformer_large_r50_s32': ('vit_large_r50_s32_224', 'augreg_in21k_ft_in1k augreg_in21k'),
    'sformer_large_r50_s32_384': ('vit_large_r50_s32_384', 'augreg_in21k_ft_in1k'),
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
    'sformer_test_qwen3': ('qwen3_vit_88m', dict(embed_dim=64, depth=4, num_heads=2)),
    'sformer_test_gemma4': (
        'gemma4_vit_167m', dict(embed_dim=64, depth=4, num_heads=2, head_dim=32, intermediate_size=128)),
    'sformer_test_deepseek': (
        'deepseek_vit_412m', dict(embed_dim=64, depth=4, num_heads=2, dynamic_img_pad=True)),
    'sformer_test_naflex': ('naflexvit_base_patch16_gap', dict(embed_dim=64, depth=4, num_heads=2)),
    'sformer_test_sam': ('samvit_base_patch16', dict(embed_dim=64, depth=4, num_heads=2, window_size=4)),
    'sformer_test_vitamin': ('vitamin_small_224', dict(depth=4)),
    'sformer_test_hybrid': ('vit_tiny_r_s16_p8_224', dict(embed_dim=64, depth=4, num_heads=2)),
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
        return '.'.join([source, tag or tags.split()[0]] if tag or tags else [source])
    return SOURCES[architecture]
