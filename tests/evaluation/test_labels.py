"""Benchmarks: which labels count as right."""
import copy
import unicodedata

import datasets
import pytest
import timm
import torch
import torch.nn as nn
from evaluation_tools import all_images, class_folders, png
from timm.data import ImageNetInfo, RealLabelsImagenet, resolve_input_data_config

from sformer import SFormerError, evaluate
from sformer.data import open_images
from sformer.evaluation.labels import RealLabels, match_names, resolve_benchmark, subset_synsets
from sformer.evaluation.predictions import class_names, origin_of_names

SYNSETS = ImageNetInfo('imagenet-1k').label_names()


def logits_of(model, folder):
    x, y = all_images(model, folder)
    with torch.inference_mode():
        return model(x), y


def test_imagenet_a_and_r_compare_200_classes(classifier, tmp_path):
    for name in ('imagenet-a', 'imagenet-r'):
        synsets = subset_synsets(name)
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


def test_names_that_are_numbers_come_before_numbers(classifier):
    """Image folders of the Hub and of torchvision sort 10 before 2, and so are classes of what was trained on them."""
    by_text = sorted(map(str, range(12)))
    model = Knowing(by_text, [], label_names=by_text)
    numbers = [*map(str, range(12))]
    assert resolve_benchmark(None, model, 'x', numbers).label_map == [by_text.index(name) for name in numbers]
    model = Knowing([*'3120'], [], label_names=[*'3120'])
    assert resolve_benchmark(None, model, 'x', [*'0123']).label_map == [3, 1, 2, 0]


def test_an_order_that_is_only_guessed_is_said(caplog):
    """A model without names: timm sorts class_10 after class_2, torchvision before it."""
    names = [f'class_{i}' for i in range(1, 13)]
    model = Knowing(names, [])
    assert resolve_benchmark(None, model, 'x', names).label_map is None
    assert "class 1 is taken for 'class_2' of x" in caplog.text and "it is 'class_10': name" in caplog.text
    caplog.clear()
    resolve_benchmark(None, model, 'x', names, by_position=True)
    resolve_benchmark(None, model, 'x', [f'class_{i:02}' for i in range(12)])
    assert not caplog.text


@pytest.mark.parametrize('every', [2, 3, 1000])
def test_synsets_and_words_in_one_data_set(classifier, every):
    """Each is one class of ImageNet; they were scored by position, 0.1 % right."""
    words = ImageNetInfo('imagenet-1k').label_descriptions()
    mixed = [word if i % every == 1 else synset for i, (synset, word) in enumerate(zip(SYNSETS, words, strict=True))]
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    assert resolve_benchmark(None, classifier, 'x', [mixed[i] for i in order]).label_map == order
    assert resolve_benchmark(None, classifier, 'x', [mixed[i] for i in order[:10]]).label_map == order[:10]


def test_label_sets_that_do_not_match(classifier, model, tmp_path):
    with pytest.raises(SFormerError, match='has 2 classes .* the model has 1000, and their names'):
        evaluate(classifier, class_folders(tmp_path / 'two', ['cat', 'dog']))
    with pytest.raises(SFormerError, match='no benchmark .imagenet-z., but: imagenet-1k'):
        evaluate(model, 'digits', benchmark='imagenet-z')
    with pytest.raises(SFormerError, match='imagenet-v2 has 1000 classes, digits has 10'):
        evaluate(model, 'digits', benchmark='imagenet-v2')
    with pytest.raises(SFormerError, match='imagenet-1k has 1000 classes, the model has 10'):
        resolve_benchmark('imagenet-1k', model, 'rows', None)
    with pytest.raises(SFormerError, match='imagenet-a needs a model of ImageNet classes, this one has 10'):
        evaluate(model, 'digits', benchmark='imagenet-a')
    with pytest.raises(SFormerError, match='imagenet-r has 200 classes with names like n0'):
        evaluate(classifier, str(tmp_path / 'two'), benchmark='imagenet-r')
    with pytest.raises(SFormerError, match='ReaL labels are of 1000 classes'):
        evaluate(model, 'digits', benchmark='imagenet-real')


def write_validation(folder, numbers, shards=3):
    """Images named as those of the ImageNet validation set, with these numbers."""
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
    result = evaluate(classifier, f'imagenet-real={folder}', streaming=streaming, batch_size=2)
    assert (result['dataset'], result['streaming']) == ('imagenet-real', streaming)
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


# names of classes that are not the same, letter by letter ------------------------------------------------------------

class Knowing(nn.Module):
    """Knows each class of `class_folders` by the grey of its images, in an order of its own."""

    def __init__(self, names, folders, **cfg):
        super().__init__()
        self.num_classes = len(names)
        levels = {folder: i * 37 / 255 for i, folder in enumerate(folders)}
        self.levels = nn.Parameter(torch.tensor([levels.get(name, 9.) for name in names]))
        self.pretrained_cfg = dict(architecture='knowing', input_size=(1, 8, 8), mean=(0.,), std=(1.,), crop_pct=1.,
                                   interpolation='bilinear', num_classes=len(names), **cfg)

    def forward(self, x):
        return -(x.mean((1, 2, 3))[:, None] - self.levels).abs()


CAFE = 'caf\u00e9'
SAME = {
    'in another order': (['zebra', 'dog', 'cat'], ['cat', 'dog', 'zebra']),
    'another case': (['Zebra', 'dog', 'CAT'], ['cat', 'Dog', 'zebra']),
    'separators': (['hot dog', 'ice_cream', 'pop-corn'], ['hot_dog', 'ice-cream', 'pop corn']),
    'accents': ([unicodedata.normalize('NFD', CAFE), 'tea', 'bar'], ['bar', CAFE, 'tea']),
    'some of them': (['zebra', 'dog', 'cat', 'eel'], ['Cat', 'eel']),
    'the same but for case, swapped': (['dog', 'Dog', 'cat'], ['Dog', 'dog', 'cat']),
    'the same but for case, twice': (['Dog', 'dog', 'cat'], ['CAT', 'Dog', 'dog']),
}


