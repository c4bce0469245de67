"""`sformer detect train | show`."""
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RunInterruptedError, SFormerError
from .options import MAX_IMG_SIZE, MAX_SEED

__all__ = ['commands']

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
        checkpoint: Annotated[Path | None, typer.Option(
            help='Weights of the backbone; its published ones if not given')] = None,
        split: Annotated[str, typer.Option(help='Split to train on')] = 'train',
        masks: Annotated[bool, typer.Option(help='Segment what is detected: Mask R-CNN, not Faster R-CNN')] = False,
        image_size: Annotated[tuple[int, int], typer.Option(
            min=32, max=MAX_IMG_SIZE, help='Height and width that images are fitted into, multiples of 32')
        ] = (512, 512),
        finest_stride: Annotated[int, typer.Option(
            help='Of the levels of the pyramid, in pixels: 4, 8 or 16; small objects need 4')] = 4,
        channels: Annotated[int, typer.Option(min=1, max=4096, help='Channels of the pyramid')] = 128,
        window_size: Annotated[int | None, typer.Option(
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
        device: Annotated[str | None, typer.Option(help='cpu, cuda, ...; an accelerator if there is one')] = None,
        skip_bad: SkipBad = False,
        overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace a model that is there')] = False,
) -> None:
    """Train a detector on a timm backbone. A run that was ended goes on where its last epoch ended."""
    from ..conversion.training_state import STATE_NAME
    from ..detection import DetectorConfig, TrainingConfig, create_detector, open_coco, train_
    from ..detection.training import remove_state
    from ..evaluation.launch import Group
    from ..saving import check_vacant
    from ..tasks import save_model
    check_vacant(output, overwrite)
    if finest_stride not in (4, 8, 16):
        raise SFormerError(f'--finest-stride is 4, 8 or 16, not {finest_stride}.')
    images = open_coco(data, split, masks, skip_bad)
    config = DetectorConfig(
        backbone, images.categories, masks, image_size, channels,
        tuple(16 / stride for stride in (4, 8, 16, 32) if stride >= finest_stride), max_detections=max_detections,
        window_size=window_size)
    detector = create_detector(config, checkpoint, seed)
    how = TrainingConfig(epochs, batch_size, lr, trained_blocks=trained_blocks, seed=seed, amp=amp)
    try:
        train_(detector, images, how, output, Group(device).device, report=print)
    except KeyboardInterrupt:
        if (output / STATE_NAME).exists():
            raise RunInterruptedError('interrupted. The same command continues after the last whole epoch.') from None
        raise
    save_model(detector, output, overwrite)
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
    from ..detection.detector_evaluation import check_calibrated
    from ..detection.drawing import draw_file
    from ..detection.pictures import check_picture
    from ..tasks import open_model
    check_picture(output, image, overwrite)
    detector = open_model(model, 'detect show')
    check_calibrated(detector)
    draw_file(detector, image, output, min_score, not alone)
    print(f'{model} on {image}: {output}')
