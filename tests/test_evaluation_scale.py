"""Evaluation at scale on one process: benchmarks, streams, metrics, journals, results files, bad images, memory."""
import copy
import csv
import io
import json
import math
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet, resolve_input_data_config

import sformer
from sformer import SFormerError, evaluate
from sformer.benchmarks import Benchmark, RealLabels, resolve_benchmark
from sformer.data import Plan, open_images
from sformer.data.sources import Digits
from sformer.distributed import Group
from sformer.evaluation import Journal, check_results_file, engine, evaluate_all, write_results
from sformer.evaluation.metrics import ChunkScore, summarize

TIMINGS = {'seconds', 'source_seconds', 'images_per_second', 'decode_seconds', 'preprocess_seconds', 'wall_seconds',
           'wait_seconds', 'peak_memory_mib'}
SYNSETS = ImageNetInfo('imagenet-1k').label_names()


def steady(result, *but):
    return {k: v for k, v in result.items() if k not in TIMINGS and k not in but}


def png(level, mode='L', size=(8, 8)):
    buffer = io.BytesIO()
    Image.new(mode, size, level if mode == 'L' else (level,) * 3).save(buffer, 'png')
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    datasets.disable_progress_bars()


@pytest.fixture(scope='module')
def classifier():
    """An untrained classifier of ImageNet classes, as small as can be, with logits that depend on the image."""
    torch.manual_seed(0)
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=8, patch_size=4, in_chans=1, embed_dim=12, depth=1, num_heads=3)
    model.head.weight.data.normal_()
    return model.eval()


@pytest.fixture
def digit_files(tmp_path):
    """The first 200 test digits as parquet, in so many shards."""
    import datasets
    source = open_images('digits', 'test', data_config=dict(
        input_size=(1, 8, 8), mean=(.5,), std=(.5,), interpolation='bilinear', crop_pct=1.)).dataset.source

    def write(shards, num=200, damaged=()):
        images = []
        for i in range(num):
            buffer = io.BytesIO()
            Image.fromarray(source.images[i]).save(buffer, 'png')
            images.append({'bytes': b'no image' if i in damaged else buffer.getvalue(), 'path': None})
        table = datasets.Dataset.from_dict(
            dict(image=images, label=[int(y) for y in source.labels[:num]]),
            features=datasets.Features(dict(
                image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))))
        folder = tmp_path / f'digits{shards}-{num}-{len(damaged)}'
        folder.mkdir(exist_ok=True)
        for i in range(shards):
            table.shard(shards, i).to_parquet(folder / f'test-{i}.parquet')
        return str(folder)
    return write


def class_folders(root, names, per_class=1):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(per_class):
            (root / name / f'{j}.png').write_bytes(png((i * 37 + j * 91) % 256))
    return str(root)


def logits_of(model, folder):
    images = open_images(folder, data_config=resolve_input_data_config(model), needs_labels=True)
    x, y = next(images.batches(len(images)))
    with torch.inference_mode():
        return model(x), y


# metrics --------------------------------------------------------------------------------------------------------------

def test_likelihood_and_calibration_error_by_hand(model, digits):
    images, labels = digits
    result = evaluate(model, 'digits', 'test')
    with torch.inference_mode():
        p = model(images).double().softmax(1).numpy()
    y = labels.numpy()
    assert result['nll'] == pytest.approx(-np.log(p[np.arange(540), y]).mean(), abs=1e-5)
    confidence, right = p.max(1), p.argmax(1) == y
    error = 0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert result['ece'] == pytest.approx(100 * error, abs=1e-3) and result['ece'] > 1
    assert result['source_nll'] != result['nll'] and result['source_ece'] != result['ece']


def test_certain_and_uncertain_predictions_have_a_bin():
    score = ChunkScore()
    score.add(torch.tensor([[100., 0.], [0., 0.], [0., 100.]]), torch.tensor([[0], [0], [0]]))
    bins = score.record()['bins']
    assert bins[-1][:2] == [2, 1] and bins[7][:2] == [1, 1] and sum(b[0] for b in bins) == 3
    assert summarize([score.record()], 3)['ece'] == pytest.approx(100 * (1 + 0.5) / 3, abs=1e-3)


