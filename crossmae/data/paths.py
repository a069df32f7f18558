"""Find image files: in folders, by patterns, on command lines."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from crossmae.errors import UserError, printable, shorten

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# Files and folders that operating systems, network drives and archive programs put next to data. Names with a leading
# dot are left out as well.
SYSTEM_NAMES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "folder.htt", "_vti_cnf", "~snapshot", "lost+found"),
    *("$recycle.bin", "recycler", "system volume information", "found.000", "temporary items", "network trash folder"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@synoeastream", "@synoresource"),
    *("__macosx", "thevolumesettingsfolder", "__pycache__", "pax_global_header", "paxheader", "albumartsmall.jpg"),
}
SYSTEM_PREFIXES = (".", "paxheaders.", "@gmt-", "~$")  # hidden, tar programs, shadow copies, open documents

log = logging.getLogger(__name__)


def is_system_name(name: str) -> bool:
    """Check for hidden names and names of `SYSTEM_NAMES`."""
    folded = name.casefold()
    return folded.startswith(SYSTEM_PREFIXES) or folded in SYSTEM_NAMES


def find_system_part(path: str) -> str | None:
    """Return the first part of a path that is a system's name."""
    return next((part for part in path.split("/") if part not in ("", ".", "..") and is_system_name(part)), None)


def count_names(names: Iterable[str]) -> str:
    """Count names, as in "4 @eaDir, 1 Thumbs.db"."""
    counts = Counter("._*" if name.startswith("._") else name for name in names)  # macOS writes `._x` next to `x`
    return shorten([f"{count:,} {printable(name)}" for name, count in counts.most_common()])


def match_pattern(argument: str, key: str) -> list[str]:
    """Find files by a pattern with `~` and `**`, sorted.

    Files in folders such as `@eaDir` are left out, unless the pattern names the folder.
    """
    pattern = os.path.expanduser(argument)
    named = {part for part in pattern.split(os.sep) if not glob.has_magic(part)}
    paths = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    systems = [find_system_part("/".join(part for part in name.split(os.sep) if part not in named)) for name in paths]
    found = [name for name, system in zip(paths, systems, strict=True) if system is None]
    if len(found) < len(paths):
        log.info("%s: left out what is hidden or of the system: %s", argument, count_names(filter(None, systems)))
    if not found:
        raise UserError(f"{key}: {argument}: no such file or folder, and no file matches it as a pattern. Correct it.")
    return found


def without_system_names(arguments: Sequence[str]) -> list[str]:
    """Leave out system names that a shell's `*` found."""
    system = [name for name in map(os.path.basename, arguments) if is_system_name(name) and name[0] != "."]
    if not system or len(arguments) == 1:
        return list(arguments)
    log.info("left out what is of the system: %s", count_names(system))
    return [argument for argument in arguments if os.path.basename(argument) not in system]


def find_images(folder: Path, key: str) -> list[str]:
    """Find all images in a folder and its subfolders, sorted by path.

    The log counts what was left out. Paths are strings, because millions of `Path` objects would need gigabytes.

    Raises UserError if no image is found, or a subfolder cannot be searched.
    """
    images: list[str] = []
    others: list[str] = []
    system: list[str] = []
    for path in walk_files(folder, system, _refuse):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        else:
            others.append(suffix or os.path.basename(path))
    kinds = count_names(others)
    if system:
        log.info("%s: left out what is hidden or of the system: %s", folder, count_names(system))
    if others:
        log.info("%s: left out %d files that are no images: %s", folder, len(others), kinds)
    if not images:
        found = f" Other files there: {kinds}." if others else ""
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{key}: no image in {folder} or its subfolders (looked for {suffixes}).{found}")
    return sorted(images, key=lambda name: name.split(os.sep))


def walk_files(
    folder: str | Path, system: list[str], on_error: Callable[[OSError], None] | None = None
) -> Iterator[str]:
    """Yield the files in a folder, and collect the system's names.

    Links to folders are followed, and each real folder is searched once.
    """
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=on_error, followlinks=True):
        visited.add(os.path.realpath(parent))
        system.extend(name for name in (*folders, *files) if is_system_name(name))
        folders[:] = sorted(
            name
            for name in folders
            if not is_system_name(name) and os.path.realpath(os.path.join(parent, name)) not in visited
        )
        yield from (os.path.join(parent, name) for name in files if not is_system_name(name))


def _refuse(error: OSError) -> None:
    raise UserError(f"{printable(error.filename)}: cannot be searched: {error.strerror}. Change its permissions.")


def find_inputs(arguments: Sequence[str]) -> list[Path]:
    """Find all files named by files, folders and patterns, each once."""
    paths: list[str] = []
    for argument in without_system_names(arguments):
        path = Path(argument).expanduser()
        if path.is_dir():
            paths += find_images(path, "IMAGES")
        else:
            paths += [str(path)] if path.is_file() else match_pattern(argument, "IMAGES")
    return [Path(path) for path in dict.fromkeys(paths)]
