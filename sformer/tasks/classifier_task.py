"""Classification, by timm's models: the task of what no other claims."""
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..conversion import Conversion, another_source, calibration_batches, convert, warn_of_changes
from ..conversion.sources import CAME_ALONG, create_source, label_names_of
from ..data import ImageRequest
from ..data.image_files import ImageSource
from ..data.names import find_data
from ..errors import SFormerError
from ..evaluation import EvaluationConfig, check_replaceable, evaluate_all
from ..evaluation.figures import CLASSIFICATION
from ..evaluation.networks import device_of
from ..evaluation.predictions import Prediction, Reader, origin_of_names, predict_classes
from ..evaluation.schema import SOURCE, Result
from ..execution import export_onnx, export_safetensors, load_onnx
from ..execution.integer import IntegerReport
from ..execution.prepared import Rounding
from ..files import Json
from ..layers import named_neurons
from ..models import SFormerMixin
from ..neurons import FitConfig, SFNConfig
from ..profiling import compare_codings, pixels_of, spike_maps
from ..profiling.executed import CodingsCompared
from ..profiling.scales import shown_range
from ..saving import load_classifier, open_classifier, save_classifier
from ..saving.model_config import read_config
from .door import register_task
from .task import (
    OPTIONS,
    ConversionOptions,
    Description,
    EvaluationRequest,
    ExportOptions,
    Inputs,
    Look,
    Maps,
    Recorded,
    Task,
)

__all__ = ['Classification']

CLASSIFIER_USAGE = '''import sformer
import timm
from PIL import Image

model = timm.create_model({name!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.new('{mode}', {size})  # put yours here
logits = model(transform(image).unsqueeze(0))  # (1, {classes})'''


