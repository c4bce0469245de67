"""Training of a detector's pyramid and heads on a backbone that is frozen, whose maps are kept on disk."""
import contextlib
import dataclasses
import hashlib
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.v2 import functional as F

from ..conversion.training_state import STATE_NAME, TrainingState
from ..data.batches import progress
from ..errors import SFormerError, check_flag, check_integer, check_number
from ..files import state_hash, write_aside
from .coco import CocoData

__all__ = ['TrainingConfig', 'remove_state', 'train_']

_logger = logging.getLogger(__name__)

DIVERGED = 2.  # times the loss of the first step


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a detector is trained: AdamW, the learning rate rises linearly and falls along a cosine (one cycle).

    Args:
        epochs: Passes over the images.
        batch_size: Images per step, all of one size.
        lr: Highest learning rate.
        weight_decay: Of AdamW.
        trained_blocks: Last blocks of the backbone that are trained, too; with any, no maps are kept.
        seed: Seed of the order and the mirroring of images, and of what the losses sample.
        amp: Autocast of what is trained to bfloat16, but for the last layer of the box head.

    Raises:
        ConfigError: If a value is out of its range; the message names it.
    """
    epochs: int = 12
    batch_size: int = 2
    lr: float = 5e-4
    weight_decay: float = 0.05
    trained_blocks: int = 0
    seed: int = 0
    amp: bool = False

    def __post_init__(self) -> None:
        check_integer(self, 'epochs', 1)
        check_integer(self, 'batch_size', 1)
        check_number(self, 'lr', 0, 100)
        check_number(self, 'weight_decay', 0)
        check_integer(self, 'trained_blocks', 0)
        check_integer(self, 'seed', 0, 2 ** 63 - 1)
        check_flag(self, 'amp')


def train_(
        detector: nn.Module,
        data: CocoData,
        config: TrainingConfig,
        directory: Path,
        device: torch.device | None = None,
        report: Callable[[str], None] = _logger.info,
) -> list[dict[str, float]]:
    """Train a detector, in place. After each epoch its state is written to `directory`, from where it goes on.

    Args:
        detector: As of `create_detector`.
        data: Images with annotations.
        config: How to train.
        directory: Folder for the state of the training and for the maps of a frozen backbone.
        device: Where to train.
        report: Called with a line about each epoch.

    Returns:
        Mean losses of every epoch of this run.

    Raises:
        SFormerError: If no object is annotated, a loss is NaN or infinite, or the state in `directory` is of another
            training.
    """
    _check_objects(data)
    model: FasterRCNN = detector.to(device or 'cpu').train()
    backbone = state_hash(model.backbone.vit.state_dict())
    _freeze_(model, config.trained_blocks)
    maps = None if config.trained_blocks else _Maps(model, directory)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    steps = sum(1 for _ in epoch_batches(data, config, 0))
    key = _digest([dataclasses.asdict(config), dataclasses.asdict(model.config), data.fingerprint, len(data), backbone])
    state = TrainingState(directory / STATE_NAME)
    done = state.open(key, parameters, optimizer)
    history: list[dict[str, float]] = []
    if done == config.epochs:
        return history
    scheduler = _schedule(optimizer, config.lr, steps * config.epochs, done * steps)
    for epoch in range(done, config.epochs):
        torch.manual_seed(config.seed + epoch)  # what the losses sample
        total: dict[str, float] = {}
        for batch in progress(epoch_batches(data, config, epoch), f'Epoch {epoch + 1} of {config.epochs}', steps):
            with _in_bfloat16(model, maps) if config.amp else contextlib.nullcontext():
                losses = _losses(model, data, batch, maps)
            optimizer.zero_grad()
            loss = _finite_sum(losses, epoch)
            if not state.history:
                state.history.append([loss.item()])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.)
            optimizer.step()
            scheduler.step()
            for name, value in losses.items():
                total[name] = total.get(name, 0.) + value.item() / steps
        history.append(total)
        report(f'epoch {epoch + 1}: ' + ', '.join(f'{name} {value:.4f}' for name, value in total.items()))
        state.save(epoch + 1)
    say_if_diverged(state.history[0][0], sum(history[-1].values()))
    return history


def say_if_diverged(begin: float, end: float) -> None:
    if end > DIVERGED * begin:
        _logger.warning(
            f'the training has diverged: the loss is {end:.3g} in its last epoch, and was {begin:.3g} in its first '
            f'step. Start over with a smaller learning rate (--lr).')


def _schedule(
        optimizer: torch.optim.Optimizer,
        lr: float,
        steps: int,
        done: int,
) -> torch.optim.lr_scheduler.LRScheduler:
    """One cycle; where a tenth of the steps is no more than one, it has nowhere to rise, and falls along the cosine."""
    if steps > 10:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=steps, pct_start=0.1, last_epoch=done - 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: (1 + math.cos(math.pi * i / steps)) / 2, last_epoch=done - 1)


def _check_objects(data: CocoData) -> None:
    if all(annotation.crowd for annotations in data.annotations.values() for annotation in annotations):
        raise SFormerError(f'{data.file} has no annotation of a single object, so there is nothing to learn from it.')


def _freeze_(model: FasterRCNN, trained_blocks: int) -> None:
    """Freeze the backbone but for its last blocks and the norm behind them."""
    vit = model.backbone.vit
    vit.requires_grad_(False)
    if trained_blocks:
        for module in (*vit.blocks[-trained_blocks:], vit.norm):
            module.requires_grad_(True)
    else:
        vit.eval()


Batch = list[tuple[int, bool]]  # ids of images, and whether they are mirrored


def epoch_batches(data: CocoData, config: TrainingConfig, epoch: int) -> Iterator[Batch]:
    """Batches of images of one size, so that none is padded to another's; in an order of their own in each epoch."""
    rng = random.Random(f'{config.seed} {epoch}')
    groups: dict[tuple[int, int], Batch] = {}
    for id, entry in data.images.items():
        groups.setdefault((entry.height, entry.width), []).append((id, rng.random() < 0.5))
    batches = []
    for group in groups.values():
        rng.shuffle(group)
        batches += [group[i:i + config.batch_size] for i in range(0, len(group), config.batch_size)]
    rng.shuffle(batches)
    yield from batches