def test_sums_do_not_depend_on_order_or_chunks():
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 10) * 10, torch.randint(0, 10, (64, 1))

    def total(order, size):
        records = []
        for part in torch.as_tensor(order).split(size):
            score = ChunkScore()
            score.add(logits[part], labels[part])
            records.append(score.record())
        return summarize(records, 64)
    assert total(range(64), 64) == total(range(63, -1, -1), 7)


# benchmarks -----------------------------------------------------------------------------------------------------------

def test_imagenet_a_and_r_compare_200_classes(classifier, tmp_path):
    from sformer.benchmarks import _synsets
    for name in ('imagenet-a', 'imagenet-r'):
        synsets = _synsets(name)
        folder = class_folders(tmp_path / name, synsets)
        result = evaluate(classifier, folder)
        logits, labels = logits_of(classifier, folder)
        chosen = [SYNSETS.index(s) for s in synsets]
        order = logits[:, chosen].argsort(1, descending=True)
        assert result['benchmark'] == name and result['num_images'] == 200
        assert result['top1'] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
        assert result['top5'] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
        among_all = (logits.argsort(1, descending=True)[:, :5] == torch.tensor(chosen)[labels][:, None]).any(1)
        assert result['top5'] > 100 * among_all.double().mean().item(), 'restriction makes it easier'


def test_labels_go_by_class_names(classifier, tmp_path):
    """Some classes of ImageNet, under labels of their own: none of them may be taken for classes 0, 1, 2."""
    names = [SYNSETS[i] for i in (7, 500, 999)]
    folder = class_folders(tmp_path / 'three', names)
    logits, _ = logits_of(classifier, folder)
    expected = copy.deepcopy(classifier)
    expected.head.bias.data[[7, 500, 999]] += 1000
    result = evaluate(expected, folder)
    assert result['top5'] == 100 and result['benchmark'] is None
    assert evaluate(classifier, folder)['top1'] == pytest.approx(
        100 * (logits.argmax(1) == torch.tensor([7, 500, 999])).double().mean().item())


def test_class_folders_named_by_numbers(classifier):
    """ImageNet-V2 names its folders 0 to 999, and some readers sort 10 before 2."""
    names = sorted(map(str, range(1000)))
    found = resolve_benchmark('imagenet-v2', classifier, 'v2', names)
    assert found.label_map is not None and all(found.label_map[i] == int(n) for i, n in enumerate(names))
    assert resolve_benchmark('imagenet-v2', classifier, 'v2', list(map(str, range(1000)))).label_map is None


def test_label_sets_that_do_not_match(classifier, model, tmp_path):
    with pytest.raises(SFormerError, match='has 2 classes .* the model has 1000, and their names'):
        evaluate(classifier, class_folders(tmp_path / 'two', ['cat', 'dog']))
    with pytest.raises(SFormerError, match='no benchmark .imagenet-z., but: imagenet-1k'):
        evaluate(model, 'digits', benchmark='imagenet-z')
    with pytest.raises(SFormerError, match='imagenet-v2 has 1000 classes, digits has 10'):
        evaluate(model, 'digits', benchmark='imagenet-v2')
    with pytest.raises(SFormerError, match='imagenet-a needs a model of ImageNet classes, this one has 10'):
        evaluate(model, 'digits', benchmark='imagenet-a')
    with pytest.raises(SFormerError, match='imagenet-r has 200 classes with names like n0'):
        evaluate(classifier, str(tmp_path / 'two'), benchmark='imagenet-r')
    with pytest.raises(SFormerError, match='ReaL labels are of 1000 classes'):
        evaluate(model, 'digits', benchmark='imagenet-real')


def write_validation(folder, numbers, shards=3):
    """Images named as those of the ImageNet validation set, with these numbers."""
    import datasets
    rows = [{'bytes': png(n % 251), 'path': f'ILSVRC2012_val_{n:08d}_n01440764.JPEG'} for n in numbers]
    table = datasets.Dataset.from_dict(
        dict(image=rows, label=[0] * len(rows)),
        features=datasets.Features(dict(image=datasets.Image(), label=datasets.Value('int64'))))
    folder.mkdir()
    for i in range(shards):
        table.shard(shards, i, contiguous=False).to_parquet(folder / f'validation-{i}.parquet')
    return str(folder)


