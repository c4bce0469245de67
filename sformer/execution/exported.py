"""Graphs that `export_onnx` wrote, run by an engine behind the interface of a timm classifier."""
import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, NotRequired, TypedDict, cast

import numpy as np
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..errors import SFormerError, first_line, needed_packages
from ..files import Json
from .engines import Run, compile_graph, engine_version, find_engine
from .onnx import graph_hash
from .prepared import METADATA
from .processor import instruction_set, sums_exactly, unfuses
from .proof import saturating

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ['EngineNetwork', 'GraphRecord', 'load_onnx', 'check_exact', 'read_graph', 'read_exported']


class GraphRecord(TypedDict):
    """What is read of what `export_onnx` recorded."""
    graph_sha256: str
    weights_sha256: str
    pretrained_cfg: dict[str, object]
    input_size: list[int]
    num_classes: int
    param_count: int
    levels: list[int]
    recipe: NotRequired[str | None]
    blocks: NotRequired[list[str]]  # these three of graphs that say where they spike
    neurons_per_token: NotRequired[list[int]]
    grid_size: NotRequired[list[int] | None]
    uint8_input: NotRequired[bool]  # of graphs that take pixels


class EngineNetwork(nn.Module):
    """A network that an engine runs on CPUs.

    Args:
        run: Compiled graph.
        about: What `export_onnx` recorded.
        engine: Name of the engine.

    Shape:
        Input (B, C, H, W) of the size of the export, normalised; output (B, classes), float32.
    """

    def __init__(self, run: Run, about: GraphRecord, engine: str):
        super().__init__()
        self.run = run
        self.about = about
        self.engine = engine
        self.num_classes = about['num_classes']
        self.pretrained_cfg = self.default_cfg = dict(about['pretrained_cfg'], input_size=tuple(about['input_size']))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if list(x.shape[1:]) != self.about['input_size']:
            raise SFormerError(f'the graph was exported for images {tuple(self.about["input_size"])}, got '
                               f'{tuple(x.shape[1:])}.')
        images = x.detach().to('cpu', torch.float32).contiguous().numpy()
        # one pass; integers would hide what is no number. By numpy: threads of torch would go on spinning for a while
        if not np.isfinite(images.sum()):
            raise SFormerError('images have NaN or infinity in them.')
        if self.about.get('uint8_input'):
            images = self._pixels(images)
        return torch.from_numpy(self.run(images)).to(x.device)

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        """Pixels (B, H, W, C), uint8, that were normalised."""
        cfg = resolve_input_data_config(self)
        mean, std = (np.array(cfg[key], np.float32)[:, None, None] for key in ('mean', 'std'))
        pixels = np.clip(np.round(255 * (images * std + mean)), 0, 255)
        return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        raise ValueError(f'the graph was exported for images {tuple(self.about["input_size"])}; export it of a model '
                         f'of that size')

    def describe(self) -> dict[str, object]:
        """What results say of it: the engine, and size and `state_hash` of the model that was exported."""
        return dict(engine=f'{self.engine} {engine_version(self.engine)}',
                    param_count=round(self.about['param_count'] / 1e6, 4),
                    exported_of_sha256=self.about['weights_sha256'])

    def get_extra_state(self) -> str:
        return f'{self.engine} {self.about["graph_sha256"]}'  # tells it from others where results are recorded

    def set_extra_state(self, state: str) -> None:
        pass

    def __reduce__(self) -> NoReturn:
        raise SFormerError('what an engine has compiled cannot be pickled or sent to another process: load the graph '
                           'there by its path (load_onnx).')

    def __deepcopy__(self, memo: dict[int, object]) -> 'EngineNetwork':
        return type(self)(self.run, self.about, self.engine)  # what is compiled is shared

    def extra_repr(self) -> str:
        return f'{self.engine}, input_size={tuple(self.about["input_size"])}, num_classes={self.num_classes}'


def load_onnx(path: str | Path, engine: str | None = None) -> EngineNetwork:
    """Open a graph that `export_onnx` wrote.

    Args:
        path: The file.
        engine: `openvino` or `onnxruntime`; the first one that is installed if None.

    Raises:
        SFormerError: If the file is missing, damaged or of another origin, or the engine is missing, cannot run it, or
            would sum its products wrongly on this processor.
    """
    engine = find_engine(engine)
    model, about = read_graph(path)
    check_exact(model, engine, path)
    run = compile_graph(model.SerializeToString(), engine, unfused=unfuses(engine))
    return EngineNetwork(run, about, engine)


def read_graph(path: str | Path) -> 'tuple[ModelProto, GraphRecord]':
    """An `onnx.ModelProto` of a classifier that `export_onnx` wrote, and what was recorded of it.

    Raises:
        SFormerError: If the file is missing, damaged or of another origin.
    """
    model, about = read_exported(path)
    if not GraphRecord.__required_keys__ <= about.keys():
        raise SFormerError(f'{path} is the graph of no classifier, with inputs of its own: `sformer predict` runs it, '
                           f'and so does onnxruntime.')
    return model, cast(GraphRecord, about)


def read_exported(path: str | Path) -> 'tuple[ModelProto, Json]':
    """An `onnx.ModelProto` that `sformer export` wrote, and what was recorded of it.

    Raises:
        SFormerError: If the file is missing, damaged or of another origin.
    """
    path = Path(path)
    if not path.is_file():
        raise SFormerError(f'no graph at {path}.')
    with needed_packages('onnx'):
        import onnx
    try:
        model = onnx.load(path)
        recorded = {p.key: p.value for p in model.metadata_props}.get(METADATA)
        about = json.loads(recorded) if recorded else None
    except Exception as e:  # protobuf's own, of which each version has others
        raise SFormerError(f'{path} is damaged, or no ONNX file ({first_line(e)}).') from None
    if not isinstance(about, dict) or not about.get('graph_sha256'):
        raise SFormerError(f'{path} was not written by `sformer export`.')
    if about['graph_sha256'] != graph_hash(model):
        raise SFormerError(f'{path} is not as it was written: its hash differs from its record. Export it again.')
    return model, about


def check_exact(model: 'ModelProto', engine: str, where: str | Path) -> None:
    """Raise SFormerError if an engine would sum products of an `onnx.ModelProto` with saturation on this processor."""
    found = saturating(model)
    if found and not sums_exactly(engine):
        raise SFormerError(
            f'{where} has {len(found)} products of bytes ({found[0]} ...) that {engine} would sum wrongly on this '
            f'processor ({instruction_set()}), which has no VNNI: export the model again, without --no-portable.')
