"""Readers for run folders. Files may be missing or damaged, because the run was interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from crossmae.errors import UserError
from crossmae.files import load_json, read_json
from crossmae.reports.page import Missing, PictureRow, embed_image

REPORT = "report.html"
T = TypeVar("T")
C = TypeVar("C", bound="FileContent")
Default = TypeVar("Default")


class FileContent(BaseModel):
    """Base class for the content of a JSON file. Unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def read(cls: type[C], path: Path) -> C:
        """Read a JSON file.

        Raises UserError if the content has a wrong structure. The message names the file and the first wrong key.
        """
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a JSON object, received {type(content).__name__}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            why = "".join(f"{key}: " for key in first["loc"]) + first["msg"].removeprefix("Value error, ")
            raise UserError(f"{path}: unexpected content: {why}") from None


@dataclass(frozen=True)
class LoggedNumbers:
    """Numbers from a log, one row per line, and the number of damaged lines."""

    rows: list[dict[str, float]] = field(default_factory=list)
    damaged: int = 0

    def values(self, key: str) -> list[float]:
        """List all values of a key, in order."""
        return [row[key] for row in self.rows if key in row]

    def spans(self, step: str, key: str) -> Iterator[tuple[float, float]]:
        """Yield (steps since the value before, value) of positive values."""
        previous = 0.0
        for row in self.rows:
            if step in row and row.get(key, 0.0) > 0:
                yield row[step] - previous, row[key]
                previous = row[step]


def read_log(path: Path, needed: str) -> LoggedNumbers:
    """Read the numbers in a log of JSON objects.

    A line without the number `needed` counts as damaged. Raises UserError if the file does not exist.
    """
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    rows = [_numbers_of(line) for line in lines if line.strip()]
    whole = [row for row in rows if math.isfinite(row.get(needed, math.nan))]
    return LoggedNumbers(whole, len(rows) - len(whole))


def _numbers_of(line: str) -> dict[str, float]:
    """Read the numbers in a JSON object, including NaN."""
    try:
        row = load_json(line)
        items = row.items() if isinstance(row, dict) else ()
        return {key: value for key, value in items if type(value) in (int, float) and not math.isinf(value)}
    except (ValueError, OverflowError):
        return {}


class RunFolder:
    """A run folder whose files may be missing or damaged. `faults` contains the reasons by file name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: dict[str, str] = {}

    def read(self, name: str, reader: Callable[[Path], T], default: Default) -> T | Default:
        """Read a file. If this fails, store the reason and return `default`."""
        path = self.path / name
        try:
            if path.is_file():
                return reader(path)
            self.faults[name] = "the file does not exist"
        except (UserError, OSError) as error:
            self.faults[name] = str(error).removeprefix(str(path)).lstrip(":, ")
        return default

    def has(self, *names: str) -> bool:
        """Check whether at least one of the files exists."""
        return any((self.path / name).is_file() for name in names)

    def missing(self, name: str, what: str, why: str = "the file does not exist") -> Missing:
        """Return a notice that `what` cannot be shown without a file."""
        return Missing(Path(name), what, self.faults.get(name, why))

    def picture(
        self,
        name: str,
        reader: Callable[[Path], Image.Image],
        what: str,
        *,
        alt: str = "",
        caption: str = "",
        density: float = 1.0,
        lossless: bool = False,
    ) -> PictureRow | Missing:
        """Embed an image file (see `embed_image`), described by `alt` or `what`."""
        image = self.read(name, reader, None)
        if image is None:
            return self.missing(name, what)
        return PictureRow([embed_image(image, alt=alt or what, density=density, lossless=lossless)], caption)
