"""Pack any source into tar shards in WebDataset layout. A killed process loses at most one shard.

A folder of shards contains

    shard-000000.tar ...   members KEY.jpg (or .png, ...), KEY.cls with the class index, and KEY.json with the name,
                           class, width and height of the original; KEY is the index of the image in its source
    index.json             settings, classes, and for each shard its size, SHA-256 and image positions; written last
    progress.jsonl         the same content line by line; exists while shards are missing
    broken.txt             images that were left out, one per line with the reason; exists only if there are any

The same source, settings and Pillow version give bit-identical shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import PIL

from crossmae.data.parallel import map_in_order
from crossmae.data.sources.shard_files import StoredFile
from crossmae.data.sources.shrink import keep, shrink
from crossmae.data.sources.source import Source
from crossmae.data.sources.tar_index import (
    INDEX_NAME,
    PROGRESS_NAME,
    FolderIndex,
    all_are,
    entry_fault,
    read_folder_index,
    scan_shard,
    shard_entry,
)
from crossmae.errors import UserError, shorten
from crossmae.files import make_folder, read_json_lines, sha256, write_atomically, write_text
from crossmae.files.claim import CLAIM_LOCK, CLAIM_RECORD, claim
from crossmae.files.leftovers import is_leftover, sweep

BROKEN_NAME = "broken.txt"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardSettings:
    """Settings that decide the bytes of shards.

    Attributes:
        short_side: largest short side of an image in pixels.
        quality: quality of JPEG files; None: the pixels are not compressed.
        keep_original: pack the files unchanged.
        skip_broken: leave broken images out.
    """

    short_side: int = 256
    quality: int | None = 90
    images_per_shard: int = 1000
    keep_original: bool = False
    skip_broken: bool = False

    def __post_init__(self) -> None:
        limits = {"short_side": (1, 65_000), "quality": (1, 100), "images_per_shard": (1, 1_000_000)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"--{name.replace('_', '-')} {value}: out of range. Give a number from {low} to {high:,}."
                )


def make_shards(source: Source, folder: Path, settings: ShardSettings, threads: int) -> tuple[FolderIndex, int]:
    """Write missing or damaged shards. Return index and number of kept shards.

    Raises UserError if an image is broken (unless settings.skip_broken), the folder cannot be written, another process
    makes shards there, or the folder contains other files or shards with other settings.
    """
    make_folder(folder, "DST")
    _refuse_other_files(folder)
    with claim(folder, "shards", "DST", keeps_kind=False):
        sweep(folder)
        return _make_shards(source, folder, settings, threads)


def _refuse_other_files(folder: Path) -> None:
    if any((folder / name).exists() for name in (INDEX_NAME, PROGRESS_NAME)):
        return
    ours = (CLAIM_LOCK, CLAIM_RECORD)
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours and not is_leftover(path))
    if others:
        raise UserError(f"DST: {folder} holds something else ({shorten(others)}). Give a new folder.")


def _make_shards(source: Source, folder: Path, settings: ShardSettings, threads: int) -> tuple[FolderIndex, int]:
    wanted = _describe(source, settings)
    done = _complete_shards(folder, wanted)
    size, kept = settings.images_per_shard, len(done)
    spans = {
        shard_name(start // size): range(start, min(start + size, len(source))) for start in range(0, len(source), size)
    }
    missing = {name: span for name, span in spans.items() if name not in done}
    if missing or not (folder / INDEX_NAME).is_file():
        header = {"settings": wanted, "classes": source.classes}
        lines = [json.dumps(header), *(json.dumps(done[name]) for name in sorted(done))]
        write_text(folder / PROGRESS_NAME, "\n".join(lines) + "\n")
        (folder / INDEX_NAME).unlink(missing_ok=True)
        _make_missing(source, folder, settings, threads, missing, done)
    index = FolderIndex(wanted, source.classes, dict(sorted(done.items())))
    if not (folder / INDEX_NAME).is_file():
        broken = [message for entry in index.shards.values() for message in entry["broken"]]
        if not index.total("names"):
            raise UserError(f"SRC: no image can be read: {broken[0]}. Name other images.")
        if broken:
            write_text(folder / BROKEN_NAME, "\n".join(broken) + "\n")
        write_text(folder / INDEX_NAME, index.to_json() + "\n")
        (folder / PROGRESS_NAME).unlink(missing_ok=True)
    return index, kept


def verify_shards(folder: Path) -> int:
    """Compare every shard with `index.json`. Return the number of shards.

    Raises UserError if there is no index, or shards are missing or changed. The message names the shards.
    """
    index = read_folder_index(_stored(folder / INDEX_NAME))
    if index is None:
        unfinished = " (make_shards.py has not finished there)" if (folder / PROGRESS_NAME).exists() else ""
        raise UserError(f"{folder}: no {INDEX_NAME} by make_shards.py{unfinished}. Run make_shards.py.")
    good = _unchanged(folder, list(index.shards.values()))
    bad = [name for name in index.shards if name not in good]
    if bad:
        raise UserError(
            f"{folder}: {len(bad):,} of {len(index.shards):,} shards are missing or changed: {shorten(bad)}. "
            "Make them again with the same command as before."
        )
    return len(index.shards)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"


def _describe(source: Source, settings: ShardSettings) -> dict[str, Any]:
    names = hashlib.sha256("\n".join(map(source.name, range(len(source)))).encode(errors="surrogateescape"))
    about = {"source": source.description, "images": len(source), "names_sha256": names.hexdigest()}
    unused = {"short_side": None, "quality": None} if settings.keep_original else {}
    return about | asdict(settings) | unused | {"pillow": PIL.__version__}


def _complete_shards(folder: Path, wanted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the entries of undamaged shards from an earlier run, by file."""
    earlier = read_folder_index(_stored(folder / INDEX_NAME)) or _read_progress(folder / PROGRESS_NAME)
    if earlier is None:
        return {}
    for key, value in wanted.items():
        # Completed shards had no broken images, or the broken images were left out.
        if earlier.settings.get(key) == value or key == "skip_broken":
            continue
        was = f"{key} was {earlier.settings.get(key)!r}, now {value!r}"
        if key != "pillow":
            raise UserError(f"DST: {folder} holds shards with other settings: {was}. Give a new folder.")
        log.warning("%s: %s; new shards may differ in their bytes from earlier ones", folder, was)
    good = _unchanged(folder, list(earlier.shards.values()))
    for name in earlier.shards:
        if name not in good:
            log.warning("%s: missing or changed: made again", folder / name)
    return good


