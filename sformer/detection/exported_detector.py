"""A detector that was exported, run by ONNX Runtime."""
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import SFormerError
from ..execution.engines import onnxruntime_session
from ..execution.exported import check_exact, read_exported
from ..files import Json
from .detectors import DetectorConfig

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ['EngineDetector', 'load_detector_onnx']

ENGINE = 'onnxruntime'


class EngineDetector(nn.Module):
    """A detector that ONNX Runtime runs on CPUs.

    Its graph reads images of one size. An image of another is resized until it fits into that, as far as its sides
    allow, and grey fills up what is left; boxes and masks are those of the image as it was.

    Args:
        session: ONNX Runtime with the graph.
        about: What `export_detector` recorded.

    Shape:
        A list of images (3, H, W) in [0, 1]; what torchvision's detectors give.
    """

    def __init__(self, session: 'InferenceSession', about: Json):
        super().__init__()
        self.session = session
        self.config = DetectorConfig(**about['detector'])
        self.image_size: tuple[int, int] = tuple(about['image_size'])

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [self._found(image) for image in images]

    def _found(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = image.shape[-2:]
        scale = min(self.image_size[0] / height, self.image_size[1] / width)
        size = tuple(min(limit, max(1, round(scale * side)))
                     for side, limit in zip((height, width), self.image_size, strict=True))
        room = self.image_size[1] - size[1], self.image_size[0] - size[0]
        grey = image.new_tensor(self.config.mean)[:, None, None]  # 0 after the normalisation
        fitted = image if size == (height, width) else _of_size(image, size)
        filled = F.pad(fitted - grey, (0, room[0], 0, room[1])) + grey
        outputs = self.session.run(None, {'image': filled.float().clamp(0, 1).numpy()})
        names = [output.name for output in self.session.get_outputs()]
        found = {name: torch.from_numpy(values) for name, values in zip(names, outputs, strict=True)}
        across, down = width / size[1], height / size[0]
        boxes = found['boxes'] * torch.tensor([across, down, across, down])
        limits = torch.tensor([width, height, width, height], dtype=torch.float32)
        found['boxes'] = boxes.clamp(min=torch.zeros(4), max=limits)
        if 'masks' in found:
            found['masks'] = _of_size(found['masks'][..., :size[0], :size[1]].flatten(0, 1), (height, width))[:, None]
        return found

    def __reduce__(self) -> NoReturn:
        raise SFormerError('what an engine has compiled cannot be pickled or sent to another process: load the graph '
                           'there by its path.')


def _of_size(image: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Channels (C, H, W) of another height and width."""
    if not len(image) or image.shape[-2:] == size:
        return image.new_zeros(0, *size) if not len(image) else image
    return F.interpolate(image[None], size, mode='bilinear', antialias=True)[0]


def load_detector_onnx(path: str | Path, engine: str | None = None) -> EngineDetector:
    """Open a graph that `export_detector` wrote.

    Args:
        path: The file.
        engine: `onnxruntime`, or None: no other reads it.

    Raises:
        SFormerError: If the file is missing, damaged or of another origin, or the engine is another or missing, or
            would sum its products wrongly on this processor.
    """
    if engine not in (None, ENGINE):
        raise SFormerError(f'{engine} runs no graphs of detectors, {ENGINE} does.')
    model, about = read_exported(path)
    if 'detector' not in about:
        raise SFormerError(f'{path} is the graph of no detector.')
    check_exact(model, ENGINE, path)
    return EngineDetector(onnxruntime_session(model.SerializeToString()), about).eval()
