"""A detector converts whole, and what is saved is what was converted."""
import copy
import json

import pytest
import torch
from detection_tools import small_detector
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from sformer import FitConfig, SFNConfig, source_of
from sformer.conversion import changed
from sformer.data import ImageRequest
from sformer.detection import (
    convert_detector,
    detect,
    evaluate_detector,
    image_batches,
    load_detector,
    save_detector,
)
from sformer.detection.drawing import token_activity
from sformer.errors import SFormerError, UncalibratedError, UnsupportedLayerError
from sformer.files import state_hash
from sformer.layers import is_calibrated, source_view, spiking_
from sformer.profiling import profile_operations


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_product_reads_spikes(sformer_detector, data):
    operations, sites, _ = profile_operations(sformer_detector, [[data.image(10)]])
    assert [o.name for o in operations if not o.operands] == []
    products = {o.name for o in operations}
    layers = {name for name, m in sformer_detector.named_modules() if isinstance(m, (
        nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}
    assert layers <= products  # so none was passed over, either
    assert any('mask_predictor.conv5_mask' in name for name in layers) and any('pyramid' in name for name in layers)
    assert all(site.spikes['graded'] > 0 for site in sites)


def test_source_is_inside_bit_for_bit(sformer_detector, data):
    source = small_detector(masks=True)
    found, expected = detect(sformer_detector, data.image(10)), detect(source, data.image(10))
    assert same(detect(source_view(sformer_detector), data.image(10)), expected)
    assert not torch.equal(found['scores'], expected['scores'])
    assert (found['scores'] - expected['scores']).abs().max() < 0.05
    assert sformer_detector.conversion.calibration.num_images == 2
    assert sformer_detector.conversion.calibration.name == 'shapes'


def test_maps_of_an_sformer_are_near_those_of_its_source(sformer_detector, data):
    image = data.image(11)
    images, _ = sformer_detector.transform([image])
    with torch.no_grad():
        maps = sformer_detector.backbone(images.tensors)
        expected = source_view(sformer_detector).backbone(images.tensors)
    for level in expected:
        # random weights of 8 channels, calibrated on two images; a network that learnt something errs less
        assert (maps[level] - expected[level]).norm() < 0.2 * expected[level].norm()


def test_what_cannot_spike_is_named_and_nothing_is_changed(data):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x

    detector = small_detector()
    detector.backbone.pyramid.levels[0].append(Scale())
    with pytest.raises(UnsupportedLayerError, match=r'backbone\.pyramid\.levels\.0\.\d+ \(.*Scale\)'):
        convert_detector(detector, data, num_images=2)
    assert not any(True for m in detector.modules() if hasattr(m, 'neuron'))


@pytest.mark.parametrize('inplace', [False, True])
def test_weights_that_are_computed_are_named(data, inplace):
    detector = small_detector()
    prune.l1_unstructured(detector.roi_heads.box_head.fc6, 'weight', amount=0.3)
    with pytest.raises(UnsupportedLayerError, match=r'box_head\.fc6\.weight is computed anew .*prune\.remove'):
        convert_detector(detector, data, num_images=2, inplace=inplace)
    assert not any(True for m in detector.modules() if hasattr(m, 'neuron'))


def test_images_are_drawn_as_everywhere(data):
    """By the rule of `ImageRequest`, as an evaluation draws them: in the order of the data, of one size together."""
    by_sum = {data.image(id).sum().item(): id for id in data.images}
    drawn = set()
    for seed in range(8):
        wanted = ImageRequest(dataset='shapes', num_images=3, seed=seed).choose(len(data))
        batches = image_batches(None, data, 3, seed)
        ids = [by_sum[image.sum().item()] for batch in batches for image in batch]
        assert {*ids} == {[*data.images][i] for i in wanted} and len(ids) == 3
        assert all(len({image.shape for image in batch}) == 1 for batch in batches) and len(batches) <= 2
        drawn.add(tuple(sorted(ids)))
    assert len(drawn) > 1 and sum(map(len, image_batches(None, data, None))) == len(data) == 6
    with pytest.raises(SFormerError, match='7 images asked for, but .*train.json. has only 6'):
        image_batches(None, data, 7)


def test_windows_convert_and_load(data, tmp_path):
    source = small_detector(window_size=2)
    image = data.image(10)
    expected = detect(source, image)
    converted = convert_detector(copy.deepcopy(source).train(), data, num_images=2)
    assert not any(module.training for module in converted.modules())
    assert same(detect(source_view(converted), image), expected)
    whole, _, _ = profile_operations(convert_detector(small_detector(window_size=None), data, num_images=2), [[image]])
    operations, _, _ = profile_operations(converted, [[image]])
    assert [o.name for o in operations if not o.operands] == []
    macs, of_whole = ({o.name: o.macs for o in each} for each in (operations, whole))
    assert macs.keys() == of_whole.keys()
    name = 'backbone.vit.blocks.{}.attn.products.0 QK^T'
    heads, dim, tokens, windows = 2, 32, 1 + 24, 6  # a map of 4 x 6 patches and the class token
    assert macs[name.format(0)] == of_whole[name.format(1)] == heads * dim * tokens ** 2
    assert macs[name.format(1)] == heads * dim * windows * (1 + 4) ** 2
    assert macs['backbone.vit.blocks.1.attn.qkv'] == 64 * 192 * windows * (1 + 4)
    found = token_activity(converted, image)[1]
    assert found.shape == (4, 6) and (found > 0).all() and (found <= 1).all()
    save_detector(converted, tmp_path)
    loaded = load_detector(tmp_path)
    loaded.roi_heads.score_thresh = 0.
    assert same(detect(loaded, image), detect(converted, image))
    assert type(loaded.backbone.vit.blocks[1].attn) is type(converted.backbone.vit.blocks[1].attn)


def test_why_weights_have_moved(sformer_detector, data, tmp_path, caplog):
    """Of a detector as of a classifier: kept on disk and by a second conversion, and nobody takes it for the source."""
    tuned = copy.deepcopy(sformer_detector)
    with torch.no_grad():
        tuned.roi_heads.box_predictor.cls_score.bias.add_(0.1)
    assert changed(sformer_detector) == ()
    assert state_hash(source_of(sformer_detector).state_dict()) == sformer_detector.conversion.source_sha256
    loaded = load_detector(save_detector(tuned, tmp_path / 'tuned'))
    for detector in (tuned, loaded):
        assert changed(detector) == ('fine-tuned',)
        with pytest.raises(SFormerError, match='its source is not inside'):
            source_of(detector)
    assert loaded.conversion.changed == ('fine-tuned',) and not caplog.text
    evaluate_detector(loaded, data, num_images=1)
    assert 'the weights of the detector have moved since it was converted (fine-tuned)' in caplog.text
    again = convert_detector(loaded, data, SFNConfig(levels=16), num_images=2)
    assert again.conversion.changed == ('fine-tuned',) and 'its record goes on saying so' in caplog.text
    assert again.conversion.source_sha256 == sformer_detector.conversion.source_sha256
    better = convert_detector(small_detector(), data, SFNConfig(levels=4), FitConfig(compensate=True), num_images=2)
    better = load_detector(save_detector(better, tmp_path / 'better'))
    assert better.conversion.changed == ('compensated',)
    with pytest.raises(SFormerError, match='convert the source itself'):
        convert_detector(better, data, num_images=2)


def test_folders(sformer_detector, data, tmp_path):
    for name, detector in (('sformer', sformer_detector), ('source', small_detector())):
        save_detector(detector, tmp_path / name)
        loaded = load_detector(tmp_path / name)
        loaded.roi_heads.score_thresh = 0.
        assert same(detect(loaded, data.image(10)), detect(detector, data.image(10))) and type(loaded) is type(detector)
        assert loaded.config == detector.config and is_calibrated(loaded) == (name == 'sformer')
        with pytest.raises(SFormerError, match='--overwrite'):
            save_detector(detector, tmp_path / name)
    record = load_detector(tmp_path / 'sformer').conversion
    assert record.calibration == sformer_detector.conversion.calibration and not record.changed
    with pytest.raises(UncalibratedError, match=r'convert it with convert_detector\(\) before saving'):
        save_detector(spiking_(small_detector()), tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('change, message', [
    (lambda config: config.update(weights_sha256='0'), 'not the file that config.json belongs to'),
    (lambda config: config['detector'].update(backbone='os.system'), 'not the name of a timm architecture'),
    (lambda config: config['detector'].update(url='x'), 'not as sformer wrote it'),
    (lambda config: config['detector'].pop('categories'), 'not as sformer wrote it'),
    (lambda config: config['detector'].update(channels=16), 'not of the detector that config.json describes'),
    (lambda config: config.pop('detector'), 'holds no detector')])
def test_config_that_was_changed(change, message, tmp_path):
    save_detector(small_detector(), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    change(config)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(SFormerError, match=message):
        load_detector(tmp_path)


def test_weights_that_are_damaged(tmp_path):
    save_detector(small_detector(), tmp_path)
    file = tmp_path / 'model.safetensors'
    state = load_file(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(SFormerError, match='truncated or corrupted'):
        load_detector(tmp_path)
    save_file({name: tensor * 2 for name, tensor in state.items()}, file)
    with pytest.raises(SFormerError, match='SHA-256 differs'):
        load_detector(tmp_path)
    file.unlink()
    with pytest.raises(SFormerError, match='no model.safetensors'):
        load_detector(tmp_path)
