"""Pictures of what a detector finds, which carry of whom and of what they are."""
from pathlib import Path
from typing import Any, Dict, Optional

import torch.nn as nn
from PIL import Image

from ..files import file_hash, png_bytes, png_values, state_hash

__all__ = ['read_picture', 'save_picture']


def save_picture(drawn: Image.Image, path: Path, detector: nn.Module, image: Path, **how: Any) -> None:
    """Write what was drawn; a PNG carries the hash of the detector's weights, the image's name and hash, and `how` it
    was drawn."""
    if path.suffix.lower() != '.png':
        drawn.save(path)
        return
    path.write_bytes(png_bytes(drawn, dict(
        how, weights_sha256=state_hash(detector.state_dict()), image=image.name, image_sha256=file_hash(image))))


def read_picture(path: Path, weights_sha256: str) -> Optional[Dict[str, Any]]:
    """What a PNG of these weights says of itself; None if it is none that `save_picture` wrote."""
    values = png_values(path)
    if values is None or values.get('weights_sha256') != weights_sha256 or not isinstance(values.get('image'), str):
        return None
    return values
