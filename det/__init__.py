"""Detection with a CrossMAE encoder: a ViTDet-style backbone for detectron2.

Importing this package registers `build_crossmae_vitdet_backbone` in detectron2's BACKBONE_REGISTRY.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError("det needs detectron2; install it with: python tools/install_detectron2.py") from error

from det.backbone import build_backbone
from det.coco import register_coco
from det.config import add_crossmae_config, load_det_config
from det.evaluate import evaluate
from det.predict import Predictor
from det.train import train
from det.vit import ViT, build_crossmae_vitdet_backbone
from det.weights import load_weights

__all__ = [
    "Predictor",
    "ViT",
    "add_crossmae_config",
    "build_backbone",
    "build_crossmae_vitdet_backbone",
    "evaluate",
    "load_det_config",
    "load_weights",
    "register_coco",
    "train",
]
