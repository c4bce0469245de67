"""Write the tables of README and docs: figures of results from their schema, measured ones from files in docs/figures.

    python scripts/make_tables.py

A table stands behind a line `<!-- NAME: written by scripts/make_tables.py -->`. Each file in docs/figures is what a
command wrote with `--results-file` or `-o`, and holds that command; who measures anew replaces it and runs this.
"""
import json
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from few_tables import (
    added,
    concentrated,
    feedback,
    feedback_in_integers,
    few_levels,
    keys_that_rest,
    left_out,
    silence,
    silent_maps,
    trained,
)
from figure_files import DROPPED, ROOT, dropped, error_of_drop, fidelity, names, read, table, times

from sformer.evaluation.figures import CLASSIFICATION, DETECTION
from sformer.files import write_aside
from sformer.neurons import CODINGS
from sformer.profiling.energy import TWIN, ratio_to
from sformer.publishing.profile_page import OTHER, PARTS

MARK = re.compile(
    r'(?<=<!-- )(?P<name>[^:\n]+)(?P<rest>: written by scripts/make_tables.py -->\n).*?(?=\n\n|\n\Z)', re.S)
RECIPES = {
    'default': 'any processor, any images: 63 levels per branch',
    'fast': 'int8 engines: 63 levels, one threshold for all tokens, a softmax of bytes',
    'accurate': '127 levels',
    'paper': '32 levels, comparable with the paper',
    'few': '8 levels',
    'quiet': '16 levels, a price of activity',
}
LEVELS = {'default': 63, 'fast': 63, 'accurate': 127, 'paper': 32, 'few': 8, 'quiet': 16}  # of recipes


def recipes() -> str:
    """What each recipe is for, with its accuracy, activity and speed."""
    results = fine_tuned()
    source = next(iter(results.values()))['source_top1']
    rows = [['', 'the source', f'{source:.2f}', '', '', '', '1']]
    for name, purpose in RECIPES.items():
        found, result = fidelity(name), results[name]
        cells = [f'{result["top1"]:.2f}', f'{source - result["top1"]:.2f} +- {error_of_drop(result):.2f}',
                 f'{found["tokens"]:.4f}', f'{found["spikes_per_neuron"]["graded"]:.2f}']
        rows.append([f'`{name}`', purpose, *cells, times(f'speed_{name}', 8, 'openvino:fp32')])
    return table(['recipe', 'for', 'top-1 [%]', 'drop [points]', 'relative error', 'activity', 'speed'], rows)


def trained_at_scale() -> str:
    """Errors and spikes of each recipe on the network that was trained at scale."""
    rows = []
    for name in RECIPES:
        found = fidelity(name)
        spikes = found['spikes_per_neuron']
        rows.append([f'`{name}`', f'{found["tokens"]:.4f}', f'{spikes["graded"]:.2f}', f'{spikes["binary"]:.2f}',
                     f'{spikes["unary"]:.1f}', times(f'speed_{name}', 8, 'openvino:fp32')])
    return table(['recipe', 'relative error', 'activity', 'binary spikes', 'unary spikes', 'speed in integers'], rows)


def generated() -> str:
    """Thresholds that were fitted to photographs beside those that were fitted to generated images."""
    rows = [[f'`{name}`', f'{fidelity(name)["tokens"]:.4f}', f'{fidelity(name + "_generated")["tokens"]:.4f}']
            for name in ('default', 'fast')]
    return table(['recipe', '128 photographs', '256 generated images'], rows)


def int8() -> str:
    """What int8 weights add, rounded to the nearest or such that errors cancel, and what engines make of it."""
    rows = []
    for name in ('default', 'fast'):
        found = fidelity(name)
        rows.append([f'`{name}`', *(f'{value:.4f}' for value in (
            found['tokens'], found['integer']['tokens_nearest'], found['integer']['tokens'],
            found['engines']['openvino'], found['engines']['onnxruntime']))])
    heads = ['recipe', 'floating point', 'int8, nearest', 'int8, calibrated', 'the same by OpenVINO', 'by ONNX Runtime']
    return table(heads, rows)


def embedded() -> str:
    """Networks in the package, by number of levels, as their cards have them."""
    rows = []
    for path in sorted((ROOT / 'model_cards').glob('sformer*.cifar10.json')):
        record = json.loads(path.read_text(encoding='utf-8'))
        shipped = dict(record['evaluations']['eval.json'], levels=record['sfn']['levels'])
        others = [result for result in record['curve'] if result['levels'] != shipped['levels']]
        for result in sorted([*others, shipped], key=lambda result: result['levels']):
            drop = result['source_top1'] - result['top1']
            cells = [f'{result["source_top1"]:.2f}', f'{result["top1"]:.2f}',
                     f'{drop:.2f} +- {error_of_drop(result):.2f}', f'{result["agreement"]:.2f}',
                     f'{result["activity"]:.3f}']
            rows.append([f'`{record["name"]}`', str(result['levels']), *cells])
    return table(['SFormer', 'N', 'source [%]', 'top-1 [%]', 'drop [points]', 'agreement [%]', 'activity'], rows)


