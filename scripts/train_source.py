"""Train a small source network: a plain timm ViT, before its conversion to an SFormer.

    python scripts/train_source.py digits -o OUT
    python scripts/train_source.py vit_micro_cifar10 --data CIFAR10_DIR -o OUT [--epochs 300] [--resume]

OUT receives RECIPE.safetensors (a timm state dict, float32), RECIPE.json (the measured accuracy and what it takes to
repeat it) and RECIPE.ckpt (the last finished epoch). The weights are those of the last epoch: the test images are
seen once, after training, and select nothing.

The seed and the epoch alone determine all randomness, and the step alone the learning rate, so a checkpoint carries
tensors and an epoch number, and a resumed run repeats the uninterrupted one.
"""
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, random_seed
from torch import nn

from sformer.data.names import find_data
from sformer.data.origins import Digits

console = Console()


@dataclass(frozen=True)
class Augmentation:
    """Training augmentation, applied to whole batches.

    Args:
        shift: Largest translation, in pixels; a plain crop where nothing rotates or scales.
        rotate: Largest rotation, in degrees.
        scale: Largest relative change of size.
        flip: Mirror half of the images.
        erase: Probability to erase a rectangle (cutout).
        mix: Probability of mixup or cutmix in a schedule of 100 epochs or more; proportionally less in a shorter one,
            which has no time to overfit.
    """
    shift: float = 0.
    rotate: float = 0.
    scale: float = 0.
    flip: bool = False
    erase: float = 0.
    mix: float = 0.


@dataclass(frozen=True)
class Recipe:
    """A source network and the way to train it.

    `lr` is the peak of a linear warm-up and a cosine decay to zero. In the first `patch_drop_share` of the epochs the
    share `patch_drop` of the patches is left out at random, for half the time per epoch (arXiv 2208.07220).
    """
    model: str
    model_args: dict[str, Any]
    data: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augmentation
    epochs: int
    batch_size: int = 128
    opt: str = 'adamw'
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.
    label_smoothing: float = 0.1
    clip_grad: float = 1.
    ema_decay: float = 0.998
    patch_drop: float = 0.
    patch_drop_share: float = 0.7
    bf16: bool = True


_vit_micro_cifar10 = Recipe(
    model='vit_tiny_patch16_224',
    model_args={'img_size': 32, 'patch_size': 4, 'depth': 6, 'num_classes': 10},
    data='cifar10',
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    augment=Augmentation(shift=4, flip=True, erase=0.1, mix=0.5),
    epochs=36,
    opt='muon',  # its first epoch gets about as far as AdamW in three
    lr=2e-3,
    patch_drop=0.5,
)

RECIPES = {
    'digits': Recipe(
        model='vit_tiny_patch16_224',
        model_args={
            'img_size': 8, 'patch_size': 2, 'in_chans': 1, 'embed_dim': 64, 'depth': 4, 'num_heads': 4,
            'num_classes': 10,
        },
        data='digits',
        mean=(0.5,),
        std=(0.5,),
        augment=Augmentation(shift=0.5, rotate=10., scale=0.1, mix=0.5),
        epochs=200,
        batch_size=64,
        lr=2e-3,
        warmup_epochs=5.,
        bf16=False,  # too small to gain from it
    ),
    'vit_micro_cifar10': _vit_micro_cifar10,
    'eva02_micro_cifar10': replace(_vit_micro_cifar10, model='eva02_tiny_patch14_224', epochs=28),
}