def _losses(model: FasterRCNN, data: CocoData, batch: Batch, maps: '_Maps | None') -> dict[str, torch.Tensor]:
    """Losses of the parts of torchvision's detector, which are called as `GeneralizedRCNN` calls them."""
    device = next(model.parameters()).device
    images, targets = [], []
    for id, mirrored in batch:
        image, target = training_example(data, id, mirrored)
        images.append(image.to(device))
        targets.append({key: value.to(device) for key, value in target.items()})
    if maps is None:
        return model(images, targets)
    resized, targets = model.transform(images, targets)
    features = model.backbone.pyramid(maps(images, resized))
    proposals, losses = model.rpn(resized, features, targets)
    _, box_losses = model.roi_heads(features, proposals, resized.image_sizes, targets)
    return {**losses, **box_losses}


def _finite_sum(losses: dict[str, torch.Tensor], epoch: int) -> torch.Tensor:
    loss = torch.stack([*losses.values()]).sum()
    if not torch.isfinite(loss):
        raise SFormerError(f'the loss became {loss.item()} in epoch {epoch + 1}: lower the learning rate (--lr).')
    return loss


@contextlib.contextmanager
def _in_bfloat16(model: FasterRCNN, maps: '_Maps | None') -> Iterator[None]:
    """Let what is heavy compute in bfloat16 and give float32, in which boxes are decoded and matched: they take more
    than the 8 bits of bfloat16."""
    def wrapped(forward: Callable[..., object], device: str) -> Callable[..., object]:
        def run(*args: object) -> object:
            with torch.autocast(device, torch.bfloat16):
                out = forward(*args)
            return tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, out)
        return run

    heads = model.roi_heads
    parts = [model.backbone if maps is None else model.backbone.pyramid, model.rpn.head, heads.box_head]
    parts += [heads.mask_head, heads.mask_predictor] if model.config.masks else []
    device = next(model.parameters()).device.type
    try:
        for part in parts:
            part.forward = wrapped(part.forward, device)
        yield
    finally:
        for part in parts:
            part.__dict__.pop('forward', None)


def remove_state(directory: Path) -> None:
    """Remove what `train` left for a run that goes on."""
    (directory / STATE_NAME).unlink(missing_ok=True)
    for maps in directory.glob('maps-*'):
        shutil.rmtree(maps, ignore_errors=True)


def training_example(data: CocoData, id: int, mirrored: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image (3, H, W) and its target, mirrored or not."""
    image, target = data.image(id), data.target(id)
    if mirrored:
        image = F.horizontal_flip(image)
        target.update({key: F.horizontal_flip(target[key]) for key in ('boxes', 'masks') if key in target})
    return image, {key: value.as_subclass(torch.Tensor) for key, value in target.items()}


class _Maps:
    """Maps of a frozen backbone, computed once per picture and kept on disk in half precision, by its pixels: whatever
    the folder was used for before, no map is of another one."""

    def __init__(self, model: FasterRCNN, directory: Path):
        self.backbone = model.backbone
        key = _digest([state_hash(model.backbone.vit.state_dict()), dataclasses.asdict(model.config)])
        self.directory = directory / f'maps-{key}'
        self.directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, images: list[torch.Tensor], resized: ImageList) -> torch.Tensor:
        """Maps (B, C, h, w) of images, which were also resized and normalised."""
        return torch.stack([self._one(state_hash({'image': image}), pixels)
                            for image, pixels in zip(images, resized.tensors, strict=True)])

    @torch.no_grad()
    def _one(self, name: str, image: torch.Tensor) -> torch.Tensor:
        path = self.directory / f'{name}.safetensors'
        if not path.exists():
            found = self.backbone.features(image[None])[0]
            with write_aside(self.directory) as aside:
                save_file({'map': found.half().contiguous().cpu()}, aside / path.name)
        return load_file(path)['map'].to(image.device, image.dtype)


def _digest(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