@pytest.mark.parametrize('streaming', [False, True])
def test_real_labels_go_by_number_not_by_order(classifier, tmp_path, streaming):
    numbers = [50_000, 3, 1, 777, 12, 40_001, 2, 9, 31_337, 8]
    folder = write_validation(tmp_path / 'val', numbers)
    result = evaluate(classifier, folder, benchmark='imagenet-real', streaming=streaming, batch_size=2)
    real = RealLabelsImagenet(range(50_000)).real_labels
    right = {1: 0, 5: 0}
    labelled = [n for n in numbers if real[f'ILSVRC2012_val_{n:08d}.JPEG']]
    for n in labelled:
        x = torch.full((1, 1, 8, 8), (n % 251 / 255 - 0.5) / 0.5)
        order = classifier(x)[0].argsort(descending=True).tolist()
        for k in right:
            right[k] += bool(set(order[:k]) & set(real[f'ILSVRC2012_val_{n:08d}.JPEG']))
    assert 0 < len(labelled) < len(numbers), 'one of them has no label'
    assert (result['num_images'], result['skipped_images']) == (len(labelled), len(numbers) - len(labelled))
    assert result['top1'] == pytest.approx(100 * right[1] / len(labelled), abs=1e-3)
    assert result['top5'] == pytest.approx(100 * right[5] / len(labelled), abs=1e-3)
    assert result['nll'] is None and result['benchmark'] == 'imagenet-real'


def test_real_labels_need_file_names(classifier, tmp_path):
    with pytest.raises(SFormerError, match="ReaL labels go by file names .* called 'a.png'"):
        RealLabels()(0, 'a.png')
    folder = class_folders(tmp_path / 'x', SYNSETS[:1])
    with pytest.raises(SFormerError, match='ReaL labels go by file names'):
        evaluate(classifier, folder, benchmark='imagenet-real')


def test_imagenet_sample(test_data):
    """Real images of ImageNet, whose class names are WordNet ids."""
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=16, embed_dim=12, depth=1, num_heads=3)
    folder = str(test_data / 'data' / 'imagenet-sample')
    result = evaluate(model, folder, num_images=40, batch_size=16)
    assert result['num_images'] == 40 and result['img_size'] == 32 and 6 < result['nll'] < 8
    streamed = evaluate(model, folder, num_images=40, batch_size=16, streaming=True)
    assert streamed['num_images'] == 40 and streamed['dataset_fingerprint'] != result['dataset_fingerprint']


# streams --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('shards', [1, 5])
def test_stream_counts_what_is_counted_in_memory(model, digit_files, shards):
    folder = digit_files(shards)
    local = evaluate(model, folder, batch_size=16, firing_images=200)
    streamed = evaluate(model, folder, batch_size=16, firing_images=200, streaming=True)
    assert steady(streamed, 'streaming', 'firing_rate', 'firing_rates') == steady(
        local, 'streaming', 'firing_rate', 'firing_rates')
    assert streamed['firing_rate'] == pytest.approx(local['firing_rate'], rel=1e-3)
    assert streamed['streaming'] and streamed['num_images'] == 200


@pytest.mark.parametrize('workers', [0, 2])
def test_every_image_has_one_reader(digit_files, workers):
    """Whoever reads: the chunks of all ranks and workers together are those of one, batch by batch."""
    config = dict(input_size=(1, 8, 8), mean=(.5,), std=(.5,), interpolation='bilinear', crop_pct=1.)
    for shards, streaming in ((1, False), (1, True), (3, True), (12, True)):
        images = open_images(digit_files(shards, 100 + shards), data_config=config, needs_labels=True,
                             streaming=streaming)

        def batches(world, workers=0, images=images, **kwargs):
            found = {}
            for rank in range(world):
                for batch in images.planned(Plan(4, 8, rank, world, workers, **kwargs)):
                    assert found.setdefault((batch.chunk, batch.start), batch) is batch, 'delivered twice'
            return found
        one = batches(1)
        assert sum(b.num for b in one.values()) == images.num_images == 100 + shards
        for world in ((2,) if workers else (2, 3, 5, 40)):
            other = batches(world, workers)
            assert other.keys() == one.keys()
            assert all(torch.equal(b.images[0], one[k].images[0]) and torch.equal(b.labels, one[k].labels)
                       and (b.ends_chunk, b.ends_shard) == (one[k].ends_chunk, one[k].ends_shard)
                       for k, b in other.items())
        done = {k[0] for k in list(one)[::3]}
        rest = batches(3, done=done, finished={0} if streaming and shards > 1 else set())
        assert {c for c, _ in rest} == {c for c, _ in one} - done - ({
            c for c, _ in one if c[0] == 0} if streaming and shards > 1 else set())


