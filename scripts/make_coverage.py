"""Write model_cards/COVERAGE.md: every ViT, DeiT, BEiT and EVA entrypoint of timm, and whether it converts.

    python scripts/make_coverage.py

Networks are built and converted on the meta device, which takes no memory.
"""
from pathlib import Path

import timm
import torch

import sformer
from sformer.data.batches import progress
from sformer.files import write_aside
from sformer.models import spiking_model_
from sformer.models.zoo import architecture_of

MODULES = ('vision_transformer', 'deit', 'beit', 'eva')


def row(module: str, name: str) -> str:
    try:
        with torch.device('meta'):
            model = spiking_model_(timm.create_model(name))
    except (sformer.SFormerError, RuntimeError, TypeError, ValueError) as e:
        return f'| `{name}` | {module} | no: {" ".join(str(e).split())} | | |'
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f'| `{name}` | {module} | yes | {parameters:.1f} | `{architecture_of(name)}` |'


def main() -> None:
    names = [(module, name) for module in MODULES for name in timm.list_models(module=module)]
    rows = [row(module, name) for module, name in progress(names, 'Converting', len(names))]
    converted = sum('| yes |' in r for r in rows)
    text = '\n'.join([
        '# Which networks of timm convert', '',
        f'{converted} of {len(rows)} entrypoints of timm {timm.__version__} in {", ".join(MODULES)}; made by '
        f'`python scripts/make_coverage.py`. `sformer convert NAME` takes any of them; what has no architecture of its '
        f'own in the zoo becomes an `sformer_custom`, whose config names its source.', '',
        '| entrypoint | module | converts | parameters [M] | becomes |',
        '| --- | --- | --- | --- | --- |', *rows, ''])
    with write_aside(Path(__file__).parents[1] / 'model_cards') as aside:
        (aside / 'COVERAGE.md').write_text(text, encoding='utf-8')
    print(f'{converted} of {len(rows)} convert')


if __name__ == '__main__':
    main()
