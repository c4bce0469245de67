"""A static page that runs exported networks in the browser, on the visitor's own processor."""
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from timm.data import resolve_data_config

from ..data.preprocessing import check_data_config
from ..errors import SFormerError, needed_packages
from ..evaluation.predictions import class_names
from ..execution import export_onnx
from ..execution.exported import GraphRecord, read_graph
from ..execution.onnx import grid_of
from ..execution.proof import saturating
from ..execution.spike_outputs import SPIKE_OUTPUTS
from ..files import Json, holds, may_write, write_aside
from ..layers import is_calibrated, uncalibrated
from ..tasks import task_of
from .web_runtime import RUNTIME_FILES, find_runtime

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ['MODELS', 'PAGE_FILES', 'WrittenPage', 'is_page', 'write_page']

TEMPLATES = Path(__file__).parent / 'templates'
PAGE_FILES = {'index.html': 'page.html', 'page.js': 'page.js', 'worker.js': 'page_worker.js',
              'preprocess.js': 'page_preprocess.js'}
MODELS = 'models.json'  # what the page knows of its graphs
LICENSE = 'LICENSE.onnxruntime'
MAX_LEVELS = 63  # of a neuron whose spikes are 7 bits, as relaxed SIMD multiplies them
INTERPOLATIONS = ('nearest', 'box', 'bilinear', 'hamming', 'bicubic', 'lanczos')


@dataclass(frozen=True, kw_only=True)
class PageModel:
    """What a page knows of one of its graphs.

    Args:
        title: What the visitor chooses it by.
        description: How it fires.
        file: Its graph.
        names: Names of its classes.
        levels: Levels N per branch.
        input_size: (C, H, W).
        mean: Of the normalisation, per channel.
        std: Likewise.
        interpolation: How images are resized.
        scale_size: Height and width before the crop.
        crop_mode: `center`, `squash` or `border`.
        grid_size: Rows and columns of patches; None where the graph does not say where it spikes.
        blocks: Paths of its blocks.
        neurons_per_token: Neurons of each that are counted, per token.
        weights_sha256: State hash of the model that was exported.
    """
    title: str
    description: str
    file: str
    names: list[str]
    levels: int
    input_size: list[int]
    mean: list[float]
    std: list[float]
    interpolation: str
    scale_size: list[int]
    crop_mode: str
    grid_size: list[int] | None
    blocks: list[str]
    neurons_per_token: list[int]
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class WrittenPage:
    """A page that was written.

    Args:
        folder: Where it lies.
        models: Its graphs.
        runtime: What executes them, with its version.
        size: Bytes of all its files.
    """
    folder: Path
    models: list[PageModel]
    runtime: str
    size: int


def is_page(path: Path) -> bool:
    """Whether a file lies beside the `models.json` of a page, as part of it."""
    return holds('title', 'runtime', 'models')(path.with_name(MODELS))


def write_page(
        models: Sequence[str],
        folder: str | Path,
        *,
        title: str | None = None,
        runtime: str | Path | None = None,
        space: bool = False,
        license: str | None = None,
        overwrite: bool = False,
) -> WrittenPage:
    """Write a page that needs no server but one that hands out its files.

    It holds no path of this machine: models have the names of their folders or files, and what a graph recorded is left
    out of it.

    Args:
        models: Models as `sformer.tasks.open_model` finds them, or graphs that `export_onnx` wrote, which say where
            they spike if they were exported with `spikes=True`. Several are chosen from on the page, in this order.
        folder: Where to; made if it is missing. A page that is there is replaced.
        title: Title of the page.
        runtime: Folder `dist` of npm's `onnxruntime-web`; npm fetches it if None.
        space: Write `README.md`, too, the card of a static Space of the Hub.
        license: Licence that the card names.
        overwrite: Replace files of others.

    Raises:
        SFormerError: If a model is of a task that no page is made for, fires more levels than browsers multiply
            exactly, or is prepared in a way that the page does not know; if the folder holds files of others, a package
            is missing, or the runtime cannot be had.
    """
    folder = Path(folder)
    graphs = [f'model-{i}.onnx' for i in range(len(models))]
    files = [*PAGE_FILES, MODELS, LICENSE, *RUNTIME_FILES, *graphs, *(['README.md'] if space else [])]
    may_write(folder, 'page as sformer page wrote it', is_page, files=files, overwrite=overwrite)
    with needed_packages('onnx'):
        import onnx
    if space:
        with needed_packages('pages'):
            import jinja2
    tasks = {name: task_of(name) for name in models}
    for name, task in tasks.items():
        task.check_verb('page', name)
    found = find_runtime(runtime)
    engine = f'ONNX Runtime Web{f" {found.version}" if found.version else ""}'
    named = title or ('SFormer' if len(models) > 1 else _title(models[0]))
    before = _graphs_of(folder)
    with write_aside(folder) as aside:
        written = []
        for name, file in zip(models, graphs, strict=True):
            graph, record, spikes = _graph(name)
            _check_exact(graph, record, name)
            written.append(_page_model(record, name, file, spikes))
            del graph.metadata_props[:]  # which has command lines, and with them paths
            onnx.save(graph, aside / file)
        for file, template in PAGE_FILES.items():
            shutil.copyfile(TEMPLATES / template, aside / file)
        for file in RUNTIME_FILES:
            shutil.copyfile(found.folder / file, aside / file)
        shutil.copyfile(TEMPLATES / 'onnxruntime_license.txt', aside / LICENSE)
        about = dict(title=named, runtime=f'{engine} (MIT licence)', models=[asdict(model) for model in written])
        (aside / MODELS).write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')
        if space:
            environment = jinja2.Environment(
                loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True)
            text = environment.get_template('space.md').render(title=named, models=written, runtime=engine)
            (aside / 'README.md').write_text(_space_metadata(named, license) + text, encoding='utf-8')
        size = sum(path.stat().st_size for path in aside.iterdir())
    for file in before - {*graphs}:
        (folder / file).unlink(missing_ok=True)
    return WrittenPage(folder=folder, models=written, runtime=engine, size=size)


