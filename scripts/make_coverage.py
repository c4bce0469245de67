"""Write model_cards/COVERAGE.md: every family of timm, which of its entrypoints convert, and how close they are.

    python scripts/make_coverage.py
    python scripts/make_coverage.py swin_transformer convnext
    python scripts/make_coverage.py --quick swin_transformer convnext        # measures no errors

Families are modules of timm; those that are named are done anew, the others stay as the page has them. Networks are
built with one block, where they can be, and converted on the meta device, which takes no memory, and run there, so that
a product of currents in a forward of their own is met. Errors are measured on the smallest member of some families:
random weights with a few channels of thirty times the scale behind each norm, generated images, relative errors of
logits (or features) of images that were not calibrated to.
"""
import copy
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from timm.models.gemma4_vit import Gemma4Attention

import sformer
from sformer.conversion.calibration import check_products
from sformer.data import open_images
from sformer.data.batches import progress
from sformer.errors import first_line
from sformer.execution import export_onnx, load_onnx
from sformer.files import write_aside
from sformer.models import spiking_model_
from sformer.models.zoo import architecture_of
from sformer.neurons import SFNConfig

PAGE = Path(__file__).parents[1] / 'model_cards' / 'COVERAGE.md'
IMAGES = 8  # to calibrate to, and as many to measure with
OUTLIERS = 30.
# families whose smallest member is measured -> arguments that let it be: small images, of the largest fewer blocks
MEASURED: dict[str, dict[str, Any]] = {
    'vision_transformer': dict(img_size=96), 'deit': dict(img_size=96), 'beit': dict(img_size=96),
    'eva': dict(img_size=112), 'qwen3_vit': dict(img_size=96), 'gemma4_vit': dict(img_size=96),
    'deepseek_vit': dict(img_size=112, depth=4), 'naflexvit': dict(img_size=96),
    'vision_transformer_sam': dict(img_size=112), 'vision_transformer_relpos': dict(img_size=96),
    'vitamin': dict(img_size=96), 'vision_transformer_hybrid': dict(img_size=96),
    'swin_transformer': dict(img_size=112), 'hiera': {}, 'pvt_v2': dict(img_size=96), 'convnext': dict(img_size=96),
    'resnet': dict(img_size=96), 'efficientnet': dict(img_size=96), 'swin_transformer_v2': dict(img_size=128),
    'swin_transformer_v2_cr': dict(img_size=112), 'davit': dict(img_size=96), 'cait': dict(img_size=96),
    'xcit': dict(img_size=96),
}
COLUMNS = ('measured on', 'N = 127', 'N = 32', 'reloaded', 'integers', 'OpenVINO, ONNX Runtime')
ROW = re.compile(r'^\| (\w+) \| (\d+) \| (\d+) \| ')


def families() -> dict[str, list[str]]:
    """Modules of timm, with their entrypoints."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module.startswith('timm.models.'):
            found.setdefault(module.rpartition('.')[2], []).append(name)
    return dict(sorted(found.items()))


def structure(model: nn.Module) -> frozenset[type[nn.Module]]:
    return frozenset(type(module) for module in model.modules())


def shallow(name: str) -> nn.Module:
    """An entrypoint with one block, where it can be built so: of plain transformers all are alike."""
    try:
        return timm.create_model(name, depth=1).eval()
    except (TypeError, ValueError, AssertionError):
        return timm.create_model(name).eval()


def refusal(name: str, known: dict[frozenset[type[nn.Module]], str]) -> str:
    """Why an entrypoint does not convert; empty if it does. What is made of the same layers is run once."""
    with torch.device('meta'):
        try:
            model = shallow(name)
        except (RuntimeError, NotImplementedError) as e:
            return f'is not built on the meta device: {first_line(e)}'
        made_of = structure(model)
        if made_of not in known:
            known[made_of] = ''
            try:
                size = resolve_input_data_config(model)['input_size']
                check_products(spiking_model_(model), torch.zeros(1, *size))
            except (sformer.SFormerError, RuntimeError, TypeError, ValueError, AttributeError) as e:
                known[made_of] = ' '.join(str(e).split()) or type(e).__name__
    return known[made_of]


def trained_like_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, with a few channels of a larger scale behind each norm of the residual stream, as of trained
    networks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for name, module in model.named_modules():
            if isinstance(module, Gemma4Attention):  # whose scale is in the gains of its norms
                for norm in (module.q_norm, module.k_norm):
                    norm.weight.mul_(module.head_dim ** -0.25)
            weight = getattr(module, 'weight', None)
            if name.endswith(('q_norm', 'k_norm')):  # of heads, where such channels would decide each softmax alone
                continue
            if isinstance(weight, nn.Parameter) and weight.ndim == 1 and len(weight) >= 64:
                weight[torch.randperm(len(weight), generator=generator)[:max(1, len(weight) // 256)]] *= OUTLIERS
    return model.eval()


def smallest(names: list[str]) -> str:
    def size(name: str) -> int:
        with torch.device('meta'):
            return sum(p.numel() for p in timm.create_model(name).parameters())
    return min((name for name in names if not name.startswith('test_')), key=size)


def measured(family: str, name: str) -> list[str]:
    """The member and what was measured with it, as `COLUMNS` says."""
    arguments = dict(MEASURED[family])
    size = arguments.get('img_size')
    torch.manual_seed(0)
    try:
        source: Any = trained_like_(timm.create_model(name, **arguments))
    except TypeError:  # takes images of any size, without being told
        del arguments['img_size']
        source = trained_like_(timm.create_model(name, **arguments))
    if size is not None:
        source.pretrained_cfg['input_size'] = (3, size, size)
    config = resolve_input_data_config(source)
    read = open_images('dead-leaves', None, data_config=config, num_images=2 * IMAGES, seed=0)
    calibration, test = torch.cat([batch for batch, _ in read.batches(IMAGES)]).split(IMAGES)
    with torch.no_grad():
        expected = source(test)
        model, found = source, []
        for levels in (127, 32):
            model = sformer.convert(source, [calibration], SFNConfig(levels=levels))
            fired = model(test)
            found.append(f'{error(fired, expected):.3f}')
        found.append(reloaded(model, test, fired))
        whole = copy.deepcopy(model)
        sformer.to_integer_(whole)
        found.append(f'{error(whole(test), fired):.3f}')
    label = ', '.join([f'`{name}`', f'{config["input_size"][1]} pixels',
                       *(f'{key}={value}' for key, value in arguments.items() if key != 'img_size')])
    return [label, *found, exported(model, test, fired)]


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


def reloaded(model: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> str:
    with tempfile.TemporaryDirectory() as folder:
        again = sformer.load_model(sformer.save_model(model, Path(folder) / 'm'))
        return 'equal' if torch.equal(again(images), expected) else f'{error(again(images), expected):.3f}'


def exported(model: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> str:
    """Errors of the exported graph against the model by each engine, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(model, Path(folder) / 'm.onnx')
            return ', '.join(f'{error(load_onnx(Path(folder) / "m.onnx", engine)(images), expected):.3f}'
                             for engine in ('openvino', 'onnxruntime'))
        except Exception as e:  # whatever torch's exporter and the engines raise
            return f'no: {first_line(e)[:100]}'.replace('|', '/')


