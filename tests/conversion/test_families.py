"""Networks that transformers saves: the timm model that is made of a folder computes the same."""

import json

import pytest
import torch

from sformer import SFNConfig, SFormerError, convert, load_model, save_model, source_of
from sformer.conversion.families import FAMILIES
from sformer.conversion.sources import create_source

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.filterwarnings('ignore')

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
             patch_size=8)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10)


def whole(kind, **more):
    """A model of images and text."""
    return getattr(transformers, f'{kind}Config')(vision_config=SIZES, text_config=TEXT, **more)


# name of a class of transformers, its config, and what of its output is what a timm model gives
KINDS = {
    'vit': ('ViTForImageClassification', dict(num_labels=3), 'logits'),
    'vit of other epsilon': ('ViTForImageClassification', dict(layer_norm_eps=1e-2, qkv_bias=False), 'logits'),
    'vit of tanh': ('ViTForImageClassification', dict(hidden_act='gelu_new'), 'logits'),
    'vit, backbone': ('ViTModel', {}, 'token'),
    'vit, pretraining': ('ViTForMaskedImageModeling', dict(encoder_stride=8), None),
    'deit': ('DeiTForImageClassification', dict(num_labels=3), 'logits'),
    'deit of a teacher': ('DeiTForImageClassificationWithTeacher', dict(num_labels=3), 'logits'),
    'deit, backbone': ('DeiTModel', {}, 'token'),
    'beit': ('BeitForImageClassification', dict(use_relative_position_bias=True, use_mask_token=True), 'logits'),
    'beit, shared bias': ('BeitForImageClassification', dict(use_shared_relative_position_bias=True), 'logits'),
    'beit, class token': ('BeitForImageClassification', dict(
        use_mean_pooling=False, use_absolute_position_embeddings=True, layer_scale_init_value=0.), 'logits'),
    'beit, backbone': ('BeitModel', dict(use_relative_position_bias=True), 'pooler_output'),
    'dinov2': ('Dinov2Model', {}, 'token'),
    'dinov2, swiglu': ('Dinov2Model', dict(use_swiglu_ffn=True), 'token'),
    'dinov2, registers': ('Dinov2WithRegistersModel', dict(num_register_tokens=3), 'token'),
    'dinov2, registers and swiglu': ('Dinov2WithRegistersModel', dict(use_swiglu_ffn=True), 'token'),
    'dinov3': ('DINOv3ViTModel', dict(num_register_tokens=4), 'token'),
    'dinov3, gated': ('DINOv3ViTModel', dict(use_gated_mlp=True, hidden_act='silu', intermediate_size=72), 'token'),
    'dinov3, no bias': ('DINOv3ViTModel', dict(query_bias=False, value_bias=False, num_register_tokens=1), 'token'),
    'clip': ('CLIPVisionModel', {}, 'pooler_output'),
    'clip of gelu': ('CLIPVisionModel', dict(hidden_act='gelu'), 'pooler_output'),
    'clip, projected': ('CLIPVisionModelWithProjection', dict(projection_dim=16), 'image_embeds'),
    'clip, whole': ('CLIPModel', dict(projection_dim=24), 'image_features'),
    'clip, classifier': ('CLIPForImageClassification', dict(num_labels=3), 'logits'),
    'siglip': ('SiglipVisionModel', {}, 'pooler_output'),
    'siglip, whole': ('SiglipModel', {}, 'image_features'),
    'siglip, classifier': ('SiglipForImageClassification', dict(num_labels=3), 'logits'),
    'siglip, no pooling': ('SiglipVisionModel', dict(vision_use_head=False), 'mean'),
}


def made(name):
    """A model of transformers with random weights of about the size of trained ones."""
    kind, config, _ = KINDS[name]
    cls = getattr(transformers, kind)
    if cls.config_class in (transformers.CLIPConfig, transformers.SiglipConfig):
        config = whole(kind[:4] if kind.startswith('CLIP') else 'Siglip', **config)
    else:
        config = cls.config_class(**{**SIZES, **config})
    torch.manual_seed(0)
    config._attn_implementation = 'eager'
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def output_of(model, name, images):
    what = KINDS[name][2]
    with torch.no_grad():
        if what == 'image_features':
            found = model.get_image_features(pixel_values=images)
            return getattr(found, 'pooler_output', found)
        if what is None:
            return model.vit(pixel_values=images).last_hidden_state[:, 0]
        found = model(pixel_values=images)
        if what == 'mean':
            return found.last_hidden_state.mean(1)
        return found.last_hidden_state[:, 0] if what == 'token' else found[what]


