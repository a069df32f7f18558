"""Read files with errors that name the file, and write files that are complete or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from crossmae.errors import UserError

# Error handler for text files that contain names. Bytes that are not UTF-8 become escapes, which JSON can decode.
ODD_BYTES = "backslashreplace"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it.

    The content is on disk before the file is renamed. If anything fails, `path` is unchanged and the temporary file is
    removed. Only a killed process leaves the temporary file behind.
    """
    # The name is cut, because `path.name` may have the maximum length. The digest keeps cut names distinct.
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
    """Give a file the default permissions, which safetensors does not."""
    path.chmod(0o666 & ~_umask())


def printable(name: str | Path) -> str:
    """Escape line breaks, control characters and bytes that are not UTF-8.

    Printed text and pictures show names through this function. JSON files keep the original names (`ODD_BYTES`).
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, with other bytes escaped, such as \\udcff."""
    stream_text(path, lambda file: file.write(text))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def stream_text(path: Path, write: Callable[[TextIO], object]) -> None:
    """Let `write` fill a UTF-8 file atomically, with `write_text`'s escapes."""

    def fill(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors=ODD_BYTES, newline="") as file:
            write(file)

    write_atomically(path, fill)


class JsonArray:
    """A JSON array that is written entry by entry, one entry per line."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.count = file, 0
        file.write("[")

    def add(self, entry: Any) -> None:
        """Write one entry."""
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        self.file.write(f",\n{text}" if self.count else f"\n{text}")
        self.count += 1

    def close(self) -> None:
        """Write the end of the array. The file stays open."""
        self.file.write("\n]")


def sync_folder(folder: Path) -> None:
    """Flush the renames in a folder to disk."""
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
    """Create a folder, and test that files can be written there.

    Raises UserError if the folder cannot be created or written. The message names `key`, the config key or flag of the
    folder.
    """
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{key}: cannot write in {folder}: {error.strerror}. Name another folder.") from None


def check_writable(folder: Path, key: str) -> None:
    """Check that a folder can be written, without changing the folder."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not there.is_dir():
        raise UserError(f"{key}: cannot write in {folder}: {there} is a file. Name another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: cannot write in {folder}: no permission in {there}. Name another folder.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def read_file(path: str | Path, shown: str = "") -> bytes:
    """Read a whole file.

    Raises UserError if the file cannot be read. The message names the file, as `shown` if given.
    """
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{printable(shown or path)}: cannot be read: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises UserError if the file does not exist or is not JSON. The message names the file and the line.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, thousands of digits, or deeply nested lists
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_json_lines(path: Path) -> list[Any]:
    """Read the complete JSON lines of a file, [] without the file."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def check_destination(path: Path, *, force: bool = False) -> None:
    """Raise UserError if the file exists and must not be overwritten."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name the file to write.")
    if path.exists() and not force:
        raise UserError(f"{path}: exists already. Name another file, or overwrite it with --force.")