def test_rank_without_chunks_asks_nobody(digit_files):
    config = dict(input_size=(1, 8, 8), mean=(.5,), std=(.5,), interpolation='bilinear', crop_pct=1.)
    images = open_images(digit_files(1, 10), data_config=config, needs_labels=True)
    delivered = [list(images.planned(Plan(4, 8, rank, 3, workers=2), timeout=30.)) for rank in range(3)]
    assert [sum(batch.num for batch in batches) for batches in delivered] == [8, 2, 0]


def test_webdataset(model, tmp_path):
    source = open_images('digits', 'test', data_config=resolve_input_data_config(model)).dataset.source
    for shard in range(2):
        with tarfile.open(tmp_path / f'digits-validation-{shard:04d}.tar', 'w') as tar:
            for i in range(shard * 20, shard * 20 + 20):
                buffer = io.BytesIO()
                Image.fromarray(source.images[i]).save(buffer, 'png')
                for name, data in ((f'{i:06d}.png', buffer.getvalue()), (f'{i:06d}.cls', b'%d' % source.labels[i])):
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
        Image.fromarray(source.images[i]).save(tmp_path / 'val' / str(i) / 'a.png')
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


# preprocessing, precision, memory ------------------------------------------------------------------------------------

def test_overrides(model):
    result = evaluate(model, 'digits', num_images=32, img_size=12, crop_pct=0.9, interpolation='bicubic')
    assert (result['img_size'], result['crop_pct'], result['interpolation']) == (12, 0.9, 'bicubic')
    usual = evaluate(model, 'digits', num_images=32)
    assert (usual['img_size'], usual['crop_pct'], usual['interpolation']) == (8, 1.0, 'bilinear')
    assert usual['weights_sha256'] == result['weights_sha256'] and usual['nll'] != result['nll']
    assert model.patch_embed.img_size == (8, 8), 'the model itself is left alone'
    for wrong in (dict(img_size=9, crop_pct=2.), dict(interpolation='cubist'), dict(amp='int3'), dict(batch_size=0)):
        with pytest.raises(SFormerError):
            evaluate(model, 'digits', num_images=8, **wrong)


def test_mixed_precision_and_compile(model):
    half = evaluate(model, 'digits', num_images=64, amp='bfloat16', channels_last=True)
    assert half['amp'] == 'bfloat16' and half['top1'] > 90
    assert half['nll'] != evaluate(model, 'digits', num_images=64)['nll']
    assert not any(p.is_inference() for p in model.parameters()), 'the model can still be trained'
    assert model.patch_embed.proj.weight.is_contiguous(), 'the model itself is left alone'


def greedy(model, limit, layer=''):
    """A network that has no memory for more than so many images in a layer."""
    def check(module, args):
        if len(args[0]) > limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: ...")
    model = copy.deepcopy(model)
    model.get_submodule(layer).register_forward_pre_hook(check)
    return model


def test_out_of_memory(source, capsys):
    expected = evaluate(source, 'digits', batch_size=64, num_images=100)
    with pytest.raises(SFormerError, match='out of memory with batches of 64: .* --retry'):
        evaluate(greedy(source, 20), 'digits', batch_size=64)
    result = evaluate(greedy(source, 20), 'digits', batch_size=64, num_images=100, retry=True)
    assert result['batch_size'] == 16 and 'batches of 16 from now on' in capsys.readouterr().err
    assert (result['num_images'], result['top1']) == (100, expected['top1'])
    with pytest.raises(SFormerError, match='even one image does not fit'):
        evaluate(greedy(source, 0), 'digits', batch_size=4, retry=True)


def test_spikes_of_what_did_not_fit_are_not_counted(model):
    expected = evaluate(model, 'digits', batch_size=64, num_images=100)
    result = evaluate(greedy(model, 20, 'norm'), 'digits', batch_size=64, num_images=100, retry=True)
    assert result['batch_size'] == 16
    assert result['firing_rates'] == pytest.approx(expected['firing_rates'], rel=1e-3)


def test_source_of_its_own_is_prepared_like_the_model(model, source):
    result = evaluate(model, 'digits', num_images=64, source=source, img_size=12)
    assert result['img_size'] == 12 and result['agreement'] > 80


