"""An SFormer beside what SpikingJelly's own converter makes of the same ViT, on the same images: accuracy and time.

    pip install --target elsewhere --no-deps spikingjelly loguru
    PYTHONPATH=elsewhere python scripts/against_spikingjelly.py sformer_micro.cifar10 --images cifar10 -o rows.json

SpikingJelly 2 converts transformers by its STA recipe (Spatio-Temporal Approximation, ICLR 2024): here as in its own
example, `spiking_encoder` with thresholds of the least squared error times 0.5, on torchvision's ViT, which the recipe
knows. That has the weights of timm's; that both give the same logits is checked first. Its neurons are behind norms,
GELU and attention, and QK^T, AV and pixels are in floating point; an SFormer has neurons in front of every product.
Rows are timed in pairs with the source, so keep the machine free; `--pairs 0` measures accuracy alone.
"""
import functools
import tempfile
from pathlib import Path
from typing import Annotated

import timm
import torch
import torch.nn as nn
import typer
from torchvision.models import VisionTransformer

import sformer
from sformer.baselines import COMPARISON, Comparison
from sformer.baselines.rows import Built, comparison_rows
from sformer.cli.arguments import command_line
from sformer.cli.tables import print_table
from sformer.conversion.record import library_versions
from sformer.data import ImageRequest
from sformer.files import write_json

SCALE = 0.5  # of thresholds, as in SpikingJelly's example


def torchvision_twin(source: nn.Module) -> VisionTransformer:
    """torchvision's ViT with the weights of timm's.

    Raises:
        SystemExit: If timm's is another kind of ViT, so that logits differ.
    """
    patch = source.patch_embed.proj
    twin = VisionTransformer(
        image_size=source.patch_embed.img_size[0], patch_size=patch.kernel_size[0], num_layers=len(source.blocks),
        num_heads=source.blocks[0].attn.num_heads, hidden_dim=source.embed_dim,
        mlp_dim=source.blocks[0].mlp.fc1.out_features, num_classes=source.num_classes).eval()
    parts = {'patch_embed.proj': 'conv_proj', 'norm': 'encoder.ln', 'head': 'heads.head'}
    for i in range(len(source.blocks)):
        layer = f'encoder.layers.encoder_layer_{i}'
        for mine, theirs in (('norm1', 'ln_1'), ('norm2', 'ln_2'), ('attn.proj', 'self_attention.out_proj'),
                             ('mlp.fc1', 'mlp.0'), ('mlp.fc2', 'mlp.3')):
            parts[f'blocks.{i}.{mine}'] = f'{layer}.{theirs}'
    weights = source.state_dict()
    state = {f'{theirs}.{kind}': weights[f'{mine}.{kind}']
             for mine, theirs in parts.items() for kind in ('weight', 'bias')}
    state |= {'class_token': weights['cls_token'], 'encoder.pos_embedding': weights['pos_embed']}
    for i in range(len(source.blocks)):
        for kind in ('weight', 'bias'):
            state[f'encoder.layers.encoder_layer_{i}.self_attention.in_proj_{kind}'] = weights[
                f'blocks.{i}.attn.qkv.{kind}']
    twin.load_state_dict(state)
    images = torch.randn(2, 3, twin.image_size, twin.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.allclose(twin(images), source(images), atol=1e-4, rtol=1e-4):
            raise SystemExit('this ViT is not of the kind that torchvision has.')
    return twin


def spiking_jelly(source: nn.Module, batches: list[torch.Tensor], steps: int, scale: float) -> Built:
    """SpikingJelly's STA conversion over T timesteps: the image comes first, then nothing, and outputs are summed."""
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.ann2snn import Converter, STATransformerRecipe
    recipe = STATransformerRecipe(
        dataloader=batches, time_steps=steps, mode='spiking_encoder', threshold_mode='mse', threshold_scale=scale)
    network = Converter(recipe=recipe, device='cpu').convert(torchvision_twin(source)).eval()
    functional.set_step_mode(network, 'm')

    def run(images: torch.Tensor) -> torch.Tensor:
        functional.reset_net(network)
        sequence = torch.cat([images[None], images.new_zeros(steps - 1, *images.shape)])
        return network(sequence).sum(0)
    return Built(run)


def fast(source: nn.Module, batches: list[torch.Tensor]) -> Built:
    """An SFormer of recipe `fast` with int8 weights, by OpenVINO."""
    with tempfile.TemporaryDirectory() as folder:
        sformer.export_onnx(sformer.convert(source, batches, recipe='fast'), Path(folder, 'model.onnx'), batches)
        return Built(sformer.load_onnx(Path(folder, 'model.onnx'), 'openvino'), engine='openvino')


def main(
        model: Annotated[str, typer.Argument(help='SFormer with weights, whose source is taken: a ViT')],
        images: Annotated[str, typer.Option(help='Images with splits train and test')],
        steps: Annotated[int, typer.Option(help='Timesteps of SpikingJelly')] = 8,
        levels: Annotated[int, typer.Option(help='Levels of the SFormer')] = 63,
        scale: Annotated[float, typer.Option(help="Factor on SpikingJelly's thresholds")] = SCALE,
        num_images: Annotated[int, typer.Option(help='Images to calibrate with')] = 256,
        num_test: Annotated[int, typer.Option(help='Images to test with')] = 1000,
        batch_size: Annotated[int, typer.Option(help='Images per call')] = 32,
        pairs: Annotated[int, typer.Option(help='Pairs of calls per timing')] = 9,
        seed: int = 0,
        output: Annotated[Path | None, typer.Option('-o', '--output', help='JSON')] = None,
) -> None:
    source = sformer.source_of(timm.create_model(model, pretrained=True) if not Path(model).is_dir()
                               else sformer.load_model(model)).eval()
    bench = Comparison(source, ImageRequest(dataset=images, split='train', num_images=num_images, seed=seed),
                       ImageRequest(dataset=images, split='test', num_images=num_test, seed=seed), batch_size)
    known = comparison_rows([levels], ())
    rows = {'source': known['source'],
            f'SpikingJelly STA, T = {steps}': functools.partial(spiking_jelly, steps=steps, scale=scale),
            **{name: build for name, build in known.items() if name.startswith('SFN')},
            'SFN, recipe fast, int8 weights': fast}
    found = []
    for name, build in rows.items():
        built = build(source, bench.calibration)
        row = bench.measure(name, Built(built.run, engine=built.engine))  # what it costs in spikes is another matter
        found.append(row | bench.timed(built, batch_size, pairs) if pairs else row)
        print(f'{name}: drop {row["drop"]:.2f} points, relative error {row["error"]:.3f}', flush=True)
        if output:
            write_json(output, dict(
                model=model, rows=found, command=command_line().replace('sformer', Path(__file__).name, 1),
                settings=dict(scale=scale, num_images=num_images, num_test=num_test, batch_size=batch_size, seed=seed),
                versions=library_versions() | version_of_spikingjelly()))
    heads, cells = COMPARISON.table(found)
    print_table(f'{model}, {num_test} images', ['network', *heads],
                [[row['baseline'], *line] for row, line in zip(found, cells, strict=True)])


def version_of_spikingjelly() -> dict[str, str]:
    from importlib import metadata
    return {'spikingjelly': metadata.version('spikingjelly')}


if __name__ == '__main__':
    typer.run(main)
