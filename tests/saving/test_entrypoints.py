"""Registration with timm: which models there are, what they are built like, and what is known of each."""
import pytest
import timm

from sformer.layers import named_neurons
from sformer.models.zoo import SMALL, SOURCES, ZOO, architecture_of, source_name
from sformer.saving.entrypoints import entries

AUTHORS = ('jienengchen/ViTamin-', 'apple/mobileclip_b')  # whose repositories timm itself loads


def test_pinned_tags_are_published_and_of_no_namespace_but_those_of_timm():
    for name, (source, tags) in ZOO.items():
        for tag in tags.split():
            cfg, published = timm.get_pretrained_cfg(f'{name}.{tag}'), timm.get_pretrained_cfg(f'{source}.{tag}')
            assert cfg.hf_hub_id == published.hf_hub_id
            assert cfg.hf_hub_id == f'timm/{source}.{tag}' or cfg.hf_hub_id.startswith(AUTHORS)
            for key in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'num_classes', 'classifier',
                        'license'):
                assert getattr(cfg, key) == getattr(published, key), f'{name}.{tag}: {key}'
        if tags:
            assert timm.get_pretrained_cfg(name).tag == tags.split()[0]
            assert source_name(name) == f'{source}.{tags.split()[0]}'


def test_zoo_is_listed_as_pretrained():
    listed = timm.list_models('sformer*', pretrained=True)
    assert {f'{name}.{tag}' for name, (_, tags) in ZOO.items() for tag in tags.split()} <= set(listed)
    assert not any('_test_' in name for name in listed)
    assert {'sformer_base.augreg_in21k_ft_in1k', 'sformer_eva02_large_448.mim_m38m_ft_in22k_in1k',
            'sformer_eva_giant_336.m30m_ft_in22k_in1k', 'sformer_nano.digits'} <= set(listed)


@pytest.mark.parametrize('depth', [dict(depth=1), pytest.param({}, marks=pytest.mark.slow)], ids=['one block', 'all'])
@pytest.mark.parametrize('name', sorted({*ZOO, *SMALL}))
def test_entrypoint_is_its_source(name, depth):
    model = timm.create_model(name, device='meta', **depth)
    kwargs = {**(SMALL[name][1] if name in SMALL else {}), **depth}
    cfg = timm.get_pretrained_cfg(name)
    source = timm.create_model(
        SOURCES[name], device='meta', **{'img_size': cfg.input_size[-1], 'in_chans': cfg.input_size[0],
                                         'num_classes': cfg.num_classes, **kwargs})
    neurons = {f'{n}.{key}' for n, neuron in named_neurons(model) for key, _ in neuron.named_buffers()}
    assert model.state_dict().keys() - source.state_dict().keys() == neurons
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in source.named_parameters()}
    assert name in SMALL or architecture_of(SOURCES[name]) == name


def test_entries_say_what_is_known(monkeypatch):
    monkeypatch.setattr(timm, 'list_models', lambda *args, **kwargs: [
        'sformer_nano.digits', 'sformer_tiny.augreg_in21k_ft_in1k', 'sformer_test_vit', 'sformer_custom'])
    found = {entry['name']: entry for entry in entries()}
    assert found.keys() == {'sformer_nano.digits', 'sformer_tiny.augreg_in21k_ft_in1k', 'sformer_test_vit'}
    tiny, nano = found['sformer_tiny.augreg_in21k_ft_in1k'], found['sformer_nano.digits']
    assert tiny['source'] == 'vit_tiny_patch16_224.augreg_in21k_ft_in1k' and tiny['param_count'] == 5.7
    assert tiny['weights'] == 'converted on first use' and tiny['results'] == ''
    assert (tiny['input_size'], tiny['num_classes'], nano['input_size'], nano['num_classes']) == (
        [3, 224, 224], 1000, [1, 8, 8], 10)
    assert nano['weights'] == 'in the package' and nano['results'].endswith('N = 63')


@pytest.mark.parametrize('source', ['pvt_v2_b0', 'sam2_hiera_tiny', 'resnet18'])
def test_the_entrypoint_of_other_sources_takes_what_they_take(source):
    """Of sizes that are not fixed, a source has no `img_size`; its own classifier and preprocessing are known."""
    model = timm.create_model('sformer_custom', source=source, device='meta')
    known = timm.get_pretrained_cfg(source)
    assert model.pretrained_cfg['input_size'] == known.input_size and model.pretrained_cfg['mean'] == known.mean
    assert model.get_classifier() is model.get_submodule(model.pretrained_cfg['classifier'])
    assert 'hf_hub_id' not in model.pretrained_cfg or model.pretrained_cfg['hf_hub_id'] is None
