"""Write the tables of README and docs: figures of results from their schema, measured ones from files in docs/figures.

    python scripts/make_tables.py

A table stands behind a line `<!-- NAME: written by scripts/make_tables.py -->`. Each file in docs/figures is what a
command wrote with `--results-file` or `-o`, and holds that command; who measures anew replaces it and runs this.
"""
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sformer.evaluation.figures import CLASSIFICATION, DETECTION
from sformer.files import write_aside

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / 'docs/figures'
MARK = re.compile(r'(?<=<!-- )(?P<name>[^:\n]+)(?P<rest>: written by scripts/make_tables.py -->\n).*?(?=\n\n)', re.S)
RECIPES = {
    'default': 'any processor, any images: 63 levels per branch',
    'fast': 'int8 engines: 63 levels, one threshold for all tokens, a softmax of bytes',
    'accurate': '127 levels',
    'paper': '32 levels, comparable with the paper',
    'few': '8 levels',
    'quiet': '16 levels, a price of activity',
}


def read(name: str) -> Any:
    return json.loads((FIGURES / f'{name}.json').read_text(encoding='utf-8'))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ['---'] * len(heads), *rows]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines).replace('|  |', '| |')


def fidelity(name: str) -> Any:
    """The only network of a file of scripts/fidelity.py."""
    result, = read(f'fidelity_{name}')['results']
    return result


def times(name: str, batch_size: int, against: str, execution: str = 'openvino') -> str:
    """How many times as fast an execution is: median, least and most of the rounds."""
    for row in read(name)['results']:
        if (row['execution'], row['batch_size']) == (execution, batch_size):
            found = row['speedup'][against]
            return f'{found["median"]:.2f} ({found["min"]:.2f} to {found["max"]:.2f})'
    raise KeyError(f'{name} has no {execution} of batch size {batch_size}')


def recipes() -> str:
    """What each recipe is for, with its error, activity and speed."""
    rows = []
    for name, purpose in RECIPES.items():
        found = fidelity(name)
        spikes = found['spikes_per_neuron']
        cells = [f'{found["tokens"]:.4f}', f'{spikes["graded"]:.2f}', f'{spikes["unary"]:.1f}']
        rows.append([f'`{name}`', purpose, *cells, times(f'speed_{name}', 8, 'openvino:fp32')])
    return table(['recipe', 'for', 'relative error', 'activity', 'unary spikes', 'speed in integers'], rows)


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


def feedback() -> str:
    """Networks whose neurons feed back to one another and whose attention is balanced, beside plain ones."""
    rows = []
    for name, said in (('four', 'N = 4'), ('few', 'N = 8')):
        plain = fidelity(name)
        both = fidelity(f'{name}_lateral')
        share = both['feedback']
        rows.append([said, f'{plain["tokens"]:.4f}', f'{both["tokens"]:.4f}', f'{share["graded"]:.1%}',
                     f'{share["dense"]:.1%}'])
    return table(['levels', 'by themselves', 'balanced, with feedback, G = 8', 'operations that lateral spikes cause',
                  'if all were sent'], rows)


def embedded() -> str:
    """Networks in the package, by number of levels, as their cards have them."""
    rows = []
    for path in sorted((ROOT / 'model_cards').glob('sformer*.cifar10.json')):
        record = json.loads(path.read_text(encoding='utf-8'))
        shipped = dict(record['evaluations']['eval.json'], levels=record['sfn']['levels'])
        for result in sorted([*record['curve'], shipped], key=lambda result: result['levels']):
            drop = result['source_top1'] - result['top1']
            cells = [f'{result["source_top1"]:.2f}', f'{result["top1"]:.2f}',
                     f'{drop:.2f} +- {error_of_drop(result):.2f}', f'{result["agreement"]:.2f}',
                     f'{result["activity"]:.3f}']
            rows.append([f'`{record["name"]}`', str(result['levels']), *cells])
    return table(['SFormer', 'N', 'source [%]', 'top-1 [%]', 'drop [points]', 'agreement [%]', 'activity'], rows)


def fine_tuned() -> str:
    """The fine-tuned ViT-S, by recipe and number of levels, and in integers by each engine."""
    results = read('compare_vit_small_cifar10')
    source = results[0]['source_top1']
    rows = [['source', f'{source:.2f}', '', '', '', '']]
    for result in results:
        drop = f'{source - result["top1"]:.2f}'
        cells = ['', '', '']
        if result.get('agreement') is not None:  # a graph has no source inside
            drop += f' +- {error_of_drop(result):.2f}'
            cells = [f'{result["agreement"]:.2f}', f'{result["relative_logit_error"]:.4f}', f'{result["activity"]:.2f}']
        rows.append([f'`{result["model"]}`', f'{result["top1"]:.2f}', drop, *cells])
    return table(['SFormer', 'top-1 [%]', 'drop [points]', 'agreement [%]', 'relative logit error', 'activity'], rows)


def error_of_drop(result: Any) -> float:
    """Standard error of the difference of two networks on the same images, at most, in points: as if each image that
    they see differently counted for one of them."""
    return 100 * math.sqrt((1 - result['agreement'] / 100) / result['num_images'])


def speed() -> str:
    """Recipe `fast` by OpenVINO, over the source in float32 and over NNCF's int8."""
    rows = []
    for network in ('vit_base', 'vit_small'):
        for instructions, said in (('vnni', 'AVX-512-VNNI'), ('avx2', 'AVX2')):
            name = f'speed_{network}_{instructions}'
            for size in (1, 8):
                beside = name + '_batch1' if size == 1 and (FIGURES / f'{name}_batch1.json').exists() else name
                rows.append([f'`{network}_patch16_224`', said, str(size), times(name, size, 'openvino:fp32'),
                             times(beside, size, 'openvino:nncf')])
    return table(['network', 'instruction set', 'batch', 'over float32', "over NNCF's int8"], rows)


def commands() -> str:
    """The command of each file."""
    rows = []
    for path in sorted(FIGURES.glob('*.json')):
        found = read(path.stem)
        rows.append([f'`{path.stem}`', f'`{(found[0] if isinstance(found, list) else found)["command"]}`'])
    return table(['file', 'command'], rows)


TABLES: dict[str, Callable[[], str]] = {
    'figures of a classifier': CLASSIFICATION.documented,
    'figures of a detector': DETECTION.documented,
    'recipes': recipes,
    'photographs and generated images': generated,
    'feedback': feedback,
    'fine-tuned ViT-S': fine_tuned,
    'networks in the package': embedded,
    'int8': int8,
    'speed': speed,
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