def _read_progress(path: Path) -> FolderIndex | None:
    """Read `progress.jsonl`, or return None if missing or damaged."""
    header, *entries = read_json_lines(path) or [{}]
    found: list[Any] = [header.get(key) if isinstance(header, dict) else None for key in ("settings", "classes")]
    settings, classes = found
    if not isinstance(settings, dict) or not all_are(str, classes):
        return None
    entries = [entry for entry in entries if isinstance(entry, dict) and all_are(str, entry.get("broken"))]
    good = {entry["file"]: entry for entry in entries if not entry_fault(entry, len(classes))}
    return FolderIndex(settings, tuple(classes), good)


def _unchanged(folder: Path, entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:

    def is_unchanged(entry: dict[str, Any]) -> bool:
        path = folder / entry["file"]
        return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]

    checks = map_in_order(is_unchanged, entries, min(8, os.cpu_count() or 1), bar="check shards")
    return {entry["file"]: entry for entry, good in zip(entries, checks, strict=True) if good}


@dataclass(frozen=True)
class _Packed:
    """One image to write into a shard. `files` is empty for a broken image, and `broken` is then the reason."""

    files: dict[str, bytes]
    label: int | None
    source_bytes: int
    broken: str = ""


def _make_missing(
    source: Source,
    folder: Path,
    settings: ShardSettings,
    threads: int,
    missing: dict[str, range],
    done: dict[str, dict[str, Any]],
) -> None:
    indices = [index for span in missing.values() for index in span]
    images = map_in_order(lambda index: _pack(source, index, settings), indices, threads, bar="make shards")
    with open(folder / PROGRESS_NAME, "a") as progress:
        for name, span in missing.items():
            entry = done[name] = _write_shard(folder / name, islice(images, len(span)))
            progress.write(json.dumps(entry) + "\n")
            progress.flush()
            os.fsync(progress.fileno())


def _pack(source: Source, index: int, settings: ShardSettings) -> _Packed:
    # Outside of `try`: a file that cannot be opened now may be readable later, and is not left out as broken.
    data, name = source.read(index), source.name(index)
    label = source.label(index) if source.classes else None
    keeps, short_side, quality = settings.keep_original, settings.short_side, settings.quality
    try:
        image = keep(data, name, source.limits) if keeps else shrink(data, name, short_side, quality, source.limits)
    except UserError as error:
        if not settings.skip_broken:
            raise UserError(f"{str(error).rstrip('.')}. --skip-broken leaves such images out and lists them.") from None
        return _Packed({}, label, len(data), str(error))
    key = f"{index:09d}"
    about: dict[str, Any] = {"name": name}
    files = {f"{key}{image.suffix}": image.data}
    if label is not None:
        about["label"] = source.classes[label]
        files[f"{key}.cls"] = str(label).encode()
    if image.size is not None:
        about |= dict(zip(("width", "height"), image.size, strict=True))
    files[f"{key}.json"] = json.dumps(about).encode()
    return _Packed(files, label, len(data))


def _write_shard(path: Path, images: Iterator[_Packed]) -> dict[str, Any]:
    labels: list[int | None] = []
    broken: list[str] = []
    sizes: list[int] = []

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for image in images:
                for name, data in image.files.items():
                    member = tarfile.TarInfo(name)  # no owner, date 1970: the same bytes on every machine
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                sizes.append(image.source_bytes)
                if image.broken:
                    broken.append(image.broken)
                else:
                    labels.append(image.label)

    write_atomically(path, write)
    entry = shard_entry(path.name, path.stat().st_size, sha256(path), scan_shard(_stored(path)), labels)
    return entry | {"source_bytes": sum(sizes), "broken": broken}


def _stored(path: Path) -> StoredFile:
    return StoredFile(str(path), str(path))
