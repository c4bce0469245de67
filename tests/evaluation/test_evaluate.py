"""Evaluation: its numbers against ones that are counted here, and what it refuses."""
import copy
import io
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import evaluation_tools
import pytest
import timm
import torch
from conftest import NANO
from evaluation_tools import steady
from PIL import Image

from sformer import EvaluationConfig, SFormerError, UncalibratedError, convert, evaluate, evaluate_all
from sformer.evaluation.launch import Group


def test_numbers(coarse, source, digits, result):
    images, labels = digits
    with torch.no_grad():
        out, expected = coarse(images), source(images)

    def top(logits, k):
        order = logits.argsort(dim=1, descending=True)[:, :k]
        return 100 * sum(int(y) in row for row, y in zip(order.tolist(), labels, strict=True)) / 540
    assert result['num_images'] == 540 and result['dataset'] == 'digits' and result['split'] == 'test'
    assert result['top1'] == pytest.approx(top(out, 1), abs=1e-3)
    assert result['top5'] == pytest.approx(top(out, 5), abs=1e-3)
    assert result['source_top1'] == pytest.approx(top(expected, 1), abs=1e-3)
    assert result['source_top5'] == pytest.approx(top(expected, 5), abs=1e-3)
    same = (out.argmax(1) == expected.argmax(1)).double().mean().item()
    assert result['agreement'] == pytest.approx(100 * same, abs=1e-3)
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert result['relative_logit_error'] == pytest.approx(error.item(), rel=1e-3)
    assert result['top1_err'] == pytest.approx(100 - result['top1'])
    assert result['top5_err'] == pytest.approx(100 - result['top5'])
    # each of them says something else, or the comparison above would prove little
    values = [result[k] for k in ('top1', 'source_top1', 'agreement', 'top5')]
    assert len(set(values)) == 4, values


def test_without_a_source(coarse, result):
    alone = evaluate(coarse, 'digits', 'test', source=False)
    assert alone['top1'] == result['top1']
    assert not {'source_top1', 'source_top5', 'agreement', 'relative_logit_error'} & alone.keys()


def test_subset(coarse, result):
    a, b, c = (evaluate(coarse, 'digits', num_images=100, seed=seed) for seed in (0, 0, 1))
    assert a['num_images'] == 100
    assert a['dataset_fingerprint'] == b['dataset_fingerprint'] and a['top1'] == b['top1']
    assert len({r['dataset_fingerprint'] for r in (a, c, result)}) == 3


def test_default_split_is_the_one_for_evaluation(coarse, result):
    default = evaluate(coarse, 'digits')
    assert (default['split'], default['dataset_fingerprint']) == ('test', result['dataset_fingerprint'])
    train = evaluate(coarse, 'digits', 'train', num_images=10)
    assert train['split'] == 'train'


# other threads --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('training', [False, True])
def test_two_evaluations_of_one_model_at_once(model, training):
    """With a mode that the evaluations have to leave alone, and spikes that are counted for each of them."""
    busy = copy.deepcopy(model).train(training)
    busy.head_drop.p = 0.9  # shows in the accuracy if it acts
    options = dict(num_images=240, batch_size=20)
    expected = steady(evaluate(model, 'digits', **options))
    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(lambda _: steady(evaluate(busy, 'digits', **options)), range(2))]
    assert results == [expected] * 2
    assert busy.training == training


def test_model_serves_while_it_is_evaluated(model, images):
    """Its own logits, not those of its source, and images that no evaluation counts."""
    alone = steady(evaluate(model, 'digits', 'test', batch_size=20))
    with torch.inference_mode():
        expected = model(images)
    served, done = [], threading.Event()

    def serve():
        with torch.inference_mode():
            while not done.is_set():
                served.append(torch.equal(model(images), expected))
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        meanwhile = steady(evaluate(model, 'digits', 'test', batch_size=20))
    finally:
        done.set()
        thread.join()
    assert len(served) > 3 and all(served)
    assert meanwhile == alone


# refused --------------------------------------------------------------------------------------------------------------

def test_uncalibrated_is_refused(model):
    with pytest.raises(UncalibratedError, match=r'33 .* blocks\.0\.attn\.qkv\.neuron.* accuracy would mean nothing'):
        evaluate(timm.create_model('sformer_nano', img_size=8, in_chans=1, num_classes=10), 'digits')
    one = copy.deepcopy(model)
    one.head.neuron.calibrated.fill_(False)
    with pytest.raises(UncalibratedError, match=r'1 neurons .* head\.neuron'):
        evaluate(one, 'digits')


def test_who_compares_with_what_is_inside_is_told_that_it_moved(model, source, caplog):
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.head.bias.add_(0.1)
    for network, other, told in (
            (moved, True, True), (moved, False, False), (moved, source, False), (model, True, False)):
        caplog.clear()
        evaluate(network, 'digits', num_images=8, source=other)
        assert ('have moved since it was converted' in caplog.text) == told


def test_a_model_without_classes_is_refused(images):
    features = timm.create_model('vit_tiny_patch16_224', **dict(NANO, num_classes=0))
    for model in (features, convert(features, [images])):
        with pytest.raises(SFormerError, match=r'the model has no classes to predict \(num_classes=0\)'):
            evaluate(model, 'digits')


def test_compiled_model_is_refused(model):
    with pytest.raises(SFormerError, match='the model is compiled.* torchcompile=True'):
        evaluate(torch.compile(model, backend='eager'), 'digits')


