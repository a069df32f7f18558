"""Read named tensors from a path, without running anything in the file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from crossmae.errors import UserError

# Files in the folder of a detector's run. Earlier versions wrote .pth files. The last one names the last weights.
DETECTOR_BEST, DETECTOR_FINAL, DETECTOR_LAST = "model_best.safetensors", "model_final.safetensors", "last_checkpoint"
EARLIER_BEST, EARLIER_FINAL = "model_best.pth", "model_final.pth"
MODEL_FILE = "model.safetensors"  # in a checkpoint, a run of ours or a folder of a model hub
# In the folder of tools/run.py: its record, its pretraining, and its detector. A detector to compare has another name.
PIPELINE_RECORD, PIPELINE_PRETRAINED, PIPELINE_DETECTOR = "pipeline.json", "pretrain", "detect-own"
_MAX_POINTER = 256


def detector_file(folder: Path) -> Path | None:
    """Find the best weights, else the last weights, of a detector's run."""
    pointed = Path(first_line(folder / DETECTOR_LAST)).name
    names = (DETECTOR_BEST, EARLIER_BEST, pointed, DETECTOR_FINAL, EARLIER_FINAL)
    return next((folder / name for name in names if name and (folder / name).is_file()), None)


def detector_folder(path: Path) -> Path:
    """Return the folder of the detector in a folder of tools/run.py.

    Other paths are returned unchanged.

    Raises UserError if there is no detector yet, or one more to compare. The message names what is there.
    """
    if not os.path.isfile(path / PIPELINE_RECORD):  # False for a name that is too long
        return path
    folders = sorted(one for one in path.glob("detect-*") if detector_file(one) or _has_checkpoint(one))
    if [one.name for one in folders] == [PIPELINE_DETECTOR]:
        return folders[0]
    if folders:
        names = " and ".join(one.name for one in folders)
        raise UserError(f"{path}: a folder of tools/run.py --compare, with {names}. Name one, such as {folders[0]}.")
    raise UserError(f"{path}: a folder of tools/run.py without a detector yet, {_pipeline_content(path)}")


def pretrained_folder(path: Path) -> Path:
    """Return the folder of the pretraining in a folder of tools/run.py.

    Other paths are returned unchanged.

    Raises UserError if there are no weights yet. The message names what is there.
    """
    if not os.path.isfile(path / PIPELINE_RECORD):
        return path
    folder = path / PIPELINE_PRETRAINED
    if not (folder / MODEL_FILE).is_file() and not _has_checkpoint(folder):
        raise UserError(f"{path}: a folder of tools/run.py without pretrained weights yet, {_pipeline_content(path)}")
    return folder


def _has_checkpoint(run: Path) -> bool:
    return any(run.glob("checkpoints/step-*"))


def _pipeline_content(path: Path) -> str:
    names = sorted(one.name for one in path.iterdir() if one.is_dir())
    return f"with {' and '.join(names) or 'nothing but its plan'}. Repeat its command, which continues."


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