def done(family: str, names: list[str], quick: bool) -> tuple[str, str]:
    """A row of the table, and the list of what converts."""
    known: dict[frozenset[type[nn.Module]], str] = {}
    refused = {name: refusal(name, known) for name in progress(names, family, len(names))}
    converts = [name for name in names if not refused[name]]
    why = next((reason for reason in refused.values() if reason), '').replace('|', '/')
    cells = [''] * len(COLUMNS)
    if converts and family in MEASURED and not quick:
        try:
            cells = measured(family, smallest(converts))
        except (sformer.SFormerError, RuntimeError, ValueError, TypeError) as e:
            cells[0] = f'not measured: {first_line(e)[:100]}'
    why = why.partition('. Register')[0].removeprefix('no spiking counterpart for ')[:160]
    row = f'| {family} | {len(names)} | {len(converts)} | {" | ".join(cells)} | {why} |'
    print(row, flush=True)
    listed = ', '.join(f'`{name}`' if architecture_of(name) == 'sformer_custom' else
                       f'`{name}` (`{architecture_of(name)}`)' for name in converts) or 'none'
    left = ', '.join(f'`{name}`' for name in names if refused[name])
    return row, f'**{family}**: {listed}.{f" Not: {left}." if left else ""}'


def parts_of(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Rows and lists of a page, by family."""
    rows = {m[1]: line for line in text.splitlines() if (m := ROW.match(line))}
    lists = {m[1]: line for line in text.splitlines() if (m := re.match(r'^\*\*(\w+)\*\*: ', line))}
    return rows, lists


def page(known: dict[str, list[str]], rows: dict[str, str], lists: dict[str, str]) -> str:
    counts = [[int(cell) for cell in ROW.match(row).groups()[1:]] for row in rows.values()]  # type: ignore[union-attr]
    entrypoints, converts = (sum(column) for column in zip(*counts, strict=True))
    order = [family for family in known if family in rows]
    others = [f'{family} ({", ".join(f"`{name}`" for name in names)})' for family, names in known.items()
              if family not in rows]
    return '\n'.join([
        '# Which networks of timm convert', '',
        f'{converts} of {entrypoints} entrypoints of timm {timm.__version__}, in {len(order)} families (modules of '
        f'timm); made by `python scripts/make_coverage.py`. `sformer convert NAME` takes any of them; what has no '
        f'architecture of its own in the zoo becomes an `sformer_custom`, whose config names its source.', '',
        'Errors are relative ones of logits (or features) against the source, of random weights with outlier channels '
        f'of {OUTLIERS:.0f} times the scale behind each norm of the residual stream, on generated images, default '
        'recipe but for the levels. Whoever has weights that were trained measures again (`sformer evaluate`). '
        'Integers and engines are compared with the simulation at N = 32; a row without figures was converted, and '
        'not measured.', '',
        f'| family | entrypoints | convert | {" | ".join(COLUMNS)} | why not |',
        '| --- ' * (len(COLUMNS) + 4) + '|', *(rows[family] for family in order), '',
        '## Entrypoints', '', *(f'{lists[family]}\n' for family in order),
        '## Not looked at yet', '', '; '.join(others) or 'None.', ''])


def main(arguments: list[str]) -> None:
    known = families()
    quick, wanted = '--quick' in arguments, [name for name in arguments if name != '--quick']
    for family in wanted or known:
        made = done(family, known[family], quick)
        old = parts_of(PAGE.read_text(encoding='utf-8'))  # as it is now: several may run at once
        rows, lists = ({name: part[name] for name in known if name in part} for part in old)
        rows[family], lists[family] = made
        with write_aside(PAGE.parent) as aside:
            (aside / PAGE.name).write_text(page(known, rows, lists), encoding='utf-8')


if __name__ == '__main__':
    main(sys.argv[1:])
