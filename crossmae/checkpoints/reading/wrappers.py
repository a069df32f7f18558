"""Unwrap named tensors from the dicts and prefixes that trainers put around them.

If a file has several sets of weights, the plain weights are used, or the averaged weights (EMA) on request. From a file
with student and teacher (DINO) the teacher is used, which is an average as well. The unused sets are listed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossmae.checkpoints.metadata import DIGEST, PICKLED_METADATA, PUBLISHED_ARGUMENTS
from crossmae.checkpoints.reading.quantized import refuse_quantized
from crossmae.checkpoints.reading.unpickle import allowance
from crossmae.errors import UserError, shorten

# Keys under which trainers store a state dict. The first key that a file has is used.
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "teacher", "target_encoder")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "encoder", *EMA_WRAPPERS)
# Prefixes of names in a state dict of several models (MoCo v3, DINOv2).
EMA_BRANCHES = ("momentum_encoder.", "teacher.")
BRANCHES = ("base_encoder.", "teacher.", "student.")
# Prefixes of every name, added by DDP, torch.compile and trainers.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
COUNTERS = ("n_averaged", "steps")  # entries without the prefix `module.` in averaged models of torch and mmengine
_MAX_WRAPPERS, _MAX_NAME = 4, 1000
_SAVE = "Save only model.state_dict() with torch.save."
_MAX_SETTINGS, _MAX_LISTED, _MAX_TEXT = 1000, 100, 250


def state_dict(content: Any, path: Path, *, ema: bool = False) -> tuple[dict[str, Tensor], tuple[str, ...], bool]:
    """Extract the tensors of a pickle from its `WRAPPERS`.

    Returns:
        The tensors under their names in the file, the other keys of the wrappers, and true for EMA weights.

    Raises:
        UserError: the content is not a state dict.
    """
    beside: list[str] = []
    averaged = False
    content = _opened(content)
    for _ in range(_MAX_WRAPPERS):
        found = _wrapper(content, EMA_WRAPPERS) if ema and not averaged else None
        averaged = averaged or found is not None
        found = found or _wrapper(content, WRAPPERS)
        if found is None:
            break
        beside += [_short(key) for key in content if key not in (found, PICKLED_METADATA)]
        content = _opened(content[found])
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: not a state dict of named tensors, but {_describe(content)}. {_SAVE}")
    refuse_quantized(content, path)
    _check_values(content, path)
    seen: set[int] = set()
    return {name: _dense(value, name, path, seen) for name, value in content.items()}, tuple(beside), averaged


def one_model(
    tensors: dict[str, Tensor], path: Path, *, ema: bool = False
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip prefixes, and select one model of a file with several.

    Returns the tensors, and descriptions of the tensors that were left out. Raises UserError if `ema` is true and the
    file has no EMA weights.
    """
    branches = EMA_BRANCHES if ema else BRANCHES
    branch = next((prefix for prefix in branches if any(name.startswith(prefix) for name in tensors)), None)
    counters = [name for name in COUNTERS if name in tensors]
    rest = [name for name in tensors if name not in counters]
    prefix = next((p for p in WRAPPER_PREFIXES if rest and all(name.startswith(p) for name in rest)), None)
    if home := branch or prefix:
        kept = {name.removeprefix(home): value for name, value in tensors.items() if name.startswith(home)}
        others = Counter(name.partition(".")[0] for name in tensors if not name.startswith(home))
        left = [f"{name} ({count} tensors)" for name, count in others.items()] if branch else counters
        inner, more = one_model(kept, path, ema=ema and not branch)
        return inner, (*left, *more)
    if ema:
        raise UserError(
            f"{path}: has no EMA weights, no dict {', '.join(EMA_WRAPPERS)}, and no names that start with "
            f"{' or '.join(EMA_BRANCHES)}. Use the plain weights."
        )
    return tensors, ()


