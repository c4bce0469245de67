"""`sformer detect train | show`, and what `convert` and `evaluate` do with detectors."""
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Callable, Dict, List, Optional, Tuple

import typer

from ..errors import SFormerError
from .arguments import command_line
from .options import MAX_IMG_SIZE, MAX_SEED, EvaluationOptions

if TYPE_CHECKING:
    from ..neurons import FitConfig, SFNConfig

__all__ = [
    'commands', 'run_conversion', 'detection_summary', 'detector_batches', 'refuse_options', 'run_detections',
]

commands = typer.Typer(
    help='Object detection and instance segmentation.', rich_markup_mode='markdown',
    epilog='Example: `sformer detect train --help`')

Data = 'Folder in COCO format: images in SPLIT/, annotations in SPLIT.json or where COCO has them'
SkipBad = Annotated[bool, typer.Option(
    '--skip-bad', help='Leave out images and annotations that are not usable, instead of an error')]


@commands.command('train', epilog='Example: `sformer detect train --backbone vit_small_patch16_224 --data coco/ -o d/`')
def train_detector(
        backbone: Annotated[str, typer.Option(help='timm model: a plain ViT or EVA')],
        data: Annotated[Path, typer.Option(help=Data)],
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for the detector')],
        checkpoint: Annotated[Optional[Path], typer.Option(
            help='Weights of the backbone (safetensors); its published ones if not given')] = None,
        split: Annotated[str, typer.Option(help='Split to train on')] = 'train',
        masks: Annotated[bool, typer.Option(help='Segment what is detected: Mask R-CNN, not Faster R-CNN')] = False,
        image_size: Annotated[Tuple[int, int], typer.Option(
            min=32, max=MAX_IMG_SIZE, help='Height and width that images are fitted into, multiples of 32')
        ] = (512, 512),
        finest_stride: Annotated[int, typer.Option(
            help='Of the levels of the pyramid, in pixels: 4, 8 or 16; small objects need 4')] = 4,
        channels: Annotated[int, typer.Option(min=1, max=4096, help='Channels of the pyramid')] = 128,
        window_size: Annotated[Optional[int], typer.Option(
            min=1, help='Side of the windows that most blocks attend within, in tokens (ViTDet: 14); if not given, all '
            'attend globally')] = None,
        max_detections: Annotated[int, typer.Option(min=1, max=10 ** 4, help='Detections per image')] = 100,
        epochs: Annotated[int, typer.Option(min=1, max=10 ** 5, help='Passes over the images')] = 12,
        batch_size: Annotated[int, typer.Option(min=1, max=1024, help='Images per step')] = 2,
        lr: Annotated[float, typer.Option(min=0, help='Highest learning rate')] = 5e-4,
        trained_blocks: Annotated[int, typer.Option(
            min=0, max=1000, help='Last blocks of the backbone that are trained; the others are frozen')] = 0,
        amp: Annotated[bool, typer.Option('--amp', help='Mixed precision: what is trained, in bfloat16')] = False,
        seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of weights, images and sampling')] = 0,
        device: Annotated[Optional[str], typer.Option(help='cpu, cuda, ...; an accelerator if there is one')] = None,
        allow_pickle: Annotated[bool, typer.Option('--allow-pickle', help='Load a pickled checkpoint')] = False,
        skip_bad: SkipBad = False,
        overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace a model that is there')] = False,
) -> None:
    """Train a detector on a timm backbone. A run that was ended goes on where its last epoch ended."""
    from ..detection import DetectorConfig, TrainingConfig, create_detector, open_coco, save_detector
    from ..detection import train as train_detector
    from ..detection.training import remove_state
    from ..evaluation.launch import Group
    from ..saving import check_vacant
    check_vacant(output, overwrite)
    images = open_coco(data, split, masks, skip_bad)
    config = DetectorConfig(
        backbone, images.categories, masks, image_size, channels,
        tuple(16 / stride for stride in (4, 8, 16, 32) if stride >= finest_stride), max_detections=max_detections,
        window_size=window_size)
    detector = create_detector(config, checkpoint, allow_pickle, seed)
    how = TrainingConfig(epochs, batch_size, lr, trained_blocks=trained_blocks, seed=seed, amp=amp)
    train_detector(detector, images, how, output, Group(device).device, report=print)
    save_detector(detector, output, overwrite)
    remove_state(output)
    print(f'detector of {", ".join(images.categories.values())} on {backbone}, trained on {len(images)} images, saved '
          f'to {output}')


@commands.command(epilog='Example: `sformer detect show det/ image.jpg -o found.png`')
def show(
        model: Annotated[str, typer.Argument(help='Folder of a detector, or hf-hub:ID')],
        image: Annotated[Path, typer.Argument(help='Image')],
        output: Annotated[Path, typer.Option('--output', '-o', help='PNG or JPEG file to write')],
        min_score: Annotated[float, typer.Option(min=0, max=1, help='Least score of what is drawn')] = 0.5,
        alone: Annotated[bool, typer.Option(
            '--alone', help='Not beside the source, nor with the activity of patches')] = False,
        overwrite: Annotated[bool, typer.Option(
            '--overwrite', help='Replace a file that is there; a PNG of this command is replaced anyway')] = False,
) -> None:
    """Draw what a detector finds; of an SFormer between its source and the share of neurons that fire per patch."""
    from ..detection import load_detector
    from ..detection.detector_evaluation import check_calibrated
    from ..detection.drawing import draw_file
    from ..detection.pictures import check_picture
    check_picture(output, image, overwrite)
    detector = load_detector(model)
    check_calibrated(detector)
    draw_file(detector, image, output, min_score, not alone)
    print(f'{model} on {image}: {output}')


