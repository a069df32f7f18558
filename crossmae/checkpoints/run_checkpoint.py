"""Checkpoints of a training run: written atomically, found by their manifest.

Layout, in the run's folder:

    checkpoints/step-00001200/model.safetensors   tensors of the model, and metadata
                              state.pt            optimizer and position: tensors, numbers and strings only
                              run.json            config, versions and position, for people
                              manifest.json       sizes and SHA-256 of the other files; written last

A folder without a manifest is ignored. So is a folder whose files do not match the manifest.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crossmae.errors import UserError
from crossmae.files import sha256, write_atomically, write_json

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
MODEL, STATE, RECORD, MANIFEST = "model.safetensors", "state.pt", "run.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    run: Path,
    step: int,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    state: Any,
    record: Any,
    keep: int,
) -> Path:
    """Write a checkpoint, then delete all except the newest `keep` checkpoints.

    Args:
        run: folder of the run.
        step: number of finished optimizer steps.
        state: nested dicts and lists of tensors, numbers and strings.

    Returns:
        The folder of the checkpoint.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_atomically(folder / MODEL, lambda path: save_file(tensors, path, metadata))
    write_atomically(folder / STATE, lambda path: torch.save(state, path))
    write_json(folder / RECORD, record)
    names = (MODEL, STATE, RECORD)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    write_json(folder / MANIFEST, {"step": step, "files": files})
    for old in complete_checkpoints(run)[:-keep]:
        # The manifest is deleted first, so that an interrupted deletion leaves no checkpoint that seems complete.
        (old / MANIFEST).unlink()
        shutil.rmtree(old, ignore_errors=True)
    return folder


def complete_checkpoints(run: Path) -> list[Path]:
    """List complete checkpoints by ascending step. Log incomplete checkpoints."""
    found = []
    for folder in sorted((run / FOLDER).glob("step-*")):
        reason = "its name is not step-<8 digits>" if not _NAME.fullmatch(folder.name) else defect(folder)
        if reason:
            log.warning("skipping checkpoint %s: %s", folder, reason)
        else:
            found.append(folder)
    return found


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.rpartition("-")[2])


def latest_checkpoint(run: Path) -> Path | None:
    """Find the latest checkpoint whose contents match its manifest, or None."""
    for folder in reversed(complete_checkpoints(run)):
        reason = defect(folder, contents=True)
        if not reason:
            return folder
        log.warning("skipping checkpoint %s: %s", folder, reason)
    return None


def defect(folder: Path, contents: bool = False) -> str | None:
    """Describe the first defect of a checkpoint, or return None.

    The manifest and the file sizes are checked; with `contents`, the SHA-256 of every file as well.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {MANIFEST}, so it was never completed"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else "no"
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if contents and sha256(path) != expected["sha256"]:
            return f"{name} has another SHA-256 than {MANIFEST} says"
    return None


def read_state(folder: Path) -> Any:
    """Read the `state` of a checkpoint on the CPU, by restricted unpickling.

    Raises UserError if the file cannot be read.
    """
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises various types for one cause
        raise UserError(f"{folder / STATE}: cannot be read: {' '.join(str(error).split())[:300]}") from error
