"""What files in docs/figures hold, and how it is written: what scripts/make_tables.py makes tables of."""
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / 'docs/figures'


def names() -> list[str]:
    return sorted(path.stem for path in FIGURES.glob('*.json'))


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
            return of_pairs(row['speedup'][against])
    raise KeyError(f'{name} has no {execution} of batch size {batch_size}')


def of_pairs(found: Any) -> str:
    """A ratio of times: median, least and most of the rounds."""
    return f'{found["median"]:.2f} ({found["min"]:.2f} to {found["max"]:.2f})'


def error_of_drop(result: Any) -> float:
    """Standard error of the difference of two networks on the same images, at most, in points: as if each image that
    they see differently counted for one of them."""
    return 100 * math.sqrt((1 - result['agreement'] / 100) / result['num_images'])


DROPPED = ('drop [points]', 'relative logit error', 'agreement [%]', 'activity')


def dropped(result: Any) -> list[str]:
    """What an SFormer loses, and how many of its neurons fire."""
    drop = result['source_top1'] - result['top1']
    return [f'{drop:.2f} +- {error_of_drop(result):.2f}', f'{result["relative_logit_error"]:.4f}',
            f'{result["agreement"]:.2f}', f'{result["activity"]:.3f}']
