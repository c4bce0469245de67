"""The cards of this repository, and what a reader does with a card."""
import json
import re
from pathlib import Path

import torch

from sformer.publishing.model_record import ModelRecord

MODEL_CARDS = Path(__file__).parents[1] / 'model_cards'


def committed(name):
    """Record of a model that ships with the package."""
    return ModelRecord(**json.loads((MODEL_CARDS / f'{name}.json').read_text()))


def run_snippet(card):
    """Run the Python code of a card as a reader would."""
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    assert code.startswith('import sformer\n')
    names = {}
    exec(code, names)
    classes = int(re.search(r'# \(1, (\d+)\)', code)[1])
    assert names['logits'].shape == (1, classes) and torch.isfinite(names['logits']).all()
