"""Detection with a CrossMAE encoder: a ViTDet-style backbone for detectron2.

Importing this package registers `build_crossmae_vitdet_backbone` in detectron2's BACKBONE_REGISTRY.
"""

from det.library_warnings import drop_tracing_note, library_warnings_ignored

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError("det needs detectron2; install it with: python tools/install_detectron2.py") from error

with library_warnings_ignored():
    from det.backbone.build import build_backbone
    from det.backbone.vit import ViT, build_crossmae_vitdet_backbone
    from det.backbone.weights import load_weights
    from det.config import add_crossmae_config, load_det_config
    from det.data.coco import register_coco
    from det.evaluation.evaluate import evaluate
    from det.inference.predict import Predictor
    from det.training.train import train
drop_tracing_note()

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