def fine_tuned() -> dict[str, Any]:
    """Results of the fine-tuned ViT-S in integers by OpenVINO on all test images, by recipe."""
    return {result['model'].removesuffix('.onnx'): result for result in read('compare_vit_small_cifar10_openvino')}


def accuracy() -> str:
    """Top-1 and drop of the fine-tuned ViT-S in integers, with errors and activity."""
    graphs = fine_tuned()
    source, num_images = next((result['source_top1'], result['num_images']) for result in graphs.values())
    rows = [['source', '', f'{source:.2f}', *[''] * 5]]
    for simulated in read('compare_vit_small_cifar10'):
        name = simulated['model']
        result = graphs[name]
        assert result['num_images'] == num_images
        drop = f'{source - result["top1"]:.2f} +- {error_of_drop(result):.2f}'
        rows.append([f'`{name}`', str(LEVELS[name]), f'{result["top1"]:.2f}', drop, f'{result["agreement"]:.2f}',
                     f'{result["relative_logit_error"]:.4f}', f'{simulated["relative_logit_error"]:.4f}',
                     f'{simulated["activity"]:.2f}'])
    return table(['SFormer', 'N', 'top-1 [%]', 'drop [points]', 'agreement [%]',
                  'relative logit error', 'simulated', 'activity'], rows)


SMALL = {
    'v': 'ViT, 256 training images', 'r': 'ViT, every 16th LayerNorm channel x 100', 'g': 'ViT, 256 generated images',
    'e': 'EVA-02, 256 training images', 'eg': 'EVA-02, 256 generated images',
}


def small_networks() -> str:
    """Two networks that are not in the package; names of SFormers are those of the commands: v32 is the ViT, N = 32."""
    rows = []
    for result in read('compare_small'):
        levels = result['model'].lstrip(string.ascii_lowercase)
        kind = result['model'].removesuffix(levels)
        rows.append([SMALL[kind], levels, f'{result["source_top1"]:.2f}', *dropped(result)])
    return table(['network, fitted to', 'N', 'source [%]', *DROPPED], rows)


def beside_others() -> str:
    """SFormers beside quantised networks and spiking ones of several timesteps, all figures."""
    rows = []
    for row in read('baselines_micro')['rows']:
        spikes = row.get('spikes')
        counts = ' / '.join(f'{spikes[coding]:.3g}' for coding in CODINGS) if spikes else ''
        account = f'{row["account"]:.4f} ({row["coding"]})' if 'account' in row else ''
        rows.append([row['baseline'], *_losses(row), counts, f'{row["proxy"]:.3g}' if 'proxy' in row else '', account])
    return table(['', *LOSSES, 'spikes [M] (unary / binary / graded)', 'proxy [mJ]', 'account [mJ]'], rows)


def beside_others_in_short() -> str:
    """The same, losses alone."""
    return table(['', *LOSSES], [[row['baseline'], *_losses(row)] for row in read('baselines_micro')['rows']])


LOSSES = ('top-1 [%]', 'drop [points]', 'agreement [%]', 'relative logit error')


def _losses(row: Any) -> list[str]:
    return [f'{row["top1"]:.1f}', f'{row["drop"]:.1f} +- {row["drop_error"]:.1f}', f'{row["agreement"]:.1f}',
            f'{row["error"]:.3f}']


def over_levels() -> str:
    """Accuracy over the number of levels N, of scripts/accuracy.py."""
    rows = []
    for result in read('accuracy'):
        cells = [f'{result["source_top1"]:.2f}', f'{result["top1"]:.2f}', *dropped(result)]
        rows.append([f'`{result["model"]}`', str(result['levels']), *cells])
    return table(['source', 'N', 'top-1 of source [%]', 'top-1 [%]', *DROPPED], rows)


def firing() -> str:
    """Spikes per neuron over the number of levels N, of scripts/accuracy.py."""
    rows = []
    for result in read('accuracy'):
        spikes = result['spikes_per_neuron']
        rows.append([f'`{result["model"]}`', str(result['levels']), f'{result["activity"]:.3f}',
                     *(f'{spikes[coding]:.2f}' for coding in CODINGS)])
    return table(['source', 'N', 'activity', *(f'spikes per neuron, {coding}' for coding in CODINGS)], rows)


def over_the_twin() -> str:
    """Energy over that of the quantised network of as many bits, by coding."""
    figures = read('profile_micro')['energy']
    accounts = figures['account']
    ratios = [ratio_to(accounts[coding], accounts[TWIN]) for coding in CODINGS]
    cells = [f'{ratio:.2f} ({low:.2f} to {high:.2f})' for ratio, low, high in ratios]
    less = [f'{figures["break_even"][coding]:.2f}' for coding in CODINGS]
    return table(
        ['energy over the bit-matched quantised twin', *CODINGS],
        [['ratio (data movement +- 50 %)', *cells], ['5 % less below an activity of', *less]])


