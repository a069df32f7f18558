"""Cached features, one safetensors file per data set.

A file is reused only for equal weights, settings and images.

A file has `features` (N, E) and `labels` (N,). Its name has a digest of all values that decide the features. Its
metadata has these values in words, and a checksum of the tensors, so that a damaged file is never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crossmae.data.parallel import READERS, Progress, map_in_order
from crossmae.data.sources import Source
from crossmae.files import name_write_errors, write_atomically
from crossmae.files.leftovers import SHARED_SECONDS, sweep

LAYOUT = 1  # version of the files: features with another version are extracted again
KEY, CHECKSUM = "key", "sha256"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedFeatures:
    """Features (N, E) and labels (N,) of a data set, on the CPU."""

    features: Tensor
    labels: Tensor


def data_digest(source: Source, name: str = "images") -> str:
    """Digest the classes, and the name, stamp and label of every image."""
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    indices = range(len(source))
    stamps = map_in_order(source.stamp, indices, READERS)
    bar = Progress(stamps, f"look for changes of {name}", len(source), leave=False, unit="image")
    for index, stamp in zip(indices, bar, strict=True):
        digest.update(json.dumps([source.name(index), stamp, source.label(index)]).encode())
    return digest.hexdigest()


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Digest names, types, shapes and bytes of CPU tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached(folder: Path, name: str, key: dict[str, Any], extract: Callable[[], CachedFeatures]) -> CachedFeatures:
    """Read features from the cache, or extract and store them.

    Args:
        name: name of the data set. The file name begins with it.
        key: JSON values that decide features and labels.
    """
    path, text = _path(folder, name, key)
    found = _read(path, text) if path.exists() else None
    if found is not None:
        log.info("features of %s: from %s", name, path)
        return found
    found = extract()
    sweep(folder, min_age=SHARED_SECONDS)
    tensors = {"features": found.features, "labels": found.labels}
    with name_write_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = {KEY: text, CHECKSUM: tensors_digest(tensors)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return found


def is_cached(folder: Path, name: str, key: dict[str, Any]) -> bool:
    """Check whether a cache file for `key` exists, without reading it."""
    return _path(folder, name, key)[0].is_file()


def _path(folder: Path, name: str, key: dict[str, Any]) -> tuple[Path, str]:
    text = json.dumps({"layout": LAYOUT} | key, sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors", text


def _read(path: Path, text: str) -> CachedFeatures | None:
    """Read a file. If it is damaged, warn and return None."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("features", "labels")}
        if (metadata.get(KEY), metadata.get(CHECKSUM)) == (text, tensors_digest(tensors)):
            return CachedFeatures(**tensors)
    except (SafetensorError, OSError, ValueError):
        pass
    log.warning("%s: damaged and ignored; features are extracted again", path)
    return None
