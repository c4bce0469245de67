"""Benchmarks: which labels count as right, and which classes a model may choose from.

* ImageNet-1K: Russakovsky et al., arXiv 1409.0575.
* ImageNet-ReaL: Beyer et al., 'Are we done with ImageNet?', arXiv 2006.07159. Several labels per image, or none.
* ImageNet-V2: Recht et al., arXiv 1902.10811. The classes of ImageNet-1K.
* ImageNet-A: Hendrycks et al., arXiv 1907.07174; ImageNet-R: arXiv 2006.16241. 200 classes each, and only their logits
  are compared.

The lists of classes and the ReaL labels are those that timm ships.
"""
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch.nn as nn
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset
from timm.utils.misc import natural_key

from ..conversion.sources import label_names_of
from ..errors import ConfigError, SFormerError

__all__ = [
    'BENCHMARKS', 'Benchmark', 'check_benchmark', 'match_names', 'model_class_names', 'resolve_benchmark',
]

_logger = logging.getLogger(__name__)

BENCHMARKS = ('imagenet-1k', 'imagenet-real', 'imagenet-v2', 'imagenet-a', 'imagenet-r')

_SYNSET = re.compile(r'n\d{8}')
_VALIDATION = re.compile(r'ILSVRC2012_val_(\d{8})')


class RealLabels:
    """ReaL labels of the ImageNet validation images, by the number in their file names."""

    def __init__(self):
        self.labels: dict[str, list[int]] = RealLabelsImagenet(range(50_000)).real_labels

    def __call__(self, label: int | None, key: str | None) -> Sequence[int]:
        found = _VALIDATION.search(key or '')
        labels = self.labels.get(f'{found.group()}.JPEG') if found else None
        if labels is None:
            raise SFormerError(
                f'ReaL labels go by file names like ILSVRC2012_val_00000001.JPEG, and an image is called {key!r}.')
        return labels


@dataclass
class Benchmark:
    """How to score a model on a data set.

    Args:
        name: One of `BENCHMARKS`, None for a data set with labels of its own.
        label_map: Class of each label, as an index among the compared logits; None for the labels themselves.
        classes: Logits that are compared, as indices; None for all of them.
    """
    name: str | None
    label_map: list[int] | None = None
    classes: list[int] | None = None

    @property
    def labels(self) -> Callable[[int | None, str | None], Sequence[int]] | None:
        """What labels images, where it is not their label."""
        return RealLabels() if self.name == 'imagenet-real' else None


def check_benchmark(name: str | None) -> None:
    """Raise ConfigError unless there is a benchmark of this name, or none is named."""
    if name is not None and name not in BENCHMARKS:
        raise ConfigError(f'no benchmark {name!r}, but: {", ".join(BENCHMARKS)}.')


def match_names(names: Sequence[str], known: Sequence[str], whose: str, of: str) -> list[int]:
    """Which of the known names of classes each name is: the same or, one to one, the same but for case, what separates
    words (blanks, `_`, `-`) and how accents are composed.

    Args:
        names: Names of a data set.
        known: Names of a model.
        whose: Who has `names`, for errors.
        of: Who has `known`.

    Raises:
        SFormerError: If a name is none of the known ones, or one of several; names the first.
    """
    count, given = Counter(known), {*names}
    exact = {name: i for i, name in enumerate(known) if count[name] == 1}
    if ([*map(_plain_name, names)] == [*map(_plain_name, known)]
            and all(exact.get(name, i) == i for i, name in enumerate(names))):
        return [*range(len(known))]  # two may have one name, but each is in its place
    alike: dict[str, list[int]] = {}
    for i, name in enumerate(known):
        if name not in exact or name not in given:
            alike.setdefault(_plain_name(name), []).append(i)
    found: dict[int, str] = {}
    for name in names:
        those = [exact[name]] if name in exact else alike.get(_plain_name(name), [])
        if len(those) != 1 or those[0] in found:
            some = ', '.join(map(str, known[:5])) + (' ...' if len(known) > 5 else '')
            raise SFormerError(
                f'{whose} has a class {name!r}, which is no class of {of} ({some}), or not of it alone. Are classes '
                f'the same by their position, whatever their names? --by-position (by_position=True) says so.')
        found[those[0]] = name
    return [*found]


def _plain_name(name: str) -> str:
    """A name without case, with one blank between words, accents composed."""
    folded = unicodedata.normalize('NFC', unicodedata.normalize('NFC', str(name)).casefold())
    return ' '.join(re.split(r'[\s_\-]+', folded)).strip()


def resolve_benchmark(
        name: str | None,
        model: nn.Module,
        dataset: str,
        class_names: list[str] | None,
        by_position: bool = False,
) -> Benchmark:
    """Match the labels of a data set with the classes of a model.

    Names of classes decide where both sides have them, as of `match_names`; else the numbers of classes have to agree.

    Args:
        name: One of `BENCHMARKS`; None finds ImageNet-A and -R by their classes.
        model: Classifier.
        dataset: What the user calls the data set, for errors.
        class_names: Class names of the data set by label, None where unknown.
        by_position: Take label i for class i, whatever their names.

    Raises:
        SFormerError: If the label sets do not match.
    """
    num_classes: int = getattr(model, 'num_classes', None) or len(class_names or [])
    if name is None and class_names is not None and len(class_names) == 200 and not by_position:
        name = next((b for b in ('imagenet-a', 'imagenet-r') if sorted(class_names) == subset_synsets(b)), None)
    if name in ('imagenet-a', 'imagenet-r'):
        return _subset(name, model, dataset, class_names)
    if name is not None:
        _check_thousand(name, num_classes, dataset, class_names)
    if name == 'imagenet-real' or class_names is None:
        return Benchmark(name)
    if len(class_names) > num_classes:
        raise SFormerError(
            f'{dataset} has label {len(class_names) - 1}, the model has {num_classes} classes: '
            f'this is not the data set that it was trained for.')
    return Benchmark(name, None if by_position else _classes_of_labels(model, num_classes, dataset, class_names))