def pickled_metadata(content: Any, path: Path) -> dict[str, str]:
    """Return the metadata of this toolkit's pickles, {} for other pickles."""
    if not isinstance(content, Mapping):
        return {}
    ours = content.get(PICKLED_METADATA, {})
    strings = isinstance(ours, Mapping) and all(isinstance(text, str) for text in (*ours, *ours.values()))
    if not strings or (not ours and any(DIGEST in value for value in content.values() if isinstance(value, Mapping))):
        raise UserError(f"{path}: its {PICKLED_METADATA} is damaged. Copy or download it again.")
    return dict(ours)


def published_settings(content: Any) -> dict[str, str]:
    """Return the settings in a published file's `args` namespace as metadata."""
    args = content.get("args") if isinstance(content, Mapping) else None
    if not isinstance(args, argparse.Namespace) or len(vars(args)) > _MAX_SETTINGS:
        return {}
    settings = {key[:_MAX_TEXT]: _setting(value) for key, value in vars(args).items()}
    return {PUBLISHED_ARGUMENTS: json.dumps(settings, sort_keys=True)}


def _wrapper(content: Any, keys: Iterable[str]) -> str | None:
    if not isinstance(content, Mapping):
        return None

    def holds_tensors(value: Any) -> bool:
        values = list(value.values())[:5] if isinstance(value, Mapping) else [value]
        return any(isinstance(each, Tensor | np.ndarray | Mapping | nn.Module) for each in values)

    found = [key for key in keys if isinstance(content.get(key), Mapping | nn.Module)]
    # A dict of settings can have the same key. Dicts with tensors come first.
    return next((key for key in found if holds_tensors(content[key])), next(iter(found), None))


def _opened(content: Any) -> Any:
    return content.state_dict() if isinstance(content, nn.Module) else content


def _check_values(content: Mapping[Any, Any], path: Path) -> None:
    for name in content:
        if not isinstance(name, str) or len(name) > _MAX_NAME or not name.isprintable():
            raise UserError(f"{path}: not a state dict, {_short(name)} is not the name of a tensor. {_SAVE}")
    others = {name: value for name, value in content.items() if not isinstance(value, Tensor | np.ndarray)}
    if others:
        name, value = next(iter(others.items()))
        raise UserError(
            f"{path}: not a state dict but {_describe(content)}, {name!r} is of type {type(value).__name__}, not a "
            f"tensor ({len(others)} of {len(content)} entries are not). {_SAVE}"
        )
    # A tensor may be a view that repeats one value. Many tensors may be views of the same values.
    size = sum(math.prod(value.shape) * value.itemsize for value in content.values())
    if size > allowance(path):
        raise UserError(
            f"{path}: its tensors would take {size:,} bytes, but the file has only {path.stat().st_size:,}, because "
            "they are views that repeat few values. Save contiguous copies."
        )


def _setting(value: Any) -> Any:
    """Return a setting for JSON. Long values are replaced by their type."""
    if isinstance(value, list | tuple) and len(value) <= _MAX_LISTED:
        return [_setting(item) if not isinstance(item, list | tuple) else f"<{type(item).__name__}>" for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    plain = isinstance(value, bool | int | float | None) or (isinstance(value, str) and len(value) <= _MAX_TEXT)
    return value if plain else f"<{type(value).__name__}>"


def _short(key: Any) -> str:
    return f"{key if isinstance(key, str) and key.isprintable() else ascii(key)}"[:60]


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [repr(_short(key)) for key in content]
    return f"a dict with the keys {shorten(keys)}" if keys else "an empty dict"


def _dense(value: Tensor | np.ndarray, name: str, path: Path, seen: set[int]) -> Tensor:
    """Return a contiguous tensor with its own storage, as safetensors requires.

    `seen` collects the addresses of the storages in use.
    """
    try:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        value, storage = value.detach(), value.untyped_storage()
        alone = storage.nbytes() == value.numel() * value.itemsize and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        if alone and value.is_contiguous():
            return value
        return value.clone(memory_format=torch.contiguous_format)
    except (TypeError, RuntimeError) as error:
        kind = value.dtype if isinstance(value, np.ndarray) else value.layout
        raise UserError(f"{path}: {name} is not a plain array of numbers ({kind}, {error}). {_SAVE}") from None
