"""Weight files: read every supported layout, load it strictly, convert it for another library.

| function  | purpose                                                                             |
| --------- | ----------------------------------------------------------------------------------- |
| `inspect` | describe the content of a file and its possible conversions                         |
| `load`    | load a file into a model and account for every tensor; all tools use this function  |
| `convert` | write a file for another library, and check that it computes the same               |
| `read`    | return the tensors of a file under plain names                                      |

The functions are imported on first use, because they need torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "TARGETS": ("crossmae.checkpoints.conversion.targets", "TARGETS"),
    "Sizes": ("crossmae.checkpoints.conversion.convert", "Sizes"),
    "convert": ("crossmae.checkpoints.conversion.convert", "convert"),
    "inspect": ("crossmae.checkpoints.conversion.inspection", "inspect"),
    "load": ("crossmae.checkpoints.loading", "load"),
    "read": ("crossmae.checkpoints.weights", "read_weights"),
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crossmae.checkpoints' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
