"""A detector's graph finds what the detector with int8 weights finds."""
import copy
import json
import pickle

import pytest
import torch
from detection_tools import small_detector, write_coco

import sformer
from sformer import SFNConfig, SFormerError, load_onnx, to_integer_
from sformer.detection import (
    convert_detector,
    detector_export,
    export_detector,
    load_detector_onnx,
    open_coco,
    pyramid,
)
from sformer.execution import onnx as graphs
from sformer.execution.proof import saturating

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
engine = pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_coco(root, num=4)
    return open_coco(root, 'train', masks=True)


def export(data, path, levels=32, **options):
    """A small SFormer whose graph is written to a path."""
    model = convert_detector(small_detector(max_detections=60, **options), data, SFNConfig(levels), num_images=4)
    before = copy.deepcopy(model.state_dict())
    reports = export_detector(model, path, (64, 96), command='sformer export')
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    products = sum(1 for m in model.modules() if getattr(m, 'weight', None) is not None and hasattr(m, 'neuron'))
    assert len(reports) == products and all(report.integer for report in reports)
    return model


@pytest.fixture(scope='module')
def segmenting(data, tmp_path_factory):
    """An SFormer that segments, and the file of its graph."""
    path = tmp_path_factory.mktemp('graphs') / 'd.onnx'
    return export(data, path, masks=True, depth=1), path


def finds_the_same(model, path, data, capfd):
    masks = model.config.masks
    network = copy.deepcopy(model)
    to_integer_(network)
    options = engine.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = engine.InferenceSession(path, options)
    names = [out.name for out in session.get_outputs()]
    assert names == ['boxes', 'labels', 'scores', *(['masks'] if masks else [])]
    for id in (10, 12):
        image = data.image(id)
        found = dict(zip(names, map(torch.from_numpy, session.run(None, {'image': image.numpy()})), strict=True))
        with torch.no_grad():
            expected = network([image])[0]
        assert found['boxes'].shape == (60, 4) and not masks or found['masks'].shape == (60, 1, 64, 96)
        torch.testing.assert_close(found['scores'], expected['scores'], atol=0.01, rtol=0)
        # in any order: scores of random weights are all alike
        distance = (found['boxes'][:, None] - expected['boxes'][None]).abs().amax(-1).min(1)
        near = distance.values < 1
        assert near.float().mean() > 0.8
        if masks:
            lost = (found['masks'] - expected['masks'][distance.indices]).abs().mean((1, 2, 3))[near]
            assert lost.mean() < 0.01
    assert 'onnxruntime' not in capfd.readouterr().err  # which wondered at the shape of each mask


def test_the_graph_finds_what_the_detector_finds(segmenting, data, capfd):
    finds_the_same(*segmenting, data, capfd)


def test_the_graph_as_a_detector_of_images_of_any_size(segmenting, data):
    model, path = segmenting
    run = load_detector_onnx(path)
    assert run.config == model.config and not run.training
    image = data.image(10)
    direct, = run([image])
    assert direct['masks'].shape == (60, 1, 64, 96)
    twice = torch.nn.functional.interpolate(image[None], scale_factor=2)[0]  # resized to the same pixels again
    enlarged, = run([twice])
    assert enlarged['masks'].shape == (60, 1, 128, 192)
    torch.testing.assert_close(enlarged['scores'], direct['scores'], atol=0.02, rtol=0)
    distance = (enlarged['boxes'][:, None] / 2 - direct['boxes'][None]).abs().amax(-1).min(1).values
    assert (distance < 1).float().mean() > 0.8
    upright, = run([data.image(10).transpose(1, 2)])  # lies in the upper left corner, and nothing is found beside it
    assert (upright['boxes'] <= torch.tensor([64., 96., 64., 96.])).all() and upright['boxes'].amax() > 64
    with pytest.raises(SFormerError, match='what an engine has compiled cannot be pickled or sent to another process: '
                                          'load the graph there by its path'):
        pickle.dumps(run)


@pytest.mark.slow
def test_windows_and_another_size(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pyramid, 'GLOBAL_BLOCKS', 1)  # so windows in one block of two
    model = export(data, tmp_path / 'd.onnx', levels=8, window_size=2, depth=2, image_size=(96, 160))
    finds_the_same(model, tmp_path / 'd.onnx', data, capfd)


def test_weights_are_bytes_and_the_file_says_what_it_is_of(segmenting):
    graph = onnx.load(segmenting[1])
    onnx.checker.check_model(graph)
    about = json.loads(graph.metadata_props[0].value)
    assert about['detector']['categories'] == {'3': 'disc', '7': 'square'} and about['image_size'] == [64, 96]
    products = [node for node in graph.graph.node if node.op_type in ('MatMul', 'Conv', 'ConvTranspose')]
    quantised = [node for node in graph.graph.node if node.op_type == 'QuantizeLinear']
    assert len(quantised) >= len(products) / 2
    assert not saturating(graph)


def test_more_than_a_file_can_hold_is_refused_before_the_work(segmenting, tmp_path, monkeypatch):
    model, path = segmenting
    monkeypatch.setattr(detector_export, 'to_integer_', lambda *args, **how: pytest.fail('too late'))
    monkeypatch.setattr(graphs, 'MAX_GRAPH', sum(p.numel() for p in model.parameters()) - 1)
    with pytest.raises(SFormerError, match=r'the graph would hold 0\.00 GiB .* run it in torch'):
        export_detector(model, tmp_path / 'new.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mistakes(segmenting, data, own_source, images, tmp_path):
    model, path = segmenting
    with pytest.raises(SFormerError, match='the graph of no classifier'):
        load_onnx(path)
    with pytest.raises(SFormerError, match='is there already'):
        export_detector(model, path)
    sformer.export_onnx(sformer.convert(own_source, images[:2][None]), tmp_path / 'classifier.onnx')
    with pytest.raises(SFormerError, match='classifier.onnx is the graph of no detector'):
        load_detector_onnx(tmp_path / 'classifier.onnx')
    (tmp_path / 'classifier.onnx').unlink()
    with pytest.raises(SFormerError, match='no neurons'):
        export_detector(small_detector(), tmp_path / 'new.onnx')
    rotary = convert_detector(small_detector(backbone='eva02_tiny_patch14_224', depth=1), data, num_images=1)
    with pytest.raises(SFormerError, match='eva02_tiny_patch14_224 that is not valid'):
        export_detector(rotary, tmp_path / 'new.onnx')
    unknown = copy.deepcopy(model)
    unknown.roi_heads.box_head.register_forward_hook(lambda module, args, out: torch.special.i0(out))
    with pytest.raises(SFormerError, match=f"torch's exporter cannot write {model.config.backbone}: .*i0"):
        export_detector(unknown, tmp_path / 'new.onnx', (64, 96))
    assert not list(tmp_path.iterdir())
