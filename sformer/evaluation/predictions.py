"""What models say of images that nobody has labelled, image by image."""
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_input_data_config

from ..conversion.sources import label_names_of, weights_tag
from ..data.image_files import ImageSource, name_of_image, read_rgb
from ..data.preprocessing import check_data_config
from ..errors import SFormerError, UnreadableImageError, enough_memory
from ..layers import shared_copy
from .networks import check_model, device_of, network_of

__all__ = ['Finding', 'Prediction', 'Reader', 'check_topk', 'class_names', 'origin_of_names', 'predict_classes']

IMAGENET_TAG = re.compile(r'(?<![a-z])in\d+k')  # as timm ends tags: `augreg_in21k_ft_in1k`


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A class that a model sees.

    Args:
        name: Name of the class; its index where the model has no names.
        index: Number of the class, from 0 on.
        probability: Softmax of its logit; of a detector, the score of the detection.
        box: Of a detector, x0, y0, x1, y1 in pixels of the image.
    """
    name: str
    index: int
    probability: float
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of an image.

    Args:
        image: Path of the image, or its number among pictures without one.
        found: Classes, the most probable first; empty if the image cannot be read.
        source: The same of the network that it is compared with; None without one.
        error: Why the image cannot be read; None if it can.
    """
    image: str
    found: tuple[Finding, ...] = ()
    source: tuple[Finding, ...] | None = None
    error: str | None = None

    @property
    def name(self) -> str | None:
        """Name of the most probable class; None if there is none."""
        return self.found[0].name if self.found else None

    @property
    def probability(self) -> float | None:
        """Its probability."""
        return self.found[0].probability if self.found else None


class Reader:
    """From an image of a user to a tensor (C, H, W) as a classifier expects it: upright, resized, cropped, normalised.

    Raises:
        SFormerError: If the preprocessing does not fit the model.
    """

    def __init__(self, model: nn.Module):
        config = resolve_input_data_config(model)
        size, _, _ = check_data_config(config)
        self.mode = 'L' if size[0] == 1 else 'RGB'
        self.transform = create_transform(**config, is_training=False)

    def __call__(self, image: ImageSource) -> torch.Tensor:
        """The tensor; an UnreadableImageError of an image that cannot be read."""
        return self.prepared(read_rgb(image))

    def prepared(self, picture: Image.Image) -> torch.Tensor:
        """The tensor of a picture in RGB."""
        return self.transform(picture.convert(self.mode))


def class_names(model: nn.Module) -> list[str]:
    """Names of a model's classes: those that its config states; WordNet's words where these are ImageNet's, or where
    its weights were trained for ImageNet; else their numbers."""
    return _names_and_origin(model)[0]


def origin_of_names(model: nn.Module) -> str:
    """Where names of classes are from, in words; empty where the model's config has them as they are."""
    return _names_and_origin(model)[1]


def _names_and_origin(model: nn.Module) -> tuple[list[str], str]:
    names, tag = label_names_of(model), weights_tag(model)
    subset = infer_imagenet_subset(model)  # goes by the number of classes, which others may have, too
    if subset and (names == ImageNetInfo(subset).label_names() if names else IMAGENET_TAG.search(tag)):
        info = ImageNetInfo(subset)
        why = 'for whose ids its config has' if names else f'which its weights were trained for ({tag})'
        return [info.index_to_description(index) for index in range(info.num_classes())], \
            f"WordNet's words of {subset}, {why}"
    if names:
        return names, ''
    return [str(index) for index in range(getattr(model, 'num_classes', 0))], \
        'none: numbers (sformer convert --label-names gives them names)'


def check_topk(topk: int) -> None:
    """Raise SFormerError unless a number of classes is one."""
    if not isinstance(topk, int) or isinstance(topk, bool) or topk < 1:
        raise SFormerError(f'topk is a number of classes, 1 or more, not {topk!r}.')


def predict_classes(
        model: nn.Module,
        source: nn.Module | None,
        images: Iterable[ImageSource],
        topk: int = 5,
        batch_size: int = 16,
) -> Iterator[Prediction]:
    """The most probable classes of each image. No more than a batch is in memory at a time.

    Args:
        model: Classifier; it is not changed.
        source: What it is compared with, which reads the same tensors; None for nothing.
        images: As of `sformer.data.image_files.image_sources`.
        topk: Number of classes.
        batch_size: Images at a time.

    Raises:
        UncalibratedError: If thresholds were never fitted.
        SFormerError: If the model has no classes.
    """
    model = network_of(model)
    check_model(model)
    read = Reader(model)
    names = class_names(model)
    device = device_of(model)
    networks = [shared_copy(network).eval() for network in (model, source) if network is not None]
    numbered = enumerate(images)
    while chunk := list(islice(numbered, batch_size)):
        called = [name_of_image(image, index) for index, image in chunk]
        tensors: dict[int, torch.Tensor] = {}
        errors: dict[int, str] = {}
        for place, (_, image) in enumerate(chunk):
            try:
                tensors[place] = read(image)
            except UnreadableImageError as e:
                errors[place] = str(e)
        answers = _answers(networks, [*tensors.values()], device, names, topk)
        found = dict(zip(tensors, answers, strict=True))
        for place, name in enumerate(called):
            if place in errors:
                yield Prediction(image=name, error=errors[place])
            else:
                mine, *others = found[place]
                yield Prediction(image=name, found=mine, source=others[0] if others else None)


def _answers(
        networks: Sequence[nn.Module],
        tensors: Sequence[torch.Tensor],
        device: torch.device,
        names: Sequence[str],
        topk: int,
) -> list[list[tuple[Finding, ...]]]:
    """Per image, what each network finds."""
    if not tensors:
        return []
    with torch.inference_mode(), enough_memory('take a smaller batch_size (--batch-size).'):
        batch = torch.stack(list(tensors)).to(device)
        shares = [network(batch).float().softmax(-1).cpu() for network in networks]
    best = [share.topk(min(topk, len(names))) for share in shares]
    return [[_findings(top.values[i], top.indices[i], names) for top in best] for i in range(len(tensors))]


def _findings(values: torch.Tensor, indices: torch.Tensor, names: Sequence[str]) -> tuple[Finding, ...]:
    return tuple(Finding(name=names[index], index=index, probability=value)
                 for value, index in zip(values.tolist(), indices.tolist(), strict=True))
