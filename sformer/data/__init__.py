"""Images to calibrate and evaluate with: generated ones, a folder, or a data set of the Hugging Face Hub.

`open_images` turns a name into an `ImageData`, which delivers batches preprocessed as the model expects them.
"""
from ..errors import UnreadableImageError
from .delivery import Batch, ImageData, Plan, lost_workers
from .generator import dead_leaves
from .origins import GENERATED
from .request import ImageRequest, requested
from .resolution import open_images, open_request

__all__ = [
    'GENERATED', 'Batch', 'ImageData', 'ImageRequest', 'Plan', 'UnreadableImageError', 'dead_leaves', 'lost_workers',
    'open_images', 'open_request', 'requested',
]
