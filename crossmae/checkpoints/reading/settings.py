"""Settings of the model that a trainer stored next to the tensors: names of architectures, heads, image sizes."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from crossmae.checkpoints.metadata import TRAINER_SETTINGS

# Kinds of settings, and the keys that trainers give them.
_KEYS = {
    "num_heads": ("num_heads", "num_attention_heads", "n_heads", "heads"),
    "img_size": ("img_size", "image_size", "input_size"),
    "name": ("arch", "architecture", "model", "model_name", "backbone", "encoder", "name"),
}
_OTHER_MODELS = ("decoder", "predictor", "text", "head", "teacher_model", "neck")  # parts of keys of other models
_FAMILIES = {"moco-v3": ("momentum_encoder.",), "dino": ("teacher", "student")}  # by keys, or by parts of tensor names
_MOST_ENTRIES, _MOST_LEVELS, _MOST_TEXT, _MOST_VALUES = 20_000, 5, 100, 10


def trainer_settings(content: Any) -> dict[str, str]:
    """Return the model's settings in a pickle as metadata.

    The value is JSON: for `num_heads`, `img_size` and `name` a list of the different values, and the `family` of the
    trainer where keys and tensor names show it.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in _KEYS}
    families: list[str] = []
    for key, value in islice(_entries(content), _MOST_ENTRIES):
        families += [name for name, parts in _FAMILIES.items() if any(_matches(key, part) for part in parts)]
        kind = next((kind for kind, keys in _KEYS.items() if key in keys), None)
        if kind and _is_setting(kind, value) and value not in found[kind] and len(found[kind]) < _MOST_VALUES:
            found[kind].append(value)
    kept: dict[str, Any] = {kind: values for kind, values in found.items() if values}
    if not kept:
        return {}
    return {TRAINER_SETTINGS: json.dumps(kept | ({"family": families[0]} if families else {}))}


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested dicts, except of other models."""
    waiting = deque([(content, 0)])
    while waiting:
        node, level = waiting.popleft()
        node = vars(node) if isinstance(node, argparse.Namespace) else node
        if not isinstance(node, Mapping) or level > _MOST_LEVELS:
            continue
        for key, value in node.items():
            if isinstance(key, str) and not any(part in key.lower().split("_") for part in _OTHER_MODELS):
                yield key, value
                if isinstance(value, Mapping | argparse.Namespace):
                    waiting.append((value, level + 1))


def _matches(key: str, part: str) -> bool:
    return part in key if part.endswith(".") else key == part


def _is_setting(kind: str, value: Any) -> bool:
    if kind == "name":
        return isinstance(value, str) and 0 < len(value) <= _MOST_TEXT and value.isprintable()
    sides = value if kind == "img_size" and isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 1 << 20 for side in sides)
