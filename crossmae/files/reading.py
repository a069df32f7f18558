"""Read files with errors that name the file, or skip what cannot be read."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import re
import shlex
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from crossmae.errors import UserError, printable
from crossmae.files.expansion import why_unexpanded
from crossmae.files.parsing import load_json, load_plain_json

log = logging.getLogger(__name__)

# Starts of files that are no text: what they are, and what to do.
PACKED_STARTS = {
    b"\x1f\x8b": ("compressed with gzip", "Unpack it: gunzip -k {}"),
    b"BZh": ("compressed with bzip2", "Unpack it: bunzip2 -k {}"),
    b"\xfd7zXZ": ("compressed with xz", "Unpack it: unxz -k {}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "Unpack it: unzstd {}"),
    b"PK\x03\x04": ("a zip archive or an Excel table", "Unpack it: unzip {}, or save the table as CSV"),
    b"\x89PNG": ("an image", "Name a text file"),
    b"\xff\xd8\xff": ("an image", "Name a text file"),
}
LFS_POINTER, CONVERT = "a Git LFS pointer", "Convert it to PNG, JPEG or TIFF"
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
WIDE_ENCODINGS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Tried to show how a text would read. Of equally likely encodings, the first comes first.
OTHER_ENCODINGS = ("WINDOWS-1252", "WINDOWS-1251", "GB18030", "SHIFT_JIS", "EUC-KR", "BIG5")
MOST_READINGS = 4


def special_kind(path: str | Path) -> str:
    """Name the kind of a pipe, socket or device, or return ""."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "")


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading.

    Raises OSError for a named pipe, a socket and a device, which would make the reader wait, or never end.
    """
    if kind := special_kind(path):
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    return open(path, "rb")


def read_end(path: str | Path, length: int) -> bytes:
    """Read the last `length` bytes of a file, b"" if unreadable."""
    try:
        with open_file(path) as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - length, 0))
            return file.read()
    except OSError:
        return b""


def read_file(path: str | Path, shown: str = "") -> bytes:
    """Read a whole file.

    Raises UserError if the file cannot be read. The message names the file, as `shown` if given.
    """
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{printable(shown or path)}: cannot be read: {error.strerror}") from error


def decode_text(data: bytes, path: Path, shown: str = "") -> str:
    """Decode UTF-8 text, with or without a byte-order mark.

    Args:
        path: file that holds the bytes.
        shown: name of the file in the error message; default: the path.

    Raises UserError if the bytes are compressed or in another encoding. The message has the command that converts them.
    """
    where, file = printable(shown or path), shlex.quote(printable(path.name))
    for magic, (kind, command) in PACKED_STARTS.items():
        if data.startswith(magic):
            raise UserError(f"{where}: is {kind}, not text. {command.format(file)}.")
    converted = shlex.quote(printable(f"{path.stem}.utf8{path.suffix}"))
    convert = f"Convert it: iconv -f {{}} -t UTF-8 {file} > {converted}"
    if wide := next((name for magic, name in WIDE_ENCODINGS.items() if data.startswith(magic)), _guess_wide(data)):
        raise UserError(f"{where}: is {wide} text, not UTF-8. {convert.format(wide)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise UserError(f"{where}: is a binary file, not text. Name a text file.") from None
        line = data.count(b"\n", 0, error.start) + 1
        start, end = (re.search(pattern, part) for pattern, part in (
            (rb"[^\s,;\"]*\Z", data[: error.start]), (rb"[^\s,;\"]*", data[error.start :])))  # fmt: skip
        word = (start[0] if start else b"") + (end[0] if end else b"")
        readings = {name: text for name in _likely_encodings(data) if (text := _decode(word, name)).isprintable()}
        shown_readings = [f"{text[:40]!r} in {name}" for name, text in readings.items()][:MOST_READINGS]
        raise UserError(
            f"{where}: line {line} is not UTF-8: {' or '.join(shown_readings) or repr(word[:40])}. "
            f"{convert.format(next(iter(readings), 'ENCODING'))}"
        ) from None


def _guess_wide(data: bytes) -> str:
    """Guess UTF-16 without a byte-order mark, by its zeros and by decoding."""
    start = data[:1000]
    zeros = [start[offset::2].count(0) for offset in (0, 1)]
    guess = f"UTF-16{'BE' if zeros[0] > zeros[1] else 'LE'}"
    text = _decode(start[: len(start) // 2 * 2], guess) if max(zeros) * 8 > len(start) else ""
    return guess if text and all(letter.isprintable() or letter.isspace() for letter in text) else ""


def _likely_encodings(data: bytes) -> list[str]:
    """Sort encodings by the share of letters outside ASCII."""
    shares = {}
    for name in OTHER_ENCODINGS:
        odd = [letter for letter in _decode(data, name) if not letter.isascii()]
        if odd:
            shares[name] = sum(map(str.isalpha, odd)) / len(odd)
    return sorted(shares, key=lambda name: -shares[name])


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return ""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    A byte-order mark is allowed. Raises UserError if the file does not exist, is compressed or in another encoding
    (see `decode_text`), or is not JSON. The message names the file and the line.
    """
    try:
        with open_file(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: {why_unexpanded(path) or 'no such file. Name an existing file.'}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {why}. Name another file.") from None
    with suppress(ValueError):
        return load_plain_json(data)
    return parse_json(decode_text(data, path), str(path))


def parse_json(text: str, shown: str) -> Any:
    """Parse JSON text. UserError names the file as `shown`, and the line."""
    try:
        return load_json(text)
    except ValueError as error:
        kind, advice = recognize(text.lstrip()[:200].encode(errors="replace"))
        likeness = f" but {kind}" * bool(kind) + f", so {advice[:1].lower()}{advice[1:]}" * (kind == LFS_POINTER)
        raise UserError(f"{shown}: not valid JSON{likeness}: {error}. Write it again.") from None


def recognize(data: bytes) -> tuple[str, str]:
    """Say what a misnamed file is, and what to do.

    Both are "" for an unknown kind.
    """
    start, brand = data[:200].removeprefix(b"\xef\xbb\xbf").lstrip().lower(), data[8:12]
    is_media = data[4:8] == b"ftyp"
    kinds = {
        ("empty", "Get it again"): not start,
        (LFS_POINTER, "Run git lfs pull"): start.startswith(b"version https://git-lfs"),
        ("a web page or XML", "Get the file that it stands for"): start.startswith(b"<"),
        ("a HEIC image", CONVERT): is_media and brand in HEIC_BRANDS,
        ("a video", "Take its frames out"): is_media and brand not in (*HEIC_BRANDS, b"avif", b"avis"),
        ("a DICOM file", CONVERT): data[128:132] == b"DICM",
        ("a PDF document", CONVERT): start.startswith(b"%pdf"),
        ("a NumPy array", CONVERT): data.startswith(b"\x93NUMPY"),
    }
    packed = {
        (kind, "Unpack it"): data.startswith(magic) for magic, (kind, _) in PACKED_STARTS.items() if kind != "an image"
    }
    return next((found for found, fits in (kinds | packed).items() if fits), ("", ""))


def read_json_lines(path: Path, **kinds: type) -> list[dict[str, Any]]:
    """Read the objects in JSON lines, [] without the file.

    All other lines are skipped, and the log has their number and the first reason. This function raises no error for
    any content.

    Args:
        kinds: fields that every row must have, as field=type. A `float` may be any finite number.
    """
    try:
        with open_file(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("skipping %s: it cannot be read: %s", path, error.strerror)
        return []
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, fault = _read_row(line, kinds)
        if fault:
            faults.append(f"line {number} {fault}")
        else:
            rows.append(row)
    if faults:
        log.warning("%s: skipping %d of %d lines: %s", path, len(faults), len(rows) + len(faults), faults[0])
    return rows


def _read_row(line: bytes, kinds: Mapping[str, type]) -> tuple[dict[str, Any], str]:
    """Read a JSON object, and say what is wrong with it."""
    try:
        row = load_json(line.decode("utf-8"))
    except ValueError as error:
        return {}, f"is not JSON ({' '.join(str(error).split())[:80]})"
    if not isinstance(row, dict):
        return {}, "is not a JSON object"
    for field, kind in kinds.items():
        if field not in row:
            return {}, f"has no {field}"
        if not (is_number(row[field]) if kind is float else type(row[field]) is kind):
            return {}, f"has no valid {field}"
    return row, ""


def is_number(value: object) -> bool:
    """Return true for a finite number that fits a float."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False


def read_side_file(path: Path, most_bytes: int = 1 << 24) -> dict[str, Any]:
    """Read a small JSON object that anything may have changed.

    Raises UserError for any content that is not a JSON object, and if the file cannot be read or is too large.
    """
    try:
        with open_file(path) as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Remove it.") from None
    if len(data) > most_bytes:
        raise UserError(f"{path}: has more than {most_bytes:,} bytes. Remove it.")
    row, fault = _read_row(data, {})
    if fault:
        raise UserError(f"{path}: {fault}. Remove it.")
    return row


def stamp_file(path: str | Path) -> tuple[int, ...]:
    """Return numbers that change with a file, () without a file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def sha256(path: Path) -> str:
    """Compute the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
