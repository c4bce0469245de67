"""What a detector finds, drawn over the image: of an SFormer beside its source, and where its backbone spikes."""
import functools
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torchvision.models.detection import FasterRCNN
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..errors import needed_packages
from ..layers import WindowedMixin, named_neurons, named_products, source_view
from ..layers.multiplying import LINEAR
from ..neurons import Neuron
from ..profiling.scales import share_range
from .coco import read_image
from .detector_evaluation import detect, in_eval_mode
from .detectors import DetectorConfig
from .pictures import save_picture

__all__ = ['draw_detections', 'draw_file', 'enlarged', 'picture', 'token_activity']

Colour = tuple[int, int, int]

LEGIBLE = 320  # pixels that the longer side of an image needs for labels that can be read


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
        Pixels, uint8, (3, H, W); or three panels of that side by side, with titles above and the scale of the last one
        below. Small images are enlarged by a whole number.
    """
    if not side_by_side or not any(True for _ in named_neurons(detector)):
        return draw_detections(detector, image, detect(detector, image), min_score)
    found, activity = token_activity(detector, image)
    source = detect(source_view(detector), image)
    panels = {
        'source': draw_detections(detector, image, source, min_score),
        'SFormer': draw_detections(detector, image, found, min_score),
        'share of neurons that fire': _heat(image, activity)}
    return _beside(panels, share_range(activity.flatten().tolist()))


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


def enlarged(image: torch.Tensor) -> tuple[torch.Tensor, int]:
    """An image (C, H, W), of pixels as large as labels need that are to be read; and how large they are."""
    times = -(-LEGIBLE // max(image.shape[-2:]))
    return image.repeat_interleave(times, -1).repeat_interleave(times, -2), times


def draw_detections(
        detector: FasterRCNN,
        image: torch.Tensor,
        found: dict[str, torch.Tensor],
        min_score: float = 0.5,
) -> torch.Tensor:
    """Boxes, masks, categories and scores over an image, uint8 (3, H, W), as of `enlarged`."""
    config: DetectorConfig = detector.config
    names = [config.categories[id] for id in sorted(config.categories)]
    large, times = enlarged(image)
    drawn = F.to_dtype(large, torch.uint8, scale=True)
    kept = found['scores'] >= min_score
    labels, scores = found['labels'][kept].tolist(), found['scores'][kept].tolist()
    if not labels:
        return drawn
    palette = _palette()
    colours = [palette[(label - 1) % len(palette)] for label in labels]
    if 'masks' in found:
        each = [palette[i % len(palette)] for i in range(len(labels))]  # neighbours are told apart
        masks, _ = enlarged(found['masks'][kept][:, 0] > 0.5)
        drawn = draw_segmentation_masks(drawn, masks, alpha=0.45, colors=each)
    boxes = found['boxes'][kept] * times
    drawn = draw_bounding_boxes(drawn, boxes, colors=colours, width=1 + max(large.shape[-2:]) // 400)
    if len(labels) > 40 or len(names) == 1:  # texts would hide what they are of
        return drawn
    texts = [f'{names[label - 1]} {score:.2f}' for label, score in zip(labels, scores, strict=True)]
    return _labelled(drawn, boxes, texts, colours)


def _labelled(drawn: torch.Tensor, boxes: torch.Tensor, texts: list[str], colours: list[Colour]) -> torch.Tensor:
    """A picture with a text at the upper left corner of each box, on a ground of its colour, and none cut off."""
    picture = F.to_pil_image(drawn)
    draw = ImageDraw.Draw(picture)
    size = _font_size(drawn)
    font = ImageFont.truetype(_font(), size)
    for (x0, y0, _, _), text, colour in zip(boxes.tolist(), texts, colours, strict=True):
        width, height = int(font.getlength(text)) + 4, size + 4
        left = max(min(int(x0), picture.width - width), 0)
        above = max(min(int(y0) - height, picture.height - height), 0)
        draw.rectangle((left, above, left + width, above + height), fill=colour)
        draw.text((left + 2, above + height // 2), text, 'white', font, anchor='lm')
    return F.pil_to_tensor(picture)


def _font_size(image: torch.Tensor) -> int:
    return max(12, image.shape[-1] // 40)


def _heat(image: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Shares of patches in colours, over an image in pale grey, uint8 (3, H, W)."""
    large, _ = enlarged(image)
    low, high = share_range(shares.flatten().tolist())
    heat = F.resize(_coloured((shares - low) / (high - low)), list(large.shape[-2:]), F.InterpolationMode.NEAREST)
    return (0.3 * 255 * large.mean(0) + 0.7 * heat).to(torch.uint8)


def _beside(panels: dict[str, torch.Tensor], limits: tuple[float, float]) -> torch.Tensor:
    """Panels side by side, with their titles above, and the scale of the last one below it."""
    first = next(iter(panels.values()))
    height, width = first.shape[-2:]
    size = _font_size(first)
    font = ImageFont.truetype(_font(), size)
    line, gap = size + size // 2, size // 2
    sheet = Image.new('RGB', ((width + gap) * len(panels) - gap, height + 2 * line), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (title, panel) in enumerate(panels.items()):
        sheet.paste(F.to_pil_image(panel), (i * (width + gap), line))
        draw.text((i * (width + gap) + size // 3, line // 2), title, 'black', font, anchor='lm')
    left, below = (len(panels) - 1) * (width + gap), line + height
    texts = [f'{limit:.2f}' for limit in limits]
    edges = [left + int(font.getlength(texts[0])) + size, left + width - int(font.getlength(texts[1])) - size]
    draw.text((left + size // 3, below + line // 2), texts[0], 'black', font, anchor='lm')
    draw.text((left + width - size // 3, below + line // 2), texts[1], 'black', font, anchor='rm')
    if edges[1] > edges[0]:  # of an image as narrow as a line there is no room
        scale = _coloured(torch.linspace(0, 1, edges[1] - edges[0])[None].expand(size, -1))
        sheet.paste(F.to_pil_image(scale), (edges[0], below + size // 4))
    return F.pil_to_tensor(sheet)


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
    """Values in [0, 1] in colours, uint8 (3, h, w)."""
    colours = _matplotlib().colormaps['viridis'](values.numpy(), bytes=True)
    return torch.from_numpy(colours[..., :3].copy()).permute(2, 0, 1)


def _palette() -> list[Colour]:
    return [(int(r), int(g), int(b)) for r, g, b, _ in _matplotlib().colormaps['tab10'](range(10), bytes=True)]


def _font() -> str:
    return str(Path(_matplotlib().get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'))
