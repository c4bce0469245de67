"""Object detection and instance segmentation, by torchvision's detectors."""
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN

from ..conversion import network_inside, warn_of_changes
from ..data import GENERATED, ImageRequest
from ..data.image_files import ImageSource, read_rgb
from ..data.names import find_data
from ..detection import (
    CocoData,
    DetectorConfig,
    convert_detector,
    detect,
    detector_names,
    evaluate_detector,
    export_detector,
    image_batches,
    load_detector,
    load_detector_onnx,
    open_coco,
    save_detector,
)
from ..detection.coco import pixels_of_picture
from ..detection.detector_entrypoints import detector_name, is_detector_name
from ..detection.detector_evaluation import check_evaluable
from ..detection.detector_folders import DETECTOR_KEY, read_detector_config
from ..detection.detector_predictions import predict_objects
from ..detection.drawing import draw_detections, enlarged, token_activity
from ..errors import SFormerError
from ..evaluation import check_replaceable
from ..evaluation.figures import DETECTION, PRECISION
from ..evaluation.predictions import Finding, Prediction
from ..evaluation.schema import SOURCE, Result, in_line
from ..execution.integer import IntegerReport
from ..files import Json
from ..layers import named_neurons
from ..neurons import FitConfig, SFNConfig
from ..profiling.scales import share_range
from .door import register_task
from .task import ConversionOptions, Description, EvaluationRequest, ExportOptions, Inputs, Look, Recorded, Task

__all__ = ['Detection']

DETECTOR_USAGE = '''import sformer
import torch

detector = sformer.load_model({name!r})
image = torch.rand{size}  # put yours here: RGB in [0, 1], of any size
with torch.inference_mode():
    found = detector([image])[0]  # boxes (N, 4) in pixels x0, y0, x1, y1, labels (N) from 1, scores (N){masks}
categories = sorted(detector.config.categories.items())  # id and name of a label: categories[label - 1]'''

LISTED = 20  # categories that a card names


