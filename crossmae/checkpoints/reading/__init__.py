"""Read named tensors from a path, without running anything in the file."""

from __future__ import annotations

import re
from pathlib import Path

# Files in the folder of a detector's run. Earlier versions wrote .pth files. The last one names the last weights.
DETECTOR_BEST, DETECTOR_FINAL, DETECTOR_LAST = "model_best.safetensors", "model_final.safetensors", "last_checkpoint"
EARLIER_BEST, EARLIER_FINAL = "model_best.pth", "model_final.pth"
MODEL_FILE = "model.safetensors"  # in a checkpoint, a run of ours or a folder of a model hub
_MAX_POINTER = 256


def detector_file(folder: Path) -> Path | None:
    """Find the best weights, else the last weights, of a detector's run."""
    pointed = Path(first_line(folder / DETECTOR_LAST)).name
    names = (DETECTOR_BEST, EARLIER_BEST, pointed, DETECTOR_FINAL, EARLIER_FINAL)
    return next((folder / name for name in names if name and (folder / name).is_file()), None)


def weights_file(path: Path) -> Path | None:
    """Find the file of a detector's weights without reading it."""
    if not path.is_dir():
        return path
    return detector_file(path) or (path / MODEL_FILE if (path / MODEL_FILE).is_file() else None)


def first_line(pointer: Path) -> str:
    """Read a short file that names another file, "" without one."""
    return pointer.read_text(encoding="utf-8", errors="replace")[:_MAX_POINTER].strip() if pointer.is_file() else ""


def hub_advice(path: Path) -> str:
    """Return the command that gets a hub's model, or ""."""
    name = path.as_posix()
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", name) or path.parent.exists():
        return ""
    return f" Nothing is downloaded here. For a model of a hub, run `hf download {name} --local-dir {path.name}`."
