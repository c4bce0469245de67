"""COCO metrics of detectors, on one process or many.

Images go through one at a time, so what is detected in one does not depend on the others, nor on how many processes
share the work; the metrics are those of pycocotools.
"""
import contextlib
import dataclasses
import io
import math
import sys
import time
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN

from ..conversion import warn_of_changes
from ..conversion.record import library_versions
from ..data import ImageRequest
from ..data.batches import progress
from ..errors import SFormerError, UncalibratedError, alone
from ..evaluation import Journal, check_same
from ..evaluation.figures import DETECTION, precision_figures
from ..evaluation.labels import match_names
from ..evaluation.launch import Group
from ..evaluation.networks import device_of
from ..evaluation.schema import Result
from ..files import Json, state_hash
from ..layers import is_calibrated, named_neurons, placed, shared_copy, source_view, uncalibrated, unwrapped
from .coco import CocoData
from .masks import Code, encode, mask_tools

__all__ = ['check_calibrated', 'check_evaluable', 'coco_metrics', 'detect', 'evaluate_detector']


class FoundObject(TypedDict):
    """What was detected, as COCO's results have it."""
    category_id: int
    bbox: list[float]
    score: float
    segmentation: NotRequired[Code]
    image_id: NotRequired[int]


Detections = list[FoundObject]


class Detected(TypedDict):
    """What each network detected in an image, and how long it took: a line of the journal. `chunk` begins with the
    index of the image."""
    chunk: list[int]
    found: dict[str, Detections]
    seconds: dict[str, float]