class Detection(Task):
    """Images to boxes, and masks of what is in them; images are in COCO format."""
    name, key = 'detection', DETECTOR_KEY
    noun = title = 'detector'
    heading = 'Detectors, for torchvision.models.get_model. Weights: none'
    metric = 'mean_average_precision'
    verbs = ('detect show',)
    options = {'export': ('image_size',)}

    def names(self) -> Sequence[str]:
        return detector_names()

    def owns(self, model: nn.Module) -> bool:
        return isinstance(getattr(model, 'config', None), DetectorConfig)

    def architecture(self, model: FasterRCNN) -> str:
        return detector_name(model.config, any(True for _ in named_neurons(model)))

    def load(
            self,
            path: str | Path,
            revision: str | None = None,
            cache_dir: str | Path | None = None,
            **kwargs: object,
    ) -> nn.Module:
        return load_detector(path, revision, cache_dir, **kwargs)

    def open(self, name: str) -> nn.Module:
        if name.endswith('.onnx'):
            raise SFormerError(f'{name} is the graph of a detector, which `sformer predict` runs; for everything else '
                               f'name the folder that it was exported of.')
        return super().open(name)

    def open_to_run(self, name: str, engine: str | None = None) -> nn.Module:
        return load_detector_onnx(name, engine) if name.endswith('.onnx') else super().open_to_run(name, engine)

    def save(self, model: nn.Module, directory: str | Path, overwrite: bool = False) -> Path:
        return save_detector(model, directory, overwrite)

    def convert(
            self,
            source: str,
            images: ImageRequest,
            config: SFNConfig,
            fit: FitConfig,
            command: str,
            options: ConversionOptions,
    ) -> nn.Module:
        if is_detector_name(source):
            raise SFormerError(f'{source} has no weights: sformer detect train makes a detector that has.')
        detector = self.open(source)
        calibration, split = _unlabelled(images)
        return convert_detector(
            detector, calibration, config, fit, num_images=images.num_images, seed=images.seed,
            name=Path(find_data(images.dataset).name).name, split=split, inplace=True, command=command)

    def evaluate(self, names: Sequence[str], request: EvaluationRequest) -> list[Result]:
        images, file = request.images, request.results_file
        dataset, split = Path(find_data(images.dataset).name).name, images.split or 'val'
        detectors: list[FasterRCNN] = [self.open(name) for name in names]
        if file and request.results_format == 'json' and not request.resume:
            check_replaceable(file, detectors, dataset)
        masks = any(detector.config.masks for detector in detectors)
        data = open_coco(images.dataset, split, masks, skip_bad=bool(request.max_bad))
        if len(data.problems) > request.max_bad:
            raise SFormerError(f'{data.file}: {len(data.problems)} images and annotations are not usable, more than '
                               f'--max-bad {request.max_bad}.')
        for detector in detectors:
            check_evaluable(detector, data, request.by_position)
        source: bool | nn.Module = request.source
        if request.source_model:
            other = self.open(request.source_model)
            check_evaluable(other, data, request.by_position)
            inside: FasterRCNN = network_inside(other)
            if masks and not inside.config.masks:
                raise SFormerError(f'{request.source_model} finds no masks to compare with.')
            source = inside
        for name, detector in zip(names, detectors, strict=True):
            if source is True:
                warn_of_changes(name, detector)
        return [dict(
            model=type(detector).__name__, dataset=dataset, split=split, **evaluate_detector(
                detector, data, source=source, num_images=images.num_images, seed=images.seed,
                by_position=request.by_position, group=request.group, journal=request.new_journal()))
            for detector in detectors]

    def predict(
            self,
            model: nn.Module,
            source: nn.Module | None,
            images: Iterable[ImageSource],
            topk: int,
            batch_size: int,
    ) -> Iterator[Prediction]:
        return predict_objects(model, source, images, topk)

    def compared_with(self, model: FasterRCNN, source: FasterRCNN) -> nn.Module:
        inside: FasterRCNN = network_inside(source)
        if [*inside.config.categories.values()] != [*model.config.categories.values()]:
            raise SFormerError('the source to compare the detector with finds other categories.')
        return inside

    def look(
            self,
            model: FasterRCNN,
            source: FasterRCNN | None,
            image: ImageSource,
            prediction: Prediction,
    ) -> Look:
        pixels = pixels_of_picture(read_rgb(image))
        drawn = {}
        if source is not None:
            drawn['source'] = _pictured(source, pixels, detect(source, pixels), prediction.source or ())
        spikes, limits = None, (0., 1.)
        if any(True for _ in named_neurons(model)):
            found, spikes = token_activity(model, pixels)
            limits = share_range(spikes.flatten().tolist())
            drawn['SFormer'] = _pictured(model, pixels, found, prediction.found)
        else:
            drawn[self.noun] = _pictured(model, pixels, detect(model, pixels), prediction.found)
        large, _ = enlarged(pixels)
        return Look(pixels=large, drawn=drawn, spikes=spikes, limits=limits, unit='share of neurons that fire')

    def export(self, model: nn.Module, output: Path, options: ExportOptions) -> list[IntegerReport]:
        return export_detector(
            model, output, options.image_size, max_error=options.max_error, portable=options.portable,
            overwrite=options.overwrite, command=options.command)

    def batches(self, model: nn.Module, images: ImageRequest, batch_size: int) -> tuple[Iterable[Inputs], Json]:
        data, split = _unlabelled(images)
        return image_batches(model, data, images.num_images, images.seed), dict(
            name=Path(find_data(images.dataset).name).name, split=split, seed=images.seed,
            fingerprint=getattr(data, 'fingerprint', None))

    def summary(self, result: Result) -> list[str]:
        lines = [f'{result["model"]} on {result["num_images"]} images of {result["dataset"]} ({result["split"]})']
        for kind in ('boxes', 'masks'):
            if kind not in result:
                continue
            found, source = result[kind], result.get(f'{SOURCE}{kind}')
            lines.append(f'  {kind}: {in_line(PRECISION, found)}')
            if source:
                drops = '   '.join(f'{name} {source[name] - found[name]:+.2f}' for name in PRECISION
                                   if None not in (source[name], found[name]))
                lines += [f'  source: {in_line(PRECISION, source)}', f'  drop: {drops}']
            lines += [f'    {name}: {in_line(PRECISION, figures)}' for name, figures in found['per_class'].items()]
        lines += [f'  left out: {problem}' for problem in result['problems'][:5]]
        return [*lines, f'  {result["seconds"]:.1f} s'
                + (f', source {result["source_seconds"]:.1f} s' if 'source_seconds' in result else '')]

    def describe(self, folder: Path, model: FasterRCNN) -> Description:
        config = read_detector_config(folder)
        built = config[DETECTOR_KEY]
        return Description(
            config=config, architecture=self.architecture(model), input_size=[3, *built['image_size']],
            num_classes=len(built['categories']), built=built)

    def hub_task(self, built: Json) -> tuple[str, str]:
        return ('image-segmentation', 'Instance Segmentation') if built['masks'] else \
            ('object-detection', 'Object Detection')

    def source_in_words(self, built: Json, source: str) -> str:
        return f'a {"Mask" if built["masks"] else "Faster"} R-CNN with a simple feature pyramid on {source}'

    def recipe(self, record: Recorded) -> list[tuple[str, object]]:
        built = record.built
        names = [*built['categories'].values()]
        strides = ', '.join(f'{16 / scale:g}' for scale in built['scales'])
        return [
            ('input', f'RGB in [0, 1], fitted into {" x ".join(map(str, built["image_size"]))} pixels'),
            ('detects', ', '.join(names) if len(names) <= LISTED else f'{len(names)} categories'),
            ('backbone', f'`{built["backbone"]}`'),
            ('pyramid', f'{built["channels"]} channels at strides of {strides} pixels'),
            ('detections per image, at most', built['max_detections'])]

    def usage(self, record: Recorded) -> str:
        masks = ', masks (N, 1, H, W)' if record.built['masks'] else ''
        return DETECTOR_USAGE.format(name=record.load_name, size=tuple(record.input_size), masks=masks)

    def card_rows(self, result: Result) -> list[list[str]]:
        key, figure = next(iter(PRECISION.items()))
        sides = DETECTION.has_source(result)
        rows = []
        for kind in ('boxes', 'masks'):
            own, theirs = ((result.get(f'{side}{kind}') or {}).get('per_class') or {} for side in ('', SOURCE))
            for category in own if len(own) <= LISTED else ():
                values = [figures.get(category, {}).get(key) for figures in (theirs, own)][not sides:]
                if any(value is not None for value in values):
                    cells = ['' if value is None else f'{value:.{figure.digits}f}' for value in values]
                    rows.append([f'{kind}, {category}: {figure.label} [{figure.unit}]', *cells])
        return rows

    def picture_title(self, picture: Json) -> str:
        what = 'Detections of the source, of the SFormer, and the share of neurons that fire at each patch' \
            if picture.get('side_by_side') else 'Detections'
        return f'{what}: {picture["image"]}'


def _pictured(
        detector: FasterRCNN,
        pixels: torch.Tensor,
        found: dict[str, torch.Tensor],
        said: Sequence[Finding],
) -> torch.Tensor:
    """Those of the objects that were found which a prediction names, over the image in [0, 1]."""
    least = min((finding.probability for finding in said), default=1.)
    return draw_detections(detector, pixels, found, least) / 255


def _unlabelled(images: ImageRequest) -> tuple[CocoData | str, str | None]:
    """Images that no annotation is read of, and the split that they are of."""
    if images.dataset == GENERATED:
        return images.dataset, None
    split = images.split or 'train'
    return open_coco(images.dataset, split, skip_bad=True, objects=False), split


register_task(Detection())
