"""Read files with errors that name them, and write files that are complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from crossmae.errors import UserError

# Error handler of files that hold names: bytes that are not UTF-8 become escapes, which readers of JSON decode.
ODD_BYTES = "backslashreplace"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it.

    The file is forced to disk before. In any case `path` is either as it was or complete, and the temporary file is
    gone unless the process is killed.
    """
    # Cut, because `path.name` may have the longest possible length; the digest tells names with one beginning apart.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    temporary = path.with_name(f".{path.name[:40]}.{digest}.{os.getpid()}.tmp")
    try:
        write(temporary)
        allow_reading(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def allow_reading(path: Path) -> None:
    """Give a file the usual rights, unlike safetensors."""
    path.chmod(0o666 & ~_umask())


def printable(name: str | Path) -> str:
    """Escape line breaks, control characters and bytes that are not UTF-8.

    Lines of text and pictures show names through this function. JSON files keep the names: see `ODD_BYTES`.
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, other bytes as escapes such as \\udcff."""
    data = text.encode("utf-8", errors=ODD_BYTES)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def stream_text(path: Path, write: Callable[[TextIO], object]) -> None:
    """Let `write` fill a UTF-8 file, atomically, with names as in `write_text`."""

    def fill(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors=ODD_BYTES, newline="") as file:
            write(file)

    write_atomically(path, fill)


class JsonArray:
    """A JSON array that is written while its entries come, one per line."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.count = file, 0
        file.write("[")

    def add(self, entry: Any) -> None:
        """Write one entry."""
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        self.file.write(f",\n{text}" if self.count else f"\n{text}")
        self.count += 1

    def close(self) -> None:
        """Write the end of the array, and leave the file open."""
        self.file.write("\n]")


def sync_folder(folder: Path) -> None:
    """Force renames in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Compute the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def make_folder(folder: Path, key: str) -> None:
    """Create a folder, and write a file in it as a test.

    Raises:
        UserError: not possible; names `key`, the folder's config key or flag.
    """
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{key}: cannot write in {folder}: {error.strerror}") from None


def check_writable(folder: Path, key: str) -> None:
    """Check that a folder can be written, without touching it."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not there.is_dir():
        raise UserError(f"{key}: cannot write in {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: cannot write in {folder}: no permission in {there}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_file(path: str | Path, shown: str = "") -> bytes:
    """Read a whole file.

    Args:
        shown: the file's name in the error, if it is not the path.

    Raises:
        UserError: the file cannot be read; names it.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{printable(shown or path)}: cannot be read: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: no such file, or not JSON; names the file and the line.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, thousands of digits, or deeply nested lists
        raise UserError(f"{path}: not valid JSON: {error}") from None


def check_destination(path: Path, *, force: bool = False) -> None:
    """Refuse to overwrite a file."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name the file to write.")
    if path.exists() and not force:
        raise UserError(f"{path}: exists already. Name another file, or overwrite it with --force.")
