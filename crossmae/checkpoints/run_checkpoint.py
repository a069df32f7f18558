"""Checkpoints of a training run: written atomically, found by their manifest.

Layout, in the run's folder:

    checkpoints/step-00001200/model.safetensors   tensors of the model, and metadata
                              state.pt            optimizer and position: tensors, numbers and strings only
                              run.json            config, versions and position, for people
                              manifest.json       sizes and SHA-256 of the other files; written last

A folder without a manifest is ignored. So is a folder whose files do not match the manifest.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crossmae.checkpoints.reading import MODEL_FILE
from crossmae.errors import UserError, repeat_command, shorten
from crossmae.files import (
    check_space,
    name_write_errors,
    put_in_place,
    read_side_file,
    sha256,
    sync_folder,
    temporary_folder,
    write_atomically,
    write_json,
)
from crossmae.files.leftovers import sweep

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
MODEL, STATE, RECORD, MANIFEST = MODEL_FILE, "state.pt", "run.json", "manifest.json"
CHECKPOINT_FILES = (MODEL, STATE, RECORD)  # of a checkpoint, next to its manifest
SOUND_TORCH = "2.10"  # an older torch.load with weights_only=True can be made to overwrite memory
_NAME = re.compile(r"step-(\d{8})")
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # its temporary files, which were next to the checkpoint's files


def save_checkpoint(
    run: Path,
    step: int,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    state: Any,
    record: Any,
    keep: int,
) -> Path:
    """Write a checkpoint, then delete all except `keep` up to it.

    The checkpoint is written and read again in a temporary folder, and appears by one rename. An earlier checkpoint of
    the same step is there until then. Older checkpoints are deleted last.

    Args:
        run: folder of the run.
        step: number of finished optimizer steps.
        state: nested dicts and lists of tensors, numbers and strings.
        keep: number of checkpoints to keep, 0 for all.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: The checkpoint cannot be written, or cannot be read again. Earlier checkpoints stay.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    with name_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise FileExistsError(errno.EEXIST, "there is a file or link of this name", str(folder))
    with temporary_folder(folder) as place:
        new = place / folder.name
        new.mkdir()
        write_atomically(new / MODEL, lambda path: save_file(tensors, path, metadata))
        write_atomically(new / STATE, lambda path: torch.save(state, path))
        write_json(new / RECORD, record)
        paths = [new / name for name in CHECKPOINT_FILES]
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
        write_json(new / MANIFEST, {"step": step, "files": files})
        if reason := _reading_error(new, set(tensors)):
            raise UserError(
                f"{folder}: cannot be read after it was written: {reason}. Earlier checkpoints stay. Check the disk. "
                f"{repeat_command()} to continue."
            )
        put_in_place(new, folder)
        for path in list(new.iterdir()) if new.is_dir() else ():  # of an earlier folder of this name
            if path.name not in (MANIFEST, *CHECKPOINT_FILES):
                path.rename(folder / path.name)
        sync_folder(run)
    drop_older(run, folder, keep)
    return folder


class CheckpointWriter:
    """Write the checkpoints of a run in a thread, while training continues.

    The thread writes copies of the tensors, so that training waits only until they are copied. The copies are in main
    memory, and the next checkpoint reuses them. At most one checkpoint is being written. The end of the `with` block
    waits for it.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[Path] | None = None
        self.copies: dict[str, Tensor] = {}

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.thread.shutdown()
        try:
            self.wait()
        except UserError as error:
            if kind is None:
                raise
            log.error("%s", error)  # the first error ends the run

    def save(
        self,
        run: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        state: Any,
        record: Any,
        keep: int,
    ) -> None:
        """Copy the tensors, and begin `save_checkpoint`.

        Raises UserError like `wait`, for the checkpoint before.
        """
        self.wait()
        copied, state = self.copy(dict(tensors), "model"), self.copy(state, "state")
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies from the GPU may still be under way
        self.writing = self.thread.submit(save_checkpoint, run, step, copied, dict(metadata), state, record, keep)

    def copy(self, value: Any, name: str) -> Any:
        """Copy the tensors of nested dicts and lists to main memory.

        `name` is the place of `value` among the reused copies.
        """
        if isinstance(value, Mapping):
            return {key: self.copy(one, f"{name}.{key}") for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copy(one, f"{name}.{number}") for number, one in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        copy = self.copies.get(name)
        if copy is None or (copy.shape, copy.dtype) != (value.shape, value.dtype):
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.copies[name] = copy
        return copy.copy_(value.detach(), non_blocking=value.is_cuda)

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is complete.

        Raises UserError if it cannot be written. Earlier checkpoints stay.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


def drop_older(run: Path, newest: Path, keep: int) -> None:
    """Delete all except `keep` checkpoints up to `newest`, which is valid.

    Later ones stay, because their contents may not match their manifests: then `newest` is the last good one.
    """
    upto = [folder for folder in complete_checkpoints(run) if step_of(folder) <= step_of(newest)]
    for old in upto[:-keep]:
        _remove(old, CHECKPOINT_FILES)


def _reading_error(folder: Path, names: set[str]) -> str | None:
    """Open a new checkpoint again, without reading its tensors twice."""
    reason = defect(folder, contents=True)
    try:
        if not reason:
            with safe_open(folder / MODEL, "pt") as file:
                reason = None if set(file.keys()) == names else f"{MODEL} has other tensors"
            torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of safetensors or torch
        reason = " ".join(str(error).split())[:300]
    return reason


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Delete files of a checkpoint, then its folder if empty.

    The manifest is deleted first, so that an interrupted deletion leaves no checkpoint that seems complete.
    """
    try:
        for name in (MANIFEST, *names):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        log.warning("%s: an old checkpoint cannot be deleted entirely: %s", folder, error.strerror)