def test_processes_that_evaluate_different_things(model):
    class Different(Group):
        def gather(self, value, name):
            return [value, dict(value, dataset='another copy') if name == 'key' else value]
    with pytest.raises(SFormerError, match=r'do not evaluate the same \(dataset differ\)'):
        evaluate(model, 'digits', num_images=64, group=Different())


def test_a_group_counts_every_run_anew(model, digit_files):
    group, folder = Group(), digit_files(1, damaged=(3,))
    for _ in range(2):
        assert len(evaluate(model, folder, max_bad=1, group=group)['bad_images']) == 1


def test_speed_after_a_resumption_on_other_processes():
    from sformer.evaluation.engine import _result, _Subject
    score = ChunkScore()
    score.add(torch.eye(10), torch.arange(10)[:, None])
    record = dict(count=10, skipped=0, bad=[], networks=[score.record()], seconds=[8.], decode=4., preprocess=2.)
    config = dict(input_size=(1, 8, 8), crop_pct=1., interpolation='bilinear')
    subject = _Subject(torch.nn.Identity(), 0, None, Benchmark(None), False, 0, config)
    images = SimpleNamespace(name='x', split=None, fingerprint='', revision=None)
    result = _result(subject, images, [dict(record, world_size=8), dict(record, world_size=1)])
    assert (result['seconds'], result['decode_seconds'], result['images_per_second']) == (9., 4.5, 2.22)


def test_unreadable_images_are_counted_named_and_limited(model, digit_files):
    folder = digit_files(2, damaged=(3, 150))
    for streaming in (False, True):
        with pytest.raises(SFormerError, match='cannot read image 3 of '):
            evaluate(model, folder, streaming=streaming)
        with pytest.raises(SFormerError, match=r'cannot read image \d+ of .*--max-bad 1 is exceeded'):
            evaluate(model, folder, streaming=streaming, max_bad=1)
        result = evaluate(model, folder, streaming=streaming, max_bad=2)
        assert result['num_images'] == 198 and len(result['bad_images']) == 2
        assert all('not an image' in name for name in result['bad_images'])


# journal --------------------------------------------------------------------------------------------------------------

class StopError(Exception):
    pass


@pytest.mark.parametrize('streaming', [False, True])
def test_resumed_run_counts_the_same(model, digit_files, tmp_path, monkeypatch, streaming, capsys):
    folder, path = digit_files(3), tmp_path / 'journal'
    options = dict(streaming=streaming, batch_size=8)
    expected = evaluate(model, folder, **options)
    calls = []
    forward = engine._Run._forward

    def interrupt(self, batch, chunk):
        calls.append((batch.chunk, batch.start))
        if len(calls) == 14:
            raise StopError
        forward(self, batch, chunk)
    monkeypatch.setattr(engine._Run, '_forward', interrupt)
    with pytest.raises(StopError):
        evaluate(model, folder, journal=Journal(path), **options)
    first, calls[:] = list(calls), ['no interruption'] * 20
    file = next(path.glob('*/*.jsonl'))
    (file.parent / '0.jsonl').write_text('killed before it began')
    with open(file, 'a') as f:  # the kill came in the middle of a line
        f.write(file.read_text().splitlines()[-1][:-5])
    result = evaluate(model, folder, journal=Journal(path, resume=True), **options)
    again = set(first) & set(calls[20:])
    assert steady(result) == steady(expected)
    assert len(calls) - 20 < 26 and len(again) < 9, 'what was recorded is evaluated again'
    assert 'resuming after ' in capsys.readouterr().err


def test_journal_of_another_run(model, source, tmp_path):
    evaluate(model, 'digits', num_images=64, journal=Journal(tmp_path))
    for options in (dict(batch_size=32), dict(amp='bf16')):
        with pytest.raises(SFormerError, match='records another run .* differ.*without --resume'):
            evaluate(model, 'digits', num_images=64, **options, journal=Journal(tmp_path, resume=True))
    evaluate(model, 'digits', num_images=64, journal=Journal(tmp_path))
    assert len(list(tmp_path.glob('*/*.jsonl'))) == 1, 'starting over forgets'