def run_conversion(
        source: str,
        output: Path,
        configs: Tuple['SFNConfig', 'FitConfig'],
        calibration: str,
        split: Optional[str],
        num_images: int,
        seed: int,
        overwrite: bool,
) -> None:
    """What `sformer convert` does with a detector."""
    from ..detection import convert_detector, detector_names, load_detector, save_detector
    from ..saving import check_vacant
    check_vacant(output, overwrite)
    if source in detector_names() and not Path(source).is_dir():
        raise SFormerError(f'{source} has no weights: sformer detect train makes a detector that has.')
    detector = load_detector(source)
    images, split = unlabelled(calibration, split)
    converted: Any = convert_detector(
        detector, images, *configs, num_images=num_images, seed=seed, name=Path(calibration).name, split=split,
        command=command_line())
    save_detector(converted, output, overwrite)
    used = converted.conversion.calibration
    print(f'{source} -> {output}: N = {configs[0].levels}, calibrated on {used.num_images} {used.name} images')


def unlabelled(name: str, split: Optional[str]) -> Tuple[Any, Optional[str]]:
    """Images that no annotation is read of, and the split that they are of."""
    from ..data import GENERATED
    from ..detection import open_coco
    if name == GENERATED:
        return name, None
    return open_coco(name, split or 'train', skip_bad=True, objects=False), split or 'train'


def detector_batches(
        name: str,
        dataset: str,
        split: Optional[str],
        num_images: int,
        seed: int,
) -> Tuple[Any, Any, Dict[str, Any]]:
    """A detector, batches of images as it reads them, and what a record says of these."""
    from ..detection import image_batches, load_detector
    detector = load_detector(name)
    images, split = unlabelled(dataset, split)
    return detector, image_batches(detector, images, num_images, seed), dict(
        name=Path(dataset).name, split=split, seed=seed, fingerprint=getattr(images, 'fingerprint', None))


def refuse_options(name: str, **given: bool) -> None:
    """Raise SFormerError for the first option that is given and says nothing to a detector.

    Args:
        name: The detector.
        given: Whether each option is given, by its name in Python.
    """
    for option, is_given in given.items():
        if is_given:
            raise SFormerError(f'{name} is a detector: leave out --{option.replace("_", "-")}.')


# of `sformer evaluate`, what says something to a detector
DETECTION_OPTIONS = {'dataset', 'split', 'num_images', 'seed', 'source', 'source_model', 'results_file',
                     'results_format', 'resume', 'device', 'num_processes', 'timeout', 'max_bad', 'by_position'}


def run_detections(
        names: List[str],
        options: EvaluationOptions,
        group: Any,
        new_journal: Callable[[], Any],
) -> List[Dict[str, Any]]:
    """Evaluate detectors with COCO's metrics, one after another.

    Raises:
        SFormerError: If a detector or the data cannot be used, or an option says nothing to a detector.
    """
    from ..conversion import network_inside, warn_of_changes
    from ..detection import evaluate_detector, load_detector, open_coco
    from ..detection.detector_evaluation import check_evaluable
    from ..evaluation import check_replaceable, check_results_file
    refuse_options(names[0], **{
        field.name: getattr(options, field.name) != field.default for field in dataclasses.fields(options)
        if field.name not in DETECTION_OPTIONS})
    file, dataset = options.results_file, Path(options.dataset).name
    if file and check_results_file(file, options.results_format) != 'json':
        raise SFormerError(f'results of a detector are written as JSON, not to {file}.')
    detectors: List[Any] = [load_detector(name) for name in names]
    if file and not options.resume:
        check_replaceable(file, detectors, dataset)
    masks = any(detector.config.masks for detector in detectors)
    data = open_coco(options.dataset, options.split or 'val', masks, skip_bad=bool(options.max_bad))
    if len(data.problems) > options.max_bad:
        raise SFormerError(f'{data.file}: {len(data.problems)} images and annotations are not usable, more than '
                           f'--max-bad {options.max_bad}.')
    for detector in detectors:
        check_evaluable(detector, data, options.by_position)
    source: Any = options.source
    if options.source_model:
        source = load_detector(options.source_model)
        check_evaluable(source, data, options.by_position)
        source = network_inside(source)
        if masks and not source.config.masks:
            raise SFormerError(f'{options.source_model} finds no masks to compare with.')
    for name, detector in zip(names, detectors, strict=True):
        if source is True:
            warn_of_changes(name, detector)
    return [dict(
        model=type(detector).__name__, dataset=dataset, split=options.split or 'val', **evaluate_detector(
            detector, data, source=source, num_images=options.num_images, seed=options.seed, group=group,
            by_position=options.by_position, journal=new_journal()))
        for detector in detectors]


def detection_summary(result: Dict[str, Any]) -> List[str]:
    """Lines that say what the evaluation of a detector found."""
    from ..evaluation.figures import PRECISION
    from ..evaluation.schema import SOURCE, in_line
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