def sweep_run(run: Path) -> list[str]:
    """Remove what killed runs left in a folder, and log the names.

    Temporary files (see `leftovers.sweep`) and checkpoints that were never completed are removed. A folder with any
    other file stays. Claim the folder first.
    """
    removed = sweep(run)
    halves = [folder for folder in _folders(run) if _is_half_made(folder)]
    for folder in halves:
        _remove(folder, [path.name for path in folder.iterdir()])
    if halves:
        log.info("%s: removed half-made checkpoints: %s", run, shorten([folder.name for folder in halves]))
    return [*removed, *(f"{FOLDER}/{folder.name}" for folder in halves if not folder.exists())]


def _is_half_made(folder: Path) -> bool:
    try:
        if not _NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            return False
        return all(_is_ours(path) for path in folder.iterdir())
    except OSError:
        return False


def _is_ours(path: Path) -> bool:
    is_known = path.name in CHECKPOINT_FILES or _OF_SAFETENSORS.fullmatch(path.name) is not None
    return is_known and path.is_file() and not path.is_symlink()


def _folders(run: Path) -> list[Path]:
    """List whatever is named like a checkpoint."""
    try:
        return sorted((run / FOLDER).glob("step-*"))
    except OSError:
        return []


def checkpoint_names(run: Path) -> list[str]:
    """List the names of checkpoints that have a manifest."""
    return [folder.name for folder in _folders(run) if (folder / MANIFEST).exists()]


def complete_checkpoints(run: Path) -> list[Path]:
    """List complete checkpoints by ascending step. Log incomplete checkpoints."""
    found = []
    for folder in _folders(run):
        if not _NAME.fullmatch(folder.name):
            reason: str | None = "its name is not step-<8 digits>"
        else:
            reason = "it is a link" if folder.is_symlink() else defect(folder)
        if reason:
            log.warning("skipping checkpoint %s: %s", folder, reason)
        else:
            found.append(folder)
    return found


def checkpoint_bytes(model_bytes: int, optimizer_copies: int, averaged: bool) -> int:
    """Estimate the bytes of one checkpoint.

    Args:
        model_bytes: bytes of the model's tensors.
        optimizer_copies: tensors that the optimizer has for each parameter, such as 2 for AdamW.
        averaged: true if a moving average of the weights is saved.
    """
    return model_bytes * (1 + optimizer_copies + averaged)


def check_checkpoint_space(run: Path, checkpoint: int, weights: int, keep: int, key: str) -> None:
    """Check that the disk has room for the checkpoints of a run.

    While a checkpoint is written, `keep` older ones are still there. Complete checkpoints that are already in the
    folder need no more room, because new ones replace them.

    Args:
        checkpoint: bytes of one checkpoint, see `checkpoint_bytes`.
        weights: bytes of the files that a run writes next to its checkpoints, such as its final and best weights.
        key: config key or flag of the folder, for the error.

    Raises:
        UserError: There is too little free space. The message has both numbers.
    """
    there = sum(1 for folder in _folders(run) if _NAME.fullmatch(folder.name) and not defect(folder))
    check_space(run, checkpoint * max(keep + 1 - there, 1) + weights, key)


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

    Name, manifest and file sizes are checked; with `contents`, the SHA-256 of every file as well. This function raises
    no error for any content of the folder.
    """
    try:
        return _defect(folder, contents)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _defect(folder: Path, contents: bool) -> str | None:
    if not folder.is_dir():
        return "it is not a folder"
    if not os.path.lexists(folder / MANIFEST):
        return f"no {MANIFEST}, so it was never completed"
    try:
        manifest = read_side_file(folder / MANIFEST)
        files, step = manifest["files"], manifest["step"]
        # Other names are never opened: they could lead anywhere.
        known = {name: (int(files[name]["bytes"]), str(files[name]["sha256"])) for name in CHECKPOINT_FILES}
        if set(files) != set(CHECKPOINT_FILES):
            return f"{MANIFEST} is damaged: it has other files"
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return f"{MANIFEST} is damaged"
    if _NAME.fullmatch(folder.name) and step != step_of(folder):
        return f"{MANIFEST} is of another step"
    for name, (size, digest) in known.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if contents and sha256(path) != digest:
            return f"{name} has another SHA-256 than {MANIFEST} says"
    return None


def read_record(folder: Path) -> dict[str, Any]:
    """Read `run.json` of a checkpoint.

    Raises UserError if the file cannot be read or has no JSON object.
    """
    return read_side_file(folder / RECORD)


def read_state(folder: Path, mapped: bool = False) -> Any:
    """Read the `state` of a checkpoint on the CPU, by restricted unpickling.

    Args:
        mapped: leave the tensors in the file, which must stay as it is until they are used.

    Raises:
        UserError: The file cannot be read.
    """
    if torch.__version__ < SOUND_TORCH:
        log.warning(
            "%s: torch %s has a hole in its restricted reader (CVE-2026-24747). Continue only runs of your own, or "
            "update torch to %s or later.",
            folder / STATE,
            torch.__version__,
            SOUND_TORCH,
        )
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises various types for one cause
        raise UserError(f"{folder / STATE}: cannot be read: {' '.join(str(error).split())[:300]}") from error
