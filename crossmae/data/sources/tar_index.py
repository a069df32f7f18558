"""Index of the images in a tar file in WebDataset layout, which allows reading any single image.

Own code, because no maintained library gives random access to plain tar files, local or remote.

Members `folder/key.ext` with the same key make one sample. The key ends at the first dot of the base name, or at the
last one where the first makes no sense, as in `1341846.7478.png`. A sample has an image, and its label is either
`key.cls` (a number or a name) or "label" in `key.json`. Members of the system are left out. An index is built once from
the headers and cached in ~/.cache/crossmae (or $XDG_CACHE_HOME/crossmae). `tools/make_shards.py` writes an index next
to its shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from crossmae.data.paths import IMAGE_FORMATS, IMAGE_SUFFIXES, find_system_part
from crossmae.data.sources.shard_files import StoredFile, open_file, read_small
from crossmae.errors import UserError
from crossmae.files import load_json, write_text

BLOCK = 512  # bytes; every header and file in a tar archive begins at a multiple of this size
CACHE_VERSION = 2  # increase whenever the same shard would get a different index

INDEX_NAME = "index.json"
PROGRESS_NAME = "progress.jsonl"  # exists until make_shards.py has finished the folder
INDEX_FORMAT = "crossmae-shards-1"

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

_SUFFIXES = list(chain.from_iterable(IMAGE_FORMATS.values()))  # the most usual first

log = logging.getLogger(__name__)


@dataclass
class ShardIndex:
    """The samples of one shard, in the order of the image members.

    Attributes:
        names: names of the image members, such as `000017.jpg`.
        offsets, sizes: position and size of each image in the shard, in bytes.
        labels: labels as written in the shard; None for a sample without a label.
        left_out: number of unused members by extension.
        system: names of the system that were left out.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    system: list[str] = field(default_factory=list)


@dataclass
class FolderIndex:
    """Content of `index.json`."""

    settings: dict[str, Any]
    classes: tuple[str, ...]
    shards: dict[str, dict[str, Any]]

    def shard(self, name: str) -> ShardIndex:
        """Return the index of one shard."""
        entry = self.shards[name]
        labels = [None if label is None else self.classes[label] for label in entry["labels"]]
        return ShardIndex(entry["names"], entry["offsets"], entry["sizes"], labels)

    def total(self, key: str) -> int:
        """Sum `key` over all shards, and count a list as its length."""
        values = [entry[key] for entry in self.shards.values()]
        return sum(len(value) if isinstance(value, list) else value for value in values)

    def to_json(self) -> str:
        """Return the content of `index.json`."""
        content = {"format": INDEX_FORMAT, "settings": self.settings, "classes": self.classes}
        return json.dumps({**content, "shards": list(self.shards.values())})


def shard_entry(file: str, size: int, sha256: str, index: ShardIndex, labels: Sequence[int | None]) -> dict[str, Any]:
    """Return a shard's entry for `index.json`, with class indices as labels."""
    samples = {"names": index.names, "offsets": index.offsets, "sizes": index.sizes, "labels": labels}
    return {"file": file, "bytes": size, "sha256": sha256, **samples}


def read_folder_index(file: StoredFile) -> FolderIndex | None:
    """Read an `index.json`, or return None if missing or not ours.

    Raises UserError if an index of ours leads out of its folder or out of a shard, or is damaged otherwise.
    """
    data = read_small(file)
    if data is None:
        return None
    try:
        content = load_json(data)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != INDEX_FORMAT:
        log.info("%s is no index by make_shards.py: ignored", file.name)
        return None
    values: list[Any] = [content.get(key) for key in ("settings", "classes", "shards")]
    settings, classes, entries = values
    fault = "settings, classes or shards are missing"
    if isinstance(settings, dict) and all_are(str, classes) and all_are(dict, entries):
        fault = next((found for entry in entries if (found := entry_fault(entry, len(classes)))), "")
        if not fault:
            return FolderIndex(settings, tuple(classes), {entry["file"]: entry for entry in entries})
    raise UserError(f"{file.name}: damaged: {fault}. Copy it again, or run the same make_shards.py command again.")


