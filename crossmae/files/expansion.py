"""Paths as users write them: `~` is expanded, and variables that nothing expanded are named."""

from __future__ import annotations

import os
import re
from pathlib import Path

from crossmae.errors import UserError

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[^}/]*\})")


def expand_path(value: str | Path, key: str) -> Path:
    """Expand `~` in a path that a user gave.

    Raises UserError if the path is empty, or has a variable or a user that nothing expands. The message names `key`.
    """
    if not str(value).strip():
        raise UserError(f"{key}: an empty path. Name a file or folder.")
    if why := why_unexpanded(value):
        raise UserError(f"{key}: {value}: {why}")
    return Path(os.path.expanduser(value))


def why_unexpanded(value: str | Path) -> str:
    """Name what was not expanded in a path, or return "".

    It is a variable or `~user`. Files may have such names, so a part of the path that exists is no such case.
    """
    path = Path(os.path.expanduser(value))
    there = next((part for part in (path, *path.parents) if os.path.lexists(part)), path)
    lacking = str(path.relative_to(there))
    if found := _VARIABLE.search(lacking):
        return f"the variable {found[0]} was not expanded. Write the value of {found[1].strip('{}')}."
    if lacking.startswith("~") and str(there) == ".":
        return f"the home folder {lacking.partition(os.sep)[0]} is unknown. Write the whole path."
    return ""