def _graphs_of(folder: Path) -> set[str]:
    """Names of the graphs of the page in a folder, if there is one."""
    if not is_page(folder / MODELS):
        return set()
    models = json.loads((folder / MODELS).read_text(encoding='utf-8') or '{}').get('models', [])
    return {Path(model['file']).name for model in models}


def _title(name: str) -> str:
    """What a visitor reads of a model: its name without the place where it lies."""
    return Path(name.removeprefix('local-dir:').removeprefix('hf-hub:').removesuffix('.onnx')).resolve().name or name


def _graph(name: str) -> 'tuple[ModelProto, GraphRecord, bool]':
    """The graph of a model, what was recorded of it, and whether it says where it spikes; exported first if it is none
    yet."""
    if name.endswith('.onnx'):
        graph, record = read_graph(name)
        if record.get('uint8_input'):
            raise SFormerError(f'{name} takes bytes, and a page gives it normalised pixels: export it without '
                               f'--uint8-input.')
    else:
        model = task_of(name).open(name)
        if not is_calibrated(model):
            raise SFormerError(f'{name}: {uncalibrated(model)}.')
        task_of(model).check_converted(model, name)
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside, 'model.onnx')
            try:
                export_onnx(model, path, spikes=grid_of(model) is not None)
            except SFormerError:  # of windows and the like nothing says which patch they are of
                export_onnx(model, path)
            graph, record = read_graph(path)
        record['pretrained_cfg'] = dict(record['pretrained_cfg'], label_names=class_names(model))
    return graph, record, {*SPIKE_OUTPUTS} <= {output.name for output in graph.graph.output}


def _check_exact(graph: 'ModelProto', record: GraphRecord, name: str) -> None:
    """Raise SFormerError unless WebAssembly sums all products of bytes exactly, with relaxed SIMD, too: that may
    multiply 8 by 7 bits, and add pairs in 16 bits with saturation."""
    levels = max(record['levels'], default=0)
    if levels > MAX_LEVELS:
        raise SFormerError(f'{name} fires up to {levels} levels, and browsers multiply up to {MAX_LEVELS} exactly: the '
                           f'recipes default and fast have as many, --levels fewer.')
    found = saturating(graph)
    if found:
        raise SFormerError(f'{name} was exported with --no-portable: {len(found)} products of bytes ({found[0]} ...) '
                           f'would not be exact in every browser. Export it without.')


def _page_model(record: GraphRecord, name: str, file: str, spikes: bool) -> PageModel:
    cfg: Json = dict(record['pretrained_cfg'], input_size=tuple(record['input_size']))
    config: Json = resolve_data_config(pretrained_cfg=cfg)
    size, mean, std = check_data_config(config)
    interpolation, crop_mode = config['interpolation'], config['crop_mode']
    if interpolation not in INTERPOLATIONS:
        raise SFormerError(f'{name} has its images resized by {interpolation!r}, which the page does not know: '
                           f'{", ".join(INTERPOLATIONS)}.')
    if not record['num_classes']:
        raise SFormerError(f'{name} has no classes to show (num_classes=0).')
    names = cfg.get('label_names') or ()
    known = isinstance(names, (list, tuple)) and len(names) == record['num_classes']
    levels = max(record['levels'], default=0)
    recipe = record.get('recipe')
    return PageModel(
        title=_title(name), file=file, levels=levels,
        description=f'N = {levels} levels per branch' + (f', recipe {recipe}' if recipe else '')
        + f', {record["param_count"] / 1e6:.1f} million parameters',
        names=[*names] if known else [str(index) for index in range(record['num_classes'])],
        input_size=[*size], mean=[*mean], std=[*std], interpolation=interpolation, crop_mode=crop_mode,
        scale_size=[math.floor(side / config['crop_pct']) for side in size[1:]],
        grid_size=(record.get('grid_size') if spikes else None), blocks=record.get('blocks', []) if spikes else [],
        neurons_per_token=record.get('neurons_per_token', []) if spikes else [],
        weights_sha256=record['weights_sha256'])


def _space_metadata(title: str, license: str | None) -> str:
    """What a static Space of the Hub is configured by; isolated pages may use several threads."""
    from huggingface_hub.utils import yaml_dump
    values = dict(
        title=title, emoji='🧠', colorFrom='indigo', colorTo='yellow', sdk='static', app_file='index.html',
        pinned=False, **({'license': license} if license else {}),
        tags=['sformer', 'spiking-neural-network', 'onnxruntime-web'],
        custom_headers={'cross-origin-embedder-policy': 'require-corp', 'cross-origin-opener-policy': 'same-origin',
                        'cross-origin-resource-policy': 'cross-origin'})
    return f'---\n{yaml_dump(values, sort_keys=False)}---\n'
