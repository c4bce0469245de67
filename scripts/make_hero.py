"""Draw docs/hero.png: the levels of a neuron, where an image makes a network spike, accuracy over the number of levels.

    python scripts/make_hero.py

All of it is measured: neuron and spikes are those of a model that ships with the package, on a picture that this script
draws; accuracies are those of model_cards/*.json, which scripts/make_cards.py measures.
"""
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from PIL import Image, ImageDraw

import sformer
from sformer.data.image_files import read_rgb
from sformer.errors import SFormerError
from sformer.evaluation.predictions import Reader
from sformer.files import may_write, write_file
from sformer.neurons import SFNConfig
from sformer.profiling import pixels_of, spike_maps
from sformer.profiling.scales import shown_range
from sformer.publishing.plots import is_own_plot, new_figure, overlay, png, standard_error

ROOT = Path(__file__).parents[1]
MODEL = 'sformer_micro.cifar10'
SITE = 'blocks.2.mlp.fc1'
CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')  # of CIFAR-10
LEVELS = 4  # few enough to be counted in a picture
NAMES = {'sformer_nano.digits': 'digits', 'sformer_micro.cifar10': 'CIFAR-10, ViT',
         'sformer_eva02_micro.cifar10': 'CIFAR-10, EVA-02'}


def drawn_picture(side: int = 256) -> Image.Image:
    """A sailing boat on the sea, drawn here, so that nobody else has a right to it."""
    rows = np.linspace(0, 1, side)[:, None, None]
    sky = (1 - rows) * np.array([70, 130, 210]) + rows * np.array([200, 220, 245])
    picture = Image.fromarray(np.broadcast_to(sky, (side, side, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    waves = np.arange(0, side + 1, 4)
    for depth, colour in ((0.66, (40, 90, 150)), (0.76, (30, 75, 130)), (0.88, (22, 60, 110))):
        heights = side * depth + 3 * np.sin(waves / 11 + 9 * depth)
        draw.polygon([(0, side), *zip(waves.tolist(), heights.tolist(), strict=True), (side, side)], fill=colour)
    points = {
        'hull': ([(0.2, 0.62), (0.82, 0.62), (0.72, 0.76), (0.3, 0.76)], (140, 50, 40)),
        'deck': ([(0.2, 0.62), (0.82, 0.62), (0.81, 0.645), (0.21, 0.645)], (235, 225, 205)),
        'mast': ([(0.495, 0.1), (0.51, 0.1), (0.51, 0.62), (0.495, 0.62)], (90, 60, 40)),
        'sail': ([(0.52, 0.13), (0.78, 0.58), (0.52, 0.58)], (250, 250, 245)),
        'jib': ([(0.485, 0.17), (0.485, 0.58), (0.28, 0.58)], (240, 205, 150))}
    for corners, colour in points.values():
        draw.polygon([(x * side, y * side) for x, y in corners], fill=colour)
    return picture


def neuron_curve(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Current and fired level of the first channel of a site, a little beyond where it fires its highest level."""
    neuron = model.get_submodule(f'{SITE}.neuron')
    channels = neuron.step.shape[-1]
    reach = 1.15 * float(neuron.top_levels[:, 0].max() * neuron.step.flatten()[0])
    current = torch.linspace(-reach, reach, 2001)
    fired = neuron.encode(current[:, None].expand(-1, channels)).levels[:, 0]
    return current.numpy(), fired.numpy()


def accuracies() -> dict[str, list[dict[str, float]]]:
    """Measured curves of the models that ship with the package."""
    found = {}
    for name, title in NAMES.items():
        record = json.loads((ROOT / 'model_cards' / f'{name}.json').read_text(encoding='utf-8'))
        if not record.get('curve'):
            raise SFormerError(f'model_cards/{name}.json has no curve: python scripts/make_cards.py {name}')
        found[title] = [{key: point[key] for key in ('levels', 'top1', 'source_top1', 'num_images')}
                        for point in record['curve']]
    return found


def draw_hero() -> bytes:
    """The picture as a PNG that carries its numbers."""
    model = timm.create_model(MODEL, pretrained=True).eval()
    few = sformer.convert(sformer.source_of(model), config=SFNConfig(levels=LEVELS, token_scale=False), num_images=64)
    current, fired = neuron_curve(few)
    picture = drawn_picture()
    tensor = Reader(model)(picture)
    maps = spike_maps(model, tensor)
    seen = next(sformer.predict(model, picture, topk=1))
    curves = accuracies()

    figure = new_figure(12, 3.5)
    left, image, spikes, right = figure.subplots(1, 4, width_ratios=[1.15, 0.9, 1.1, 1.35])
    left.plot(current, fired, color='#4c78a8', linewidth=2)
    left.set_title(f'One neuron, N = {LEVELS}', fontsize=10)
    left.set_xlabel('current', fontsize=9)
    left.set_ylabel('fired level: one signed integer, once', fontsize=9)
    left.set_yticks(sorted({int(level) for level in np.unique(fired)}))
    left.axhline(0, color='grey', linewidth=0.6)
    left.grid(alpha=0.25)
    image.imshow(read_rgb(picture))
    image.set_axis_off()
    image.set_title(f'{CLASSES[seen.found[0].index]}, p = {seen.probability:.2f}', fontsize=10)
    everywhere = torch.stack([*maps.values()]).sum(0)
    limits = shown_range(everywhere.flatten().tolist())
    overlay(figure, spikes, pixels_of(model, tensor), everywhere, limits, 'spikes per neuron, all blocks')
    spikes.set_title('where it spikes', fontsize=10)
    for title, points in curves.items():
        errors = [standard_error(point['top1'], point['num_images']) for point in points]
        label = f'{title} ({points[0]["num_images"]:,} images)'
        drawn = right.errorbar([point['levels'] for point in points], [point['top1'] for point in points], errors,
                               marker='o', markersize=4, capsize=2, label=label)
        right.axhline(points[0]['source_top1'], color=drawn.lines[0].get_color(), linestyle='--', linewidth=1)
    right.set_xscale('log', base=2)
    right.set_xticks([1, 2, 4, 8, 16, 32, 63], ['1', '2', '4', '8', '16', '32', '63'])
    right.set_xlabel('levels N per branch (dashed: source)', fontsize=9)
    right.set_ylabel('top-1 [%] ± standard error', fontsize=9)
    right.set_title('Accuracy, without training', fontsize=10)
    right.grid(alpha=0.25)
    right.legend(fontsize=7, loc='center right', bbox_to_anchor=(1, 0.55))
    for axes in (left, right):
        axes.tick_params(labelsize=8)
    return png(figure, dict(
        neuron=dict(site=SITE, levels=LEVELS), curves=curves, seen=dict(name=seen.name, probability=seen.probability),
        spikes_per_neuron={name: values.tolist() for name, values in maps.items()}))


def main(
        output: Annotated[Path, typer.Option('--output', '-o', help='PNG to write')] = ROOT / 'docs' / 'hero.png',
) -> None:
    """Draw docs/hero.png."""
    try:
        may_write(output, 'picture of this package', is_own_plot)
        write_file(output, draw_hero())
    except SFormerError as e:
        raise SystemExit(f'{Path(__file__).name}: error: {e}') from None
    print(f'{output}: {output.stat().st_size / 1e3:.0f} kB')


if __name__ == '__main__':
    typer.run(main)
