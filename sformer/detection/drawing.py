"""What a detector finds, drawn over the image: of an SFormer beside its source, and where its backbone spikes."""
import functools
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..errors import needed_packages
from ..layers import WindowedMixin, named_neurons, named_products, source_view
from ..layers.multiplying import LINEAR
from ..neurons import Neuron
from .coco import read_image
from .detector_evaluation import detect, in_eval_mode
from .detectors import DetectorConfig
from .pictures import save_picture

__all__ = ['draw_detections', 'draw_file', 'picture', 'token_activity']


def picture(
        detector: nn.Module,
        image: torch.Tensor,
        min_score: float = 0.5,
        side_by_side: bool = True,
) -> torch.Tensor:
    """A picture of what a detector finds in an image.

    Args:
        detector: As of `load_detector`.
        image: Pixels in [0, 1], (3, H, W).
        min_score: Least score of a detection that is drawn.
        side_by_side: Of an SFormer: put its source to the left, and where the backbone spikes to the right.

    Returns:
        Pixels, uint8, (3, H, W) or three of these side by side.
    """
    if not side_by_side or not any(True for _ in named_neurons(detector)):
        return draw_detections(detector, image, detect(detector, image), min_score)
    source = source_view(detector)
    found, activity = token_activity(detector, image)
    heat = F.resize(_coloured(activity), list(image.shape[-2:]), F.InterpolationMode.NEAREST)
    pixels = F.to_dtype(image, torch.uint8, scale=True)
    return torch.cat([
        draw_detections(detector, image, detect(source, image), min_score),
        draw_detections(detector, image, found, min_score),
        (0.35 * pixels + 0.65 * heat).to(torch.uint8)], dim=-1)


def draw_file(
        detector: nn.Module,
        image: Path,
        output: Path,
        min_score: float = 0.5,
        side_by_side: bool = True,
) -> None:
    """Write a picture of what a detector finds in an image file; arguments are those of `picture`. A PNG says of which
    weights and which image it is.

    Raises:
        SFormerError: If the image is missing or unreadable, or matplotlib is missing.
    """
    _matplotlib()
    side_by_side = side_by_side and any(True for _ in named_neurons(detector))
    drawn = F.to_pil_image(picture(detector, read_image(image), min_score, side_by_side))
    save_picture(drawn, output, detector, image, min_score=min_score, side_by_side=side_by_side)


def draw_detections(
        detector: FasterRCNN,
        image: torch.Tensor,
        found: dict[str, torch.Tensor],
        min_score: float = 0.5,
) -> torch.Tensor:
    """Boxes, masks, categories and scores over an image, uint8 (3, H, W)."""
    config: DetectorConfig = detector.config
    names = [config.categories[id] for id in sorted(config.categories)]
    drawn = F.to_dtype(image, torch.uint8, scale=True)
    kept = found['scores'] >= min_score
    labels, scores = found['labels'][kept].tolist(), found['scores'][kept].tolist()
    if not labels:
        return drawn
    palette = _palette()
    colours = [palette[(label - 1) % len(palette)] for label in labels]
    if 'masks' in found:
        each = [palette[i % len(palette)] for i in range(len(labels))]  # neighbours are told apart
        drawn = draw_segmentation_masks(drawn, found['masks'][kept][:, 0] > 0.5, alpha=0.45, colors=each)
    texts = [f'{names[label - 1]} {score:.2f}' for label, score in zip(labels, scores, strict=True)]
    many = len(labels) > 40 or len(names) == 1  # the texts would hide what they are of
    size = max(11, image.shape[-1] // 45)
    return draw_bounding_boxes(
        drawn, found['boxes'][kept], None if many else texts, colors=colours, width=1 + image.shape[-1] // 400,
        font=None if many else _font(), font_size=None if many else size)


@torch.inference_mode()
def token_activity(detector: nn.Module, image: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What an SFormer finds, and the share of neurons that fire at each patch (h, w), over all linear layers of the
    backbone, which each read a vector per token."""
    model: FasterRCNN = in_eval_mode(detector)
    vit = model.backbone.vit
    shares: list[torch.Tensor] = []
    grid: list[torch.Size] = []

    windowed = {layer: attention for attention in vit.blocks.modules() if isinstance(attention, WindowedMixin)
                for layer in attention.modules()}

    def count(layer: nn.Module, neuron: Neuron, args: tuple[torch.Tensor]) -> None:
        share = (neuron.encode(args[0]).levels != 0).float().mean(-1)
        if layer in windowed:
            share = windowed[layer].join(share[..., None])[..., 0]
        shares.append(share[0])

    handles = [product.operands[0].register_forward_pre_hook(functools.partial(count, layer))
               for _, layer, products in named_products(vit.blocks) for product in products if product.kind == LINEAR]
    handles.append(model.backbone.pyramid.register_forward_pre_hook(lambda _, args: grid.append(args[0].shape[-2:])))
    try:
        found = detect(model, image)
    finally:
        for handle in handles:
            handle.remove()
    height, width = grid[0]
    return found, torch.stack(shares).mean(0)[-height * width:].reshape(height, width).cpu()


def _matplotlib() -> ModuleType:
    with needed_packages('detection'):
        import matplotlib
    return matplotlib


def _coloured(values: torch.Tensor) -> torch.Tensor:
    """Values in [0, 1] in colours, uint8 (3, h, w); the range is that of the values."""
    low, high = values.min(), values.max()
    colours = _matplotlib().colormaps['viridis'](((values - low) / (high - low).clamp_min(1e-6)).numpy(), bytes=True)
    return torch.from_numpy(colours[..., :3].copy()).permute(2, 0, 1)


def _palette() -> list[tuple[int, int, int]]:
    return [(int(r), int(g), int(b)) for r, g, b, _ in _matplotlib().colormaps['tab10'](range(10), bytes=True)]


def _font() -> str:
    return str(Path(_matplotlib().get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'))
