"""CrossMAE: pretrain a plain vision transformer with a cross-attention-only masked autoencoder (arXiv 2401.14391).

Public names are imported on first use. `import crossmae` is therefore quick, and `python -m crossmae.doctor` also runs
on a machine without torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Classifier": "crossmae.classification.classifier",
    "CrossMAE": "crossmae.models.crossmae",
    "CrossMAEOutput": "crossmae.models.crossmae",
    "ViTEncoder": "crossmae.models.encoder",
    "create_model": "crossmae.models.crossmae",
    "list_models": "crossmae.models.sizes",
    "PretrainConfig": "crossmae.pretraining.config",
    "load_config": "crossmae.pretraining.config",
    "pretrain": "crossmae.pretraining.train",
    "read_weights": "crossmae.checkpoints.weights",
    "UserError": "crossmae.errors",
}

__all__ = ["__version__", "checkpoints", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "checkpoints":
        return importlib.import_module("crossmae.checkpoints")
    if name not in _HOME:
        raise AttributeError(f"module 'crossmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
