"""Read files with errors that name the file, and write files that are complete or absent."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import re
import shlex
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import yaml

from crossmae.errors import UserError, printable

# Error handler for text files that contain names. Bytes that are not UTF-8 become escapes, which JSON can decode.
ODD_BYTES = "backslashreplace"


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
# Bounds of texts that others wrote. Larger values would exhaust memory, the stack, or the numbers of numpy and torch.
MAX_DEPTH = 100  # lists and mappings in each other
MAX_DIGITS, MAX_SETTING = 300, 10**18  # digits of a whole number in JSON; absolute value of a setting
MAX_SETTINGS_TEXT, MAX_SETTINGS = 1 << 18, 100_000  # characters of settings; their values, with aliases counted again
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[^}/]*\})")


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
    if why := why_unexpanded(folder):
        raise UserError(f"{key}: {folder}: {why}")
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{key}: cannot write in {folder}: {error.strerror}. Name another folder.") from None


def check_writable(folder: Path, key: str) -> None:
    """Check that a folder can be written, without changing the folder."""
    if why := why_unexpanded(folder):
        raise UserError(f"{key}: {folder}: {why}")
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not there.is_dir():
        raise UserError(f"{key}: cannot write in {folder}: {there} is a file. Name another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: cannot write in {folder}: no permission in {there}. Name another folder.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def expand_path(value: str | Path, key: str) -> Path:
    """Expand `~` in a path that a user gave.

    Raises UserError if the path is empty, or has a variable or a user that nothing expands. The message names `key`.
    """
    if not str(value).strip():
        raise UserError(f"{key}: an empty path. Name a file or folder.")
    if why := why_unexpanded(value):
        raise UserError(f"{key}: {value}: {why}")
    return Path(os.path.expanduser(value))


def why_unexpanded(value: str | Path) -> str:
    """Name what was not expanded in a path, or return "".

    It is a variable or `~user`. Files may have such names, so a part of the path that exists is no such case.
    """
    path = Path(os.path.expanduser(value))
    there = next((part for part in (path, *path.parents) if os.path.lexists(part)), path)
    lacking = str(path.relative_to(there))
    if found := _VARIABLE.search(lacking):
        return f"the variable {found[0]} was not expanded. Write the value of {found[1].strip('{}')}."
    if lacking.startswith("~") and str(there) == ".":
        return f"the home folder {lacking.partition(os.sep)[0]} is unknown. Write the whole path."
    return ""


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
        text = decode_text(path.read_bytes(), path)
    except FileNotFoundError:
        raise UserError(f"{path}: {why_unexpanded(path) or 'no such file. Name an existing file.'}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {why}. Name another file.") from None
    return parse_json(text, str(path))


def parse_json(text: str, shown: str) -> Any:
    """Parse JSON text. UserError names the file as `shown`, and the line."""
    try:
        return load_json(text)
    except ValueError as error:
        kind, advice = recognize(text.lstrip()[:200].encode(errors="replace"))
        likeness = f" but {kind}" * bool(kind) + f", so {advice[:1].lower()}{advice[1:]}" * (kind == LFS_POINTER)
        raise UserError(f"{shown}: not valid JSON{likeness}: {error}. Write it again.") from None


def load_json(text: str | bytes) -> Any:
    """Parse JSON within bounds.

    Raises ValueError if the text is not JSON, is nested too deeply, or has a number with too many digits.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_bounds(value)
    return value


def load_yaml(text: str) -> Any:
    """Parse YAML settings within bounds, and run nothing.

    Raises ValueError if the text is not YAML, too long, nested too deeply, or has a number that is too large, a key
    that is given again, or aliases that multiply.
    """
    if len(text) > MAX_SETTINGS_TEXT:
        raise ValueError(f"{len(text):,} characters are more than {MAX_SETTINGS_TEXT:,}")
    try:
        value = yaml.load(text, _SettingsLoader)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:  # a tag for another kind of value
        raise ValueError(f"a tag does not fit its value ({error})") from None
    _check_bounds(value, MAX_SETTINGS)
    return value


def load_literal(text: str) -> Any:
    """Parse a Python literal within the bounds of `load_yaml`.

    Raises ValueError for other text.
    """
    if len(text) > MAX_SETTINGS_TEXT:
        raise ValueError(f"{len(text):,} characters are more than {MAX_SETTINGS_TEXT:,}")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:  # of the parser, for deep nesting
        raise ValueError(f"not a literal: {error or type(error).__name__}") from None
    _check_bounds(value, MAX_SETTINGS)
    return value


class _SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that is given again."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        given = node.value if isinstance(node, yaml.MappingNode) else []
        plain = [key.value for key, _ in given if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge")]
        if again := [key for key in plain if plain.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {again[0]!r} is given again", node.start_mark)
        return dict(super().construct_mapping(node, deep))


_TOO_DEEP = f"more than {MAX_DEPTH} lists or mappings in each other"


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits, more than {MAX_DIGITS}")
    return int(digits)


def _check_bounds(value: Any, most: int | None = None) -> None:
    """Raise ValueError for deep nesting and, with `most`, many values."""
    level, count = [[value]], 0
    for _ in range(MAX_DEPTH + 1):
        if most is not None:
            values = [one for many in level for one in (many.values() if isinstance(many, dict) else many)]
            count += len(values)
            if count > most:
                raise ValueError(f"more than {most:,} values, with those behind aliases")
            if any(isinstance(one, int) and abs(one) > MAX_SETTING for one in values):
                raise ValueError(f"a number is greater than {MAX_SETTING:.0e}")
        level = [
            one for many in level for one in (many.values() if isinstance(many, dict) else many)
            if isinstance(one, dict | list | tuple | set)
        ]  # fmt: skip
        if not level:
            return
    raise ValueError(_TOO_DEEP)


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


def read_json_lines(path: Path) -> list[Any]:
    """Read the complete JSON lines of a file, [] without the file."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(load_json(line))
        except ValueError:
            continue
    return rows


def check_destination(path: Path, *, force: bool = False) -> None:
    """Raise UserError if the file exists and must not be overwritten."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name the file to write.")
    if path.exists() and not force:
        raise UserError(f"{path}: exists already. Name another file, or overwrite it with --force.")
