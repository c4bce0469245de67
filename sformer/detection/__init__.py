"""Object detection and instance segmentation: torchvision's detectors on plain vision transformers, converted whole."""
from .coco import CocoData, open_coco
from .detector_conversion import convert_detector, image_batches
from .detector_entrypoints import COCO_CATEGORIES, detector_names
from .detector_evaluation import coco_metrics, detect, evaluate_detector
from .detector_export import export_detector
from .detector_folders import load_detector, save_detector
from .detectors import DetectorConfig, build_detector, create_detector
from .exported_detector import load_detector_onnx
from .pyramid import SimpleFeaturePyramid, ViTDetBackbone
from .training import TrainingConfig, train_

__all__ = [
    'COCO_CATEGORIES', 'CocoData', 'DetectorConfig', 'SimpleFeaturePyramid', 'TrainingConfig', 'ViTDetBackbone',
    'build_detector', 'coco_metrics', 'convert_detector', 'create_detector', 'detect', 'detector_names',
    'evaluate_detector', 'export_detector', 'image_batches', 'load_detector', 'load_detector_onnx',
    'open_coco', 'save_detector', 'train_',
]