def all_are(kind: type, values: Any) -> bool:
    """Check for a list whose values have one kind."""
    return isinstance(values, list) and set(map(type, values)) <= {kind}


def entry_fault(entry: Mapping[str, Any], classes: int) -> str:
    """Find a fault in an entry of `index.json`."""
    name, length, labels = entry.get("file"), entry.get("bytes"), entry.get("labels")
    if not isinstance(name, str) or not name or PurePosixPath(name).name != name or "\0" in name:
        return f"{str(name)[:200]!r} is no file name, or leads out of the folder"
    if type(length) is not int or not isinstance(entry.get("sha256"), str):
        return f"{name}: bytes or sha256 is missing"
    if (
        not isinstance(labels, list)
        or not set(map(type, labels)) <= {int, type(None)}
        or not all(label is None or 0 <= label < classes for label in labels)
    ):
        return f"{name}: labels are not numbers of the {classes} classes"
    return _range_fault(name, entry, length)


def _range_fault(name: str, lists: Mapping[str, Any], length: int) -> str:
    """Find a fault in the lists of a shard."""
    found: list[Any] = [lists.get(key) for key in ("names", "offsets", "sizes", "labels")]
    names, offsets, sizes, labels = found
    if not (all_are(str, names) and all_are(int, offsets) and all_are(int, sizes) and isinstance(labels, list)):
        return f"{name}: names, offsets, sizes or labels are missing"
    if len({len(names), len(offsets), len(sizes), len(labels)}) > 1:
        return f"{name}: names, offsets, sizes and labels differ in number"
    if not all(start >= 0 and size >= 0 and start + size <= length for start, size in zip(offsets, sizes, strict=True)):
        return f"{name}: an image lies outside the shard's {length:,} bytes"
    return ""


