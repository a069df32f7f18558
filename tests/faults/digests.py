"""Comparable content of a run folder: everything that an exact resume must reproduce."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

TIMINGS = {"images_per_second", "data_wait_share", "memory_gb"}
# Files whose bytes may differ: digests of a zip file that has its own name, a page and a log with times.
PRESENT_ONLY = {"manifest.json", "report.html", "log.txt"}
UNCOMPARED = "tensorboard"


def digest(run: Path) -> dict[str, Any]:
    """Return what a run folder holds, by file and entry. Tensors and other files are SHA-256 digests.

    The versions in a record are left out: they have the revision of this repository, which may change during a test.
    """
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or name.startswith(UNCOMPARED):
            continue
        if path.name in PRESENT_ONLY:
            found[name] = "present"
        elif path.suffix in (".pt", ".pth"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            found |= {f"{name}:{key}": value for key, value in entries(state, "")}
        elif path.suffix == ".safetensors":  # its metadata have no fixed order
            with safe_open(path, "pt") as file:
                content = {"metadata": file.metadata()} | {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            found |= {f"{name}:{key}": value for key, value in entries(content, "")}
        elif path.suffix == ".json":
            pairs = entries(json.loads(path.read_text("utf-8")), "")
            found |= {f"{name}:{key}": value for key, value in pairs if "/versions/" not in key}
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            found |= {f"{name}:{number}": without_timings(row) for number, row in enumerate(rows)}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def entries(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts and lists by their path."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from entries(inner, f"{key}/{name}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from entries(inner, f"{key}/{number}")
    elif isinstance(value, torch.Tensor):
        yield key, (str(value.dtype), hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest())
    else:
        yield key, value


def without_timings(row: dict[str, Any]) -> dict[str, Any]:
    """Drop the numbers that differ from run to run."""
    return {key: value for key, value in row.items() if key not in TIMINGS}


def differences(whole: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """List what differs between an unbroken run and another."""
    keys = [*whole, *(key for key in other if key not in whole)]
    nothing = "nothing"
    return [
        f"{key}: {other.get(key, nothing)} instead of {whole.get(key, nothing)}"
        for key in keys
        if other.get(key, nothing) != whole.get(key, nothing)
    ]