@pytest.mark.parametrize('name', KINDS)
def test_the_timm_model_computes_the_same(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = output_of(model, name, images)
    network = create_source(str(tmp_path)).network
    with torch.no_grad():
        found = network(images)
    assert found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() <= 1e-4
    assert expected.std(0).mean() > 1e-3 * expected.abs().mean()  # it sees images


@pytest.mark.parametrize('name', ['dinov2', 'dinov2, registers', 'dinov3', 'vit', 'deit', 'siglip'])
def test_images_of_the_size_that_the_processor_makes(name, tmp_path):
    """Not that of the config: position embeddings are resized as transformers does it."""
    model = made(name)
    model.save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(
        size=dict(shortest_edge=56), crop_size=dict(height=48, width=48), do_center_crop=True)))
    source = create_source(str(tmp_path))
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        resized = {} if name.startswith('dino') else dict(interpolate_pos_encoding=True)
        found = model(pixel_values=images, **resized)
        expected = found.last_hidden_state[:, 0] if name.startswith('dino') else found[KINDS[name][2]]
        ours = source.network(images)
    assert (ours - expected).norm() / expected.norm() <= 1e-4
    assert source.origins['img_size'] == 'size of preprocessor_config.json'
    assert source.network.pretrained_cfg['crop_pct'] == pytest.approx(48 / 56)


@pytest.mark.parametrize('name', ['beit, shared bias', 'dinov2, registers and swiglu', 'dinov3, gated', 'clip, whole',
                                  'siglip', 'deit', 'deit of a teacher'])
def test_families_convert_and_come_back(name, tmp_path):
    """Epsilons, activations and pooling are in the config that is saved."""
    model = made(name)
    model.save_pretrained(tmp_path / 'source')
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = output_of(model, name, images)
    spiking = convert(str(tmp_path / 'source'), [images], SFNConfig(levels=127))
    loaded = load_model(save_model(spiking, tmp_path / 'out'))
    with torch.no_grad():
        assert torch.equal(loaded(images), spiking(images))
        assert (source_of(loaded)(images) - expected).norm() / expected.norm() <= 1e-4
        assert (loaded(images) - expected).norm() / expected.norm() <= 0.2
    eps = next(p.eps for p in source_of(loaded).modules() if isinstance(p, torch.nn.LayerNorm))
    config = model.config
    assert eps == getattr(config, 'vision_config', config).layer_norm_eps


@pytest.mark.parametrize('model, config, message', [
    ('Dinov2ForImageClassification', {}, 'the class token beside the mean of all patches.*num_classes=0'),
    ('ViTModel', dict(hidden_act='tanh'), r"hidden_act 'tanh' is not one of gelu, quick_gelu"),
    ('BeitModel', dict(hidden_act='relu'), r"hidden_act 'relu' is not one of gelu, which"),
    ('DINOv3ViTModel', dict(key_bias=True), 'timm has no DINOv3 with key_bias = True'),
    ('ViTForMaskedImageModeling', dict(), None),
])
def test_networks_that_timm_has_not(model, config, message, tmp_path):
    cls = getattr(transformers, model)
    cls(cls.config_class(**{**SIZES, 'encoder_stride': 8, **config})).save_pretrained(tmp_path)
    if message is None:
        assert create_source(str(tmp_path)).network.num_classes == 0
        return
    with pytest.raises(SFormerError, match=rf'{tmp_path.name}: .*{message}') as e:
        create_source(str(tmp_path))
    assert '\n' not in str(e.value)


def test_the_backbone_alone(tmp_path):
    """Which is all that timm has of a classifier on DINOv2."""
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES, num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    source = create_source(str(tmp_path), num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.dinov2(images).last_hidden_state[:, 0]
        assert torch.allclose(source.network(images), expected, rtol=1e-4, atol=1e-4)
    assert source.network.num_classes == 0 and source.origins['num_classes'] == 'given'


def test_defaults_are_those_of_transformers():
    """A config.json may leave fields out that are as by default."""
    for kind, family in FAMILIES.items():
        if kind not in transformers.CONFIG_MAPPING:
            continue
        config = transformers.CONFIG_MAPPING[kind]()
        config = getattr(config, 'vision_config', config)
        for field, value in family.defaults.items():
            if hasattr(config, field):
                assert getattr(config, field) == value, (kind, field)
