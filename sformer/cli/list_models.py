"""`sformer list`."""
import json
from pathlib import Path

from .tables import Format, TableFormat, print_table, show_table

__all__ = ['list_models']

LIST_COLUMNS = ('name', 'source', 'param_count', 'input_size', 'num_classes', 'license', 'weights', 'results')

# Counting parameters takes seconds: `scripts/make_list.py` does, and a test says when to do it again.
KNOWN = Path(__file__).parent / 'models.json'


NAME_WIDTH = 44
LINE_WIDTH = 80


def _line(name: str, parameters: str, size: str, licence: str) -> str:
    """A line of the list; names are whole, so that they can be searched for and copied."""
    figures = f'{parameters:>10}  {size:>10}  {licence}'
    whole = f'{name:<{NAME_WIDTH}}{figures}'
    return whole if len(name) < NAME_WIDTH and len(whole) <= LINE_WIDTH else f'{name}\n{figures:>{LINE_WIDTH}}'


def list_models(format: TableFormat = Format.table) -> None:
    """List the models that the package registers with timm, with their sources, and names of models of other tasks."""
    known = json.loads(KNOWN.read_text(encoding='utf-8'))
    found = [
        dict(entry, input_size='x'.join(map(str, entry['input_size']))) for entry in known['models']]
    if format != Format.table:
        rows = [[str(entry.get(column) or '') for column in LIST_COLUMNS] for entry in found]
        show_table(format, 'models of timm', LIST_COLUMNS, rows, LIST_COLUMNS, found)
        return
    for weights in dict.fromkeys(entry['weights'] for entry in found):
        print(f'Weights: {weights}\n')
        print(_line('model, and its source below', 'param. [M]', 'input', 'licence'))
        for entry in found:
            if entry['weights'] == weights:
                print(_line(entry['name'], str(entry['param_count']), entry['input_size'], entry['license']))
                print(f'  {entry["source"]}')
                if entry['results']:
                    print(f'  top-1 [%]: {entry["results"]}')
        print()
    for other in known['others']:
        print_table(other['heading'], ('name',), [(name,) for name in other['names']])
