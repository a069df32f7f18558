"""Find the encoders in a file, in any dict and under any prefix, and choose one of them.

A path may end with `::NAME`, the keys and the prefix of the encoder to read: `dino.pth::student.backbone`.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossmae.checkpoints.formats.keys import ENCODER_HOMES
from crossmae.errors import UserError, shorten

log = logging.getLogger(__name__)

MARK = "::"  # between a path and the name of an encoder in the file
# Parts of names that wrappers of torch, accelerate, deepspeed, fairscale, lightning and opacus add, at any depth.
_WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(?:_?module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module|_forward_module|"
    r"_original_module)\."
)
_FILTERS = re.compile(
    r"((?:.+\.)?)(patch_embed\.proj|patch_embed\.projection|embeddings\.patch_embeddings\.projection)\.weight"
)
# Prefixes that `formats.keys` reads, by the name of the patch filters. They stay in the names.
_HOMES = {"patch_embed.proj": ENCODER_HOMES, "patch_embed.projection": ("backbone.", "")}
_HF_HOMES = ("vit.", "")
_WORD = r"(?:^|[._])(?:{})(?=[._]|$)"
_AVERAGED = re.compile(_WORD.format("ema|momentum|averaged?|target|swa|shadow|k"))
_TEACHER, _STUDENT = re.compile(_WORD.format("teacher")), re.compile(_WORD.format("student"))
_MAX_DEPTH, _MAX_DICTS, _MAX_LABEL = 6, 10_000, 100


@dataclass(frozen=True)
class Candidate:
    """An encoder in a file.

    Attributes:
        keys: keys of the dicts around its tensors.
        home: prefix of its names.
        outer: the part of `home` to strip; the rest is a prefix that `formats.keys` reads.
    """

    keys: tuple[str, ...]
    home: str
    outer: str

    @property
    def label(self) -> str:
        """Name of the candidate after `MARK`, "" for a bare encoder."""
        return ".".join((*self.keys, self.home)).strip(".")

    @property
    def averaged(self) -> bool:
        """True for averaged weights, such as an EMA or a teacher."""
        return bool(_AVERAGED.search(self.label) or _TEACHER.search(self.label))

    @property
    def role(self) -> int:
        """Preference: plain weights, then a teacher, a student, other averages."""
        if _TEACHER.search(self.label):
            return 1
        return 2 if _STUDENT.search(self.label) else 3 if _AVERAGED.search(self.label) else 0


def split_choice(path: Path) -> tuple[Path, str]:
    """Split FILE::NAME into file, with `~` expanded, and encoder."""
    path = Path(os.path.expanduser(path))
    text, mark, choice = str(path).rpartition(MARK)
    return (Path(text), choice) if mark and not os.path.exists(path) else (path, "")


def unwrapped(name: str) -> str:
    """Remove the parts of a name that wrappers add."""
    return _WRAPPER.sub("", name)


def find_encoders(names: Iterable[str], keys: tuple[str, ...] = ()) -> list[Candidate]:
    """Find the encoders in a dict by the names of patch filters."""
    found: dict[str, Candidate] = {}
    for name in names:
        if match := _FILTERS.fullmatch(unwrapped(name)):
            home, filters = match.groups()
            known = _HOMES.get(filters, _HF_HOMES)
            inner = next(each for each in known if f".{home}".endswith(f".{each}") or not each)
            found[home] = Candidate(keys, home, home.removesuffix(inner))
    return list(found.values())


def tensor_dicts(content: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield every dict with tensors of its own, and its keys.

    Outer dicts come first.
    """
    ahead: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: dict[int, Any] = {}
    while ahead and len(seen) < _MAX_DICTS:
        keys, value = ahead.popleft()
        value = opened(value)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen[id(value)] = value
        if any(is_tensor(each) for each in value.values()):
            yield keys, value
        if len(keys) < _MAX_DEPTH:
            ahead += [
                ((*keys, key), inner)
                for key, inner in value.items()
                if isinstance(key, str) and isinstance(inner, Mapping | nn.Module) and "optim" not in key
            ]


def choose(
    found: Sequence[Candidate],
    path: Path,
    *,
    ema: bool,
    choice: str,
    known: Sequence[str],
    same: Callable[[Candidate, Candidate], bool],
) -> Candidate | None:
    """Choose the encoder that is meant, and log the others.

    Args:
        ema: choose averaged weights.
        choice: name of an encoder, or the beginning of its name; "" leaves the choice to this function.
        known: keys of dicts, most usual first.
        same: compares the tensors of two candidates.

    Returns:
        The encoder, None if `ema` is true and no weights are averaged.

    Raises:
        UserError: no encoder has the name, or several encoders are equally likely.
    """
    asked = [each for each in found if not choice or each.label == choice or each.label.startswith(f"{choice}.")]
    if not asked:
        names = shorten([each.label[:_MAX_LABEL] or "(no name)" for each in found]) or "none"
        raise UserError(f"{path}: has no encoder {choice[:_MAX_LABEL]!r}. Its encoders are {names}: name one of them.")
    if ema and not (asked := [each for each in asked if each.averaged]):
        return None

    def rank(each: Candidate) -> tuple[int, int, bool]:
        place = known.index(each.keys[0]) if each.keys and each.keys[0] in known else len(known)
        return (0 if ema else each.role, place if each.keys else -1, one_dict and bool(each.outer))

    one_dict = len({each.keys for each in asked}) == 1
    best = min(asked, key=rank)
    others = [each for each in asked if each is not best and not same(best, each)]
    labels = [each.label[:_MAX_LABEL] for each in others]
    if rivals := [each for each in others if rank(each) == rank(best)]:
        names = shorten([each.label[:_MAX_LABEL] for each in (best, *rivals)])
        raise UserError(
            f"{path}: has several encoders: {names}. Name one of them after the path, such as "
            f"{path}{MARK}{best.label[:_MAX_LABEL]}."
        )
    if others and not choice:
        level = logging.WARNING if any(each.role != best.role for each in others) else logging.INFO
        words = "%s: has several encoders, and %s is read. %s%s%s reads another (%s)"
        log.log(level, words, path, best.label[:_MAX_LABEL] or "the bare one", path, MARK, labels[0], shorten(labels))
    return best


def same_tensors(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Compare two sets of tensors. Tensors without values differ."""
    return first.keys() == second.keys() and all(_equal(value, second[name]) for name, value in first.items())


def opened(content: Any) -> Any:
    """Return the state dict of a module, and other content unchanged."""
    return content.state_dict() if isinstance(content, nn.Module) else content


def is_tensor(value: Any) -> bool:
    """Check for a tensor of torch or an array of numpy."""
    return isinstance(value, Tensor | np.ndarray)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return not first.is_meta and not second.is_meta and torch.equal(first, second)
    return is_tensor(first) and is_tensor(second) and np.array_equal(np.asarray(first), np.asarray(second))
