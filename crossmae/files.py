"""Writing files so that a reader, or a restart after a kill, never sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from crossmae.errors import UserError

CHUNK = 1 << 20
# Error handler of files that hold names: bytes that are not UTF-8 become escapes, which readers of JSON turn back.
ODD_BYTES = "backslashreplace"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, then rename it to `path`.

    Whatever happens, `path` is either as it was or complete, and the temporary file is gone unless the process is
    killed.
    """
    # Cut, because `path.name` may be as long as a name can be; the digest tells apart what begins alike.
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
    """The rights that a new file has: safetensors writes files that only their owner may read."""
    path.chmod(0o666 & ~_umask())


def printable(name: str | Path) -> str:
    """Escape line breaks, control characters and bytes that are not UTF-8.

    Lines of text and pictures show names by this function. JSON files keep the names: see `ODD_BYTES`.
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically; of file names that are not UTF-8, the odd bytes become escapes such as \\udcff."""
    data = text.encode("utf-8", errors=ODD_BYTES)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def stream_text(path: Path, write: Callable[[TextIO], object]) -> None:
    """Let `write` fill a UTF-8 file, atomically; see `write_text` for names."""

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
        """Write the end of the array; the file stays open."""
        self.file.write("\n]")


def sync_folder(folder: Path) -> None:
    """Force a folder's entries, that is renames in it, to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def make_folder(folder: Path, key: str) -> None:
    """Create a folder and its parents, and prove that a file can be written in it.

    Raises:
        UserError: not possible; names `key`, the config key or flag that asked for it.
    """
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{key}: can not write in {folder}: {error.strerror}") from None


def check_writable(folder: Path, key: str) -> None:
    """Make sure that a folder can be written in, or made, without touching anything.

    Raises:
        UserError: not possible; names `key`, the config key or flag that asked for it.
    """
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not there.is_dir():
        raise UserError(f"{key}: can not write in {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: can not write in {folder}: no permission in {there}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: no such file, or not JSON; names the file and the line.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON or UTF-8, thousands of digits, or deeply nested lists
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line; empty lines are allowed.

    Raises:
        UserError: no such file, or a line that is no JSON object; names the file and the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, received {type(row).__name__}")
        rows.append(row)
    return rows


def check_destination(path: Path, *, force: bool = False) -> None:
    """Refuse to write over something.

    Raises:
        UserError: the path is a folder, or a file and `force` is not set.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the file to write")
    if path.exists() and not force:
        raise UserError(f"{path}: exists already and is left as it is; name another file, or overwrite it with --force")