def _check_thousand(name: str, num_classes: int, dataset: str, class_names: list[str] | None) -> None:
    """Raise SFormerError unless what is scored by a benchmark of ImageNet-1K has its 1000 classes."""
    if name == 'imagenet-real':
        if num_classes != 1000:
            raise SFormerError(f'ReaL labels are of 1000 classes, the model has {num_classes}.')
    elif class_names is not None:
        if len(class_names) != 1000:
            raise SFormerError(f'{name} has 1000 classes, {dataset} has {len(class_names)}.')
    elif num_classes != 1000:
        raise SFormerError(f'{name} has 1000 classes, the model has {num_classes}.')


def _classes_of_labels(
        model: nn.Module,
        num_classes: int,
        dataset: str,
        class_names: list[str],
) -> list[int] | None:
    """Class of a model that each label stands for, by names; None if labels are the numbers of classes."""
    names = model_class_names(model)
    if names and sorted(names) == sorted(class_names):
        pass  # they decide, numbers too: many tools sort 10 before 2, and name classes so
    elif sorted(class_names) == sorted(map(str, range(num_classes))):
        names = [str(i) for i in range(num_classes)]  # classes named by their numbers, sorted by whatever rule
    elif names and all(map(_SYNSET.fullmatch, names)) and not all(map(_SYNSET.fullmatch, class_names)):
        names = _words_of(names, class_names)
    if names:
        classes = match_names(class_names, names, dataset, 'the model')
        return classes if classes != list(range(num_classes)) else None
    if len(class_names) < num_classes:
        raise SFormerError(
            f'{dataset} has {len(class_names)} classes ({", ".join(class_names[:3])} ...), the model has '
            f'{num_classes}, and their names do not tell which is which.')
    by_text = sorted(class_names)
    if class_names != by_text and class_names == sorted(class_names, key=natural_key):
        first = next(i for i, name in enumerate(class_names) if name != by_text[i])
        _logger.warning(
            f'the model does not say what its classes are called, so class {first} is taken for {class_names[first]!r} '
            f'of {dataset}, whose classes are sorted by their numbers. Where it was trained by torchvision or '
            f'transformers, it is {by_text[first]!r}: name its classes in this order (convert --label-names).')
    return None


def _subset(name: str, model: nn.Module, dataset: str, class_names: list[str] | None) -> Benchmark:
    names, synsets = model_class_names(model), subset_synsets(name)
    if names is None or not set(synsets) <= set(names):
        raise SFormerError(f'{name} needs a model of ImageNet classes, this one has {model.num_classes} others.')
    if class_names is None or sorted(class_names) != synsets:
        have = 'no class names' if class_names is None else f'{len(class_names)} others'
        raise SFormerError(f'{name} has 200 classes with names like {synsets[0]}, {dataset} has {have}.')
    return Benchmark(name, [synsets.index(n) for n in class_names], [names.index(n) for n in synsets])


def subset_synsets(name: str) -> list[str]:
    """Sorted WordNet ids of ImageNet-A or -R."""
    return (files('timm.data') / '_info' / f'{name.replace("-", "_")}_synsets.txt').read_text().split()


def _words_of(synsets: list[str], class_names: list[str]) -> list[str] | None:
    """What classes of ImageNet are called where data have names of them: WordNet's words, or the first of these, but
    for those that data call by their numbers. None if their names are of others: a classifier is taken for one of
    ImageNet by its number of classes."""
    info, given = ImageNetInfo(), [*map(_plain_name, class_names)]
    try:
        words = [info.label_name_to_description(synset, detailed=False) for synset in synsets]
    except KeyError:  # of no synset of WordNet's
        return None
    numbered = {*class_names}
    spellings = [[synset if synset in numbered else word for synset, word in zip(synsets, said, strict=True)]
                 for said in (words, [word.partition(',')[0] for word in words])]
    best = max(spellings, key=lambda names: len({*map(_plain_name, names)} & {*given}))
    plain = [*map(_plain_name, best)]
    common = {*plain} & {*given}
    if 2 * len(common) < len(given):
        return None
    if len(given) == len(plain) and all(a == b for a, b in zip(given, plain, strict=True) if a in common):
        return class_names  # two are called crane, and some have other names elsewhere, but each is in its place
    return best


def model_class_names(model: nn.Module) -> list[str] | None:
    """Names of a model's classes: those in its config, a list or a mapping from their numbers, or the WordNet ids of
    ImageNet classifiers; None if unknown."""
    names = label_names_of(model)
    if names:
        return names
    subset = infer_imagenet_subset(model)
    try:
        return ImageNetInfo(subset).label_names() if subset else None
    except AssertionError:
        return None