def cache_folder() -> Path:
    """Return the folder of cached indexes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crossmae" / "tar_index"


def index_shard(shard: StoredFile, marks: dict[str, str]) -> ShardIndex:
    """Return the cached index of a shard, or build the index."""
    path = cache_folder() / f"{hashlib.sha256(os.fsencode(shard.identity)).hexdigest()[:32]}.json"
    about = {"version": CACHE_VERSION, "shard": shard.identity, **marks}
    try:
        kept = load_json(path.read_text(encoding="utf-8"))
        index = ShardIndex(**kept["index"])
        counted = isinstance(index.left_out, dict) and all_are(int, [*index.left_out.values()])
        texts = all_are(str, index.system) and {type(label) for label in index.labels} <= {str, type(None)}
        if (
            kept["about"] == about
            and counted
            and texts
            and not _range_fault(shard.name, kept["index"], int(marks["bytes"]))
        ):
            return index
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cached index, or a damaged one: build the index
    index = scan_shard(shard)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"about": about, "index": asdict(index)}, separators=(",", ":")))
    except OSError as error:
        log.warning("%s: the index is not kept for the next run, cannot write %s: %s", shard.name, path, error)
    return index


def scan_shard(shard: StoredFile) -> ShardIndex:
    """Build the index of a shard from its headers.

    Raises UserError if the shard is not a tar file, is compressed or cut off, or a sample cannot be used. The message
    names the shard.
    """
    members: list[tarfile.TarInfo] = []
    texts: dict[str, bytes] = {}
    end = 0
    try:
        with open_file(shard) as file:
            _refuse_compressed(shard, file)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.size < 0 or (members and member.offset <= members[-1].offset):
                        raise tarfile.HeaderError(f"a negative size near byte {member.offset:,}")  # would not end
                    end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)
                    if not member.isdir():
                        members.append(member)
                    if member.isreg() and member.name.lower().endswith((".cls", ".json")):
                        content = tar.extractfile(member)
                        texts[member.name] = content.read() if content else b""
            # tarfile treats a broken header, or a file that is cut between two members, as the end of the archive.
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise UserError(f"{shard.name}: damaged or cut off at byte {end:,}: no end mark. Copy it again.")
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, RecursionError, LookupError) as error:
        raise UserError(f"{shard.name}: not a tar file, or cut off: {error}. Copy it again.") from None
    except OSError as error:
        raise UserError(f"{shard.name}: cannot be read: {error.strerror or error}. Check the address.") from error
    return _collect(members, texts, shard)


@dataclass
class _Sample:
    """The members of one key by extension, and the contents of members that may contain the label."""

    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)

    def image(self) -> str | None:
        """Return the extension of the image, `jpg` before `left.jpg` and `pgm`."""
        images = [extension for extension in self.members if is_image_extension(extension)]
        return min(images, key=lambda name: ("." in name, _SUFFIXES.index(f".{name.rpartition('.')[2]}")), default=None)

    def label(self) -> str | None:
        """Read the label from .cls, else from .json."""
        if "cls" in self.texts:
            return self.texts["cls"].decode(errors="replace").strip() or None
        try:
            value: Any = load_json(self.texts.get("json", b"{}"))
        except ValueError:
            return None
        label = value.get("label") if isinstance(value, dict) else None
        return str(label) if isinstance(label, int | float | str) and label != "" else None


def _split(name: str, at_last_dot: bool) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.rpartition(".") if at_last_dot else base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _has_dots_in_keys(names: Sequence[str]) -> bool:
    """Check whether hardly any extension of an image is there twice."""
    extensions = [extension for name in names if is_image_extension(extension := _split(name, at_last_dot=False)[1])]
    plain = any("." not in extension for extension in extensions)
    return not plain and len(extensions) > 2 and len(set(extensions)) * 2 > len(extensions)


def is_image_extension(extension: str) -> bool:
    """Check whether an extension ends in an image suffix, such as `left.jpg`."""
    return PurePosixPath(f"x.{extension}").suffix in IMAGE_SUFFIXES


def _collect(members: Sequence[tarfile.TarInfo], texts: Mapping[str, bytes], shard: StoredFile) -> ShardIndex:
    system = [find_system_part(member.name) for member in members]
    left_out = Counter[str]()
    kept = [member for member, part in zip(members, system, strict=True) if not part]
    at_last_dot = _has_dots_in_keys([member.name for member in kept])
    samples: dict[str, _Sample] = {}
    for member in kept:
        key, extension = _split(member.name, at_last_dot)
        sample = samples.setdefault(key, _Sample())
        if extension in sample.members:
            raise UserError(f"{shard.name}: holds {member.name} twice. Give every sample its own key.")
        if (not member.isreg() or member.issparse()) and is_image_extension(extension):
            kind = "in pieces (sparse)" if member.issparse() else "a link"
            raise UserError(
                f"{shard.name}: {member.name} is {kind}. Pack whole files (tar --dereference --hard-dereference)."
            )
        sample.members[extension] = member
        if extension in ("cls", "json") and member.isreg():
            sample.texts[extension] = texts[member.name]
    found = []
    for sample in samples.values():
        extension_or_none = sample.image()
        used = {extension_or_none, *sample.texts} if extension_or_none else set()
        left_out.update(f".{other}" for other in sample.members if other not in used)
        if extension_or_none is not None:
            found.append((sample.members[extension_or_none], sample.label()))
    found.sort(key=lambda pair: pair[0].offset_data)
    images, labels = [member for member, _ in found], [label for _, label in found]
    offsets, sizes = [member.offset_data for member in images], [member.size for member in images]
    names = [member.name for member in images]
    return ShardIndex(names, offsets, sizes, labels, dict(left_out), [part for part in system if part])


def _refuse_compressed(shard: StoredFile, file: BinaryIO) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            raise UserError(
                f"{shard.name}: is compressed ({name}), so no image can be read without all before it. Unpack it to a "
                "plain .tar (images are compressed already)."
            )
