"""Temporary names of every writer, and the removal of the temporary files that killed processes left."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from crossmae.errors import printable, shorten

log = logging.getLogger(__name__)

MOST_LETTERS = 40  # of a file's name that are kept in its temporary name
DEPTH = 2  # levels of folders below a swept folder: checkpoints/step-00000005
SHARED_SECONDS = 86_400.0  # age of leftovers in a folder that several machines may write
CLOCK_SECONDS = 1.0  # error of the time of a process or of a file
_TEMPORARY = re.compile(r"\.(.+)\.([0-9a-f]{8})\.(\d+)\.tmp", re.DOTALL)
_PROBE = re.compile(r"\.write-test\.(\d+)")


def temporary_name(name: str) -> str:
    """Return the temporary name that belongs to a file and this process.

    The name proves that it is ours: it contains a digest of its own beginning. Long names are cut, because a name may
    have the maximum length. A digest keeps cut names distinct.
    """
    start = name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 9]}~{_digest(name)}"
    return f".{start}.{_digest(start)}.{os.getpid()}.tmp"


def probe_name() -> str:
    """Return the name of the file that tests a folder."""
    return f".write-test.{os.getpid()}"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def is_leftover(path: Path) -> bool:
    """Return true for a temporary file or folder without its process.

    Links, and names that are not certainly ours, are no leftovers.
    """
    try:
        about = path.lstat()
    except OSError:
        return False
    if stat.S_ISLNK(about.st_mode):
        return False
    if found := _TEMPORARY.fullmatch(path.name):
        is_ours, process = _digest(found[1]) == found[2], found[3]
    elif found := _PROBE.fullmatch(path.name):
        is_ours, process = stat.S_ISREG(about.st_mode) and about.st_size == 0, found[1]
    else:
        return False
    return is_ours and not is_running(process, about.st_mtime)


def is_running(process: str | int, changed: float) -> bool:
    """Return true if the process that changed a file may still run.

    Args:
        process: number of the process, on this machine. A later process may have the same number by chance.
        changed: time of the last change, in seconds as from `time.time`.
    """
    try:
        return bool(psutil.Process(int(process)).create_time() <= changed + CLOCK_SECONDS)
    except (psutil.Error, OverflowError, ValueError):
        return False


def sweep(folder: Path, depth: int = DEPTH, min_age: float = 0.0) -> list[str]:
    """Remove what killed processes left in a folder, and log the names.

    Only temporary files and folders of this toolkit are removed. Links are not followed. Claim the folder first, so
    that no other run writes there. In a folder that nothing claims, use `min_age`, because processes of other machines
    may write there.

    Args:
        depth: levels of folders below `folder`.
        min_age: seconds since the last change of a leftover.
    """
    removed = []
    for path in [path for path in _leftovers(folder, depth) if _age(path) >= min_age]:
        try:
            shutil.rmtree(path) if os.path.isdir(path) else path.unlink()
        except OSError as error:
            log.warning("%s: left by a killed process, and cannot be removed: %s", path, error.strerror)
            continue
        removed.append(str(path.relative_to(folder)))
    if removed:
        log.info("%s: removed what a killed process left: %s", folder, shorten(sorted(map(printable, removed))))
    return removed


def _age(path: Path) -> float:
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime
    return 0.0


def _leftovers(folder: Path, depth: int) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        paths = {name: Path(place, name) for name in (*folders, *files)}
        ours = {name for name, path in paths.items() if is_leftover(path)}
        yield from (paths[name] for name in sorted(ours))
        is_deep = len(Path(place).relative_to(folder).parts) >= depth
        folders[:] = [] if is_deep else [name for name in folders if name not in ours]