def account() -> str:
    """Energy per image by part and coding."""
    accounts = read('profile_micro')['energy']['account']
    rows = [[label, *(f'{parts[part]:.4g}' for parts in accounts.values())]
            for part, label in {**PARTS, **OTHER}.items()]
    return table(['mJ per image', *(name.replace('quantised, ', '') for name in accounts)], rows)


def written_down(name: str) -> Callable[[], str]:
    """A table that was written down from what a command printed, with when that was."""
    def made() -> str:
        found = read(name)
        versions = ', '.join(f'{package} {version}' for package, version in found['versions'].items())
        when = f'*measured {found["measured"]}, {found["state"]} ({versions}); not repeated since*'
        return table(found['heads'], [*found['rows'], [when, *[''] * (len(found['heads']) - 1)]])
    return made


def detectors() -> str:
    """Boxes of cells and masks of nuclei, in short."""
    cells, nuclei = (read(f'detector_{name}') for name in ('cells', 'nuclei'))
    rows = [[row[0], *row[1:3], *other[4:6]] for row, other in zip(cells['rows'], nuclei['rows'], strict=True)]
    when = f'*measured {cells["measured"]} and {nuclei["measured"]}, {cells["state"]}; not repeated since*'
    return table(['', 'cells, boxes: mAP', 'mAP50', 'nuclei, masks: mAP', 'mAP50'], [*rows, [when, '', '', '', '']])


def short_training() -> str:
    """A detector that was trained for minutes, and its SFormer."""
    found = read('detector_short')
    rows = [[name, *(f'{boxes[key]:.2f}' for key in ('mAP', 'mAP50', 'mAP75'))]
            for name, boxes in (('source', found['source_boxes']), ('SFormer, N = 63', found['boxes']))]
    return table(['boxes', 'mAP', 'mAP50', 'mAP75'], rows)


def speed() -> str:
    """Recipe `fast` by OpenVINO, over the source in float32 and over NNCF's int8."""
    rows = []
    for network in ('vit_base', 'vit_small'):
        for instructions, said in (('vnni', 'AVX-512-VNNI'), ('avx2', 'AVX2')):
            name = f'speed_{network}_{instructions}'
            for size in (1, 8):
                beside = name + '_batch1' if size == 1 and f'{name}_batch1' in names() else name
                rows.append([f'`{network}_patch16_224`', said, str(size), times(name, size, 'openvino:fp32'),
                             times(beside, size, 'openvino:nncf')])
    return table(['network', 'instruction set', 'batch', 'over float32', "over NNCF's int8"], rows)


def commands() -> str:
    """The command of each file."""
    rows = []
    for name in names():
        found = read(name)
        rows.append([f'`{name}`', f'`{(found[0] if isinstance(found, list) else found)["command"]}`'])
    return table(['file', 'command'], rows)


TABLES: dict[str, Callable[[], str]] = {
    'figures of a classifier': CLASSIFICATION.documented,
    'figures of a detector': DETECTION.documented,
    'recipes': recipes,
    'trained at scale': trained_at_scale,
    'photographs and generated images': generated,
    'feedback': feedback,
    'few levels': few_levels,
    'keys that rest': keys_that_rest,
    'maps of keys that rest': silent_maps,
    'feedback in integers': feedback_in_integers,
    'concentrated': concentrated,
    'left out': left_out,
    'added': added,
    'fine-tuned ViT-S': accuracy,
    'networks in the package': embedded,
    'int8': int8,
    'speed': speed,
    'two small networks': small_networks,
    'silence': silence,
    'trained': trained,
    'beside others': beside_others,
    'beside others, in short': beside_others_in_short,
    'beside others, in full': written_down('baselines_full'),
    'EVA-02 beside others': written_down('baselines_eva02'),
    'ViT-S beside others': written_down('baselines_saliency'),
    'SpikingJelly': written_down('spikingjelly'),
    'accuracy over N': over_levels,
    'firing over N': firing,
    'energy over the twin': over_the_twin,
    'account of energy': account,
    'detectors': detectors,
    'cells': written_down('detector_cells'),
    'nuclei': written_down('detector_nuclei'),
    'cells, a short training': short_training,
    'saliency maps': written_down('heatmaps'),
    'times of the page': written_down('page_times'),
    'logits of the page': written_down('page_logits'),
    'commands': commands,
}


def with_tables(page: str) -> str:
    """A page with its tables as the files have them."""
    return MARK.sub(lambda found: found['name'] + found['rest'] + TABLES[found['name']](), page)


def pages() -> list[Path]:
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def main() -> None:
    for path in pages():
        text = path.read_text(encoding='utf-8')
        if (made := with_tables(text)) != text:
            with write_aside(path.parent) as aside:
                (aside / path.name).write_text(made, encoding='utf-8')


if __name__ == '__main__':
    main()
