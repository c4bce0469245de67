"""Pictures of a profile: level histograms, energy, spike maps, accuracy against levels and energy."""
from collections.abc import Sequence

import torch

from ..profiling.energy import TWIN, ratio_to
from ..profiling.scales import shown_range
from .plots import new_figure, overlay, png, standard_error

__all__ = ['CurvePoint', 'plot_energy', 'plot_levels', 'plot_maps', 'plot_trade_off']

CurvePoint = dict[str, float]  # levels, top1 [%], perhaps energy [mJ], source_top1 [%] and num_images

WIDTH = 4.6  # inches: what is readable on a phone
COLOURS = {'products': '#4c78a8', 'firing': '#f58518', 'weights': '#54a24b', 'spikes': '#e45756', 'routing': '#b279a2',
           'floating': '#9d9da1'}


def plot_levels(histograms: dict[str, dict[int, int]]) -> bytes:
    """Draw how often each level is fired, site by site, on a logarithmic axis.

    Args:
        histograms: Site -> level, with its sign -> how often.

    Returns:
        PNG that carries its numbers, as of `plots.plot_accuracy`.
    """
    rows = -(-len(histograms) // 2)
    figure = new_figure(WIDTH, 1.4 * rows)
    for i, (site, counts) in enumerate(histograms.items()):
        axes = figure.add_subplot(rows, 2, i + 1, yscale='log')
        total = sum(counts.values())
        axes.vlines(list(counts), 1e-7, [n / total for n in counts.values()], linewidth=1.2, color='#4c78a8')
        axes.set_ylim(max(0.5 / total, 1e-7), 1)
        axes.set_title(f'{site}: {counts.get(0, 0) / total:.1%} silent', fontsize=8)
        axes.tick_params(labelsize=7)
        if i % 2 == 0:
            axes.set_ylabel('share', fontsize=8)
        if i >= len(histograms) - 2:
            axes.set_xlabel('level', fontsize=8)
    return png(figure, dict(levels={site: {str(k): n for k, n in c.items()} for site, c in histograms.items()}))


def plot_energy(account: dict[str, dict[str, float]], parts: dict[str, str]) -> bytes:
    """Draw where energy goes, and how much of the quantised twin's that is. Whiskers are the range of that ratio where
    moving data takes half and half as much again: in both networks, since it is the same chip.

    Args:
        account: As of `profiling.energy`, mJ per image.
        parts: Its parts and what they are called.
    """
    figure = new_figure(WIDTH, 0.9 + 0.5 * len(account))
    axes = figure.add_subplot(xlabel='energy per image, estimated [mJ]')
    twin = account[TWIN]['total']
    axes.tick_params(labelsize=8)
    shown = [name for name, values in account.items() if values['total'] <= 4 * twin]  # or the others are a line
    for name in shown:
        values = account[name]
        left = 0.
        row = name.replace(', ', ',\n')
        for part, label in parts.items():
            axes.barh(row, values[part], left=left, color=COLOURS[label], label=label if name == shown[0] else None)
            left += values[part]
        if name != TWIN:
            ratio, low, high = ratio_to(values, account[TWIN])
            axes.errorbar(left, row, xerr=[[(ratio - low) * twin], [(high - ratio) * twin]], color='black', capsize=3)
            axes.annotate(f'{ratio:.2f} ({low:.2f} to {high:.2f})', (high * twin, row), (4, 0), fontsize=7, va='center',
                          textcoords='offset points')
    left_out = [f'{name} {values["total"] / twin:.0f} times quantised'
                for name, values in account.items() if name not in shown]
    axes.set_title('Energy, and its ratio to quantised with the range of that'
                   + (f'\n(not drawn: {", ".join(left_out)})' if left_out else ''), fontsize=8)
    axes.set_xlim(right=1.5 * axes.get_xlim()[1])  # room for the ratios
    axes.invert_yaxis()
    axes.locator_params(axis='x', nbins=5)
    figure.legend(ncols=3, fontsize=7, loc='outside lower center')
    return png(figure, dict(energy=account))


def plot_maps(image: torch.Tensor, maps: dict[str, torch.Tensor]) -> bytes:
    """Draw an image, and over it which of its patches spike most, block by block, each on a scale of its own.

    Args:
        image: (C, H, W), values in [0, 1].
        maps: Name -> spikes per neuron, (rows, columns) of patches.
    """
    columns = 3
    rows = -(-(len(maps) + 1) // columns)
    figure = new_figure(WIDTH, 1.45 * rows)
    pixels = image.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy()
    for i, (name, values) in enumerate({'image': None, **maps}.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        if values is None:
            axes.imshow(pixels)
            axes.set_axis_off()
        else:
            overlay(figure, axes, image, values, shown_range(values.flatten().tolist()))
        axes.set_title(name, fontsize=7)
    return png(figure, dict(spikes_per_neuron={name: values.tolist() for name, values in maps.items()}))


def plot_trade_off(points: Sequence[CurvePoint], source: float | None) -> bytes:
    """Draw accuracy against N and, where it is given, against energy.

    Args:
        points: `levels`, `top1` in percent and perhaps `energy` in mJ per image and `num_images`, which bars of one
            standard error are of.
        source: Top-1 of the source in percent, if known.
    """
    axes_of = ['levels'] + ['energy'] * all('energy' in point for point in points)
    figure = new_figure(WIDTH, 2.6 * len(axes_of))
    names = dict(levels='levels N per branch', energy='energy per image, estimated [mJ]')
    for i, key in enumerate(axes_of):
        axes = figure.add_subplot(len(axes_of), 1, i + 1, xlabel=names[key], ylabel='top-1 [%]')
        ordered = sorted(points, key=lambda point: point[key])
        if key == 'levels':
            axes.set_xscale('log')
            axes.set_xticks([p[key] for p in ordered], [f'{p[key]:g}' for p in ordered], fontsize=7)
            axes.minorticks_off()
        axes.errorbar([p[key] for p in ordered], [p['top1'] for p in ordered],
                      [standard_error(p['top1'], p.get('num_images')) for p in ordered], marker='o', capsize=3)
        if source is not None:
            axes.axhline(source, color='grey', linestyle='--', label=f'source, {source:.1f} %')
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return png(figure, dict(points=list(points), source_top1=source))
