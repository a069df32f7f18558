"""Unwrap named tensors from the dicts and prefixes that trainers put around them.

The one encoder in a file is found in any dict and under any prefix. If a file has several, the plain weights are used,
or the averaged weights (EMA) on request. From a file with student and teacher (DINO) the teacher is used, which is an
average as well. The unused sets are listed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossmae.checkpoints.metadata import DIGEST, PICKLED_METADATA, PUBLISHED_ARGUMENTS
from crossmae.checkpoints.reading.candidates import (
    Candidate,
    choose,
    find_encoders,
    is_tensor,
    opened,
    same_tensors,
    tensor_dicts,
    unwrapped,
)
from crossmae.checkpoints.reading.quantized import refuse_quantized
from crossmae.checkpoints.reading.unpickle import allowance
from crossmae.errors import UserError, counted, shorten

# Keys under which trainers store a state dict, most usual first.
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "teacher", "target_encoder")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "encoder", *EMA_WRAPPERS)
# Prefixes of names in a state dict of several models without an encoder.
EMA_BRANCHES = ("momentum_encoder.", "teacher.")
BRANCHES = ("base_encoder.", "teacher.", "student.")
COUNTERS = ("n_averaged", "steps")  # entries without the prefix `module.` in averaged models of torch and mmengine
_MAX_WRAPPERS, _MAX_NAME = 4, 1000
_SAVE = "Save only model.state_dict() with torch.save."
# Keys of files with the state of an optimizer, also of DeepSpeed's.
_OPTIMIZER = (
    *("optimizer", "optimizer_state_dict", "optimizer_states", "optim", "param_groups", "base_optimizer_state"),
    *("lr_scheduler", "lr_schedulers", "scheduler", "scaler"),
)
_MAX_SETTINGS, _MAX_LISTED, _MAX_TEXT = 1000, 100, 250


def state_dict(
    content: Any, path: Path, *, ema: bool = False, choice: str = ""
) -> tuple[dict[str, Tensor], tuple[str, ...], bool, str]:
    """Extract the tensors of a pickle from its dicts.

    The one dict with an encoder is used, under any key. Without an encoder, the dict under the first of `WRAPPERS` is
    used, else the only dict of tensors.

    Returns:
        The tensors under their names in the file, the other keys of the wrappers, true for EMA weights, and the prefix
        of the chosen encoder, for `one_model`.

    Raises:
        UserError: the content is not a state dict, or has several encoders that are equally likely.
    """
    content = opened(content)
    dicts = dict(tensor_dicts(content))
    found = [each for keys, held in dicts.items() for each in find_encoders(_tensor_names(held), keys)]
    chosen = None
    if found:
        compare = partial(_same, dicts, path)
        chosen = choose(found, path, ema=ema, choice=choice, known=WRAPPERS, same=compare)
    keys = chosen.keys if chosen else _usual_keys(content, ema) or _only_keys(dicts)
    beside: list[str] = []
    for key in keys:
        beside += [_short(other) for other in content if other not in (key, PICKLED_METADATA)]
        content = opened(content[key])
    if chosen:
        others = [name for name, value in content.items() if not is_tensor(value)]
        beside += [_short(name) for name in others if name != PICKLED_METADATA]
        content = {name: value for name, value in content.items() if is_tensor(value)}
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: not a state dict of named tensors, but {_describe(content)}. {_SAVE}")
    if not chosen and (state := [key for key in _OPTIMIZER if key in content]):
        raise UserError(
            f"{path}: has no weights, only the state of a training run ({', '.join(state)}). Name the file with the "
            "model, which is often next to it."
        )
    refuse_quantized(content, path)
    _check_values(content, path)
    seen: set[int] = set()
    tensors = {name: _dense(value, name, path, seen) for name, value in content.items()}
    averaged = ema and Candidate(tuple(keys), "", "").averaged
    return tensors, tuple(beside), averaged, chosen.home.strip(".") if chosen else choice


def one_model(
    tensors: dict[str, Tensor], path: Path, *, ema: bool = False, choice: str = ""
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip wrappers and prefixes, and select the model with the encoder.

    Returns the tensors, and descriptions of the tensors that were left out. Raises UserError if `ema` is true and the
    file has no EMA weights, or several encoders are equally likely.
    """
    tensors = _without_wrappers(tensors, path)
    found = find_encoders(tensors)
    if not found:
        return _one_branch(tensors, path, ema)
    under = {each: {name for name in tensors if name.startswith(each.home)} for each in found}

    def same(first: Candidate, second: Candidate) -> bool:
        one, two = ({name.removeprefix(each.home): tensors[name] for name in under[each]} for each in (first, second))
        return same_tensors(one, two)

    chosen = choose(found, path, ema=ema, choice=choice, known=WRAPPERS, same=same)
    if chosen is None:
        raise _no_average(path)
    # A shorter prefix has the names of longer ones as well: they belong to the other encoders.
    rivals = {name: each for each in found if not chosen.home.startswith(each.home) for name in under[each]}
    apart = rivals.keys() | set(COUNTERS)
    inside = {name for name in tensors if name.startswith(chosen.outer) and name not in apart}
    kept = {name.removeprefix(chosen.outer): tensor for name, tensor in tensors.items() if name in inside}
    others = [name for name in tensors if name not in inside]
    counts = Counter(
        rivals[name].outer.strip(".") if name in rivals and rivals[name].outer else name.partition(".")[0]
        for name in others
    )
    return kept, tuple(
        name if name in COUNTERS else f"{_short(name)} ({counted(count, 'tensor')})" for name, count in counts.items()
    )


