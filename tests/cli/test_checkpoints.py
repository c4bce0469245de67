"""Checkpoints that people have, from the command line: converted, evaluated and exported as they are."""
import json
import sys

import numpy as np
import pytest
import torch
from cli_process import assert_mistake
from evaluation_tools import class_folders
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

import sformer
from sformer.conversion import source_of
from sformer.execution import load_onnx

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.filterwarnings('ignore')

NAMES = ['airplane', 'bird', 'cat']


def fine_tuned(folder, **more):
    """A ViT as somebody has fine-tuned it with transformers, and its image processor."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)}, **more)
    config._attn_implementation = 'eager'
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size=dict(height=32, width=32), image_mean=[.4, .5, .6], image_std=[.2, .25, .3], resample=2)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    """A folder of transformers, its model and its processor; not to be changed."""
    folder = tmp_path_factory.mktemp('transformers') / 'vit'
    return folder, *fine_tuned(folder)


def test_a_folder_of_transformers_to_a_prediction(vit, run, tmp_path):
    folder, model, processor = vit
    result = run('convert', folder, '-o', tmp_path / 'out', '--num-images', 8)
    assert result.code == 0, result.err
    assert f'{folder} -> sformer_tiny: N = 63, calibrated on 8 dead-leaves images' in result.out
    for line in ('architecture vit_tiny_patch16_224: a ViT of config.json; weights: model.safetensors',
                 'head of 3 classes: classifier in model.safetensors',
                 'classes: airplane, bird, cat: id2label of config.json',
                 'image size 32 x 32: size of preprocessor_config.json',
                 'mean 0.4 0.5 0.6, std 0.2 0.25 0.3: preprocessor_config.json'):
        assert line in result.out.splitlines(), result.out
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['label_names'] == NAMES and config['id2label'] == {'0': 'airplane', '1': 'bird', '2': 'cat'}
    assert config['label2id']['cat'] == 2 and config['model_args']['norm_eps'] == 1e-12
    assert config['sformer']['origins']['mean'] == 'preprocessor_config.json'
    assert config['sformer']['source_tag'] is None and config['sformer']['source_weights'] is None
    assert 'augreg' not in json.dumps(config)

    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)) for i in range(4)]
    pixels = processor(images=images, return_tensors='pt')['pixel_values']
    saved = sformer.load_model(tmp_path / 'out')
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        found = source_of(saved)(pixels)
        spiking = saved(pixels)
    assert (found - expected).norm() / expected.norm() <= 1e-4
    assert (spiking - expected).norm() / expected.norm() <= 0.2

    data = class_folders(tmp_path / 'images', NAMES)
    result = run('evaluate', tmp_path / 'out', '--data', data, '--source-model', folder)
    assert result.code == 0 and 'source: top-1' in result.out, result.err
    assert 'has other weights' not in result.err
    trained = ('--dataset', 'dead-leaves', '--num-images', 4, '--batch-size', 2, '--steps', 1)
    result = run('distill', tmp_path / 'out', '-o', tmp_path / 'trained', '--source-model', folder, *trained)
    assert result.code == 0, result.err
    result = run('compare', tmp_path / 'out', folder, '--data', data)
    assert result.code == 0 and str(folder)[-3:] in result.out, result.err


@pytest.mark.slow
def test_a_source_is_exported_at_once(vit, run, tmp_path):
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    folder, model, _ = vit
    options = ('--num-images', 16, '--mean', '.5', '.5', '.5')
    result = run('export', folder, tmp_path / 'at-once.onnx', '--recipe', 'fast', *options)
    assert result.code == 0, result.err
    assert 'classes: airplane, bird, cat: id2label of config.json' in result.out and 'layers in integers' in result.out
    assert run('convert', folder, '-o', tmp_path / 'out', '--recipe', 'fast', *options).code == 0
    assert run('export', tmp_path / 'out', tmp_path / 'in-two.onnx').code == 0
    one, two = (load_onnx(tmp_path / f'{name}.onnx', 'onnxruntime') for name in ('at-once', 'in-two'))
    assert one.about['graph_sha256'] == two.about['graph_sha256']
    assert one.about['pretrained_cfg']['mean'] == [.5, .5, .5] and one.about['levels'] == two.about['levels']
    assert_mistake(run('export', folder, tmp_path / 'x.onnx', '--image-size', 32, 32), 'leave out --image-size')
    assert_mistake(run('export', folder, tmp_path / 'x.onnx', '--levels', 0), 'levels must be an integer')


def test_a_repository_of_transformers(vit, published, run_here, tmp_path, monkeypatch):
    folder, model, _ = vit
    monkeypatch.setattr(sys, 'argv', ['sformer', 'convert'])
    commit = published.put('me/vit', {path.name: path.read_bytes() for path in folder.iterdir()})
    result = run_here('convert', 'hf-hub:me/vit', '-o', tmp_path / 'out', '--num-images', 4)
    assert result.code == 0, result.err
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['sformer']['source_weights'] == f'me/vit@{commit}' and config['sformer']['source_tag'] is None
    assert config['label_names'] == NAMES and 'augreg' not in json.dumps(config)
    data = class_folders(tmp_path / 'images', NAMES)
    result = run_here('evaluate', tmp_path / 'out', '--data', data, '--source-model', 'hf-hub:me/vit')
    assert result.code == 0 and 'source: top-1' in result.out, result.err
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)  # it is in the cache
    assert run_here('convert', 'hf-hub:me/vit', '-o', tmp_path / 'again', '--num-images', 4).code == 0


def test_repositories_that_cannot_be_converted(published, run_here, tmp_path):
    published.put('me/tf', {'config.json': b'{"model_type": "vit"}', 'tf_model.h5': b'x'})
    published.put('me/none', {'README.md': b'x'})
    published.put('me/other', {'config.json': b'{"model_type": "swin"}', 'model.safetensors': b'x'})
    for name, message in (('me/tf', 'hf-hub:me/tf has weights of TensorFlow alone'),
                          ('me/none', 'hf-hub:me/none has no config.json'),
                          ('me/other', "hf-hub:me/other: config.json is of a 'swin' of transformers"),
                          ('me/nothing', 'me/nothing: there is no such repository')):
        assert_mistake(run_here('convert', f'hf-hub:{name}', '-o', tmp_path / 'x'), message)
    assert not published.count('GET', 'me/other/resolve/.*safetensors')  # not before it is known what it is of


def test_weights_in_parts(vit, tmp_path):
    folder, model, _ = vit
    model.save_pretrained(tmp_path / 'parts', max_shard_size='60KB')
    assert len([*(tmp_path / 'parts').glob('*.safetensors')]) > 1
    found = sformer.conversion.create_source(str(tmp_path / 'parts')).network
    images = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(found(images), model(pixel_values=images).logits, atol=1e-4)
    part = next((tmp_path / 'parts').glob('*.safetensors'))
    part.unlink()
    with pytest.raises(sformer.SFormerError, match=rf'index\.json names {part.name}, which is not there'):
        sformer.conversion.create_source(str(tmp_path / 'parts'))


def test_weights_that_lack_something_or_have_more(vit, tmp_path):
    folder, model, _ = vit
    state = load_file(folder / 'model.safetensors')
    for name in ('config.json', 'preprocessor_config.json'):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    layer = 'encoder.layer.1'
    for changes, message in (
            ({f'vit.{layer}.output.dense.bias': None}, rf'{layer}\.output\.dense\.bias is missing'),
            ({f'vit.{layer}.attention.attention.key.bias': None},
             rf'{layer}\.attention\.attention\.key\.bias is missing beside'),
            ({'vit.adapter.weight': torch.zeros(1)}, r'vit\.adapter\.weight is no parameter of a ViT'),
            ({'classifier.weight': torch.zeros(3, 47)}, r'head\.weight is \(3, 47\) instead of \(3, 48\)')):
        changed = {key: value for key, value in {**state, **changes}.items() if value is not None}
        save_file(changed, tmp_path / 'model.safetensors')
        with pytest.raises(sformer.SFormerError, match=message) as e:
            sformer.conversion.create_source(str(tmp_path))
        assert '\n' not in str(e.value)