@dataclass(frozen=True)
class Split:
    """Images as uint8 of shape (N, C, H, W) and their labels as int64 of shape (N,)."""
    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> 'Split':
        return Split(self.images.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(data: Path | None, cache: Path) -> tuple[Split, Split]:
    """UCI handwritten digits from scikit-learn: 1,257 training and 540 test images of 8x8 grey pixels."""
    parts = Digits('train'), Digits('test')
    return tuple(Split(torch.from_numpy(part.images[:, None]), torch.from_numpy(part.labels.astype(np.int64)))
                 for part in parts)


def load_cifar10(data: Path | None, cache: Path) -> tuple[Split, Split]:
    """CIFAR-10 from the parquet files of its Hugging Face copy: 50,000 training and 10,000 test images of 32x32."""
    place = find_data(str(data or 'cifar10'))
    if place.folder is None:
        raise typer.BadParameter(f'CIFAR-10 is read from train-*.parquet and test-*.parquet: {place.hint}')
    return _load_parquet(place.folder, 'train', cache), _load_parquet(place.folder, 'test', cache)


def _load_parquet(data: Path, split: str, cache: Path) -> Split:
    # Decoded once and kept as in CIFAR-10's own binary release: a row is the label, then the pixels.
    path = cache / f'cifar10-{split}.npy'
    if not path.exists():
        import pyarrow.parquet as pq
        from PIL import Image

        if not (files := sorted(data.glob(f'{split}-*.parquet'))):
            raise typer.BadParameter(f'no {split}-*.parquet in {data}')
        rows = [row for file in files for row in pq.read_table(file, columns=['img', 'label']).to_pylist()]
        table = np.empty((len(rows), 1 + 3 * 32 * 32), dtype=np.uint8)
        rows = track(rows, f'decode {split}', console=console, disable=not console.is_terminal)
        for out, row in zip(table, rows, strict=True):
            image = Image.open(io.BytesIO(row['img']['bytes'])).convert('RGB')
            out[0], out[1:] = row['label'], np.asarray(image).transpose(2, 0, 1).ravel()
        buffer = io.BytesIO()
        np.save(buffer, table)
        write(path, buffer.getvalue())
    table = torch.from_numpy(np.load(path))
    return Split(table[:, 1:].view(-1, 3, 32, 32), table[:, 0].long())


LOADERS: dict[str, Callable[[Path | None, Path], tuple[Split, Split]]] = {
    'digits': load_digits,
    'cifar10': load_cifar10,
}


def random_affine(images: torch.Tensor, augment: Augmentation) -> torch.Tensor:
    """Move, turn, resize and mirror each image by its own random amount; what enters the frame is black.

    Args:
        images: Floating-point images of shape (B, C, H, W), black = 0.
    """
    size, device = len(images), images.device
    extent = torch.tensor([images.shape[-1], images.shape[-2]], device=device)
    angle = (torch.rand(size, device=device) * 2 - 1) * math.radians(augment.rotate)
    scale = 1 + (torch.rand(size, device=device) * 2 - 1) * augment.scale
    mirror = 1 - 2 * torch.randint(0, 1 + augment.flip, (size,), device=device)
    shift = (torch.rand(size, 2, device=device) * 2 - 1) * augment.shift
    if not (augment.rotate or augment.scale):
        shift = shift.round()  # the bilinear samples fall on pixel centres and nothing blurs
    shift = shift * 2 / extent
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], dim=1).view(size, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def init_weights_(model: nn.Module):
    """Scale the initial weights to the width: timm's 0.02 suits wide networks and long schedules."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    nn.init.trunc_normal_(model.pos_embed, std=0.2)


class Trainer:
    """A source network in training: weights, their moving average, optimizer and batch augmentation."""

    def __init__(self, recipe: Recipe, seed: int, device: torch.device, compile: bool = False):
        self.recipe, self.seed, self.device = recipe, seed, device
        random_seed(seed)
        timm.layers.set_fused_attn(device.type != 'cpu')  # slow in bf16 on a CPU, backward above all
        self.model = timm.create_model(recipe.model, patch_drop_rate=recipe.patch_drop, **recipe.model_args).to(device)
        init_weights_(self.model)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True)
        if compile:
            self.model.compile()
        self.optimizer = create_optimizer_v2(
            self.model, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
        augment = recipe.augment
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
        self.erase = RandomErasing(augment.erase, max_area=0.25, device=device)
        self.mix = Mixup(
            cutmix_alpha=1.,
            prob=augment.mix * min(1., recipe.epochs / 100),
            label_smoothing=recipe.label_smoothing,
            num_classes=self.model.num_classes,
        )

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std

    def train_epoch(self, epoch: int, train: Split) -> float:
        """Train for one epoch and return the mean loss."""
        recipe = self.recipe
        random_seed(self.seed * 10_000 + epoch + 1)
        self.model.train()
        if recipe.patch_drop and epoch >= recipe.patch_drop_share * recipe.epochs:
            self.model.patch_drop.prob = 0.
        order = torch.randperm(len(train), device=self.device)
        batches = order[:len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size)
        total = torch.zeros((), device=self.device)
        description = f'epoch {epoch + 1}/{recipe.epochs}'
        progress = track(batches, description, console=console, transient=True, disable=not console.is_terminal)
        for step, index in enumerate(progress, start=epoch * len(batches)):
            images = random_affine(train.images[index].float() / 255, recipe.augment)
            images, targets = self.mix(self.erase(self.normalize(images)), train.labels[index])
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), targets)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
            for group in self.optimizer.param_groups:
                group['lr'] = recipe.lr * self.schedule(step / len(batches))
            self.optimizer.step()
            self.ema.update(self.model, step)
            total += loss.detach()
        return total.item() / len(batches)

    def schedule(self, epoch: float) -> float:
        """Linear warm-up, then cosine decay to zero, as a fraction of the peak learning rate."""
        warmup, epochs = min(self.recipe.warmup_epochs, self.recipe.epochs / 10), self.recipe.epochs
        return epoch / warmup if epoch < warmup else (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2

    @torch.inference_mode()
    def count_correct(self, split: Split) -> int:
        """Number of images that the averaged weights classify correctly, in float32."""
        self.ema.module.eval()
        batches = zip(split.images.split(500), split.labels.split(500), strict=True)
        return sum(
            (self.ema.module(self.normalize(images.float() / 255)).argmax(dim=1) == labels).sum().item()
            for images, labels in batches
        )

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k).state_dict() for k in ('model', 'ema', 'optimizer')}

    def load_state_dict(self, state: dict[str, Any]):
        for k, v in state.items():
            getattr(self, k).load_state_dict(v)


def write(path: Path, data: bytes):
    """Write aside, then rename: a file under its final name is complete."""
    aside = path.with_name(path.name + '.tmp')
    aside.write_bytes(data)
    os.replace(aside, path)


def main(
        name: Annotated[str, typer.Argument(metavar='RECIPE', help=' | '.join(RECIPES))],
        out: Annotated[Path, typer.Option('--output', '-o', help='Folder for weights, record and checkpoint.')],
        data: Annotated[Path | None, typer.Option(help='Folder of the parquet files (CIFAR-10).')] = None,
        epochs: Annotated[int | None, typer.Option(min=1, help="Length of the schedule; the recipe's without.")] = None,
        seed: int = 0,
        resume: Annotated[bool, typer.Option('--resume', help='Continue from the checkpoint.')] = False,
        device: Annotated[str, typer.Option()] = 'cuda' if torch.cuda.is_available() else 'cpu',
        compile: Annotated[bool, typer.Option('--compile', help='torch.compile the network.')] = False,
):
    """Train the source network RECIPE and measure it on its test images."""
    if name not in RECIPES:
        raise typer.BadParameter(f'unknown recipe {name!r}; known: {", ".join(RECIPES)}')
    recipe = replace(RECIPES[name], epochs=epochs or RECIPES[name].epochs)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, seed, torch.device(device), compile)
    train, test = (split.to(trainer.device) for split in LOADERS[recipe.data](data, out))

    checkpoint, start, seconds = out / f'{name}.ckpt', 0, 0.
    run = json.dumps({'recipe': asdict(recipe), 'seed': seed})
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=trainer.device, weights_only=True)
        if state['run'] != run:
            raise typer.BadParameter(f'{checkpoint} belongs to another run: {state["run"]}')
        trainer.load_state_dict(state['trainer'])
        start, seconds = state['epoch'], state['seconds']
    for epoch in range(start, recipe.epochs):
        began = time.perf_counter()
        loss = trainer.train_epoch(epoch, train)
        seconds += time.perf_counter() - began
        buffer = io.BytesIO()
        torch.save({'run': run, 'epoch': epoch + 1, 'seconds': seconds, 'trainer': trainer.state_dict()}, buffer)
        write(checkpoint, buffer.getvalue())
        print(f'{name} epoch {epoch + 1}/{recipe.epochs} loss {loss:.4f} seconds {seconds:.0f}', flush=True)

    correct = trainer.count_correct(test)
    averaged = trainer.ema.module.state_dict()
    said = {'format': 'pt', 'mean': json.dumps(recipe.mean), 'std': json.dumps(recipe.std)}  # for whoever converts them
    weights = save({k: v.float().cpu().contiguous() for k, v in averaged.items()}, said)
    record = {
        'recipe': {'name': name, **asdict(recipe)},
        'seed': seed,
        'test_accuracy': correct / len(test),
        'test_correct': correct,
        'test_samples': len(test),
        'train_samples': len(train),
        'params': sum(p.numel() for p in trainer.model.parameters()),
        'train_seconds': round(seconds),
        'device': trainer.device.type,
        'versions': {'torch': torch.__version__, 'timm': timm.__version__},
        'command': f'python scripts/train_source.py {name}{" --data DIR" if data else ""} -o OUT'
                   f' --epochs {recipe.epochs} --seed {seed}{" --compile" if compile else ""}',
        'sha256': hashlib.sha256(weights).hexdigest(),
    }
    write(out / f'{name}.safetensors', weights)
    write(out / f'{name}.json', (json.dumps(record, indent=2) + '\n').encode())
    print(f'{name} test accuracy {correct / len(test):.2%} ({correct}/{len(test)})')


if __name__ == '__main__':
    typer.run(main)
