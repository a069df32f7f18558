"""Detection with a CrossMAE encoder: a ViTDet-style backbone for detectron2.

Public names are imported on first use, so that `import det` is quick. The first use of a public name also registers
`build_crossmae_vitdet_backbone` in detectron2's BACKBONE_REGISTRY. In a script of detectron2, this name is
`det.add_crossmae_config`, which adds the keys of the backbone to a config.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from crossmae.errors import advise
from det.library_warnings import drop_tracing_note, ignore_library_warnings, library_warnings_ignored

_HOME = {
    "Predictor": "det.inference.predict",
    "ViT": "det.backbone.vit",
    "add_crossmae_config": "det.config",
    "build_backbone": "det.backbone.build",
    "build_crossmae_vitdet_backbone": "det.backbone.vit",
    "evaluate": "det.evaluation.evaluate",
    "load_det_config": "det.config",
    "load_weights": "det.backbone.weights",
    "register_coco": "det.data.coco",
    "set_image_size": "det.config",
    "train": "det.training.train",
}

__all__ = list(_HOME)

if find_spec("detectron2") is None:
    raise ImportError(advise("det needs detectron2; install it with: python tools/install_detectron2.py"))
ignore_library_warnings()
drop_tracing_note()


def register_backbone() -> None:
    """Register the backbone with detectron2, which imports its models."""
    importlib.import_module("det.backbone.vit")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'det' has no attribute {name!r}")
    with library_warnings_ignored():
        register_backbone()
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
