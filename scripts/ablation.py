"""What each idea of the recipe brings: errors of SFormers with one of them left out.

    python scripts/ablation.py sformer_micro.cifar10 sformer_eva02_micro.cifar10 --images data/cifar10
    python scripts/ablation.py vit_small_saliency.safetensors --images photos/

A network is one that ships with the package or any SFormer with weights, whose source is taken, or the source that
`scripts/saliency_source.py` built. The error is |source - sformer| / |source| over logits (over all tokens of a network
without a classifier) on images that calibration did not see.
"""
from pathlib import Path
from typing import Annotated, Any, Optional

import timm
import torch
import torch.nn as nn
import typer
from fidelity import BATCH_SIZE, split_images
from saliency_source import load_source, relative_error

import sformer
from sformer.conversion.record import library_versions
from sformer.files import write_json
from sformer.neurons import FitConfig, SFNConfig

# what is left out -> fields of SFNConfig and FitConfig; a config that says the same as the default is not measured
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'nothing': ({}, {}),
    'thresholds that follow the token': (dict(token_scale=False), {}),
    'wide levels of the softmax': (dict(attention_fire='uniform'), {}),
    'levels that spread out after activation functions': (dict(activation_fire='uniform'), {}),
    'levels that widen elsewhere': (dict(fire='uniform'), {}),
    'correction of gains': ({}, dict(unbiased=False)),
    'least squares (max instead)': ({}, dict(estimator='max')),
    'least squares (quantile 0.999 instead)': ({}, dict(estimator='quantile')),
}


def same_fire(a: SFNConfig, b: SFNConfig) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in ('signed_fire', 'mlp_fire', 'gated_fire'))


def open_source(name: str) -> nn.Module:
    if name.endswith('.safetensors'):
        return load_source(Path(name))
    return sformer.source_of(timm.create_model(name, pretrained=True)).eval()


@torch.inference_mode()
def outputs(network: Any, images: torch.Tensor) -> torch.Tensor:
    """Logits, or all tokens of a network without a classifier."""
    forward = network if network.num_classes else network.forward_features
    return torch.cat([forward(batch) for batch in images.split(BATCH_SIZE)])


def main(
        networks: Annotated[list[str], typer.Argument(help='Names, or a source that saliency_source.py built')],
        images: Annotated[str, typer.Option(help='Images: a folder, parquet files, a data set of the Hub')],
        split: Annotated[Optional[str], typer.Option(help='Split of these images')] = None,
        levels: Annotated[Optional[list[int]], typer.Option(help='Numbers of levels N  [default: 32 8]')] = None,
        num_images: Annotated[int, typer.Option(help='Images to calibrate with')] = 128,
        num_test: Annotated[int, typer.Option(help='Images to test with')] = 48,
        seed: int = 0,
        output: Annotated[Optional[Path], typer.Option('-o', '--output', help='JSON')] = None,
) -> None:
    columns = [(name, n) for name in networks for n in levels or [32, 8]]
    errors: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
    for name in networks:
        source = open_source(name)
        test, others, _ = split_images(source, images, split, num_test, num_images, seed)
        expected = outputs(source, test)
        for n in levels or [32, 8]:
            for variant, (fields, fit) in VARIANTS.items():
                if same_fire(SFNConfig(n), SFNConfig(n, **fields)) and fields.keys() & {'fire', 'activation_fire'}:
                    continue
                model = sformer.convert(source, others.split(BATCH_SIZE), SFNConfig(n, **fields), FitConfig(**fit))
                errors[variant][f'{name} {n}'] = relative_error(expected, outputs(model, test))
    print(f'| left out | {" | ".join(f"{Path(name).stem}, N = {n}" for name, n in columns)} |')
    print(f'| --- |{" --- |" * len(columns)}')
    for variant, row in errors.items():
        cells = [f'{row[key]:.4f}' if (key := f'{name} {n}') in row else '' for name, n in columns]
        print(f'| {variant} | {" | ".join(cells)} |')
    if output:
        write_json(output, dict(errors=errors, images=images, num_images=num_images, num_test=num_test, seed=seed,
                                versions=library_versions()))


if __name__ == '__main__':
    typer.run(main)
