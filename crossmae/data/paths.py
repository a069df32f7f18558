"""Find image files: in folders, by patterns, on command lines."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from itertools import chain
from pathlib import Path

from PIL import Image

from crossmae.data.parallel import map_in_order
from crossmae.errors import UserError, printable, shorten
from crossmae.files import special_kind, why_unexpanded

# Formats that Pillow decodes itself, the most usual first, by Pillow's names. The first suffix is written. EPS, PDF and
# WMF need an interpreter, FITS and HDF5 hold other data, PSD and ICO hold several pictures, `.rgb` may be raw pixels.
IMAGE_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2c", ".j2k", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "MPO": (".mpo",),
    "GIF": (".gif",),
    "DIB": (".dib",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "TGA": (".tga",),
}
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow reads their headers only, or starts programs
IMAGE_SUFFIXES = frozenset(chain.from_iterable(IMAGE_FORMATS.values()))
_VIDEOS = """
    3g2 3gp asf avi divx dv f4v flv h264 hevc ivf m1v m2t m2ts m2v m4v mjpeg mkv mov mp4 mpe mpeg mpg mts mxf ogv qt
    rm rmvb ts vob webm wmv y4m
"""
_LABELS = "cfg cls csv db html ini json jsonl log lst md names py sh toml tsv txt xml yaml yml"
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _VIDEOS.split())  # containers, and raw streams, that PyAV opens
LABEL_SUFFIXES = frozenset(f".{name}" for name in _LABELS.split())  # what lies next to images in sound data sets
MOST_OPENED = 3  # files of one kind
CONVERT = "Convert them to PNG, JPEG or TIFF, or name other files"

# Files and folders that operating systems, network drives and archive programs put next to data. Names with a leading
# dot are left out as well.
SYSTEM_NAMES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "folder.htt", "_vti_cnf", "~snapshot", "lost+found"),
    *("$recycle.bin", "recycler", "system volume information", "temporary items", "network trash folder"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@synoeastream", "@synoresource"),
    *("__macosx", "thevolumesettingsfolder", "__pycache__", "pax_global_header", "paxheader", "albumartsmall.jpg"),
    *("lost.dir", "dfsrprivate", "msocache", "config.msi", "desktop db", "desktop df", "_gsdata_"),
    *("@__thumb", "@sharebin", "@downloadstation", "@appstore"),
}
SYSTEM_SPELLINGS = {"RECYCLED", "eaDir"}  # `recycled` may be a class
NUMBERED_SYSTEM_NAME = re.compile(r"(found|gnusparsefile)\.\d+|\$[a-z]\w{3,}(\.bin|\.~\w+)?")  # $WINDOWS.~BT, not $5
SYSTEM_PREFIXES = (".", "paxheaders.", "@gmt-", "~$")  # hidden, tar programs, shadow copies, open documents

# Folders next to the images that hold other pictures of the same base names.
_COMPANIONS = """
    mask masks label labels annotation annotations annot annots thumb thumbs thumbnail thumbnails preview previews depth
    depths disparity normals segmentation segmentations segmentationclass segmentationobject seg groundtruth
    ground_truth gt labelids overlay overlays edges heatmap heatmaps saliency
"""
COMPANIONS = frozenset(_COMPANIONS.split())
SPLIT_WORDS = "train(ing)?|val(id(ation)?)?|test(ing)?|dev"  # pattern of the usual names of splits

SCANNED_FROM = 32  # names in a folder; fewer files are looked at one by one
_ODD_PATH = re.compile(r"//|/\.?$|(?:^|/)\./|^\.$")  # pathlib writes such paths in another way

log = logging.getLogger(__name__)


def is_system_name(name: str) -> bool:
    """Check for hidden names and names of `SYSTEM_NAMES`."""
    folded = name.casefold()
    known = folded in SYSTEM_NAMES or name in SYSTEM_SPELLINGS
    return known or folded.startswith(SYSTEM_PREFIXES) or NUMBERED_SYSTEM_NAME.fullmatch(folded) is not None


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
        why = why_unexpanded(argument) or "no such file or folder, and no file matches it as a pattern. Correct it."
        raise UserError(f"{key}: {argument}: {why}")
    return found


def without_system_names(arguments: Sequence[str]) -> list[str]:
    """Leave out system names that a shell's `*` found."""
    system = [name for name in map(os.path.basename, arguments) if is_system_name(name) and name[0] != "."]
    if not system or len(arguments) == 1:
        return list(arguments)
    log.info("left out what is of the system: %s", count_names(system))
    return [argument for argument in arguments if os.path.basename(argument) not in system]


def find_images(folder: Path, key: str, suffixes: Set[str] = IMAGE_SUFFIXES) -> list[str]:
    """Find all images in a folder and its subfolders, sorted by path.

    Only files with one of the suffixes are found. The log counts what was left out. Paths are strings, because millions
    of `Path` objects would need gigabytes.

    Raises UserError if no image is found, or a subfolder cannot be searched.
    """
    images: list[str] = []
    unread = Counter[tuple[str, str]]()
    system: list[str] = []
    special: dict[str, str] = {}
    start = len(os.path.join(folder, ""))
    for path in walk_files(folder, system, _refuse, special):
        kind = file_kind(path)
        if kind in suffixes:
            images.append(path)
        else:
            unread[_subfolder(path[start:]), kind] += 1
    for path, kind in special.items():
        unread[_subfolder(path[start:]), kind] += 1
    if system:
        log.info("%s: left out what is hidden or of the system: %s", folder, count_names(system))
    if not images:
        raise UserError(f"{key}: {describe_lack(f'{folder} or its subfolders', unread)}")
    log_unread(folder, unread, (_subfolder(path[start:]) for path in images))
    return sorted(images, key=lambda name: name.split(os.sep))