def test_journals_of_several_runs(model, source, tmp_path, capsys):
    """Of other models or other images, on the way to the same results file."""
    runs = (model, {}), (source, {}), (model, dict(seed=1))
    journals = []
    for other, options in runs:
        journals.append(Journal(tmp_path, resume=True))
        evaluate(other, 'digits', num_images=64, **options, journal=journals[-1])
    assert len(list(tmp_path.glob('*/*.jsonl'))) == 3 and 'resuming' not in capsys.readouterr().err
    journals[1].remove()
    evaluate(model, 'digits', num_images=64, journal=Journal(tmp_path, resume=True))
    assert 'resuming after 64 of 64' in capsys.readouterr().err
    journals[0].remove()
    journals[2].remove()
    assert not tmp_path.exists()


# results files --------------------------------------------------------------------------------------------------------

def test_csv_keeps_rows_and_columns(model, tmp_path):
    path = tmp_path / 'sub' / 'r.csv'
    assert check_results_file(path) == 'csv' and not path.parent.exists()
    result = evaluate(model, 'digits', num_images=16)
    write_results(path, [result], 'csv')
    header = path.read_text().splitlines()[0].split(',')
    assert header[:9] == ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct',
                          'interpolation']
    assert {'weights_sha256', 'dataset_fingerprint', 'num_images', 'world_size', 'versions'} <= set(header)
    timm_file = tmp_path / 'timm.csv'
    timm_file.write_text('model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation,note\n'
                         '"a,b",81.5,18.5,95,5,22.05,224,0.9,bicubic,"kept, too"\n')
    write_results(timm_file, [result, result], 'csv')
    rows = list(csv.DictReader(open(timm_file, newline='')))
    assert len(rows) == 3 and rows[0]['model'] == 'a,b' and rows[0]['note'] == 'kept, too' and rows[0]['nll'] == ''
    assert float(rows[2]['top1']) == result['top1'] and rows[1]['note'] == ''
    assert json.loads(rows[1]['versions'])['timm'] == timm.__version__
    assert math.isclose(float(rows[1]['param_count']), result['param_count'])


def test_csv_with_many_unreadable_images(tmp_path):
    path = tmp_path / 'r.csv'
    for _ in range(2):
        write_results(path, [dict(model='m', top1=1., bad_images=['name' * 10] * 5000)], 'csv')
    assert len(path.read_text().splitlines()) == 3


def test_results_files_that_can_not_be(tmp_path):
    assert check_results_file(tmp_path / 'r') == 'json' and check_results_file(tmp_path / 'r.txt', 'csv') == 'csv'
    with pytest.raises(SFormerError, match="json or csv, not as 'xml'"):
        check_results_file(tmp_path / 'r.xml')
    with pytest.raises(OSError):
        check_results_file(tmp_path)
    for text in ('a,b\n1,2\n', 'model,top1\nx,1,2\n', 'model,top1\nx\n', '\x00\xff', 'model,top1,top1\n'):
        (tmp_path / 'foreign.csv').write_bytes(text.encode('latin-1'))
        with pytest.raises(SFormerError, match='foreign.csv'):
            check_results_file(tmp_path / 'foreign.csv')
    assert {p.name for p in tmp_path.iterdir()} == {'foreign.csv'}


# comparison -----------------------------------------------------------------------------------------------------------

def test_comparison_is_several_evaluations(model, source, monkeypatch):
    """With another preprocessing for one of them, and one pass over the images for all."""
    coarse = sformer.convert(source, 'digits', sformer.SFNConfig(levels=2), split='train')
    other = copy.deepcopy(source)
    other.pretrained_cfg = dict(other.pretrained_cfg, mean=(0.4,), interpolation='nearest', crop_pct=0.9)
    alone = [evaluate(m, 'digits', num_images=100) for m in (model, coarse, other)]
    reads, calls = [], []
    read = Digits.read
    monkeypatch.setattr(Digits, 'read', lambda self, i: reads.append(i) or read(self, i))
    call = engine._Network.__call__
    monkeypatch.setattr(
        engine._Network, '__call__', lambda self, *a, **k: calls.append(self.bypass) or call(self, *a, **k))
    together = evaluate_all([model, coarse, other], 'digits', num_images=100)
    assert [steady(r) for r in together] == [steady(r) for r in alone]
    assert len(reads) == 100 and sum(calls) == 2 and len(calls) == 8, 'the source of both, once per batch'
    assert len({r['nll'] for r in together}) == 3
