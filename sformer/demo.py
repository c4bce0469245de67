"""The demo: a trained ViT becomes an SFormer, is evaluated, saved, reloaded, and drawn."""
import re
import time
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.data import resolve_input_data_config

from .checkpoints import write_aside
from .conversion import convert
from .data import open_images
from .errors import SFormerError
from .evaluation import evaluate
from .layers import source_of
from .neurons import SFNConfig
from .saving import save_model

__all__ = ['run', 'plot_accuracy', 'plot_firing_rates']

LEVELS = (4, 8, 32)
CURVE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def run(output: Path) -> None:
    """Convert the digits ViT that ships with the package and show what comes out.

    Args:
        output: Folder for the SFormer (`sformer_nano/`) and the pictures.
    """
    output = Path(output)
    console = Console()
    start = time.perf_counter()
    source = source_of(timm.create_model('sformer_nano.digits', pretrained=True)).eval()
    parameters = sum(p.numel() for p in source.parameters())
    console.print(f'Source: a ViT with {parameters:,} parameters, trained on 1,257 handwritten digits; '
                  f'evaluated on 540 others.')

    results = {}
    for levels in sorted({*CURVE, *LEVELS}):
        begin = time.perf_counter()
        model = convert(source, 'digits', SFNConfig(levels=levels), split='train')
        seconds = time.perf_counter() - begin
        results[levels] = dict(evaluate(model, 'digits', 'test'), conversion_seconds=seconds, network=model)
    reference = evaluate(source, 'digits', 'test')

    table = Table('network', 'top-1', 'agreement', 'firing rate', 'convert \\[s]', 'test \\[s]')
    table.add_row('source ViT', f'{reference["top1"]:.2f} %', '', '', '', f'{reference["seconds"]:.2f}')
    for levels in LEVELS:
        r = results[levels]
        table.add_row(f'SFormer, N = {levels}', f'{r["top1"]:.2f} %', f'{r["agreement"]:.2f} %',
                      f'{r["activity"]:.3f}', f'{r["conversion_seconds"]:.2f}', f'{r["seconds"]:.2f}')
    console.print(table)

    model = results[LEVELS[-1]]['network']
    folder = save_model(model, output / 'sformer_nano', overwrite=True)
    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    data_config = resolve_input_data_config(model)
    images, _ = next(iter(open_images('digits', 'test', data_config=data_config).batches(64)))
    with torch.inference_mode():
        if not torch.equal(model(images), reloaded(images)):
            raise SFormerError('the reloaded SFormer gives other logits than the one that was saved.')
    console.print(f'Saved to {folder}, reloaded through timm: the same logits, bit for bit.', soft_wrap=True)

    with write_aside(output) as aside:
        accuracy = {levels: results[levels]['top1'] for levels in CURVE}
        plot_accuracy(accuracy, reference['top1'], aside / 'accuracy.png')
        plot_firing_rates(results[LEVELS[-1]]['activity_per_site'], LEVELS[-1], aside / 'firing_rates.png')
    console.print(f'Pictures: {output / "accuracy.png"}, {output / "firing_rates.png"} '
                  f'({time.perf_counter() - start:.0f} s in all)', soft_wrap=True)


def plot_accuracy(accuracy: Dict[int, float], source: float, path: Path) -> None:
    """Draw top-1 accuracy against the number of levels N.

    Args:
        accuracy: Top-1 in percent per N.
        source: Top-1 of the source in percent.
        path: PNG file.
    """
    from matplotlib.figure import Figure  # the object interface needs no display and no global state
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.add_subplot(
        xscale='log', xlabel='levels N per branch', ylabel='top-1 [%]', title='Accuracy of the single-timestep SFormer')
    axes.axhline(source, color='grey', linestyle='--', label=f'source ViT, {source:.1f} %')
    axes.plot(list(accuracy), list(accuracy.values()), marker='o', label='SFormer')
    axes.set_xticks(list(accuracy), [str(n) for n in accuracy])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    figure.savefig(path, dpi=150)


def plot_firing_rates(rates: Dict[str, float], levels: int, path: Path) -> None:
    """Draw firing rates as a map of sites and blocks.

    Args:
        rates: Firing rate per neuron path, as of `evaluate`.
        levels: Number of levels N, for the title.
        path: PNG file.
    """
    from matplotlib.figure import Figure
    cells: Dict[str, Dict[str, float]] = {}
    for name, rate in rates.items():
        block = re.match(r'blocks\.(\d+)\.(.*)', name)
        column, site = (block[1], block[2]) if block else ('head', name)
        cells.setdefault(site.replace('.neuron', '').replace('_neuron', ''), {})[column] = rate
    columns: List[Any] = list(dict.fromkeys(column for row in cells.values() for column in row))
    figure = Figure(figsize=(1.6 + 0.75 * len(columns), 1.2 + 0.42 * len(cells)), layout='constrained')
    axes = figure.add_subplot(title=f'Firing rate, N = {levels}', xlabel='block')
    grid = [[row.get(column, float('nan')) for column in columns] for row in cells.values()]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap='viridis', aspect='auto')
    for y, row in enumerate(grid):
        for x, rate in enumerate(row):
            if rate == rate:
                axes.text(x, y, f'{rate:.2f}', ha='center', va='center', fontsize=8,
                          color='black' if rate > 0.6 else 'white')
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(cells)), list(cells))
    figure.colorbar(image, label='share of neurons that fire')
    figure.savefig(path, dpi=150)