def file_kind(name: str) -> str:
    """Return the suffix in lower case, or "without a suffix"."""
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _subfolder(path: str) -> str:
    first, separator, _ = path.partition(os.sep)
    return first if separator else ""


def _count_kinds(unread: Mapping[tuple[str, str], int]) -> str:
    counts = Counter[str]()
    for (_, kind), count in unread.items():
        counts[kind] += count
    return shorten([f"{count:,} {printable(kind)}" for kind, count in counts.most_common()])


def describe_lack(place: str, unread: Mapping[tuple[str, str], int]) -> str:
    """Explain why a place has no image: count other files."""
    if not unread:
        return f"no image in {place}: there is no file. Name another folder."
    return f"no image in {place}: {_count_kinds(unread)} are not read by this tool. {CONVERT}."


def log_unread(place: str | Path, unread: Mapping[tuple[str, str], int], images: Iterable[str]) -> None:
    """Log unread files. Warn if they outnumber the images.

    Args:
        unread: number of files by subfolder and kind.
        images: subfolder of every image.
    """
    if not unread:
        return
    data = Counter[str]()
    for (subfolder, kind), count in unread.items():
        data[subfolder] += count if kind not in LABEL_SUFFIXES else 0
    read = Counter(images) if +data else Counter[str]()
    more = sorted(printable(name) for name in +data if name and data[name] > read[name])
    if data.total() > read.total() or more:
        there = f" in {shorten(more)}" if more else ""
        message = "%s: %s are not read by this tool, more files than images%s. %s"
        log.warning(message, place, _count_kinds(unread), there, CONVERT)
    else:
        log.info("%s: %s are not read by this tool", place, _count_kinds(unread))


def refuse_unread(paths: Sequence[str], where: str) -> None:
    """Raise a UserError for files that are no images."""
    others: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if (kind := file_kind(path)) not in IMAGE_SUFFIXES:
            others[kind].append(path)
    unread = {("", kind): len(own) for kind, own in others.items() if not any(map(_is_image, own[:MOST_OPENED]))}
    if unread:
        found = f"{_count_kinds(unread)} of {len(paths):,} files are not read by this tool"
        raise UserError(f"{where}: {found}. Convert them to PNG, JPEG or TIFF, or leave them out of the list.")


def _is_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            if file.read(2) in (b"II", b"MM"):  # TIFF files of many channels are unknown to Pillow
                return True
            with Image.open(file) as image:
                return image.format not in NOT_DECODED
    except Exception:  # the libraries raise many kinds of errors
        return False


def walk_files(
    folder: str | Path,
    system: list[str],
    on_error: Callable[[OSError], None] | None = None,
    special: dict[str, str] | None = None,
) -> Iterator[str]:
    """Yield the files in a folder, and collect the system's names.

    Links to folders are followed, and each real folder is searched once. Named pipes, sockets and devices are left out,
    and collected in `special`.
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
        odd = {os.path.join(parent, name): kind for name, kind in find_special(parent).items()}
        if special is not None:
            special |= odd
        paths = (os.path.join(parent, name) for name in files if not is_system_name(name))
        yield from (path for path in paths if path not in odd)


def join_names(folder: Path, names: Sequence[str]) -> list[str]:
    """Join like `str(folder / name)`, ten times faster for plain names."""
    start = str(folder / "x")[:-1]
    return [
        str(folder / name) if _ODD_PATH.search(name) or os.sep != "/" else name if name[0] == "/" else start + name
        for name in names
    ]


def are_files(paths: Sequence[str]) -> list[bool]:
    """Check which paths are files. List a folder that has many once."""
    parents = [path.rpartition(os.sep)[0] for path in paths]
    known: set[str] = set()
    for parent, count in Counter(parents).items():
        if count >= SCANNED_FROM:
            known.update(_files_in(parent))
    rest = [path for path in paths if path not in known]
    there = dict(zip(rest, map_in_order(os.path.isfile, rest, bar="find images"), strict=True))
    return [path in known or there[path] for path in paths]


def _files_in(folder: str) -> Iterator[str]:
    """Yield paths of files, and of links to files, in a folder."""
    with suppress(OSError, ValueError), os.scandir(folder or os.sep) as entries:
        for entry in entries:
            with suppress(OSError):  # a link to itself
                if entry.is_file():
                    yield f"{folder}{os.sep}{entry.name}"


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


def find_inputs(arguments: Sequence[str], suffixes: Set[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Find all files named by files, folders and patterns, each once.

    In folders, only files with one of the suffixes are found.
    """
    paths: list[str] = []
    for argument in without_system_names(arguments):
        path = Path(os.path.expanduser(argument))
        if os.path.isdir(path):
            paths += find_images(path, "IMAGES", suffixes)
        else:
            if kind := special_kind(path):
                raise UserError(f"IMAGES: {printable(argument)}: it is {kind}, not a file. Name a file.")
            paths += [str(path)] if os.path.isfile(path) else match_pattern(argument, "IMAGES")
    return [Path(path) for path in dict.fromkeys(paths)]
