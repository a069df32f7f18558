"""Weight files: read any of them, load them strictly, convert between the layouts of the field's libraries.

| function  | what for                                                                            |
| --------- | ----------------------------------------------------------------------------------- |
| `inspect` | what a file is, and what it can become                                              |
| `load`    | its weights into a model, with every tensor accounted for; what every tool uses     |
| `convert` | a file for another library, proven to compute the same                              |
| `read`    | its tensors under plain names, for anything else                                    |
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "inspect": ("crossmae.checkpoints.conversion.inspection", "inspect"),
    "load": ("crossmae.checkpoints.loading", "load"),
    "convert": ("crossmae.checkpoints.conversion.convert", "convert"),
    "read": ("crossmae.checkpoints.weights", "read_weights"),
    "Sizes": ("crossmae.checkpoints.conversion.convert", "Sizes"),
    "TARGETS": ("crossmae.checkpoints.conversion.targets", "TARGETS"),
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crossmae.checkpoints' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
