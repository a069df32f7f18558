"""Find image files: in folders, by patterns, on command lines."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from crossmae.errors import UserError
from crossmae.files import printable, special_kind

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

log = logging.getLogger(__name__)


def match_pattern(argument: str, key: str) -> list[str]:
    """Find files by a pattern with `~` and `**`, sorted."""
    found = sorted(name for name in glob.glob(os.path.expanduser(argument), recursive=True) if os.path.isfile(name))
    if not found:
        raise UserError(f"{key}: {argument}: no such file or folder, and no file matches it as a pattern. Correct it.")
    return found


def find_images(folder: Path, key: str) -> list[str]:
    """Find all images in a folder and its subfolders, sorted by path.

    Links to folders are followed, and each real folder is searched once. Hidden files and folders are left out. The log
    counts files that are not images. Paths are strings, because millions of `Path` objects would need gigabytes.

    Raises UserError if no image is found, or a subfolder cannot be searched.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in visited
        )
        special = find_special(parent)
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name in special:
                others[special[name]] += 1
            elif not name.startswith(".") and suffix in IMAGE_SUFFIXES:
                images.append(os.path.join(parent, name))
            else:
                others[suffix or name] += 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
    if others:
        log.info("%s: left out %d files that are no images: %s", folder, others.total(), kinds)
    if not images:
        found = f" Other files there: {kinds}." if others else ""
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{key}: no image in {folder} or its subfolders (looked for {suffixes}).{found}")
    return sorted(images, key=lambda name: name.split(os.sep))


def find_special(folder: str) -> dict[str, str]:
    """Find named pipes, sockets and devices in a folder.

    Returns what each name is. Links to such files count.
    """
    with os.scandir(folder) as entries:
        plain = {
            entry.path: entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) for entry in entries
        }
    odd = [path for path, is_plain in plain.items() if not is_plain]
    return {os.path.basename(path): kind for path in odd if (kind := special_kind(path))}


def _refuse(error: OSError) -> None:
    raise UserError(f"{printable(error.filename)}: cannot be searched: {error.strerror}. Change its permissions.")


def find_inputs(arguments: Sequence[str]) -> list[Path]:
    """Find all files named by files, folders and patterns, each once."""
    paths: list[str] = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            paths += find_images(path, "IMAGES")
        else:
            if kind := special_kind(path):
                raise UserError(f"IMAGES: {printable(argument)}: it is {kind}, not a file. Name a file.")
            paths += [str(path)] if path.is_file() else match_pattern(argument, "IMAGES")
    return [Path(path) for path in dict.fromkeys(paths)]
