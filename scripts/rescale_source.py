"""Rescale a ViT checkpoint without changing its function: some LayerNorm channels x 100, the weights that follow / 100.

    python scripts/rescale_source.py vit.safetensors rescaled.safetensors

Networks with such heavy channels are common; thresholds per channel must not notice.
"""
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

NORM_TO_LINEAR = {'norm1': 'attn.qkv', 'norm2': 'mlp.fc1'}


def main(
        checkpoint: Path,
        output: Path,
        factor: Annotated[float, typer.Option(help='Factor on the chosen channels')] = 100.,
        every: Annotated[int, typer.Option(help='Every n-th channel is chosen')] = 16,
) -> None:
    state = load_file(checkpoint)
    blocks = sorted({key.rsplit('.norm1', 1)[0] for key in state if key.endswith('.norm1.weight')})
    for block in blocks:
        for norm, linear in NORM_TO_LINEAR.items():
            scale = torch.ones_like(state[f'{block}.{norm}.weight'])
            scale[::every] = factor
            state[f'{block}.{norm}.weight'] *= scale
            state[f'{block}.{norm}.bias'] *= scale
            state[f'{block}.{linear}.weight'] /= scale
    save_file(state, output)
    print(f'{output}: every {every}th channel of {len(blocks) * len(NORM_TO_LINEAR)} LayerNorms x {factor:g}')


if __name__ == '__main__':
    typer.run(main)
