"""Dense networks, which give maps and boxes: torchvision's detectors convert whole, or what does not is named."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_tools import (
    mask_rcnn,
    neuron_names,
    photographs,
    randomise_,
    relative_error,
    rng,
    same_state,
    spiking,
    state_of,
)
from torchvision import ops
from torchvision.models import detection

from sformer import (
    SFNConfig,
    SFormerError,
    UnsupportedLayerError,
    calibrate_,
    is_calibrated,
    source_of,
    spiking_,
    to_integer_,
)
from sformer.layers import SpikingConv2d, SpikingConvTranspose2d, SpikingLinear
from sformer.profiling import profile_operations

WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@pytest.fixture(scope='module')
def detector():
    return mask_rcnn()


@pytest.fixture(scope='module')
def converted(detector):
    return spiking(detector, photographs(), SFNConfig(127))


def test_a_detector_converts_whole(detector, converted):
    layers = [m for m in converted.modules() if isinstance(m, WEIGHTED)]
    assert len(layers) == 13 and all(type(m) in (SpikingLinear, SpikingConv2d, SpikingConvTranspose2d) for m in layers)
    assert is_calibrated(converted)
    neurons = set(neuron_names(converted))
    kept = [name for name in converted.state_dict() if name.rpartition('.')[0] not in neurons]
    assert kept == list(detector.state_dict())
    assert same_state(source_of(converted), state_of(detector))


def test_a_converted_detector_finds_what_its_source_finds(detector, converted):
    images = photographs(2)
    with torch.no_grad():
        expected, found = detector(images), converted(images)
    for a, b in zip(expected, found, strict=True):
        assert len(a['boxes']) == len(b['boxes']) == 6
        overlap, nearest = ops.box_iou(a['boxes'], b['boxes']).max(1)
        assert (overlap > 0.8).sum() >= 4
        same = nearest[overlap > 0.8]
        assert relative_error(b['masks'][same], a['masks'][overlap > 0.8]) < 0.2  # a box a pixel off moves its mask


def test_calibration_takes_a_forward_of_the_users_own_for_lists(detector, converted):
    model, images = spiking_(copy.deepcopy(detector), SFNConfig(127)), photographs()
    batches = [dict(images=images, ids=[1, 2, 3])]
    assert calibrate_(model, batches, forward_fn=lambda network, batch: network(batch['images'])) == 1
    assert same_state(model, state_of(converted))
    assert calibrate_(spiking_(copy.deepcopy(detector)), [images[:2], images[2:]]) == 3


def test_a_part_that_no_current_reached_is_named(detector):
    model = spiking_(copy.deepcopy(detector))
    model.roi_heads.score_thresh = 2.  # nothing is found, so no mask is drawn
    state = state_of(model)
    with pytest.raises(SFormerError, match=r'no current reached roi_heads\.mask_head\.0\.0\.neuron and 3 more'):
        calibrate_(model, [photographs()])
    assert same_state(model, state)


def test_a_detector_that_finds_nothing_runs_and_is_counted(converted):
    model, images = copy.deepcopy(converted), photographs(2)
    model.roi_heads.score_thresh = 2.
    with torch.no_grad():
        assert all(not len(found['boxes']) for found in model(images))
    operations, sites, count = profile_operations(model, [images])
    assert count == 2 and not any(o.name.startswith('roi_heads.mask') and o.macs for o in operations)
    assert {site.neurons for site in sites if 'mask' in site.name} == {0}


def test_batch_norm_after_a_convolution_is_an_affine_map_of_its_current():
    # what makes it fold into the weights: a factor and an offset per output channel, in integers as well
    block = mask_rcnn().backbone[0]
    x = torch.randn(4, 3, 32, 32, generator=rng())
    model = spiking(block, x, SFNConfig(32))
    conv, norm, _ = model
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = copy.deepcopy(conv)
    with torch.no_grad():
        folded.weight.mul_(factor.view(-1, 1, 1, 1))
        folded.bias = nn.Parameter(norm.bias - norm.running_mean * factor)
        torch.testing.assert_close(folded(x).relu(), model(x), rtol=1e-4, atol=1e-5)
        whole = copy.deepcopy(model)
        assert [report.integer for report in to_integer_(whole)] == [True]
        assert relative_error(whole(x), model(x)) < 0.02


def test_a_gate_per_channel_spikes():
    source = randomise_(ops.SqueezeExcitation(8, 4))
    x = torch.randn(3, 8, 6, 5, generator=rng())
    model = spiking(source, x, SFNConfig(127))
    gate, value = model._scale(x), x
    expected = model.gate_neuron.encode(gate).decode() * model.value_neuron.encode(value).decode()
    torch.testing.assert_close(model(x), expected)
    assert 0 < relative_error(model(x), source(x)) < 0.02
    operations, _, _ = profile_operations(model, [x])
    gates = [operation for operation in operations if operation.kind == 'gate']
    assert [operation.macs for operation in gates] == [8 * 6 * 5] and len(operations) == 3


def test_a_detector_in_integers(converted):
    model, images = copy.deepcopy(converted), photographs(2)
    reports = to_integer_(model)
    assert len(reports) == 13 and all(report.integer for report in reports)
    with torch.no_grad():
        a, b = converted.backbone(torch.stack([images[0]])), model.backbone(torch.stack([images[0]]))
        assert relative_error(b, a) < 0.03
        assert all(len(found['boxes']) == 6 for found in model(images))


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'fasterrcnn_resnet50_fpn', 'fasterrcnn_resnet50_fpn_v2', 'maskrcnn_resnet50_fpn', 'maskrcnn_resnet50_fpn_v2',
    'keypointrcnn_resnet50_fpn', 'retinanet_resnet50_fpn', 'retinanet_resnet50_fpn_v2', 'fcos_resnet50_fpn'])
def test_detectors_of_torchvision_convert_whole(name):
    model = spiking_(getattr(detection, name)(weights=None, weights_backbone=None).eval())
    assert all(type(m) in (SpikingLinear, SpikingConv2d, SpikingConvTranspose2d)
               for m in model.modules() if isinstance(m, WEIGHTED))
    if name == 'maskrcnn_resnet50_fpn':
        model.transform.min_size, model.transform.max_size = (96,), 128
        model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0., 4
        assert calibrate_(model, [photographs(2)]) == 2 and is_calibrated(model)
        operations, _, count = profile_operations(model, [photographs(2)])
        assert count == 2 and all(operation.kind in ('convolution', 'linear') for operation in operations)


@pytest.mark.slow
@pytest.mark.parametrize('name, named', [
    ('ssd300_vgg16', 'SSDFeatureExtractorVGG'), ('ssdlite320_mobilenet_v3_large', 'Hardswish')])
def test_detectors_that_do_not_convert_are_refused_by_the_name_of_a_layer(name, named):
    with pytest.raises(UnsupportedLayerError, match=named):
        spiking_(getattr(detection, name)(weights=None, weights_backbone=None))