def test_model_without_a_classifier(model):
    headless = copy.deepcopy(model)
    headless.reset_classifier(0)
    with pytest.raises(SFormerError, match='class'):
        evaluate(headless, 'digits')


def test_dataset_without_labels(model, tmp_path):
    with pytest.raises(SFormerError, match='no labels'):
        evaluate(model, 'dead-leaves')
    Image.new('L', (8, 8)).save(tmp_path / 'a.png')
    with pytest.raises(SFormerError, match='no labels'):
        evaluate(model, str(tmp_path))


def test_unknown_dataset_and_split(model, tmp_path):
    with pytest.raises(SFormerError, match='is not a folder'):
        evaluate(model, str(tmp_path / 'nowhere'))
    with pytest.raises(SFormerError, match="no split 'val'"):
        evaluate(model, 'digits', 'val')
    with pytest.raises(SFormerError, match='541 images asked for'):
        evaluate(model, 'digits', 'test', num_images=541)


def test_one_image(model):
    result = evaluate(model, 'digits', num_images=1)
    assert result['num_images'] == 1 and result['top1'] in (0, 100)


def test_two_classes(own_source, tmp_path, images):
    """Top-5 of fewer than five classes is top-2."""
    own_source.reset_classifier(2)
    for name in 'ab':
        (tmp_path / name).mkdir()
        Image.new('L', (8, 8), 100 + ord(name)).save(tmp_path / name / '0.png')
    result = evaluate(convert(own_source, [images]), str(tmp_path))
    assert result['top5'] == 100 and result['num_images'] == 2


@pytest.mark.parametrize('shards', [1, 5])
def test_stream_counts_what_is_counted_in_memory(model, digit_files, shards):
    folder = digit_files(shards)
    local = evaluate(model, folder, batch_size=16, activity_images=200)
    streamed = evaluate(model, folder, batch_size=16, activity_images=200, streaming=True)
    but = 'streaming', 'activity', 'activity_per_site', 'spikes_per_neuron'
    assert steady(streamed, *but) == steady(local, *but)
    assert streamed['activity'] == pytest.approx(local['activity'], rel=1e-3)
    assert streamed['spikes_per_neuron'] == pytest.approx(local['spikes_per_neuron'], rel=1e-3)
    assert streamed['streaming'] and streamed['num_images'] == 200


def test_webdataset(model, tmp_path):
    files = evaluation_tools.digit_files(40)
    for shard in range(2):
        with tarfile.open(tmp_path / f'digits-validation-{shard:04d}.tar', 'w') as tar:
            for i in range(shard * 20, shard * 20 + 20):
                image, label = files[i]
                for name, data in ((f'{i:06d}.png', image), (f'{i:06d}.cls', b'%d' % label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    local, streamed = (evaluate(model, str(tmp_path), streaming=s) for s in (False, True))
    assert local['split'] == 'validation' and local['num_images'] == streamed['num_images'] == 40
    assert local['top1'] == streamed['top1'] > 90
    # the archive does not say how many it has, so only the fingerprint of what was counted would differ
    assert local['dataset_fingerprint'] and streamed['dataset_fingerprint']
    (tmp_path / 'docs').mkdir()
    Image.new('L', (8, 8)).save(tmp_path / 'docs' / 'preview.png')
    assert evaluate(model, str(tmp_path), num_images=3)['split'] == 'validation'
    # unpacked beside the archives
    for i in range(10):
        (tmp_path / 'val' / str(i)).mkdir(parents=True)
        (tmp_path / 'val' / str(i) / 'a.png').write_bytes(files[i][0])
    assert evaluate(model, str(tmp_path), num_images=3)['split'] == 'val'


@pytest.mark.parametrize('streaming', [False, True])
def test_archive_that_was_cut_off(model, tmp_path, streaming):
    """Between two files, where `tarfile` takes it for the end."""
    path = tmp_path / 'digits-validation-0000.tar'
    with tarfile.open(path, 'w') as tar:
        for i in range(4):
            for suffix, data in (('png', b'x' * 512), ('cls', b'1')):
                info = tarfile.TarInfo(f'{i}.{suffix}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    path.write_bytes(path.read_bytes()[:4 * 1024])
    assert len(tarfile.open(path).getnames()) == 4
    with pytest.raises(SFormerError, match='0000.tar has no end-of-archive mark'):
        evaluate(model, str(tmp_path), streaming=streaming)


def test_stream_that_ends_early(model, digit_files, monkeypatch):
    """What the files say and what comes out of them has to agree."""
    import pyarrow.parquet as pq
    folder = digit_files(2)
    read = pq.read_metadata

    class More:
        def __init__(self, path):
            self.num_rows = read(path).num_rows + 1
    monkeypatch.setattr(pq, 'read_metadata', More)
    with pytest.raises(SFormerError, match='counted 200 images, expected 202'):
        evaluate(model, folder, streaming=True)


def test_processes_that_evaluate_different_things(model):
    class Different(Group):
        def gather(self, value):
            return [value, dict(value, dataset='another copy') if 'dataset' in value else value]
    with pytest.raises(SFormerError, match=r'do not evaluate the same \(dataset differ\)'):
        evaluate_all([model], EvaluationConfig(dataset='digits', num_images=64), group=Different())


def test_a_group_counts_every_run_anew(model, digit_files):
    group, config = Group(), EvaluationConfig(dataset=digit_files(1, damaged=(3,)), max_bad=1)
    for _ in range(2):
        assert len(evaluate_all([model], config, group=group)[0]['bad_images']) == 1
