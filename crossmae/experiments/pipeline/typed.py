"""Arguments of tools/run.py as a user types them, for the page and the error about another request."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossmae.errors import advise

# Arguments whose names differ from the fields of a request.
ARGUMENTS = {
    "images": "IMAGES",
    "val_share": "--val",
    "pretrain_settings": "--pretrain-set",
    "detect_settings": "--detect-set",
    "version": "crossmae",
}
PATHS = ("images", "labels", "output", "weights")
DIGEST_OF = "digest of "  # and the field of a file


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe what differs between two requests: "--budget 30m, not --budget 1h".

    Args:
        before, now: fields of the requests, digests of files, and the version of this program.

    Returns "" if nothing differs.
    """
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(DIGEST_OF)]
    pairs = [(as_typed(key, before.get(key)), as_typed(key, now[key])) for key in changed]
    if not pairs:  # the name of another file would explain another digest
        fields = [key.removeprefix(DIGEST_OF) for key in now if before.get(key) != now[key]]
        pairs = [(f"another content of {name_of(field)}", as_typed(field, now[field])) for field in fields]
    return "; ".join(f"{first}, not {second}" for first, second in pairs)


def command_of(request: Mapping[str, Any]) -> str:
    """Write the command line of a request.

    `request` has the fields that are not at their default.
    """
    given = [as_typed(field, value) for field, value in request.items()]
    return advise(" ".join(["python tools/run.py", *(words.removeprefix("IMAGES ") for words in given)]))


def name_of(field: str) -> str:
    """Return the name of an argument."""
    return ARGUMENTS.get(field, f"--{field.replace('_', '-')}")


def as_typed(field: str, value: Any) -> str:
    """Write an argument with its value.

    Such as "--budget 1h30m", "no --weights" or "--detect-set A=1 B=2".
    """
    name = name_of(field)
    if value is None or value is False or value == []:
        return f"no {name}"
    if value is True:
        return name
    if field == "budget":
        return f"{name} {format_duration(value)}"
    words = value if isinstance(value, list) else [f"{value:.12g}" if isinstance(value, float) else str(value)]
    if field in PATHS:
        words = [str(_from_here(Path(word))) for word in words]
    return f"{name} {shlex.join(words)}"


def format_duration(seconds: float) -> str:
    """Write a duration as `parse_duration` reads it: "30m", "1h30m", "45s"."""
    text = ""
    for unit, length in (("h", 3600), ("m", 60)):
        number, seconds = divmod(seconds, length)
        text += f"{number:.0f}{unit}" if number else ""
    return f"{text}{round(seconds, 6):.12g}s" if round(seconds, 6) or not text else text


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