@pytest.mark.parametrize('case', SAME)
def test_names_that_are_alike(case, tmp_path):
    """By position these were right on none or on a third of the images, without a word."""
    names, folders = SAME[case]
    by_plain = {match_names([folder], names, '', '')[0]: folder for folder in folders}
    model = Knowing([by_plain.get(i, 'none') for i in range(len(names))], folders, label_names=names)
    assert evaluate(model, class_folders(tmp_path / 'x', folders))['top1'] == 100


def test_names_that_are_the_same_exactly_come_first():
    assert match_names(['Dog', 'doG', 'cat'], ['dog', 'Dog', 'cat'], '', '') == [1, 0, 2]
    assert match_names(['crane', 'CRANE', 'cat'], ['crane', 'crane', 'cat'], '', '') == [0, 1, 2]  # each in its place


NOT_THE_SAME = {
    'shifted': (['a', 'b', 'c'], ['b', 'c', 'd'], "'d'"),
    'a plural': (['zebra', 'dog', 'cat'], ['cat', 'dogs', 'zebra'], "'dogs'"),
    'alike to two': (['Dog', 'dOg', 'cat'], ['DOG', 'cat', 'eel'], "'DOG'"),
    'two alike to one': (['d\u00f6g', 'cat', 'eel'], ['D\u00f6g', 'do\u0308g', 'cat'], "'D.+g'|'d.+g'"),
    'none': (['x', 'y', 'z'], ['cat', 'dog', 'eel'], "'cat'"),
}


@pytest.mark.parametrize('case', NOT_THE_SAME)
def test_names_that_are_not(case, tmp_path):
    names, folders, named = NOT_THE_SAME[case]
    model, folder = Knowing(folders, sorted(folders), label_names=names), class_folders(tmp_path / 'x', sorted(folders))
    with pytest.raises(SFormerError, match=rf'x has a class ({named}), which is no class of the model \({names[0]}, .* '
                                           r'--by-position \(by_position=True\)'):
        evaluate(model, folder)
    order = open_images(folder, data_config=resolve_input_data_config(model)).class_names
    right = sum(a == b for a, b in zip(folders, order, strict=True))
    assert evaluate(model, folder, by_position=True)['top1'] == pytest.approx(100 * right / 3, abs=1e-3)


def test_names_that_nobody_states(tmp_path):
    """A model that says no names is trained on folders in the order of their names."""
    folder = class_folders(tmp_path / 'x', ['a', 'b', 'c'])
    assert evaluate(Knowing([*'abc'], [*'abc']), folder)['top1'] == 100
    mapped = Knowing([*'cab'], [*'abc'], label_names={'0': 'c', '1': 'a', '2': 'b'})  # as timm has it, too
    assert evaluate(mapped, folder)['top1'] == 100


def test_imagenet_in_words(classifier):
    """The Hub's copy names classes by WordNet's words; own classes that happen to be a thousand have no such names."""
    words = ImageNetInfo('imagenet-1k').label_descriptions()
    spelt = [{'crane': 'crane2'}.get(word, word) if i > 500 else word for i, word in enumerate(words)]
    for names in (words, spelt, [f'thing {i}' for i in range(1000)]):
        assert resolve_benchmark(None, classifier, 'x', names).label_map is None
    some = [words[i] for i in (7, 500, 999)]
    assert resolve_benchmark(None, classifier, 'x', some).label_map == [7, 500, 999]
    first = [words[i].partition(',')[0].upper().replace(' ', '_') for i in (500, 7)]
    assert resolve_benchmark(None, classifier, 'x', first).label_map == [500, 7]
    with pytest.raises(SFormerError, match="has a class 'crane'"):  # sorted by name, whose two cranes are anybody's
        resolve_benchmark(None, classifier, 'x', sorted(words))
    unknown = Knowing(['n00000001', 'n00000002'], [], label_names=['n00000001', 'n00000002'])
    assert resolve_benchmark(None, unknown, 'x', ['a', 'b']).label_map is None
    stated = Knowing(SYNSETS, [], label_names=SYNSETS)  # as a model of the Hub does
    assert resolve_benchmark(None, stated, 'x', some).label_map == [7, 500, 999]
    with pytest.raises(SFormerError, match='has a class .n00000000., which is no class'):
        resolve_benchmark(None, classifier, 'x', ['n00000000', *SYNSETS[1:]])


def test_words_of_imagenet_only_where_weights_are_of_it(classifier):
    """A thousand classes may be of anything."""
    words = ImageNetInfo('imagenet-1k').label_descriptions()
    for said, names, origin in (
            (dict(tag='augreg_in21k_ft_in1k'), words,
             "WordNet's words of imagenet-1k, which its weights were trained for (augreg_in21k_ft_in1k)"),
            (dict(label_names=SYNSETS), words, "WordNet's words of imagenet-1k, for whose ids its config has"),
            (dict(tag='plankton1k'), [*map(str, range(1000))], 'none: numbers (sformer convert --label-names '),
            (dict(), [*map(str, range(1000))], 'none: numbers'),
            (dict(tag='x_in1k', label_names=SYNSETS[::-1]), SYNSETS[::-1], '')):
        model = copy.copy(classifier)
        model.pretrained_cfg = {**{k: v for k, v in classifier.pretrained_cfg.items() if k != 'tag'}, **said}
        assert class_names(model) == names
        assert origin_of_names(model).startswith(origin) and bool(origin) == bool(origin_of_names(model))