def _one_branch(tensors: dict[str, Tensor], path: Path, ema: bool) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Select the tensors of one model, of a file without an encoder."""
    branches = EMA_BRANCHES if ema else BRANCHES
    branch = next((prefix for prefix in branches if any(name.startswith(prefix) for name in tensors)), None)
    if branch:
        kept = {name.removeprefix(branch): value for name, value in tensors.items() if name.startswith(branch)}
        others = Counter(name.partition(".")[0] for name in tensors if not name.startswith(branch))
        return kept, tuple(f"{name} ({counted(count, 'tensor')})" for name, count in others.items())
    if ema:
        raise _no_average(path)
    left = tuple(name for name in COUNTERS if name in tensors)
    kept = {name: value for name, value in tensors.items() if name not in left}
    inside = bool(kept) and all(name.startswith("model.") for name in kept)
    return ({name.removeprefix("model."): value for name, value in kept.items()}, left) if inside else (kept, left)


def _no_average(path: Path) -> UserError:
    return UserError(
        f"{path}: has no EMA weights, no dict {', '.join(EMA_WRAPPERS)}, and no names that start with "
        f"{' or '.join(EMA_BRANCHES)}. Use the plain weights."
    )


def _without_wrappers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove the parts of names that wrappers add.

    A model under two wrappers is kept once.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        plain = unwrapped(name)
        earlier, held = found.setdefault(plain, (name, tensor))
        if held is not tensor and not same_tensors({plain: held}, {plain: tensor}):
            raise UserError(f"{path}: {earlier} and {name} are both {plain} without wrappers. Save one model alone.")
    return {name: tensor for name, (_, tensor) in found.items()}


def _tensor_names(content: Mapping[Any, Any]) -> list[str]:
    return [name for name, value in content.items() if isinstance(name, str) and is_tensor(value)]


def _same(dicts: Mapping[tuple[str, ...], Mapping[Any, Any]], path: Path, first: Candidate, second: Candidate) -> bool:
    """Compare the tensors of two encoders.

    Tensors larger than the file count as different, because comparing them may take long.
    """
    one, two = (
        {plain.removeprefix(each.home): value for plain, value in names if plain.startswith(each.home)}
        for each in (first, second)
        for names in [[(unwrapped(str(name)), value) for name, value in dicts[each.keys].items() if is_tensor(value)]]
    )
    size = sum(math.prod(value.shape) * value.itemsize for value in one.values())
    return size <= allowance(path) and same_tensors(one, two)


def _usual_keys(content: Any, ema: bool) -> tuple[str, ...]:
    """Find the keys of the usual wrappers around a state dict."""
    keys: list[str] = []
    while len(keys) < _MAX_WRAPPERS:
        averaged = any(key in EMA_WRAPPERS for key in keys)
        found = _wrapper(content, EMA_WRAPPERS) if ema and not averaged else None
        found = found or _wrapper(content, WRAPPERS)
        if found is None:
            break
        keys.append(found)
        content = opened(content[found])
    return tuple(keys)


def _only_keys(dicts: Mapping[tuple[str, ...], Mapping[Any, Any]]) -> tuple[str, ...]:
    return next(iter(dicts)) if len(dicts) == 1 else ()


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