class Classification(Task):
    """Images to logits: SFormers, other timm models, and graphs that were exported of them."""
    name, key = 'classification', ''
    noun, title = 'classifier', 'vision transformer'
    library = 'timm'
    metric = 'accuracy'
    source_is_base = True
    verbs = ('baselines', 'benchmark', 'distill', 'page', 'search', 'sweep')
    options = {**OPTIONS, 'export': tuple(option for option in OPTIONS['export'] if option != 'image_size')}

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, SFormerMixin)

    def architecture(self, model: nn.Module) -> str:
        return vars(model)['pretrained_cfg']['architecture']

    def load(
            self,
            path: str | Path,
            revision: str | None = None,
            cache_dir: str | Path | None = None,
            **kwargs: object,
    ) -> nn.Module:
        return load_classifier(path, revision, cache_dir=cache_dir, **kwargs)

    def open(self, name: str) -> nn.Module:
        return open_classifier(name)

    def open_to_run(self, name: str, engine: str | None = None) -> nn.Module:
        return load_onnx(name, engine) if name.endswith('.onnx') else super().open_to_run(name, engine)

    def save(self, model: nn.Module, directory: str | Path, overwrite: bool = False) -> Path:
        return save_classifier(model, directory, overwrite)

    def convert(
            self,
            source: str,
            images: ImageRequest,
            config: SFNConfig,
            fit: FitConfig,
            command: str,
            options: ConversionOptions,
    ) -> nn.Module:
        trained = create_source(
            source, options.checkpoint, **options.model_kwargs,
            preprocessing={key: getattr(options, key) for key in ('mean', 'std', 'crop_pct', 'interpolation')})
        return convert(
            trained, images.dataset, config, fit, split=images.split, num_images=images.num_images,
            batch_size=options.batch_size, seed=images.seed, image_column=images.image_column,
            label_names=options.label_names, inplace=True, command=command)

    def remarks(self, model: nn.Module) -> list[str]:
        cfg: Json = vars(model)['pretrained_cfg']
        record: Conversion = vars(model)['conversion']
        names = label_names_of(model)
        classes = getattr(model, 'num_classes', 0)

        def where(key: str) -> str:
            return record.origins.get(key, CAME_ALONG)
        lines = [f'architecture {record.source}: {record.origins["architecture"]}; weights: {where("weights")}'] \
            if 'architecture' in record.origins else []
        lines.append(f'head of {classes} classes: {where("num_classes")}' if classes else
                     f'no head, features alone: {where("num_classes")}')
        if names:
            lines.append(f'classes: {", ".join(names[:5])}{" ..." if len(names) > 5 else ""}: {where("label_names")}')
        height, width = resolve_input_data_config(model)['input_size'][1:]
        lines.append(f'image size {height} x {width}: {where("img_size")}')
        mean, std = (f'{key} {" ".join(f"{value:.4g}" for value in cfg[key])}' for key in ('mean', 'std'))
        if where('mean') == where('std'):
            return [*lines, f'{mean}, {std}: {where("mean")}']
        return [*lines, f'{mean}: {where("mean")}', f'{std}: {where("std")}']

    def evaluate(self, names: Sequence[str], request: EvaluationRequest) -> list[Result]:
        engine = request.options['engine']
        assert engine is None or isinstance(engine, str)
        config = EvaluationConfig(**_settings(request), device=request.group.device)
        _check_engine(names, request.options)
        models = [self.open_to_run(name, engine if name.endswith('.onnx') else None) for name in names]
        if request.results_file and request.results_format == 'json' and not request.resume:
            check_replaceable(request.results_file, models, find_data(config.dataset).name)
        sources: list[bool | nn.Module] = [request.source] * len(models)
        if request.source_model:
            source = self.open(request.source_model)
            sources = [self.compared_with(model, source) for model in models]
        elif request.source:
            for name, model in zip(names, models, strict=True):
                warn_of_changes(name, model)
        return evaluate_all(models, config, sources=sources, group=request.group, journal=request.new_journal())

    def predict(
            self,
            model: nn.Module,
            source: nn.Module | None,
            images: Iterable[ImageSource],
            topk: int,
            batch_size: int,
    ) -> Iterator[Prediction]:
        return predict_classes(model, source, images, topk, batch_size)

    def origin_of_names(self, model: nn.Module) -> str:
        return origin_of_names(model)

    def compared_with(self, model: nn.Module, source: nn.Module) -> nn.Module:
        return another_source(model, source)

    def look(self, model: nn.Module, source: nn.Module | None, image: ImageSource, prediction: Prediction) -> Look:
        tensor = Reader(model)(image)
        pixels = pixels_of(model, tensor).clamp(0, 1).expand(3, -1, -1)
        spiking = any(True for _ in named_neurons(model))
        maps = spike_maps(model, tensor.to(device_of(model))) if spiking else {}
        spikes = torch.stack([*maps.values()]).sum(0).cpu() if maps else None
        limits = (0., 1.) if spikes is None else shown_range(spikes.flatten().tolist())
        return Look(pixels=pixels, drawn={'as the network sees it': pixels}, spikes=spikes, limits=limits,
                    unit='spikes per neuron, summed over blocks')

    def export(self, model: nn.Module, output: Path, options: ExportOptions) -> list[IntegerReport]:
        rounding = Rounding(
            split=options.split, num_images=options.num_images, seed=options.seed, image_column=options.image_column,
            max_error=options.max_error, portable=options.portable, command=options.command)
        if options.format == 'onnx':
            return export_onnx(model, output, options.calibration, spikes=options.spikes,
                               uint8_input=options.uint8_input, overwrite=options.overwrite, **rounding)
        for given, option in ((options.spikes, '--spikes'), (options.uint8_input, '--uint8-input')):
            if given:
                raise SFormerError(f'{option} is of graphs, and tensors are none: leave it out.')
        return export_safetensors(
            model, output, options.calibration, overwrite=options.overwrite, **rounding)

    def batches(self, model: nn.Module, images: ImageRequest, batch_size: int) -> tuple[Iterable[Inputs], Json]:
        return calibration_batches(model, images, batch_size, 'Counting')[:2]

    def executed(self, model: nn.Module, images: Inputs) -> CodingsCompared:
        assert isinstance(images, torch.Tensor)  # as its batches are
        return compare_codings(model, images)

    def maps(self, model: nn.Module, image: torch.Tensor) -> Maps:
        return pixels_of(model, image), spike_maps(model, image)

    def summary(self, result: Result) -> list[str]:
        lines = [f'{result["model"]} on {result["num_images"]} images of {result["dataset"]}'
                 + (f' ({result["split"]})' if result['split'] else ''),
                 f'  {CLASSIFICATION.said(result)}']
        if 'source_top1' in result:
            lines += [f'  source: {CLASSIFICATION.said(result, SOURCE)}',
                      f'  drop {result["source_top1"] - result["top1"]:+.2f} points   '
                      f'{CLASSIFICATION.compared(result)}']
        if result.get('activity') is not None:
            spikes = ', '.join(f'{n:.3f} {coding}' for coding, n in (result.get('spikes_per_neuron') or {}).items())
            lines.append(f'  activity {result["activity"]:.3f}' + (f'   spikes per neuron {spikes}' if spikes else ''))
        for key, what in (('skipped_images', 'without a label'), ('bad_images', 'unreadable')):
            number = len(result[key]) if key == 'bad_images' else result[key]
            lines += [f'  left out: {number} images {what}'] if number else []
        lines += [f'    {name}' for name in result['bad_images']]
        if result['num_passed_over']:
            names = ', '.join(result['passed_over'][:3]) + (' ...' if result['num_passed_over'] > 3 else '')
            lines.append(
                f'  passed over: {result["num_passed_over"]} files or folders that are no labelled images ({names})')
        loading = result['decode_seconds'] + result['preprocess_seconds']
        computing = result['seconds'] + result.get('source_seconds', 0.)
        return lines + [
            f'  {result["seconds"]:.1f} s, {result["images_per_second"]:.1f} images/s'
            + (f' on {result["world_size"]} processes' if result['world_size'] > 1 else ''),
            f'  decoding and preprocessing {100 * loading / (loading + computing):.1f} % of the work '
            f'({result["decode_seconds"]:.1f} s + {result["preprocess_seconds"]:.1f} s), '
            f'waited for {result["wait_seconds"]:.1f} s of {result["wall_seconds"]:.1f} s']

    def describe(self, folder: Path, model: nn.Module) -> Description:
        config = read_config(folder)
        return Description(
            config=config, architecture=config['architecture'],
            input_size=config.get('pretrained_cfg', {}).get('input_size', (3, 224, 224)),
            num_classes=config.get('num_classes', vars(model)['num_classes']))

    def hub_task(self, built: Json) -> tuple[str, str]:
        return 'image-classification', 'Image Classification'

    def source_in_words(self, built: Json, source: str) -> str:
        return source

    def recipe(self, record: Recorded) -> list[tuple[str, object]]:
        source = record.conversion.get('source')
        return [('input', ' x '.join(map(str, record.input_size))), ('classes', record.num_classes),
                *([('source', f'`{source}`')] if source else [])]

    def usage(self, record: Recorded) -> str:
        channels, height, width = record.input_size
        return CLASSIFIER_USAGE.format(
            name=record.load_name, mode='L' if channels == 1 else 'RGB', size=(width, height),
            classes=record.num_classes)


def _check_engine(names: Sequence[str], options: Mapping[str, object]) -> None:
    """Raise SFormerError for options that would be recorded and change nothing."""
    exported = [name for name in names if name.endswith('.onnx')]
    if options['engine'] and not exported:
        raise SFormerError('--engine is for models that `sformer export` wrote, which end in .onnx.')
    for option in ('amp', 'torchcompile', 'channels_last'):
        if exported and options[option]:
            raise SFormerError(f'{exported[0]} computes as it was exported: leave out --{option.replace("_", "-")}.')


def _settings(request: EvaluationRequest) -> Json:
    """Fields of an evaluation's config."""
    images, options = request.images, request.options
    config = {name: value for name, value in options.items() if name not in ('amp', 'amp_dtype', 'engine')}
    return dict(
        config, dataset=images.dataset, split=images.split, num_images=images.num_images, seed=images.seed,
        by_position=request.by_position, max_bad=request.max_bad, timeout=request.group.timeout,
        amp=options['amp_dtype'] if options['amp'] else None)


register_task(Classification())