@torch.inference_mode()
def detect(detector: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a detector finds in an image (3, H, W) in [0, 1], as torchvision has it: `boxes` (N, 4), `labels`, `scores`
    (N) and `masks` (N, 1, H, W) in [0, 1] if it segments. Its mode is not changed."""
    found = in_eval_mode(detector)([image.to(device_of(detector))])[0]
    return {key: value.cpu() for key, value in found.items()}


def in_eval_mode(detector: nn.Module) -> nn.Module:
    """A detector if it is in eval mode, else a view of it that is."""
    trains = any(module.training for module in detector.modules())
    return shared_copy(detector).eval() if trains else detector


def evaluate_detector(
        detector: nn.Module,
        data: CocoData,
        *,
        source: bool | nn.Module = True,
        num_images: int | None = None,
        seed: int = 0,
        by_position: bool = False,
        group: Group | None = None,
        journal: Journal | None = None,
) -> Result:
    """Evaluate a detector and, of an SFormer, its source alongside. Neither is changed, nor moved.

    Args:
        detector: As of `load_detector`.
        data: Images with annotations.
        source: Whether the source is evaluated; or another detector in its place.
        num_images: Size of a random subset of the images; all if None.
        seed: Seed of the subset.
        by_position: Take categories for the same in the order of their ids, whatever names they have.
        group: Processes of this run; this one alone if None.
        journal: Where to record what was detected, for a run that goes on where this one ended.

    Returns:
        Figures in percent as of `coco_metrics`, for `boxes` and, of a detector that segments, `masks`; those of the
        source as `source_boxes` and `source_masks`; seconds, and what was evaluated on what.

    Raises:
        UncalibratedError: If an SFormer has default thresholds.
        SFormerError: If the categories of the data are not those of the detector, by their names, or there are fewer
            images.
    """
    model: FasterRCNN = unwrapped(detector)
    source = source if isinstance(source, bool) else unwrapped(source)
    if source is True and group is None:
        warn_of_changes('the detector', model)
    group = group or Group()
    check_evaluable(model, data, by_position)
    every = list(data.images)
    wanted = ImageRequest(dataset=str(data.file), num_images=num_images, seed=seed)
    ids = [every[i] for i in wanted.choose(len(every))]
    networks = {'': shared_copy(placed(model, group.device)).eval()}
    if isinstance(source, nn.Module):
        networks['source_'] = shared_copy(placed(source, group.device)).eval()
    elif source and any(True for _ in named_neurons(model)):
        networks['source_'] = source_view(networks['']).eval()
    key: Json = dict(
        models=[state_hash(model.state_dict())], sources=[*networks], dataset=data.fingerprint, num_images=len(ids),
        seed=seed if len(ids) < len(every) else None, config=repr(dataclasses.asdict(model.config)),
        by_position=by_position, device=group.device.type,
        **{name: library_versions().get(name) for name in ('sformer', 'torch', 'timm')})
    if isinstance(source, nn.Module):
        key['source'] = state_hash(source.state_dict())
    check_same(dict(key, recorded=journal is not None), group)
    categories = {prefix: _categories_of(network, data, by_position) for prefix, network in networks.items()}
    records = _detect_all(networks, data, ids, categories, key, group, journal)
    figures: Result = {}
    kinds = ('boxes', 'masks') if model.config.masks else ('boxes',)
    for prefix in networks:
        found: Detections = [{**detection, 'image_id': ids[r['chunk'][0]]}
                             for r in records for detection in r['found'][prefix]]
        for kind in kinds:
            figures[f'{prefix}{kind}'] = coco_metrics(data, found, ids, kind, max(100, model.config.max_detections))
        figures[f'{prefix}seconds'] = round(sum(r['seconds'][prefix] for r in records), 3)
    return DETECTION.make(
        {}, dataset_fingerprint=data.fingerprint, num_images=len(ids), seed=seed, weights_sha256=key['models'][0],
        param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 4), device=group.device.type,
        world_size=group.world_size, versions=library_versions(), problems=data.problems, **figures)


def check_calibrated(detector: nn.Module) -> None:
    """Raise UncalibratedError if a detector has neurons whose thresholds were never fitted."""
    if any(True for _ in named_neurons(detector)) and not is_calibrated(detector):
        raise UncalibratedError(f'{uncalibrated(detector)}; convert it with convert_detector().')


def check_evaluable(detector: nn.Module, data: CocoData, by_position: bool = False) -> None:
    """Raise what `evaluate_detector` raises of a detector that cannot be evaluated on these images."""
    check_calibrated(detector)
    _categories_of(detector, data, by_position)


def _categories_of(detector: FasterRCNN, data: CocoData, by_position: bool) -> list[int]:
    """Ids of categories in the data by the label, from 1, that a detector gives them."""
    known = [detector.config.categories[id] for id in sorted(detector.config.categories)]
    ids = sorted(data.categories)
    names = [data.categories[id] for id in ids]
    labels = [*range(len(ids))] if by_position else match_names(names, known, str(data.file), 'the detector')
    if len(ids) != len(known):
        which = '' if by_position else f': it has no {next(n for i, n in enumerate(known) if i not in labels)!r}'
        raise SFormerError(f'{data.file} has {len(ids)} categories, the detector finds {len(known)}{which}.')
    return [id for _, id in sorted(zip(labels, ids, strict=True))]


def _detect_all(
        networks: dict[str, nn.Module],
        data: CocoData,
        ids: list[int],
        categories: dict[str, list[int]],
        key: Json,
        group: Group,
        journal: Journal | None,
) -> list[Detected]:
    """Records of all images by their index, from all processes, which take them in turns."""
    done: list[Detected] = journal.open(key, group) if journal is not None else []
    if done and group.is_main:
        print(f'resuming after {len(done)} of {len(ids)} images', file=sys.stderr)
    left = sorted(set(range(len(ids))) - {record['chunk'][0] for record in done})
    records: list[Detected] = []
    mine = left[group.rank::group.world_size]
    with contextlib.closing(journal) if journal is not None else contextlib.nullcontext():
        for i in progress(mine, 'Evaluating', len(mine)):
            group.tick()
            image = data.image(ids[i])
            record = Detected(chunk=[i, 0], found={}, seconds={})
            for prefix, network in networks.items():
                start = time.perf_counter()
                found = detect(network, image)
                record['seconds'][prefix] = time.perf_counter() - start
                record['found'][prefix] = _as_coco(found, categories[prefix])
            if journal is not None:
                journal.add(record)
            records.append(record)
        shared = group.gather(records)
    records = sorted([*done, *(r for part in shared for r in part)], key=lambda r: r['chunk'])
    if [record['chunk'][0] for record in records] != list(range(len(ids))):
        raise SFormerError(f'{data.file}: {len(records)} images were counted, not {len(ids)}.')
    return records


def _as_coco(found: dict[str, torch.Tensor], categories: Sequence[int]) -> Detections:
    """Detections as COCO's results have them, as plain data."""
    boxes = found['boxes'].clone()
    boxes[:, 2:] -= boxes[:, :2]
    detections: Detections = [
        FoundObject(category_id=categories[label - 1], bbox=box, score=score) for box, label, score in zip(
            boxes.tolist(), found['labels'].tolist(), found['scores'].tolist(), strict=True)]
    if 'masks' in found:
        for detection, mask in zip(detections, found['masks'][:, 0] > 0.5, strict=True):
            code = encode(mask.numpy())
            detection['segmentation'] = dict(size=[*code['size']], counts=code['counts'].decode('ascii'))
    return detections


def coco_metrics(
        data: CocoData,
        detections: Detections,
        ids: Sequence[int],
        kind: str = 'boxes',
        max_detections: int = 100,
) -> Result:
    """COCO's average precision by pycocotools, in percent.

    Args:
        data: Images with annotations.
        detections: As COCO's results have them.
        ids: Images that were evaluated.
        kind: `boxes` or `masks`.
        max_detections: Detections per image that count; COCO's figures count 100.

    Returns:
        `mAP` (mean over IoU of 0.50 to 0.95), `mAP50`, `mAP75`, and the same by category in `per_class`; None where
        there is no object.
    """
    mask_tools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    places = {id: place for place, id in enumerate(ids, start=1)}
    labels = {category: label for label, category in enumerate(sorted(data.categories), start=1)}
    results = [dict(found, image_id=places[found['image_id']], category_id=labels[found['category_id']])
               for found in detections]
    with alone, contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth = COCO()
        truth.dataset = _truth(data, places, labels)
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, 'bbox' if kind == 'boxes' else 'segm')
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, math.inf]], ['all']
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval['precision'][:, :, :, 0, 0]  # IoU, recall, category

    return dict(precision_figures(precision), per_class={
        data.categories[category]: precision_figures(precision[:, :, i])
        for i, category in enumerate(sorted(data.categories))})


def _truth(data: CocoData, places: dict[int, int], labels: dict[int, int]) -> Json:
    """What is annotated, as COCO has it, numbered from 1: pycocotools takes an object with the id 0 for none, and
    numbers that are large for others."""
    annotations: list[Json] = []
    for id, place in places.items():
        for annotation in data.annotations[id]:
            _, _, width, height = annotation.box
            entry = dict(
                id=len(annotations) + 1, image_id=place, category_id=labels[annotation.category_id],
                bbox=[*annotation.box], area=width * height, iscrowd=int(annotation.crowd))
            annotations.append(entry if annotation.mask is None else dict(entry, segmentation=annotation.mask))
    return dict(
        images=[dict(id=place, height=data.images[id].height, width=data.images[id].width)
                for id, place in places.items()],
        annotations=annotations,
        categories=[dict(id=label, name=data.categories[category]) for category, label in labels.items()])
